"""A tokenizer with a few tokens more than the model has rows: fine-tunes that add, say, a pad token.

The model gets a row for each, the mean of its own: such a token is read as nothing in particular, and its logit
is the mean of all others. `transformers` fails on such a token, or reads beyond the table.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp

from moejax.axes import VOCAB
from moejax.config import ModelConfig
from moejax.interop.files import InteropError
from moejax.models import transformer
from moejax.params import ParamSpec, Tree, map_specs
from moejax.sharding import Layout


def with_tokens(cfg: ModelConfig, tokens: int, tokenizer: str) -> ModelConfig:
    """The model with a row for each of its tokenizer's `tokens`.

    InteropError if there are more than a few more of them than rows (a hundredth, at least 16), or if tables of
    token ids route some layers: nothing says where the new ones would go.
    """
    rows = cfg.vocab_size
    if tokens <= rows:
        return cfg
    more = dataclasses.replace(cfg, vocab_size=tokens)
    if tokens - rows > max(math.ceil(rows / 100), 16):
        raise InteropError(
            f"{tokenizer} has {tokens} tokens, the model's vocabulary only {rows}: they do not belong together"
        )
    shapes = lambda c: jax.tree.map(lambda a: a.shape, transformer.abstract_router_state(c))  # noqa: E731
    if shapes(cfg) != shapes(more):
        raise InteropError(
            f"{tokenizer} has {tokens} tokens, the model's tables of experts by token only {rows} rows: remove "
            "the tokens that were added, or add rows to the tables"
        )
    return more


def pad_rows(params: Tree, cfg: ModelConfig, layout: Layout | None = None) -> Tree:
    """`params` with the rows of embedding and head that only `cfg` has, each the mean of the others."""

    def pad(spec: ParamSpec, a: jax.Array):
        if VOCAB not in spec.axes or a.shape == spec.shape:
            return a
        axis = spec.axes.index(VOCAB)
        where = None if layout is None else layout.sharding(*spec.axes)
        return _with_means(a, axis, spec.shape[axis] - a.shape[axis], where)

    return map_specs(pad, transformer.param_specs(cfg), params)


def _with_means(a: jax.Array, axis: int, count: int, where) -> jax.Array:
    @functools.partial(jax.jit, out_shardings=where)
    def padded(a):
        mean = a.mean(axis=axis, keepdims=True, dtype=jnp.promote_types(a.dtype, jnp.float32))
        return jnp.concatenate([a, jnp.repeat(mean.astype(a.dtype), count, axis)], axis)

    return padded(a)
