"""Prefill and decoding on the device: a batch of prompts in, tokens out, many per call."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import ComputeConfig, ModelConfig
from moejax.evals import speculative
from moejax.evals.sample import Sampling, sample
from moejax.models import transformer
from moejax.models.cache import (
    Cache,
    LayerCache,
    init_cache,
    init_layer,
    init_layers,
    place,
    place_layers,
)
from moejax.sharding import Layout

# Tokens per call of `decode`: the first calls are short, so that a reader sees text at once.
CHUNKS = (1, 2, 4, 8, 16)
NOTHING = -1  # stands where a row has no token


class State(NamedTuple):
    """Everything that decoding carries from token to token.

    Attributes:
      token_B: the row's last token, not yet in the cache.
      position_B: its position.
      left_B: tokens that the row may still emit; 0 = finished.
      cache: keys and values of everything before `token_B`.
      draft: the guess of speculative decoding; None without it.
    """

    token_B: jax.Array
    position_B: jax.Array
    left_B: jax.Array
    cache: Cache | list[LayerCache]
    draft: speculative.Draft | None


# XLA:CPU multiplies bfloat16 in float32, and moves the conversion of *all* experts out of the loop that reads a
# few of them: gigabytes a token. Without that pass only what is read is converted. Wide vectors, where there
# are such, convert quantised weights in two thirds of the time.
CPU_OPTIONS: dict[str, Any] = {
    "xla_disable_hlo_passes": "while-loop-invariant-code-motion",
    "xla_cpu_prefer_vector_width": 512,
}


class Program:
    """A function under jax.jit, on CPU with CPU_OPTIONS. Which device there is turns out at its first call:
    asking earlier would start JAX."""

    def __init__(self, fn: Callable, **how: Any):
        self._fn, self._how = fn, how
        functools.update_wrapper(self, fn)

    @functools.cached_property
    def jitted(self) -> Any:
        """The function of jax.jit."""
        options = CPU_OPTIONS if jax.default_backend() == "cpu" else None
        return jax.jit(self._fn, compiler_options=options, **self._how)

    def __call__(self, *args: Any) -> Any:
        return self.jitted(*args)


@functools.partial(Program, static_argnames=("cfg", "compute", "length", "with_draft", "layout"))
def prefill(
    params,
    router_state,
    tokens_BS,
    lengths_B,
    max_new_B,
    keys_B,
    stop_ids,
    cfg: ModelConfig,
    compute: ComputeConfig,
    length: int,
    how: Sampling,
    with_draft: bool,
    layout: Layout | None,
) -> State:
    """Read the (right-padded) prompts into a cache of `length` slots and choose each row's first token."""
    batch, width = tokens_BS.shape
    mask_BS = jnp.arange(width)[None] < lengths_B[:, None]
    mask_BS &= (max_new_B > 0)[:, None]
    apart = any(isinstance(v, list) for v in params.values())
    init = functools.partial(init_layers if apart else init_cache, cfg, batch, length)
    cache = init(dtype=compute.dtype)
    out = transformer.forward(
        params,
        router_state,
        tokens_BS,
        cfg,
        compute=compute,
        mask_BS=mask_BS,
        cache=place(cache, cfg, layout),
        prefill=True,
        layout=layout,
    )
    last = jnp.take_along_axis(out.hidden_BSD, (lengths_B - 1)[:, None, None], axis=1)
    token_B = sample(transformer.logits(params, last)[:, 0], keys_B, lengths_B, how)
    draft = None
    if with_draft:
        next_BS = jnp.pad(tokens_BS[:, 1:], ((0, 0), (0, 1)))
        next_BS = next_BS.at[jnp.arange(batch), lengths_B - 1].set(token_B)
        own = init_layer(cfg, cfg.num_layers, batch, length, dtype=compute.dtype)
        draft = speculative.guess(
            params,
            router_state,
            out.trunk,
            next_BS,
            None,
            lengths_B - 1,
            place_layers(own, cfg, cfg.num_layers, layout),
            cfg,
            compute,
            mask_BS=mask_BS,
            prefill=True,
            layout=layout,
        )
    left_B = jnp.where(_is_stop(token_B, stop_ids), 0, jnp.maximum(max_new_B - 1, 0))
    return State(token_B, lengths_B, left_B, place(out.cache, cfg, layout), draft)


def _is_stop(token_B, stop_ids):
    return (token_B[:, None] == stop_ids[None]).any(axis=1)


class Emitted(NamedTuple):
    """The tokens of one call of `decode`.

    Attributes:
      tokens_BC: NOTHING where a row had no token; a row's tokens are in order, not always side by side.
      passes_B: forward passes that each row took part in.
      accepted_B: how many of those gave two tokens.
    """

    tokens_BC: jax.Array
    passes_B: jax.Array
    accepted_B: jax.Array


@functools.partial(
    Program, static_argnames=("cfg", "compute", "layout"), donate_argnames=("state",)
)
def decode(
    params,
    router_state,
    state: State,
    steps,
    keys_B,
    stop_ids,
    cfg: ModelConfig,
    compute: ComputeConfig,
    how: Sampling,
    layout: Layout | None,
) -> tuple[State, Emitted]:
    """Up to `steps` (a traced integer, at most CHUNKS[-1]) forward passes, until all rows are finished.

    One token a pass; with a draft, one or two. The cache is updated in place.
    """
    per_pass = 1 if state.draft is None else 2
    zero_B = jnp.zeros_like(state.left_B)
    tokens_BC = jnp.full((state.token_B.shape[0], CHUNKS[-1] * per_pass), NOTHING, jnp.int32)

    def more(carry):
        i, state, _ = carry
        return (i < steps) & (state.left_B > 0).any()

    def one(carry):
        i, state, emitted = carry
        active_B = state.left_B > 0
        new_Bn, cache, draft = _one_pass(
            params, router_state, state, active_B, keys_B, cfg, compute, how, layout
        )
        # Emit a row's tokens in order; if the first one ends the row, the second is discarded.
        left_B, token_B, kept = state.left_B, state.token_B, []
        for new_B in new_Bn:
            emits_B = (left_B > 0) & (new_B != NOTHING)
            token_B = jnp.where(emits_B, new_B, token_B)
            left_B = jnp.where(emits_B, jnp.where(_is_stop(new_B, stop_ids), 0, left_B - 1), left_B)
            kept.append(jnp.where(emits_B, new_B, NOTHING))
        kept_Bn = jnp.stack(kept, axis=1)
        number_B = (kept_Bn != NOTHING).sum(axis=1, dtype=jnp.int32)
        state = State(
            token_B, state.position_B + number_B, left_B, place(cache, cfg, layout), draft
        )
        tokens_BC = jax.lax.dynamic_update_slice_in_dim(
            emitted.tokens_BC, kept_Bn, i * per_pass, axis=1
        )
        emitted = Emitted(
            tokens_BC,
            emitted.passes_B + active_B.astype(jnp.int32),
            emitted.accepted_B + (number_B > 1).astype(jnp.int32),
        )
        return i + 1, state, emitted

    start = (jnp.int32(0), state, Emitted(tokens_BC, zero_B, zero_B))
    _, state, emitted = jax.lax.while_loop(more, one, start)
    return state, emitted


def _one_pass(params, router_state, state: State, active_B, keys_B, cfg, compute, how, layout):
    """One forward pass: the rows' next tokens (a list of [B], NOTHING where there is none), the cache and
    the draft."""
    if state.draft is not None:
        true_B2, accepted_B, cache, draft = speculative.guess_round(
            params,
            router_state,
            state.token_B,
            state.position_B,
            active_B,
            state.cache,
            state.draft,
            cfg,
            compute,
            layout=layout,
        )
        return [true_B2[:, 0], jnp.where(accepted_B, true_B2[:, 1], NOTHING)], cache, draft
    out = transformer.forward(
        params,
        router_state,
        state.token_B[:, None],
        cfg,
        compute=compute,
        positions_BS=state.position_B[:, None],
        mask_BS=active_B[:, None],
        cache=state.cache,
        layout=layout,
    )
    logits_BV = transformer.logits(params, out.hidden_BSD)[:, 0]
    return [sample(logits_BV, keys_B, state.position_B + 1, how)], out.cache, None
