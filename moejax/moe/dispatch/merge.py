"""Merging (SMEAR, 2306.03745; Lory, 2405.03133): the tokens of a group go through one FFN, whose parameters are
a weighted sum of the experts'."""

import jax
import jax.numpy as jnp

from moejax.moe.experts import Activation, Params, expert_ffn_slots
from moejax.routers.contract import MergeRouting


def merge(params: Params, x_TD: jax.Array, routing: MergeRouting, act: Activation) -> jax.Array:
    """y_t = FFN(x_t; sum_e weights_ge theta_e) for the tokens of each group g, in x's dtype.

    The parameters are summed in the float32 of the weights; G merged experts exist at once.
    """
    weights_GE = routing.weights_GE
    merged = {
        name: jnp.einsum("GE,E...->G...", weights_GE, w.astype(weights_GE.dtype))
        for name, w in params.items()
    }
    x_GtD = x_TD.reshape(weights_GE.shape[0], -1, x_TD.shape[1])
    return expert_ffn_slots(merged, x_GtD, act).reshape(x_TD.shape)
