"""Soft dispatch (Soft MoE, 2308.00951 eq. 1-3): every slot is a mix of tokens, every token a mix of slots."""

import jax
import jax.numpy as jnp

from moejax.moe.experts import Activation, Params, expert_ffn_slots
from moejax.routers.contract import SoftRouting


def soft(params: Params, x_TD: jax.Array, routing: SoftRouting, act: Activation) -> jax.Array:
    """y_t = sum_ec combine_tec FFN_e(sum_u dispatch_uec x_u), in x's dtype.

    The mixes are computed in the float32 of the weights.
    """
    dispatch_TEC, combine_TEC = routing
    x_ECD = jnp.einsum("TEC,TD->ECD", dispatch_TEC, x_TD.astype(dispatch_TEC.dtype))
    y_ECD = expert_ffn_slots(params, x_ECD.astype(x_TD.dtype), act)
    y_TD = jnp.einsum("TEC,ECD->TD", combine_TEC, y_ECD.astype(combine_TEC.dtype))
    return y_TD.astype(x_TD.dtype)
