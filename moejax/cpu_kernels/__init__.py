"""Grouped matrix products compiled for this processor (kernels.cc), where a C++ compiler is found.

    grouped             y_RF  = x[at_R] w[e]          rows sorted by expert e, each times its own matrix
    grouped_transposed  x_RD  = sum y[at_R] w[e]^T    its gradient in x
    outer               w_EDF = x[at_R]^T y[at_R]     its gradient in w
    dot                 y_TF  = x_TD w                a plain product, with its gradients

XLA:CPU multiplies small groups slowly, widens bfloat16 before it multiplies it, and is slow with matrices in
few bits. These are for one device; everywhere else, and without a compiler, what they do is done in plain JAX,
with the same result up to rounding. MOEJAX_CPU_KERNELS=off keeps to that.

A matrix is an array (N, D, F), float32 or bfloat16, or a `weights.Quantized` one. Sums are in float32;
few rows may meet int4 rounded to 16 bits of the largest value of a block. Rows past the sum of the groups are
never read, and their results are zero.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.cpu_kernels import build

DTYPES = (jnp.float32, jnp.bfloat16)
_OF_MATRICES = (*DTYPES, jnp.uint16, jnp.int8, jnp.uint8)


def here() -> bool:
    """Whether programs that are traced here can use them: the only device is a CPU, and there is a compiler."""
    return jax.default_backend() == "cpu" and jax.device_count() == 1 and build.load()


def serve(rows: jax.Array, matrices: Any) -> bool:
    """Whether a product of these rows and matrices (a tree) is to be made by them here: of dtypes that they
    take, and not inside a `jax.shard_map`."""
    arrays = jax.tree.leaves(matrices)
    return (
        rows.dtype in DTYPES
        and all(a.dtype in _OF_MATRICES for a in arrays)
        and not any(jax.typeof(a).manual_axis_type.varying for a in (rows, *arrays))
        and here()
    )


def grouped(x_TD, at_R, group_sizes_E, first, *stacks) -> list[jax.Array]:
    """y_RF of each stack, in x's dtype.

    Args:
      x_TD: rows, of which `at_R` (int32) names one for each row of the result; None: row r itself.
      group_sizes_E: rows of each expert.
      first: expert 0 is stack[first].
      stacks: matrices (N, D, F), all of one shape.
    """
    rows = x_TD.shape[0] if at_R is None else at_R.shape[0]
    out = [jax.ShapeDtypeStruct((rows, w.shape[2]), x_TD.dtype) for w in stacks]
    call = jax.ffi.ffi_call("moejax_grouped", out, vmap_method="sequential")
    return call(x_TD, _at(at_R), _ints(group_sizes_E), _ints(first), *jax.tree.leaves(stacks))


def grouped_transposed(at_R, group_sizes_E, first, *pairs) -> jax.Array:
    """x_RD = sum of y[at_R] w^T over pairs (y_TF, stack), in y's dtype. Other arguments as of `grouped`."""
    y_TF, stack = pairs[0]
    rows = y_TF.shape[0] if at_R is None else at_R.shape[0]
    out = jax.ShapeDtypeStruct((rows, stack.shape[1]), y_TF.dtype)
    call = jax.ffi.ffi_call("moejax_grouped_transposed", out, vmap_method="sequential")
    return call(_at(at_R), _ints(group_sizes_E), _ints(first), *jax.tree.leaves(pairs))


def outer(x_TD, x_at_R, y_TF, y_at_R, group_sizes_E) -> jax.Array:
    """w_EDF in float32, zero for empty groups. Arguments as of `grouped`."""
    shape = (group_sizes_E.shape[0], x_TD.shape[1], y_TF.shape[1])
    out = jax.ShapeDtypeStruct(shape, jnp.float32)
    call = jax.ffi.ffi_call("moejax_outer", out, vmap_method="sequential")
    return call(x_TD, _at(x_at_R), y_TF, _at(y_at_R), _ints(group_sizes_E))


@jax.custom_vjp
def dot(x_TD: jax.Array, w: Any) -> jax.Array:
    """x @ w (D, F), in x's dtype. A quantised w gets no gradient."""
    stack = jax.tree.map(lambda a: a[None], w)
    return grouped(x_TD, None, _all(x_TD), 0, stack)[0]


def _dot_backward(residuals, dy_TF):
    x_TD, w = residuals
    stack = jax.tree.map(lambda a: a[None], w)
    dx_TD = grouped_transposed(None, _all(x_TD), 0, (dy_TF, stack))
    if not isinstance(w, jax.Array):
        return dx_TD, jax.tree.map(_no_gradient, w)
    return dx_TD, outer(x_TD, None, dy_TF, None, _all(x_TD))[0].astype(w.dtype)


dot.defvjp(lambda x_TD, w: (dot(x_TD, w), (x_TD, w)), _dot_backward)


def _no_gradient(a):
    if jnp.issubdtype(a.dtype, jnp.floating):
        return jnp.zeros_like(a)
    return np.zeros(a.shape, jax.dtypes.float0)


def _all(x_TD):
    return jnp.full((1,), x_TD.shape[0], jnp.int32)


def _at(at_R):
    return jnp.zeros((0,), jnp.int32) if at_R is None else _ints(at_R)


def _ints(a):
    return jnp.asarray(a, jnp.int32)
