"""tokamax's kernels: Pallas on GPU (Triton, Mosaic) and TPU, its own XLA fallback elsewhere.

An optional extra: `pip install 'moejax[kernels]'`. Imported when first used. Which kernel runs,
tokamax decides from the default device, so a program for a GPU has to be lowered where there is
one.
"""

from moejax.moe.grouped_matmul import ragged


def _ragged_dot_general(*args, **kwargs):
    try:
        import tokamax
    except ImportError as e:
        raise ImportError(
            "grouped_matmul 'tokamax' needs the package tokamax: pip install 'moejax[kernels]', "
            "or choose 'auto' or 'ragged'"
        ) from e
    return tokamax.ragged_dot_general(*args, **kwargs)


PRODUCTS = ragged.products_of(_ragged_dot_general)
