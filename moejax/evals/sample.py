"""Choosing the next token from logits: greedy, or a draw among the likeliest."""

import dataclasses
import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from moejax.config import ConfigError


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["temperature", "top_p"],
    meta_fields=["top_k"],
)
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to choose. Temperature and top_p are arguments of a compiled program; each top_k is one of its own.

    Attributes:
      temperature: divides the logits. 0 is greedy and ignores the other two.
      top_k: draw among the k likeliest tokens; 0 = all.
      top_p: draw within the smallest set of tokens whose probability reaches it (1904.09751).
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self, vocab_size: int) -> None:
        """Raises ConfigError naming the value that is out of range."""
        good = 0 <= self.temperature < math.inf and 0 < self.top_p <= 1  # not so for NaN
        if not good or not 0 <= self.top_k <= vocab_size:
            raise ConfigError(
                f"temperature={self.temperature} must be >= 0, top_p={self.top_p} in (0, 1], "
                f"top_k={self.top_k} between 0 and the vocabulary of {vocab_size}"
            )


def row_keys(seed: int, numbers: Sequence[int]) -> jax.Array:
    """A random key for each row, from the seed and the row's number alone, so that a row's draws do not depend
    on the rows beside it."""
    fold = jax.vmap(jax.random.fold_in, in_axes=(None, 0))
    return fold(jax.random.key(seed), jnp.asarray(numbers, jnp.int32))


def sample(logits_BV, keys_B, position_B, how: Sampling) -> jax.Array:
    """One token per row, int32 [B]. `position_B`: the position of that token, folded into the row's key."""

    def greedy():
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)

    def draw():
        scaled = logits_BV * (1 / how.temperature)
        if how.top_k:
            kth = jax.lax.top_k(scaled, how.top_k)[0][:, -1:]
            scaled = jnp.where(scaled < kth, -jnp.inf, scaled)
        scaled = jax.lax.cond(how.top_p < 1, _nucleus, lambda x, _: x, scaled, how.top_p)
        keys = jax.vmap(jax.random.fold_in)(keys_B, position_B)
        return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)

    # One of them runs: a draw sorts the vocabulary.
    return jax.lax.cond(how.temperature == 0, greedy, draw)


def _nucleus(scaled_BV, top_p):
    """-inf for all tokens outside the smallest set whose probability reaches `top_p`."""
    ordered = jnp.sort(scaled_BV, axis=-1)[:, ::-1]
    p = jax.nn.softmax(ordered, axis=-1)
    inside = jnp.cumsum(p, axis=-1) - p < top_p  # the token that crosses top_p is kept
    least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(scaled_BV < least, -jnp.inf, scaled_BV)
