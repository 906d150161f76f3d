"""Checksums of arrays with more elements than 32 bits count, as the experts of a published 16B model have."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.runs import checksums


def test_more_than_32_bits_of_elements():
    """Traced only: 5 billion elements would not fit."""
    stack = jax.ShapeDtypeStruct((27, 64, 2048, 1408), jnp.bfloat16)
    start = np.zeros(4, np.uint32)
    traced = checksums._sum.trace(stack, start, stack.shape, True)
    assert traced.out_info.shape == () and traced.out_info.dtype == jnp.uint32


def test_places_wrap_around():
    """A part of a stack that begins past 2^32 counts as one that begins 2^32 earlier."""
    a = jax.random.bits(jax.random.key(0), (2, 64), jnp.uint32)
    shape = (2**27 + 2, 64)
    late = checksums._sum(a, np.array([2**26 + 3, 0], np.uint32), shape, True)
    early = checksums._sum(a, np.array([3, 0], np.uint32), shape, True)
    assert late == early != checksums._sum(a, np.array([4, 0], np.uint32), shape, True)
