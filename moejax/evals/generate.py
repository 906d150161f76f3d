"""Generation with a KV cache: batched prompts of different lengths, greedy or sampled, token by token."""

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError, ModelConfig
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.moe.routers import ROUTERS


def sample(logits_BV, key, temperature: float, top_k: int, top_p: float) -> jax.Array:
    """One token per row. Temperature 0 is greedy; top_k 0 and top_p 1 cut nothing.

    top_p keeps the smallest set of tokens whose probability reaches it (1904.09751).
    """
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    scaled = logits_BV / temperature
    if top_k:
        kth = jax.lax.top_k(scaled, top_k)[0][:, -1:]
        scaled = jnp.where(scaled < kth, -jnp.inf, scaled)
    if top_p < 1:
        ordered = jnp.sort(scaled, axis=-1)[:, ::-1]
        p = jax.nn.softmax(ordered, axis=-1)
        inside = jnp.cumsum(p, axis=-1) - p < top_p  # the token that crosses top_p is kept
        least = jnp.min(jnp.where(inside, ordered, jnp.inf), axis=-1, keepdims=True)
        scaled = jnp.where(scaled < least, -jnp.inf, scaled)
    return jax.random.categorical(key, scaled, axis=-1).astype(jnp.int32)


@functools.partial(jax.jit, static_argnames=("cfg", "length"))
def prefill(params, router_state, tokens_BS, lengths_B, cfg: ModelConfig, length: int):
    """Read the (right-padded) prompts. Returns the logits after each row's last token, and the cache."""
    mask = jnp.arange(tokens_BS.shape[1])[None] < lengths_B[:, None]
    cache = init_cache(cfg, tokens_BS.shape[0], length)
    out = transformer.forward(
        params, router_state, tokens_BS, cfg, mask_BS=mask, cache=cache, prefill=True
    )
    last = jnp.take_along_axis(out.hidden_BSD, (lengths_B - 1)[:, None, None], axis=1)
    return transformer.logits(params, last)[:, 0], out.cache


@functools.partial(jax.jit, static_argnames=("cfg",), donate_argnames=("cache",))
def decode(params, router_state, token_B, position_B, cache, cfg: ModelConfig):
    """One more token per row. Returns logits and the cache, updated in place."""
    out = transformer.forward(
        params,
        router_state,
        token_B[:, None],
        cfg,
        positions_BS=position_B[:, None],
        cache=cache,
    )
    return transformer.logits(params, out.hidden_BSD)[:, 0], out.cache


def generate(
    params,
    router_state,
    cfg: ModelConfig,
    prompts: list[list[int]],
    max_new: int,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
) -> Iterator[np.ndarray]:
    """Yields one token per prompt (int32 [B]) until all have stopped or `max_new` is reached.

    A row that has stopped repeats its stop token. The same seed gives the same text.

    Raises:
      ConfigError: an empty prompt, a total longer than model.max_seq_len, a router that is not causal, or a
        sampling parameter out of range.
    """
    if cfg.num_moe_layers and not ROUTERS[cfg.moe.router].causal:
        raise ConfigError(
            f"model.moe.router={cfg.moe.router!r} is not causal: a token's route depends on later ones, so the "
            "model cannot generate; train with router='token_choice'"
        )
    if not prompts or not all(prompts):
        raise ConfigError(
            "generate needs at least one token in every prompt: start with the bos token"
        )
    if temperature < 0 or not 0 < top_p <= 1 or not 0 <= top_k <= cfg.vocab_size:
        raise ConfigError(
            f"temperature={temperature} must be >= 0, top_p={top_p} in (0, 1], "
            f"top_k={top_k} between 0 and the vocabulary of {cfg.vocab_size}"
        )
    longest = max(map(len, prompts))
    if longest + max_new > cfg.max_seq_len:
        raise ConfigError(
            f"{longest} prompt tokens and {max_new} new ones exceed model.max_seq_len={cfg.max_seq_len}; "
            f"max_new may be {max(cfg.max_seq_len - longest, 0)}"
        )
    tokens = np.zeros((len(prompts), longest), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    position = jnp.array([len(p) for p in prompts], jnp.int32)
    params = transformer.unstack(params)
    logits, cache = prefill(params, router_state, tokens, position, cfg, longest + max_new)
    choose = jax.jit(functools.partial(sample, temperature=temperature, top_k=top_k, top_p=top_p))
    key = jax.random.key(seed)
    stopped = np.zeros(len(prompts), bool)
    token = jnp.zeros(len(prompts), jnp.int32)
    for i in range(max_new):
        token = jnp.where(stopped, token, choose(logits, jax.random.fold_in(key, i)))
        yield np.asarray(token)
        stopped |= np.isin(np.asarray(token), stop_ids)
        if stopped.all() or i + 1 == max_new:
            return
        logits, cache = decode(params, router_state, token, position, cache, cfg)
        position = position + 1
