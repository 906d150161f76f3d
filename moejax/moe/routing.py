"""What a router returns, and the contract that every router fulfils.

A router is one file in `moejax/moe/routers/` that builds a `Router`, and one line in `ROUTERS`.
Contract tests run over that table.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig


class Routing(NamedTuple):
    """Token choice: each token names its experts.

    Attributes:
      expert_index_TK: int32, -1 marks an empty slot (a padding token, a dropped route). The experts of a
        token are distinct: buffers of expert parallelism count on it.
      combine_weights_TK: float32, 0 where the slot is empty.
    """

    expert_index_TK: jax.Array
    combine_weights_TK: jax.Array


class SlotRouting(NamedTuple):
    """Slot form: each expert names its tokens (expert choice; token choice under a capacity).

    Attributes:
      token_index_EC: int32, -1 marks an empty slot.
      combine_weights_EC: float32, 0 where the slot is empty.
    """

    token_index_EC: jax.Array
    combine_weights_EC: jax.Array


class BatchTotals(NamedTuple):
    """Totals over the whole global batch, for losses that are not linear in the tokens.

    A micro-batch of a gradient-accumulation step sees only its own tokens; with the totals of the whole
    batch its losses and gradients are its exact share of the whole batch's. `None` in the last two
    fields means: this call holds the whole batch, count here.

    Attributes:
      num_tokens: tokens that are not padding.
      num_sequences: sequences with at least one such token.
      load_E: routes per expert, or None. Stacked over layers outside the layer loop.
      group_load_G: tokens that reach each balance group, or None.
    """

    num_tokens: jax.Array
    num_sequences: jax.Array
    load_E: jax.Array | None = None
    group_load_G: jax.Array | None = None


class RouterOutput(NamedTuple):
    """One layer's routing.

    Attributes:
      routing: `Routing` or `SlotRouting`.
      scores_TE: affinities in float32, before any bias.
      losses: balance losses by name, each already multiplied by its coefficient.
      load_E: routes per expert in this call, float32, without padding.
      group_load_G: tokens that reach each balance group in this call.
    """

    routing: Any
    scores_TE: jax.Array
    losses: dict[str, jax.Array]
    load_E: jax.Array
    group_load_G: jax.Array


@dataclasses.dataclass(frozen=True)
class Router:
    """The functions of a router; all pure, router maths in float32.

    Attributes:
      param_specs: `(cfg, d_model, std) -> dict of ParamSpec`, what gradients learn.
      init_state: `(cfg) -> dict of arrays`, what a rule learns (may be empty).
      route: `(params, state, x_TD, cfg, *, seq_len, key, mask_T, token_ids_T, replay_TK, totals)
        -> RouterOutput`. T is whole sequences of `seq_len` tokens, one after the other. `replay_TK`
        forces the expert indices; the weights are still computed. `key` differs from layer to layer,
        step to step and micro-batch to micro-batch: what is drawn from it depends on accumulation.
      update_state: `(state, load_E, cfg) -> state`, once per optimiser step, from the global load.
      linear_losses: `(cfg) -> whether` every loss is a sum over tokens or sequences. One that multiplies
        two sums over the batch (a count and a mean score) is not, and needs `totals` under accumulation,
        which cost a forward pass more.
      causal: whether a token's route is independent of later tokens; generation refuses others.
      form: 'token' (`Routing`) or 'slot' (`SlotRouting`).
    """

    param_specs: Callable[[MoEConfig, int, float], dict]
    init_state: Callable[[MoEConfig], dict]
    route: Callable[..., RouterOutput]
    update_state: Callable[[dict, jax.Array, MoEConfig], dict]
    causal: bool
    form: str
    linear_losses: Callable[[MoEConfig], bool] = lambda cfg: False


def count_totals(mask_BS: jax.Array) -> BatchTotals:
    """Totals of a whole batch from its padding mask (1 = token)."""
    mask = (mask_BS > 0).astype(jnp.float32)
    return BatchTotals(mask.sum(), (mask.max(axis=1) > 0).astype(jnp.float32).sum())
