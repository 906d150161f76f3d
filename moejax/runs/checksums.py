"""Checksums of saved arrays: orbax restores flipped bits without a word."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils


def checksum(tree) -> int:
    """The sum of all 32-bit words modulo 2^32: the same on any mesh, and changed by any damaged word.

    bfloat16 counts as the float32 that it is, so that a model read in float32 has the checksum with which
    it was saved in bfloat16. Each shard is read once, on the host, where it lies.
    """
    total = 0
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                total += _sum_of_words(np.asarray(shard.data).reshape(-1))
    if jax.process_count() > 1:
        total = multihost_utils.process_allgather(np.uint32(total % 2**32)).sum(dtype=np.uint64)
    return int(total) % 2**32


def _sum_of_words(a: np.ndarray) -> int:
    if a.dtype == jnp.bfloat16:
        return int(a.view(np.uint16).sum(dtype=np.uint64)) << 16
    a = a.astype(np.float32) if a.dtype == np.float16 else a
    return int(a.view(np.uint32).sum(dtype=np.uint64))


def verify(tree, meta: dict, item: str) -> None:
    """ValueError if arrays are not those that were saved (as far as checksums were saved with them)."""
    saved = meta.get("checksums", {}).get(item)
    if saved is not None and checksum(tree) != saved:
        raise ValueError(f"checksum of its {item} differs: damaged data")
