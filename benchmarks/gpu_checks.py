"""What a GPU's kernels compute, with gradients, beside float32: a part of `benchmarks.gpu`.

Groups that are empty or end inside a tile, widths of no whole tile, few rows; documents and windows.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.attention.contract import Call, Where
from moejax.attention.core import attend, seen
from moejax.moe.grouped_matmul import grouped_matmul, here


def cases() -> Iterator[tuple[dict, Callable[..., dict], tuple[Any, ...]]]:
    """A line that says what is checked; a function that measures the errors, and its arguments."""
    for sizes, d, f in (
        ((300, 1, 0, 129, 265), 128, 256),
        ((0, 0, 40), 192, 64),
        ((3, 17, 9, 1, 2), 8, 12),
        ((1, 0, 1, 0, 0, 1), 256, 128),
    ):
        for dtype in (jnp.bfloat16, jnp.float32):
            line = {"what": f"groups {sizes}, {d} -> {f}", "dtype": jnp.dtype(dtype).name}
            yield line, groups_error, (sizes, d, f, dtype)
    for width, v_width, window in (
        (128, 128, None),
        (128, 128, 100),
        (64, 64, None),
        (192, 128, None),
    ):
        line = {"what": f"attention {width}/{v_width}, window {window}", "dtype": "bfloat16"}
        yield line, attention_error, (width, v_width, window)


def groups_error(sizes, d: int, f: int, dtype) -> dict:
    rows, sizes_E = (
        8 * (sum(sizes) // 8 + 1),
        jnp.asarray(sizes, jnp.int32),
    )  # the last are no group's
    shapes = ((rows, d), (len(sizes), d, f), (rows, f))
    x, w, dy = (jax.random.normal(jax.random.key(i), a).astype(dtype) for i, a in enumerate(shapes))

    def of(name, dtype):
        call = functools.partial(grouped_matmul, group_sizes_E=sizes_E, implementation=name)
        y, pull = jax.vjp(call, x.astype(dtype), w.astype(dtype))
        return y, *pull(dy.astype(dtype))

    with jax.default_matmul_precision("highest"):
        want = jax.jit(of, static_argnums=(0, 1))("reference", jnp.float32)
    return _errors(jax.jit(of, static_argnums=(0, 1))(here(), dtype), want, ("y", "dx", "dW"))


def attention_error(width: int, v_width: int, window: int | None) -> dict:
    """Packed documents, 8 query heads on 2 key heads."""
    rows, length = 2, 1000
    ends = ((300, 301, 800, length), (length,))
    ids = [np.searchsorted(e, np.arange(length), side="right") + 1 for e in ends]
    document_BS = jnp.asarray(np.stack(ids), jnp.int32)
    starts = [np.concatenate([[0], e])[i - 1] for e, i in zip(ends, ids)]
    at_BS = jnp.asarray(np.arange(length) - np.stack(starts), jnp.int32)
    shapes = ((rows, length, 8, width), (rows, 2, length, width), (rows, 2, length, v_width))
    q, k, v = (jax.random.normal(jax.random.key(i), a, jnp.bfloat16) for i, a in enumerate(shapes))
    dy = jax.random.normal(jax.random.key(3), (*shapes[0][:3], v_width), jnp.bfloat16)

    def of(block, dtype):
        def call(q, k, v):
            where = Where(at_BS, document_BS, None)
            sight = seen({"k": k, "v": v}, Call(where, window=window)).sight
            return attend(q, k, v, sight, width**-0.5, block=block)

        y, pull = jax.vjp(call, q.astype(dtype), k.astype(dtype), v.astype(dtype))
        return y, *pull(dy.astype(dtype))

    with jax.default_matmul_precision("highest"):
        want = jax.jit(of, static_argnums=(0, 1))(128, jnp.float32)
    got = jax.jit(of, static_argnums=(0, 1))(0, jnp.bfloat16)
    return _errors(got, want, ("y", "dq", "dk", "dv"))


def _errors(got, want, names) -> dict:
    """The largest difference over the largest value."""
    errors = (
        jnp.abs(g.astype(jnp.float32) - w).max() / jnp.abs(w).max() for g, w in zip(got, want)
    )
    return {n: f"{float(e):.1e}" for n, e in zip(names, errors)}
