"""The expert FFN on CPU for a few rows, as in decoding: one row after the other through its expert.

With a row per expert or so there is nothing to batch, and time goes into reading matrices: windows would
multiply 16 rows, most of them padding, where one is meant. Forward only; training has its own path.
"""

import jax
import jax.numpy as jnp

from moejax.moe.experts import Activation
from moejax.moe.varying import vary, varying_axes
from moejax.weights import dot_of_few

# Rows per expert up to which this is faster than windows (measured at 256 x 128, 64 experts).
ROWS_PER_EXPERT = 2


def forward(
    stack: dict, first, x_TD, weight_R, token_R, group_sizes_E, act: Activation
) -> jax.Array:
    """y_TD, in x's dtype: for every token the sum over its rows of weight_r FFN_{e(r)}(x). Arguments as of
    `windowed_ffn.forward`."""
    end_E = jnp.cumsum(group_sizes_E)
    row_R = jnp.arange(token_R.shape[0], dtype=end_E.dtype)
    expert_R = first + jnp.sum(row_R[:, None] >= end_E[None], axis=1, dtype=jnp.int32)

    def body(r, y_TD):
        def product(name, x):
            y = dot_of_few(x, stack[f"w_{name}"], expert_R[r])
            if f"b_{name}" not in stack:
                return y
            b = jax.lax.dynamic_slice_in_dim(stack[f"b_{name}"], expert_R[r], 1)
            return y + b.astype(y.dtype)

        x_1D = jax.lax.dynamic_slice_in_dim(x_TD, token_R[r], 1)
        y_1D = act.ffn(product, x_1D)
        sum_1D = jax.lax.dynamic_slice_in_dim(y_TD, token_R[r], 1) + y_1D * weight_R[r]
        return jax.lax.dynamic_update_slice_in_dim(y_TD, sum_1D, token_R[r], 0)

    axes = varying_axes(x_TD, weight_R, group_sizes_E, *jax.tree.leaves(stack))
    wide = jnp.promote_types(x_TD.dtype, weight_R.dtype)
    y_TD = vary(jnp.zeros(x_TD.shape, wide), axes)
    y_TD = jax.lax.fori_loop(jnp.zeros_like(end_E[-1]), end_E[-1], body, y_TD)
    return y_TD.astype(x_TD.dtype)
