"""What is handed to a GPU's attention kernel, and when.

A dense stand-in has its interface; the kernel is checked where there is a GPU: `benchmarks.gpu --only=Checks`.
"""

import importlib.machinery
import importlib.util
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention import gpu_kernel
from moejax.attention.block_attention import block_size
from moejax.attention.contract import Call, Where
from moejax.attention.core import attend, seen

S = 41
DOCUMENTS = np.stack([np.repeat([1, 2, 3, 0], [3, 20, 11, 7]), np.ones(S, int)]).astype(np.int32)
STARTS = np.stack([np.repeat([0, 3, 23, 34], [3, 20, 11, 7]), np.zeros(S, int)])
POSITIONS = (np.arange(S) - STARTS).astype(np.int32)


def dot_product_attention(
    query, key, value, *, scale, is_causal, local_window_size, implementation
):
    """As tokamax's: queries [B,T,N,H], keys [B,S,K,H]; of each query, the keys before and behind it."""
    assert is_causal and implementation == ("mosaic", "triton")
    before, behind = local_window_size
    n, t = query.shape[2], query.shape[1]
    assert t % gpu_kernel.TILE == 0
    k, v = (jnp.repeat(a, n // a.shape[2], axis=2) for a in (key, value))
    back = jnp.arange(t)[:, None] - jnp.arange(t)[None]  # of a key behind its query
    mask = (back[None, None] <= jnp.swapaxes(before, -1, -2)[:, None]) & (back >= -behind)[
        None, None
    ]
    logits = jnp.where(mask, jnp.einsum("bqnh,bknh->bnqk", query, k) * scale, -1e30)
    return jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(logits), v)


@pytest.fixture
def gpu(monkeypatch):
    """One GPU with tokamax, as far as the choice of a kernel goes; float32 is let through for exact values."""
    tokamax = types.ModuleType("tokamax")
    tokamax.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
    tokamax.dot_product_attention = dot_product_attention  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tokamax", tokamax)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setattr(gpu_kernel, "DTYPES", (jnp.float32,))
    monkeypatch.setattr(gpu_kernel, "TILE", 16)


def _arrays(h=6, v=4):
    shapes = ((2, S, 4, h), (2, 2, S, h), (2, 2, S, v), (2, S, 4, v))
    return [jax.random.normal(k, s) for k, s in zip(jax.random.split(jax.random.key(0), 4), shapes)]


def _sight(window=None, packed=True, **keys):
    where = Where(jnp.asarray(POSITIONS if packed else np.arange(S)[None].repeat(2, 0)), None, None)
    where = where._replace(segment_ids_BS=jnp.asarray(DOCUMENTS) if packed else None)
    return seen(keys or {"k": jnp.zeros((2, 2, S, 6))}, Call(where, window=window)).sight


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("window", [None, 0, 5])
def test_the_first_key_that_a_query_sees(window, packed):
    """A run from it to the query's own key is what the mask says, for every token of a document."""
    sight = _sight(window, packed)
    at = np.arange(S)
    run = (at >= np.asarray(sight.first_BS)[:, :, None]) & (at <= at[:, None])
    real = DOCUMENTS > 0 if packed else np.ones((2, S), bool)
    np.testing.assert_array_equal(run[real], np.asarray(sight.mask_BST())[real])


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("window", [None, 5])
def test_values_and_gradients(gpu, window, packed):
    *args, dy = _arrays()
    real_BS = jnp.asarray(DOCUMENTS > 0 if packed else np.ones((2, S), bool))
    sight = _sight(window, packed)
    assert gpu_kernel.serves(args[0], args[2], sight)

    def of(sight):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, sight, 0.4), *args)
        real = real_BS[:, :, None, None]
        return out * real, *pull(dy * real)

    got, want = of(sight), of(sight._replace(first_BS=None))
    for name, g, w in zip(("out", "q", "k", "v"), got, want, strict=True):
        # Sums of up to 41 float32 products of order 1, in another order.
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5, err_msg=name)


def test_a_kernel_is_for_what_it_can_do(gpu, monkeypatch):
    q, _, v, _ = _arrays()
    sight = _sight()
    assert gpu_kernel.serves(q, v, sight)
    assert not gpu_kernel.serves(q.astype(jnp.bfloat16), v, sight)  # not in DTYPES here
    assert not gpu_kernel.serves(*_arrays(h=264)[:3:2], sight)
    assert not gpu_kernel.serves(q, v, sight._replace(first_BS=None))
    assert not gpu_kernel.serves(q, v, sight._replace(chosen=object()))
    monkeypatch.setattr(jax, "device_count", lambda: 2)
    assert not gpu_kernel.serves(q, v, sight)


def test_sinks_and_blocks_asked_for_are_not_the_kernels(gpu, monkeypatch):
    *args, _ = _arrays()
    monkeypatch.setattr(gpu_kernel, "attend", lambda *_: pytest.fail("the kernel was called"))
    attend(*args, _sight(), 0.4, sinks_N=jnp.zeros(4))
    attend(*args, _sight(), 0.4, block=8)


def test_without_tokamax(gpu, monkeypatch):
    monkeypatch.delitem(sys.modules, "tokamax")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    q, _, v, _ = _arrays()
    assert not gpu_kernel.serves(q, v, _sight())


def test_blocks_of_a_gpu(monkeypatch):
    """Where no kernel serves: larger blocks than on a CPU."""
    assert block_size(4096) == 256 and block_size(512) == 0
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert block_size(4096) == 1024 and block_size(700) == 0 and block_size(4096, 64) == 64
