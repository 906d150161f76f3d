"""Soft dispatch (Soft MoE, 2308.00951 eq. 1-3): every slot is a mix of tokens, every token a mix of slots."""

import jax
import jax.numpy as jnp

from moejax.moe.experts import Activation, Params, expert_ffn_slots
from moejax.routers.contract import SoftRouting


def soft(params: Params, x_TD: jax.Array, routing: SoftRouting, act: Activation) -> jax.Array:
    """y_bs = sum_ec combine_bsec FFN_e(sum_u dispatch_buec x_bu), in x's dtype.

    The mixes are computed in the float32 of the weights.
    """
    dispatch_BSEC, combine_BSEC = routing
    b, s, e, c = dispatch_BSEC.shape
    x_BSD = x_TD.reshape(b, s, -1).astype(dispatch_BSEC.dtype)
    x_EBCD = jnp.einsum("BSEC,BSD->EBCD", dispatch_BSEC, x_BSD).astype(x_TD.dtype)
    y_ECD = expert_ffn_slots(params, x_EBCD.reshape(e, b * c, -1), act)
    y_EBCD = y_ECD.reshape(x_EBCD.shape).astype(combine_BSEC.dtype)
    y_BSD = jnp.einsum("BSEC,EBCD->BSD", combine_BSEC, y_EBCD)
    return y_BSD.reshape(x_TD.shape).astype(x_TD.dtype)
