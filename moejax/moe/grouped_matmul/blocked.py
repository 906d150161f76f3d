"""The CPU path: batched products over windows of rows that exist (`windows.py`), in plain XLA.

XLA:CPU's own `ragged_dot` multiplies every row by every expert. The expert FFN has a version of its
own on top of the same windows (`moejax.moe.windowed_ffn`) that reads the rows once for all three of
its matrices.
"""

import functools

import jax
import jax.numpy as jnp

from moejax.moe.grouped_matmul import windows as win
from moejax.moe.grouped_matmul.products import Products
from moejax.moe.varying import vary, varying_axes


def _batched(a, b, contract_a, contract_b):
    return jax.lax.dot_general(
        a,
        b,
        (((contract_a,), (contract_b,)), ((0,), (0,))),
        preferred_element_type=jnp.promote_types(a.dtype, jnp.float32),
    )


def _rows_product(contract, x_RD, w_EDF, group_sizes_E):
    """Rows times their expert's matrix, contracting dimension `contract` of it: 1 is D, 2 is F."""
    num_rows, width = x_RD.shape[0], w_EDF.shape[3 - contract]
    axes = varying_axes(x_RD, w_EDF, group_sizes_E)
    y_RF = vary(jnp.zeros((num_rows, width), x_RD.dtype), axes)
    if num_rows == 0:
        return y_RF

    def body(y_RF, windows):
        x_SCD = win.read_rows(x_RD, windows)
        w_SDF = win.read_experts(w_EDF, windows, x_RD.dtype)
        return win.write_rows(y_RF, _batched(x_SCD, w_SDF, 2, contract), windows)

    at_once = win.windows_at_once(w_EDF.shape[0], w_EDF.shape[1] * w_EDF.shape[2])
    return win.for_each_set(group_sizes_E, num_rows, at_once, y_RF, body)


def outer(x_RD, y_RF, group_sizes_E):
    num_rows, num_experts = x_RD.shape[0], group_sizes_E.shape[0]
    shape = (num_experts, x_RD.shape[1], y_RF.shape[1])
    accumulator = jnp.promote_types(x_RD.dtype, jnp.float32)
    w_EDF = vary(jnp.zeros(shape, accumulator), varying_axes(x_RD, y_RF, group_sizes_E))
    if num_rows == 0:
        return w_EDF.astype(x_RD.dtype)

    def body(w_EDF, windows):
        x_SCD = win.read_rows(x_RD, windows, mask=True)
        y_SCF = win.read_rows(y_RF, windows, mask=True)
        return win.add_experts(w_EDF, _batched(x_SCD, y_SCF, 1, 1), windows)

    at_once = win.windows_at_once(num_experts, shape[1] * shape[2])
    return win.for_each_set(group_sizes_E, num_rows, at_once, w_EDF, body).astype(x_RD.dtype)


PRODUCTS = Products(
    matmul=functools.partial(_rows_product, 1),
    matmul_transposed=functools.partial(_rows_product, 2),
    outer=outer,
)
