"""tokamax's kernels for GPU and TPU, each product by the one that is fastest there.

An optional extra: `pip install 'moejax[kernels]'`. Imported when first used. tokamax reads the default device,
so a program for a GPU has to be lowered where there is one.

tokamax ships the best tiles for a few shapes, and takes small and slow ones for all others. So on Hopper the
tiles of its Mosaic kernel are named here.

They do not say how their results vary over a mesh, which `jax.shard_map` needs to know: see `one_gpu`.
"""

import functools
import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from moejax.moe.grouped_matmul import ragged
from moejax.moe.grouped_matmul.products import Products

# Of rows, columns and the dimension that is summed; steps of the sum in flight; blocks that walk
# eight columns wide.
HOPPER_TILES = {
    "block_m": 128,
    "block_n": 128,
    "block_k": 64,
    "num_stages": 5,
    "split_k": 1,
    "persistent": True,
    "grid_tile_width": 8,
}

# The first that takes the operands computes the product. Mosaic takes 16 bits, rows in eights, and widths of
# whole tiles.
ON_GPU = {
    ragged.CONTRACT_D: ("mosaic", "triton"),
    ragged.CONTRACT_F: ("mosaic", "triton"),
    ragged.CONTRACT_ROWS: ("triton", "mosaic"),
}


def products_by(on_gpu: Mapping[Any, Sequence[str]]) -> Products:
    """The three products by the kernels named for each."""
    three = ragged.products_of(functools.partial(_ragged_dot_general, on_gpu))

    def outer(x_RD, y_RF, group_sizes_E):
        # The Triton kernel reads rows of other groups for a group that has none (seen with tokamax 0.0.14).
        w_EDF = three.outer(x_RD, y_RF, group_sizes_E)
        return jnp.where(group_sizes_E[:, None, None] > 0, w_EDF, 0)

    return three._replace(outer=outer)


def _ragged_dot_general(on_gpu, a, b, group_sizes_E, dimensions, *, preferred_element_type):
    try:
        import tokamax
    except ImportError as e:
        raise ImportError(
            "grouped_matmul 'tokamax' needs the package tokamax: pip install 'moejax[kernels]', "
            "or choose 'auto' or 'ragged'"
        ) from e
    if a.dtype == jnp.float64:  # no kernel has it
        return jax.lax.ragged_dot_general(
            a, b, group_sizes_E, dimensions, preferred_element_type=preferred_element_type
        )
    call = functools.partial(
        tokamax.ragged_dot_general,
        a,
        b,
        tokamax.RaggedDotGroupSizes(group_sizes_E, a.shape[0]),
        dimensions,
        # What the forward product was tuned with; it means a's dtype, too.
        preferred_element_type=None if dimensions is ragged.CONTRACT_D else preferred_element_type,
    )
    if jax.default_backend() != "gpu":
        return call(implementation="mosaic")
    widths = (*a.shape[1:], *b.shape[1:])
    fits = a.dtype.itemsize == 2 and a.shape[0] % 8 == 0 and all(d % 64 == 0 for d in widths)
    kernels = [k for k in on_gpu[dimensions] if fits or k != "mosaic"]
    if dimensions is not ragged.CONTRACT_ROWS:
        kernels = [_hopper_mosaic() if k == "mosaic" else k for k in kernels]
    try:
        return call(implementation=kernels)
    except ValueError as e:
        if "Unknown implementation" not in str(e):
            raise
        warnings.warn(
            "tokamax has no Triton kernels here: gradients of expert weights take longer. "
            "pip install jax-triton",
            stacklevel=2,
        )
        return call(implementation="mosaic")


@functools.cache
def _hopper_mosaic() -> Any:
    """tokamax's Mosaic kernel with HOPPER_TILES; where that cannot be, its name: tiles by its own choice."""
    if getattr(jax.devices()[0], "compute_capability", "") != "9.0":
        return "mosaic"
    try:
        from tokamax._src.ops.ragged_dot import api, pallas_mosaic_gpu_common

        tiles = pallas_mosaic_gpu_common.Config(**HOPPER_TILES)
        return api.IMPLEMENTATIONS["mosaic_gpu"].replace(config=tiles)
    except (ImportError, AttributeError, TypeError, ValueError) as e:
        warnings.warn(
            f"tokamax {importlib.metadata.version('tokamax')} does not take tiles as 0.0.17 does ({e}): "
            "experts may be slower",
            stacklevel=2,
        )
        return "mosaic"


PRODUCTS = products_by(ON_GPU)
