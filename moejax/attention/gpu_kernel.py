"""Attention by tokamax's kernels (on Hopper FlashAttention-3, 2407.08608), where the one device is a GPU.

They need keys that lie in a row: `Sight.first_BS`.
"""

import jax
import jax.numpy as jnp

from moejax import one_gpu
from moejax.attention.block_attention import Sight, pad

DTYPES = (jnp.bfloat16, jnp.float16)
WIDEST = 256  # channels of a head
TILE = 256  # queries and keys are filled up to a multiple of it


def serves(q_BSNH, v_BMTH, sight: Sight) -> bool:
    """Whether `attend` computes this here. Decided where the program is traced."""
    return (
        sight.first_BS is not None
        and sight.chosen is None
        and q_BSNH.dtype in DTYPES
        and max(q_BSNH.shape[-1], v_BMTH.shape[-1]) <= WIDEST
        and one_gpu.has_tokamax()
    )


def attend(q_BSNH, k_BMTH, v_BMTH, sight: Sight, scale: float) -> jax.Array:
    """`core.attend` for queries and keys of the same tokens, without sinks."""
    import tokamax

    assert sight.first_BS is not None  # `serves`
    length = q_BSNH.shape[1]
    padded = -(-length // TILE) * TILE
    q, k, v = (pad(a, 1, padded) for a in (q_BSNH, k_BMTH.swapaxes(1, 2), v_BMTH.swapaxes(1, 2)))
    # A query that fills up sees its own key and those before it; no query sees a key that does.
    first_BS = pad(sight.first_BS.astype(jnp.int32), 1, padded)
    back_B1S = (jnp.arange(padded, dtype=jnp.int32)[None] - first_BS)[:, None]
    out_BSNH = tokamax.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=True,
        local_window_size=(back_B1S, 0),  # of each query: keys before it, and behind it
        implementation=("mosaic", "triton"),
    )
    return out_BSNH[:, :length]
