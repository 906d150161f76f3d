"""Grouped matrix product: rows sorted by expert, each row times its own expert's matrix.

    y_RF[r] = x_RD[r] @ w_EDF[e]     for the expert e whose group holds row r

Groups follow each other in row order: the first group_sizes_E[0] rows belong to expert 0, and so
on. One contract, several implementations in a table; a test suite runs over all of them.
"""

import types
import warnings
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from moejax import one_gpu
from moejax.moe.grouped_matmul import ragged, reference, tokamax_kernels
from moejax.moe.grouped_matmul.products import differentiable
from moejax.moe.varying import vary_together

IMPLEMENTATIONS: Mapping[str, Callable[[jax.Array, jax.Array, jax.Array], jax.Array]] = (
    types.MappingProxyType(
        {
            "reference": reference.grouped_matmul,
            "ragged": differentiable(ragged.PRODUCTS),
            "tokamax": differentiable(tokamax_kernels.PRODUCTS),
        }
    )
)


def grouped_matmul(
    x_RD: jax.Array,
    w_EDF: jax.Array,
    group_sizes_E: jax.Array,
    *,
    implementation: str = "ragged",
) -> jax.Array:
    """Each row times its expert's matrix.

    Args:
      x_RD: (R, D) rows sorted by expert, float32, bfloat16 or (with x64) float64.
      w_EDF: (E, D, F) one matrix per expert, of the same dtype.
      group_sizes_E: (E,) integers >= 0, rows of each expert; their sum is at most R.
      implementation: a key of IMPLEMENTATIONS; `here()` is the fast one of an accelerator. On CPU none is
        fast: the expert FFN has a path of its own there (`moejax.moe.windowed_ffn`), which the config's 'auto'
        takes.

    Returns:
      y_RF of x_RD's dtype, accumulated in float32 or better. Rows past sum(group_sizes_E) are zero,
      and so is their gradient, even where x_RD or the incoming gradient holds NaN there. Experts
      without rows get a zero gradient. Differentiable in x_RD and w_EDF.

    Raises:
      ValueError: unknown implementation, or shapes or dtypes that do not fit together.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"grouped_matmul implementation {implementation!r}: "
            f"choices are {', '.join(IMPLEMENTATIONS)}"
        )
    _check(x_RD, w_EDF, group_sizes_E)
    # Inside shard_map, operands that vary over fewer axes than others (replicated weights, say) are
    # marked as varying here, outside the stated gradient, so that JAX sums their gradients over
    # those axes.
    return IMPLEMENTATIONS[implementation](*vary_together(x_RD, w_EDF, group_sizes_E))


def here() -> str:
    """The implementation that 'auto' takes where the program is traced, on anything but a CPU.

    XLA computes a ragged product on a GPU as a dense one, every row by every expert; this says so where it is
    all there is.
    """
    if one_gpu.has_tokamax():
        return "tokamax"
    if jax.default_backend() != "gpu":
        return "ragged"  # native on a TPU
    way_out = (
        "pip install 'moejax[kernels]' brings kernels that multiply it by its own"
        if jax.device_count() == 1
        else "the kernels that multiply it by its own work on one device only"
    )
    warnings.warn(
        f"experts on a GPU: XLA multiplies every row by every expert; {way_out}", stacklevel=2
    )
    return "ragged"


def _check(x_RD, w_EDF, group_sizes_E):
    if x_RD.ndim != 2 or w_EDF.ndim != 3 or group_sizes_E.ndim != 1:
        raise ValueError(
            "grouped_matmul takes x (R, D), w (E, D, F) and group_sizes (E,); got shapes "
            f"{x_RD.shape}, {w_EDF.shape} and {group_sizes_E.shape}"
        )
    if w_EDF.shape[:2] != (group_sizes_E.shape[0], x_RD.shape[1]):
        raise ValueError(
            f"grouped_matmul: w of shape {w_EDF.shape} must start with (E, D) = "
            f"({group_sizes_E.shape[0]}, {x_RD.shape[1]}), from group_sizes and x"
        )
    if x_RD.dtype != w_EDF.dtype:
        raise ValueError(f"grouped_matmul: x is {x_RD.dtype} and w is {w_EDF.dtype}; cast one")
    if not jnp.issubdtype(group_sizes_E.dtype, jnp.integer):
        raise ValueError(f"grouped_matmul: group_sizes must be integers, not {group_sizes_E.dtype}")
