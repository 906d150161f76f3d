"""Dropless dispatch: sort the routes by expert, send every token through its experts, sum.

As in MegaBlocks (2211.15841), no capacity and nothing dropped.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.experts import Activation, Params
from moejax.moe.routed_ffn import routed_ffn
from moejax.moe.rows import limit_rows, sort_routes
from moejax.routers.contract import Routing


def dropless(
    params: Params,
    x_TD: jax.Array,
    routing: Routing,
    act: Activation,
    implementation: str = "auto",
    *,
    num_rows: int | None = None,
    stack: tuple[Params, Any] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_T = sum over K of combine_weights_TK * FFN[expert_index_TK](x_T), nothing dropped.

    Args:
      params: expert parameters (`experts.expert_param_specs`).
      x_TD: tokens.
      routing: expert_index_TK (int32, -1 = empty slot, contributes nothing) and combine_weights_TK
        (float32).
      act: the activation.
      implementation: of the grouped matmul, see `routed_ffn`.
      num_rows: rows to compute, where fewer than T K routes can be taken (most of them are another
        device's): no more than these are moved or held.
      stack: where `params` lies in the parameters of all layers (see `routed_ffn`).

    Returns:
      y_TD in x's dtype, and the number of routes dropped for want of rows; 0 without `num_rows`.
    """
    routes = sort_routes(routing.expert_index_TK, params["w_down"].shape[0])
    dropped = jnp.zeros((), jnp.int32)
    if num_rows is not None:
        routes, dropped = limit_rows(routes, num_rows)
    return routed_ffn(
        params, x_TD, routing.combine_weights_TK, routes, act, implementation, stack
    ), dropped
