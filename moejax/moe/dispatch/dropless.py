"""Dropless dispatch: sort the routes by expert, one grouped FFN over all of them, put them back and
sum.

As in MegaBlocks (2211.15841), no capacity and nothing dropped. Rows move by gathers alone, forward
and
backward: the permutation is known both ways, while autodiff of a gather is a scatter-add, which is
slow on CPU and not deterministic on GPU.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import MoEConfig
from moejax.moe.experts import Params, expert_ffn
from moejax.moe.routing import Routing
from moejax.moe.varying import vary_together


class SortedRoutes(NamedTuple):
    """The T*K routes sorted by expert, and the way back. Route i is choice i % K of token i // K.

    Attributes:
      route_R: the route in each row, sorted by expert; within an expert, in token order.
      row_TK: the row of each route, R or more where it has none.
      group_sizes_E: rows of each expert. Empty slots lie past their sum.
    """

    route_R: jax.Array
    row_TK: jax.Array
    group_sizes_E: jax.Array


def sort_routes(expert_index_TK: jax.Array, num_experts: int) -> SortedRoutes:
    """A stable sort of the routes by expert; -1 (an empty slot) sorts last."""
    flat_R = expert_index_TK.reshape(-1)
    expert_R = jnp.where(flat_R < 0, num_experts, flat_R)
    number_R = jnp.arange(flat_R.size, dtype=jnp.int32)
    if (num_experts + 1) * flat_R.size < 2**31:
        # Expert and route in one integer: sorting plain integers takes a third of the time of
        # argsort.
        route_R = jax.lax.sort(expert_R * flat_R.size + number_R, is_stable=False) % flat_R.size
    else:
        route_R = jnp.argsort(expert_R, stable=True)
    row_R = jnp.zeros_like(route_R).at[route_R].set(number_R, unique_indices=True)
    member_RE = expert_R[:, None] == jnp.arange(num_experts, dtype=expert_R.dtype)[None]
    group_sizes_E = jnp.sum(member_RE, axis=0, dtype=jnp.int32)
    return SortedRoutes(route_R, row_R.reshape(expert_index_TK.shape), group_sizes_E)


def limit_rows(routes: SortedRoutes, num_rows: int) -> tuple[SortedRoutes, jax.Array]:
    """The first `num_rows` rows, and how many routes that drops (those of the last experts)."""
    if num_rows >= routes.route_R.size:
        return routes, jnp.zeros((), jnp.int32)
    kept_E = jnp.diff(jnp.minimum(jnp.cumsum(routes.group_sizes_E), num_rows), prepend=0)
    dropped = (routes.group_sizes_E - kept_E).sum()
    return SortedRoutes(routes.route_R[:num_rows], routes.row_TK, kept_E), dropped


def dropless(
    params: Params,
    x_TD: jax.Array,
    routing: Routing,
    moe: MoEConfig,
    *,
    num_rows: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """y_T = sum over K of combine_weights_TK * expert_ffn[expert_index_TK](x_T), nothing dropped.

    Args:
      params: expert parameters (`experts.expert_param_specs`).
      x_TD: tokens.
      routing: expert_index_TK (int32, -1 = empty slot, contributes nothing) and combine_weights_TK
        (float32).
      moe: activation and grouped matmul implementation.
      num_rows: rows to compute, where fewer than T K routes can be taken (most of them are another
        device's): no more than these are moved or held.

    Returns:
      y_TD in x's dtype, and the number of routes dropped for want of rows; 0 without `num_rows`.
    """
    routes = sort_routes(routing.expert_index_TK, params["w_down"].shape[0])
    dropped = jnp.zeros((), jnp.int32)
    if num_rows is not None:
        routes, dropped = limit_rows(routes, num_rows)
    x_RD = dispatch(*vary_together(x_TD, routes.route_R, routes.row_TK))
    y_RD = expert_ffn(params, x_RD, routes.group_sizes_E, moe)
    y_TD = combine(*vary_together(y_RD, routing.combine_weights_TK, routes.route_R, routes.row_TK))
    return y_TD, dropped


def _no_gradient(x):
    return np.zeros(x.shape, jax.dtypes.float0)


def _take(a: jax.Array, index: jax.Array) -> jax.Array:
    """a[index], zero past the end: a route without a row, a row without a route."""
    return a.at[index].get(mode="fill", fill_value=0)


@jax.custom_vjp
def dispatch(x_TD: jax.Array, route_R: jax.Array, row_TK: jax.Array) -> jax.Array:
    """x_RD: the token of every row; zero where route_R is T K (no route)."""
    return _take(x_TD, route_R // row_TK.shape[1])


def _dispatch_forward(x_TD, route_R, row_TK):
    return dispatch(x_TD, route_R, row_TK), (route_R, row_TK)


def _dispatch_backward(residuals, dx_RD):
    route_R, row_TK = residuals
    # Rows past the groups hold zeros: expert_ffn gives them no gradient.
    dx_TD = sum(_take(dx_RD, row_T).astype(_wide(dx_RD)) for row_T in row_TK.T)
    return dx_TD.astype(dx_RD.dtype), _no_gradient(route_R), _no_gradient(row_TK)


dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def combine(
    y_RD: jax.Array, weights_TK: jax.Array, route_R: jax.Array, row_TK: jax.Array
) -> jax.Array:
    """y_TD: the weighted sum of every token's rows, in float32 or better, in y_RD's dtype."""
    wide = _wide(y_RD)
    # A sum of K gathers, not a reduction of one: XLA fuses it and writes nothing of size T K D.
    y_TD = sum(
        _take(y_RD, row_T).astype(wide) * weight_T.astype(wide)[:, None]
        for row_T, weight_T in zip(row_TK.T, weights_TK.T)
    )
    return y_TD.astype(y_RD.dtype)


def _combine_forward(y_RD, weights_TK, route_R, row_TK):
    return combine(y_RD, weights_TK, route_R, row_TK), (y_RD, weights_TK, route_R, row_TK)


def _combine_backward(residuals, dy_TD):
    y_RD, weights_TK, route_R, row_TK = residuals
    wide = _wide(y_RD)
    weight_R = _take(weights_TK.reshape(-1), route_R).astype(wide)
    dy_RD = _take(dy_TD, route_R // row_TK.shape[1]).astype(wide) * weight_R[:, None]
    dweights_TK = jnp.stack(
        [
            jnp.sum(_take(y_RD, row_T).astype(wide) * dy_TD.astype(wide), axis=1)
            for row_T in row_TK.T
        ],
        axis=1,
    )
    return (
        dy_RD.astype(y_RD.dtype),
        dweights_TK.astype(weights_TK.dtype),
        _no_gradient(route_R),
        _no_gradient(row_TK),
    )


combine.defvjp(_combine_forward, _combine_backward)


def _wide(x):
    return jnp.promote_types(x.dtype, jnp.float32)
