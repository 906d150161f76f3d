"""What an implementation provides: the three products of a grouped matmul; and the gradient they
give.

    matmul             y_RF  = x_RD w[e]         forward
    matmul_transposed  x_RD  = y_RF w[e]^T       gradient in x
    outer              w_EDF = x_RD[e]^T y_RF[e] gradient in w

where [e] is the expert whose group holds the row. The gradient is stated rather than left to
autodiff because loops with a dynamic number of steps have none, and because published grouped
matmuls have had wrong gradients for empty groups and padding rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Products(NamedTuple):
    """Three pure functions; each ignores rows past sum(group_sizes_E), whatever they hold.

    Attributes:
      matmul: (x_RD, w_EDF, group_sizes_E) -> y_RF, zero in rows past the sum.
      matmul_transposed: (y_RF, w_EDF, group_sizes_E) -> x_RD, likewise.
      outer: (x_RD, y_RF, group_sizes_E) -> w_EDF, zero for empty groups.
    """

    matmul: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    matmul_transposed: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    outer: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]


def differentiable(products: Products) -> Callable[[jax.Array, jax.Array, jax.Array], jax.Array]:
    """`products.matmul` with its gradient made of the other two."""

    @jax.custom_vjp
    def grouped_matmul(x_RD, w_EDF, group_sizes_E):
        return products.matmul(x_RD, w_EDF, group_sizes_E)

    def forward(x_RD, w_EDF, group_sizes_E):
        return grouped_matmul(x_RD, w_EDF, group_sizes_E), (x_RD, w_EDF, group_sizes_E)

    def backward(residuals, dy_RF):
        x_RD, w_EDF, group_sizes_E = residuals
        dx_RD = products.matmul_transposed(dy_RF, w_EDF, group_sizes_E)
        dw_EDF = products.outer(x_RD, dy_RF, group_sizes_E)
        no_gradient_E = np.zeros(group_sizes_E.shape, jax.dtypes.float0)
        return dx_RD, dw_EDF, no_gradient_E

    grouped_matmul.defvjp(forward, backward)
    return grouped_matmul


def rows_in_groups(num_rows: int, group_sizes_E: jax.Array) -> jax.Array:
    """Boolean column (R, 1): False for rows past the sum of the groups."""
    return (jnp.arange(num_rows) < jnp.sum(group_sizes_E))[:, None]
