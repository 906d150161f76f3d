"""Capacity: every expert has C slots; a route that finds no free slot is dropped, and counted.

Slots go to routes in order of their rank k and then of their token (GShard, 2006.16668 algorithm 1): no
token loses its first choice to another's second.

Tokens compete over all that one call sees: a slot may go to a later token (or another sequence's), and with
gradient accumulation C is counted in every micro-batch. So a step depends on accumulation where something
is dropped, and training is not strictly causal. Evaluation and generation drop nothing: a capacity is part of
the objective.
"""

import math

import jax
import jax.numpy as jnp

from moejax.moe.experts import Activation, Params, expert_ffn_slots
from moejax.routers.contract import Routing, SlotRouting


def slots_per_expert(num_tokens: int, k: int, num_experts: int, factor: float) -> int:
    """C = ceil(factor * T * K / E), at most T."""
    return min(num_tokens, math.ceil(factor * num_tokens * k / num_experts))


def fill_slots(routing: Routing, num_experts: int, capacity: int):
    """Token choice in slot form under a capacity. Returns (SlotRouting, number of dropped routes)."""
    num_tokens, k = routing.expert_index_TK.shape
    expert_R = routing.expert_index_TK.T.reshape(-1)  # rank-major: all first choices come first
    weight_R = routing.combine_weights_TK.T.reshape(-1)
    token_R = jnp.tile(jnp.arange(num_tokens, dtype=jnp.int32), k)
    chosen_RE = jax.nn.one_hot(expert_R, num_experts, dtype=jnp.int32)
    place_R = ((jnp.cumsum(chosen_RE, axis=0) - 1) * chosen_RE).sum(axis=1)
    fits_R = (expert_R >= 0) & (place_R < capacity)
    # Routes without a slot are written to one slot past the end and cut off.
    slot_R = jnp.where(fits_R, expert_R * capacity + place_R, num_experts * capacity)
    size = num_experts * capacity + 1
    token_EC = jnp.full((size,), -1, jnp.int32).at[slot_R].set(token_R)[:-1]
    weight_EC = jnp.zeros((size,), weight_R.dtype).at[slot_R].add(jnp.where(fits_R, weight_R, 0))
    dropped = ((expert_R >= 0) & ~fits_R).sum().astype(jnp.float32)
    shape = (num_experts, capacity)
    return SlotRouting(token_EC.reshape(shape), weight_EC[:-1].reshape(shape)), dropped


def slots(params: Params, x_TD: jax.Array, routing: SlotRouting, act: Activation) -> jax.Array:
    """Gather each slot's token, run the experts, add the weighted results back to their tokens."""
    index_EC, weight_EC = routing
    taken_EC = index_EC >= 0
    x_ECD = jnp.where(taken_EC[..., None], x_TD[jnp.maximum(index_EC, 0)], 0)
    y_ECD = expert_ffn_slots(params, x_ECD, act).astype(weight_EC.dtype) * weight_EC[..., None]
    y_TD = jnp.zeros(x_TD.shape, weight_EC.dtype)
    y_TD = y_TD.at[jnp.maximum(index_EC, 0)].add(jnp.where(taken_EC[..., None], y_ECD, 0))
    return y_TD.astype(x_TD.dtype)


def capacity(
    params: Params,
    x_TD: jax.Array,
    routing: Routing,
    act: Activation,
    factor: float,
    experts_per_token: int,
) -> tuple[jax.Array, jax.Array]:
    """Token choice with `slots_per_expert` slots; where a token may have more routes than `experts_per_token`,
    that is their mean. Returns (y_TD, dropped routes)."""
    num_experts = params["w_down"].shape[0]
    k = min(experts_per_token, routing.expert_index_TK.shape[1])
    size = slots_per_expert(x_TD.shape[0], k, num_experts, factor)
    filled, dropped = fill_slots(routing, num_experts, size)
    return slots(params, x_TD, filled, act), dropped
