"""`jax.lax.ragged_dot`: native on TPU, fused by opt-in back ends on GPU, dense (slow) on CPU.

Rows past the sum are undefined on some back ends, so they are masked on the way in and out; the two
gradient products are stated with `ragged_dot_general` and not left to its transpose rule for the
same reason.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.moe.grouped_matmul.products import Products, rows_in_groups


def _dimensions(lhs: int, rhs: int, group_dimensions: list[int]):
    return jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=(([lhs], [rhs]), ([], [])),
        lhs_ragged_dimensions=[0],
        rhs_group_dimensions=group_dimensions,
    )


CONTRACT_D = _dimensions(1, 1, [0])  # x_RD, w_EDF -> y_RF
CONTRACT_F = _dimensions(1, 2, [0])  # y_RF, w_EDF -> x_RD
CONTRACT_ROWS = _dimensions(0, 0, [])  # x_RD, y_RF -> w_EDF


def products_of(ragged_dot_general: Callable) -> Products:
    """The three products by a function with the interface of `jax.lax.ragged_dot_general`."""

    def call(a, b, group_sizes_E, dimensions):
        # Results in the type of the operands: matrix units accumulate bfloat16 in float32 and round
        # once.
        return ragged_dot_general(a, b, group_sizes_E, dimensions, preferred_element_type=a.dtype)

    def rows_product(dimensions, x_RD, w_EDF, group_sizes_E):
        y_RF = call(_masked(x_RD, group_sizes_E), w_EDF, group_sizes_E, dimensions)
        return _masked(y_RF, group_sizes_E)

    def outer(x_RD, y_RF, group_sizes_E):
        x_RD, y_RF = _masked(x_RD, group_sizes_E), _masked(y_RF, group_sizes_E)
        return call(x_RD, y_RF, group_sizes_E, CONTRACT_ROWS)

    return Products(
        matmul=functools.partial(rows_product, CONTRACT_D),
        matmul_transposed=functools.partial(rows_product, CONTRACT_F),
        outer=outer,
    )


def _masked(x_RD, group_sizes_E):
    return jnp.where(rows_in_groups(x_RD.shape[0], group_sizes_E), x_RD, 0)


PRODUCTS = products_of(jax.lax.ragged_dot_general)
