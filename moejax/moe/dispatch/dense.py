"""The oracle: every expert computes every token, the combine weights pick. Slow, obvious, exact."""

import jax
import jax.numpy as jnp

from moejax.moe.experts import Activation, Params, expert_ffn_slots
from moejax.routers.contract import Routing, SlotRouting


def dense(
    params: Params, x_TD: jax.Array, routing: Routing | SlotRouting, act: Activation
) -> jax.Array:
    """y_t = sum_e w_te FFN_e(x_t), computed for all e; in x's dtype.

    Takes token choice and slot form alike: both are weights over (token, expert) pairs.
    """
    num_experts = params["w_down"].shape[0]
    weights_TE = combine_matrix(routing, x_TD.shape[0], num_experts)
    x_ECD = jnp.broadcast_to(x_TD[None], (num_experts, *x_TD.shape))
    y_ETD = expert_ffn_slots(params, x_ECD, act)
    y_TD = jnp.einsum("TE,ETD->TD", weights_TE, y_ETD.astype(weights_TE.dtype))
    return y_TD.astype(x_TD.dtype)


def combine_matrix(routing: Routing | SlotRouting, num_tokens: int, num_experts: int) -> jax.Array:
    """Combine weights as a matrix over (token, expert)."""
    if isinstance(routing, Routing):
        weights = routing.combine_weights_TK
        chosen = jax.nn.one_hot(routing.expert_index_TK, num_experts, dtype=weights.dtype)
        return jnp.einsum("TKE,TK->TE", chosen, weights)
    weights = routing.combine_weights_EC
    taken = jax.nn.one_hot(routing.token_index_EC, num_tokens, dtype=weights.dtype)
    return jnp.einsum("ECT,EC->TE", taken, weights)
