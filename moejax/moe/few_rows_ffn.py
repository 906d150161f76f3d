"""The expert FFN on CPU for a few rows, as in decoding: one row after the other through its expert.

With a row per expert or so there is nothing to batch, and time goes into reading matrices: windows would
multiply 16 rows, most of them padding, where one is meant. Forward only; training has its own path.
"""

import jax
import jax.numpy as jnp

from moejax.linear import linear
from moejax.moe.varying import vary, varying_axes

# Rows per expert up to which this is faster than windows (measured at 256 x 128, 64 experts).
ROWS_PER_EXPERT = 2


def forward(params: dict, x_RD, group_sizes_E, act, limit: float) -> jax.Array:
    """y_RD for rows sorted by expert; rows past the groups give zero."""
    end_E = jnp.cumsum(group_sizes_E)
    row_R = jnp.arange(x_RD.shape[0], dtype=end_E.dtype)
    expert_R = jnp.sum(row_R[:, None] >= end_E[None], axis=1, dtype=jnp.int32)

    def body(r, y_RD):
        mine = {
            k: jax.lax.dynamic_index_in_dim(w, expert_R[r], keepdims=False).astype(x_RD.dtype)
            for k, w in params.items()
        }
        x_1D = jax.lax.dynamic_slice_in_dim(x_RD, r, 1)
        through = lambda name, x: linear(x, mine[f"w_{name}"], mine.get(f"b_{name}"))  # noqa: E731
        gate_1F = through("gate", x_1D) if act.gated else None
        y_1D = through("down", act.apply(gate_1F, through("up", x_1D), limit))
        return jax.lax.dynamic_update_slice_in_dim(y_RD, y_1D, r, 0)

    axes = varying_axes(x_RD, group_sizes_E, *params.values())
    y_RD = vary(jnp.zeros_like(x_RD), axes)
    return jax.lax.fori_loop(jnp.zeros_like(end_E[-1]), end_E[-1], body, y_RD)
