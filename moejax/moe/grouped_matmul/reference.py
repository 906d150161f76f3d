"""The oracle: one dense product per expert, rows picked by a mask. Slow, plain, differentiated by
JAX.

It shares no code with the other implementations and has no gradient of its own, so that agreeing
with it means something. In float64 (with x64 enabled) it is exact to about 1e-15.
"""

import jax
import jax.numpy as jnp


def grouped_matmul(x_RD: jax.Array, w_EDF: jax.Array, group_sizes_E: jax.Array) -> jax.Array:
    """y_RF by E masked products; see `moejax.moe.grouped_matmul` for the contract."""
    precise = jnp.promote_types(x_RD.dtype, jnp.float32)
    end_E = jnp.cumsum(group_sizes_E)
    start_E = end_E - group_sizes_E
    row_R = jnp.arange(x_RD.shape[0])
    y_RF = jnp.zeros((x_RD.shape[0], w_EDF.shape[2]), precise)
    for e in range(w_EDF.shape[0]):
        mine_R1 = ((row_R >= start_E[e]) & (row_R < end_E[e]))[:, None]
        # A select, not a product with 0: rows of other groups may hold NaN. Selecting on both sides
        # of the product keeps NaN out of the value and out of the gradient.
        x_own_RD = jnp.where(mine_R1, x_RD, 0).astype(precise)
        y_own_RF = jnp.matmul(x_own_RD, w_EDF[e].astype(precise), precision="highest")
        y_RF = jnp.where(mine_R1, y_own_RF, y_RF)
    return y_RF.astype(x_RD.dtype)
