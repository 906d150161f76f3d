"""Rows: the routes of all tokens sorted by expert, and the two maps between tokens and rows.

`to_rows` copies tokens to their rows, `to_tokens` sums the rows of every token; each is the other's
gradient. Both are gathers: the permutation is known both ways, while autodiff of a gather is a
scatter-add, which is slow on CPU and not deterministic on GPU.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SortedRoutes:
    """The T*K routes sorted by expert, and the way back. Route i is choice i % K of token i // K.

    Attributes:
      route_R: the route in each row, sorted by expert; within an expert, in token order. T*K: none.
      row_TK: the row of each route, R or more where it has none.
      group_sizes_E: rows of each expert. Empty slots lie past their sum.
      complete: static; every route has a row (of an empty slot too), so none has to be looked for.
    """

    route_R: jax.Array
    row_TK: jax.Array
    group_sizes_E: jax.Array
    complete: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def token_R(self) -> jax.Array:
        """The token in each row; T: none."""
        return self.route_R // self.row_TK.shape[1]

    def one_by_one(self) -> "SortedRoutes":
        """The same rows with every route a token of its own."""
        return dataclasses.replace(self, row_TK=self.row_TK.reshape(-1, 1))


# Experts times routes up to which every route is compared with every expert to count them: one pass, where
# searching the sorted routes is several. With thousands of experts it would cost more than the FFNs.
COMPARED = 2**24


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
    each_E = jnp.arange(num_experts, dtype=expert_R.dtype)
    if num_experts * flat_R.size <= COMPARED:
        group_sizes_E = jnp.sum(expert_R[:, None] == each_E[None], axis=0, dtype=jnp.int32)
    else:
        end_E = jnp.searchsorted(expert_R[route_R], each_E, side="right")
        group_sizes_E = jnp.diff(end_E.astype(jnp.int32), prepend=0)
    return SortedRoutes(route_R, row_R.reshape(expert_index_TK.shape), group_sizes_E, complete=True)


def limit_rows(routes: SortedRoutes, num_rows: int) -> tuple[SortedRoutes, jax.Array]:
    """The first `num_rows` rows, and how many routes that drops (those of the last experts)."""
    if num_rows >= routes.route_R.size:
        return routes, jnp.zeros((), jnp.int32)
    kept_E = jnp.diff(jnp.minimum(jnp.cumsum(routes.group_sizes_E), num_rows), prepend=0)
    dropped = (routes.group_sizes_E - kept_E).sum()
    return SortedRoutes(routes.route_R[:num_rows], routes.row_TK, kept_E), dropped


@jax.custom_vjp
def to_rows(x_TD: jax.Array, routes: SortedRoutes) -> jax.Array:
    """x_RD: the token of every row; zero where a row has none."""
    if routes.complete:
        return x_TD.at[routes.token_R].get(mode="promise_in_bounds")
    return x_TD.at[routes.token_R].get(mode="fill", fill_value=0)


@jax.custom_vjp
def to_tokens(y_RD: jax.Array, routes: SortedRoutes) -> jax.Array:
    """y_TD: the sum of every token's rows, in float32 or better, in y's dtype."""
    wide = jnp.promote_types(y_RD.dtype, jnp.float32)
    # A sum of K gathers, not a reduction of one: nothing of size T K D is written.
    y_TD = sum(take(y_RD, row_T, routes).astype(wide) for row_T in routes.row_TK.T)
    return y_TD.astype(y_RD.dtype)


def take(a_R: jax.Array, row: jax.Array, routes: SortedRoutes) -> jax.Array:
    """a_R[row] for rows out of `routes.row_TK`; zero for a route without a row."""
    if routes.complete:
        return a_R.at[row].get(mode="promise_in_bounds")
    return a_R.at[row].get(mode="fill", fill_value=0)


def _no_gradient(routes):
    return jax.tree.map(lambda a: np.zeros(a.shape, jax.dtypes.float0), routes)


to_rows.defvjp(
    lambda x_TD, routes: (to_rows(x_TD, routes), routes),
    lambda routes, dx_RD: (to_tokens(dx_RD, routes), _no_gradient(routes)),
)
to_tokens.defvjp(
    lambda y_RD, routes: (to_tokens(y_RD, routes), routes),
    lambda routes, dy_TD: (to_rows(dy_TD, routes), _no_gradient(routes)),
)
