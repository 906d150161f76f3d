"""Checksums of arrays: orbax restores flipped bits without a word.

An array's checksum is the sum, modulo 2^32, over its 32-bit words of a mix of the word and its place. For a
given place the mix is one to one, so no single damaged word goes unnoticed; anything else (two rows
swapped, a reversed array) is missed once in 2^32 times. Shards add up to the same number however the array is
split. It is computed where the shard lies, by its device.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from moejax.params import path_name

# XLA's CPU makes one vectorised loop of a few parts that are added up, and a slow one of a plain sum.
PARTS = 8


def local_sums(tree, *, mixed: bool = True) -> dict[str, int]:
    """The checksum of this process's part of every array, by path; talks to no other process.

    `mixed=False` gives plain sums of words, of which moejax 0.1.0 stored one for a whole item.
    """
    parts = {}
    for path, array in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = jnp.asarray(array)
        parts[path_name(path)] = [
            _sum(shard.data, _start(shard.index, array.shape), array.shape, mixed)
            for shard in array.addressable_shards
            if shard.replica_id == 0
        ]
    return {name: sum(map(int, p)) % 2**32 for name, p in jax.device_get(parts).items()}


def add_up(sums: dict[str, int]) -> dict[str, int]:
    """Every process's `local_sums` together; all processes must call this with the same names."""
    if jax.process_count() == 1:
        return sums
    rows = multihost_utils.process_allgather(np.array(list(sums.values()), np.uint32))
    totals = rows.sum(axis=0, dtype=np.uint64) % 2**32
    return dict(zip(sums, map(int, totals), strict=True))


def checksums(tree) -> dict[str, int]:
    """The checksum of every array by its path, the same on any mesh. bfloat16 and other short floats count as
    the float32 that they are, so that a model read in float32 has the checksums of what was saved."""
    return add_up(local_sums(tree))


def _start(index: tuple, shape: tuple) -> np.ndarray:
    """Where a shard begins; keys have further axes, which are never split."""
    return np.array([s.indices(n)[0] for s, n in zip(index, shape)], np.uint32)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _sum(a: jax.Array, start: jax.Array, shape: tuple, mixed: bool) -> jax.Array:
    words = _words(a)
    shape = (*shape, *words.shape[a.ndim :])
    strides = [math.prod(shape[i + 1 :]) % 2**32 for i in range(len(shape))]
    first = sum((start[i] * jnp.uint32(strides[i]) for i in range(a.ndim)), jnp.uint32(0))
    size, flat = words.size, words.reshape(-1)
    if words.shape[1:] == shape[1:]:  # without a hole

        def places(begin: int, n: int):
            return jax.lax.iota(jnp.uint32, n) + jnp.uint32(begin % 2**32)
    else:
        iota = functools.partial(jax.lax.broadcasted_iota, jnp.uint32, words.shape)
        every = sum((jnp.uint32(n) * iota(i) for i, n in enumerate(strides)), jnp.uint32(0))
        every = every.reshape(-1)

        def places(begin: int, n: int):
            return every[begin : begin + n]

    def part(begin: int, n: int):
        x = flat[begin : begin + n]
        return _mix(x + (places(begin, n) + first) * jnp.uint32(0x9E3779B9)) if mixed else x

    n = size // PARTS
    total = sum((part(i * n, n) for i in range(PARTS)), jnp.zeros(n, jnp.uint32))
    rest = part(n * PARTS, size - n * PARTS)
    return total.sum(dtype=jnp.uint32) + rest.sum(dtype=jnp.uint32)


def _mix(x):
    """One to one, and every bit of x matters to every bit: triple32's first rounds (Wellons, 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _words(a: jax.Array) -> jax.Array:
    """The bits of each element as one uint32, or two in a last axis; of a key, its words."""
    if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
        return jax.random.key_data(a)
    if a.dtype == jnp.bfloat16:
        return jax.lax.bitcast_convert_type(a, jnp.uint16).astype(jnp.uint32) << 16
    if jnp.issubdtype(a.dtype, jnp.floating) and a.dtype.itemsize < 4:
        a = a.astype(jnp.float32)
    elif a.dtype == bool or a.dtype.itemsize < 4:
        a = a.astype(jnp.int32)
    return jax.lax.bitcast_convert_type(a, jnp.uint32)
