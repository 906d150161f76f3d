"""Attention in blocks is attention: values, gradients, what is not computed, and memory."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention import block_attention
from moejax.attention.block_attention import Sight, attend_in_blocks
from moejax.attention.core import attend
from moejax.config import AttentionConfig, ComputeConfig, ModelConfig, ObjectiveConfig
from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.models.loss import loss_fn
from moejax.params import init_params

S = 41  # no block divides it
ROW = np.arange(S)


def packed():
    """Positions and documents of two rows: documents of 3, 20 and 11 tokens and padding; one document."""
    lengths = [(3, 20, 11), (S,)]
    segments, positions = np.zeros((2, S), np.int32), np.zeros((2, S), np.int32)
    for row, documents in enumerate(lengths):
        start = 0
        for number, n in enumerate(documents, 1):
            segments[row, start : start + n] = number
            positions[row, start : start + n] = np.arange(n)
            start += n
    return positions, segments


POSITIONS, SEGMENTS = packed()
SHUFFLED = np.random.default_rng(1).permuted(np.stack([ROW, ROW]), axis=1)


@dataclasses.dataclass(frozen=True)
class Case:
    """Heads, key heads, widths of keys and of values; key positions; what decides which keys are seen."""

    heads: tuple[int, int, int, int] = (4, 2, 6, 6)
    block: int = 8
    window: int | None = None
    packed: bool = False
    cached: bool = False  # 60 slots, and queries at positions 10 to 50
    positions: np.ndarray | None = None
    sinks: bool = False

    def sight(self, window) -> Sight:
        if self.cached:
            at = np.stack([ROW + 10, ROW + 4])
            return Sight(jnp.asarray(at), jnp.arange(60)[None], window=window)
        if self.packed:
            at, documents = jnp.asarray(POSITIONS), jnp.asarray(SEGMENTS)
            return Sight(at, at, documents, documents, window)
        at = jnp.asarray(np.stack([ROW, ROW]) if self.positions is None else self.positions)
        return Sight(at, at, window=window)

    def arrays(self, dtype):
        n, m, h, v = self.heads
        keys = jax.random.split(jax.random.key(0), 5)
        t = 60 if self.cached else S
        shapes = ((2, S, n, h), (2, m, t, h), (2, m, t, v), (n,), (2, S, n, v))
        return [jax.random.normal(k, s, dtype) for k, s in zip(keys, shapes, strict=True)]


CASES = {
    "multi-head": Case((2, 2, 6, 6)),
    "grouped": Case(),
    "values of another width": Case((2, 2, 6, 4)),
    "one key head": Case((4, 1, 6, 5), cached=True),
    "one block": Case(block=64),
    "blocks of one": Case(block=1, window=3, packed=True),
    "window within a block": Case(window=3),
    "window over blocks": Case(window=19),
    "window of zero": Case(window=0),
    "sinks": Case(sinks=True),
    "sinks, window": Case(sinks=True, window=5),
    "packed": Case(packed=True),
    "packed, window, sinks": Case(packed=True, window=6, sinks=True, block=7),
    "cache": Case(cached=True),
    "cache, window": Case(cached=True, window=9),
    "positions in no order": Case(positions=SHUFFLED, window=9),
}


def both(case: Case, dtype):
    """(values, gradients of q, k, v and sinks) at once and in blocks; the window is traced, as in a scan over
    layers."""
    *args, cotangent = case.arrays(dtype)

    def of(function, q, k, v, sinks, window):
        out = function(q, k, v, case.sight(window), 0.4, sinks if case.sinks else None)
        return (out * cotangent).astype(sums).sum(), out

    results, sums = [], jnp.promote_types(dtype, "float32")
    for function in (attend, functools.partial(attend_in_blocks, block=case.block)):
        grad = jax.value_and_grad(functools.partial(of, function), (0, 1, 2, 3), has_aux=True)
        window = None if case.window is None else jnp.asarray(case.window)
        (_, out), grads = jax.jit(grad)(*args, window)
        named = zip(("out", "q", "k", "v", "sinks"), (out, *grads), strict=True)
        results.append(jax.device_get(dict(named)))
    return results


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name):
    """float64: sums of some tens of terms of order 1, in another order."""
    with jax.enable_x64(True):
        want, got = both(CASES[name], "float64")
    for key, value in want.items():
        assert np.isfinite(value).all() and (key == "sinks" or np.abs(value).max() > 0.1)
        np.testing.assert_allclose(got[key], value, rtol=1e-12, atol=1e-13, err_msg=key)
    assert (np.abs(want["sinks"]).max() > 0.01) == CASES[name].sinks


def test_bfloat16():
    """Softmax in float32, products of bfloat16, as without blocks. A bfloat16 has 8 bits: each way is off by
    up to 2^-8 of sums of order 1 (weights sum to 1; a gradient sums up to 41 of them)."""
    case = Case(sinks=True, packed=True)
    with jax.enable_x64(True):
        exact = both(case, "float64")[0]
        want, got = both(case, "bfloat16")
    for key, value in exact.items():
        assert got[key].dtype == want[key].dtype == "bfloat16"
        error = {n: np.abs(np.asarray(a, "float64") - value).max() for n, a in
                 (("blocks", got[key]), ("at once", want[key]))}  # fmt: skip
        # Inputs of the three differ by their rounding alone: it is what both have in common.
        assert error["blocks"] < max(1.5 * error["at once"], 2**-7), (key, error)


# --------------------------------------------------------------------------------------------------
# What is not computed.


def needed(sight: Sight, block: int) -> np.ndarray:
    """`_needed` of a sight in blocks, which divide it."""
    cut = lambda a: None if a is None else block_attention.cut(a, a.shape[1] // block, block)  # noqa: E731
    parts = map(cut, sight[:4])
    return np.asarray(block_attention._needed(Sight(*parts, sight.window)))


def seen(sight: Sight, block: int) -> np.ndarray:
    """The same by the whole mask."""
    mask = np.asarray(sight.mask_BST()).any(axis=0)
    i, j = (n // block for n in mask.shape)
    return mask.reshape(i, block, j, block).any(axis=(1, 3))


@pytest.mark.parametrize("window", [None, 0, 1, 5, 8, 9, 30])
def test_blocks_that_no_query_sees_are_left_out(window):
    at = jnp.arange(64)[None]
    row = Sight(at, at, window=window)
    np.testing.assert_array_equal(needed(row, 8), seen(row, 8))
    documents = jnp.repeat(jnp.array([1, 2, 3, 0]), jnp.array([16, 24, 20, 4]))[None]
    starts = jnp.repeat(jnp.array([0, 16, 40, 60]), jnp.array([16, 24, 20, 4]))[None]
    many = Sight(at - starts, at - starts, documents, documents, window)
    np.testing.assert_array_equal(needed(many, 8), seen(many, 8))
    assert needed(many, 8).sum() <= 2 * (2 + 1) // 2 + 2 * (3 * 4 // 2)
    # Rows that differ: what one of them needs.
    first, second = (jnp.concatenate(a) for a in ((at - starts, at), (documents, 0 * at + 1)))
    rows = Sight(first, first, second, second, window)
    np.testing.assert_array_equal(needed(rows, 8), seen(rows, 8))
    # A row without order: more may be computed, never less.
    lost = Sight(jnp.asarray(SHUFFLED[:, :40]), jnp.asarray(SHUFFLED[:, :40]), window=window)
    assert (needed(lost, 8) >= seen(lost, 8)).all()


def test_what_is_left_out_is_not_touched():
    """Keys and values that are not numbers, in the future of two blocks and before their window: multiplied by
    a weight of zero they would still spoil values and gradients."""
    q, k, v, _, cotangent = Case().arrays("float32")
    spoil = lambda a: a.at[:, :, :7].set(jnp.nan).at[:, :, 28:].set(jnp.nan)  # noqa: E731
    at = jnp.asarray(np.stack([ROW, ROW]))

    @jax.jit
    def run(k, v):
        of = lambda q: attend_in_blocks(q, k, v, Sight(at, at, window=8), 0.4, block=7)  # noqa: E731
        out, pullback = jax.vjp(of, q)
        return out[:, 14:28], pullback(cotangent)[0][:, 14:28]

    for got, want in zip(run(spoil(k), spoil(v)), run(k, v), strict=True):
        assert np.isfinite(got).all()
        np.testing.assert_array_equal(got, want)


# --------------------------------------------------------------------------------------------------
# Memory.


def test_memory_grows_with_the_length():
    """Twice the tokens take twice the memory, forward and backward; 2 GB at 4096 tokens is gone. A table of
    blocks, a bit each for 256 x 256 scores, does grow with the square."""

    def temporary(length, gradient):
        def loss(q, k, v):
            at = jnp.arange(length)[None]
            return attend(q, k, v, Sight(at, at), 0.125).sum()

        shapes = [(1, length, 8, 64), (1, 8, length, 64), (1, 8, length, 64)]
        args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
        function = jax.value_and_grad(loss, (0, 1, 2)) if gradient else loss
        return jax.jit(function).lower(*args).compile().memory_analysis().temp_size_in_bytes

    for gradient in (False, True):
        half, whole = (temporary(n, gradient) for n in (2048, 4096))
        assert whole / half < 2.3 and whole < 200e6


# --------------------------------------------------------------------------------------------------
# Whole models.

GQA = AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=8, sinks=True, windows=(5, 0))
MLA = AttentionConfig(
    kind="mla", num_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=6,
)  # fmt: skip
MODEL = ModelConfig(vocab_size=32, d_model=16, num_layers=3, d_ff=16, init_std=0.2, attention=GQA)
MODELS = {
    "windows and sinks": MODEL,
    "mla and mtp": dataclasses.replace(MODEL, attention=MLA, num_layers=2, mtp_depth=1),
}
WAYS = {"windows and sinks": dict(remat="full"), "mla and mtp": dict(remat="dots")}


@pytest.mark.parametrize(
    "name", ["windows and sinks", pytest.param("mla and mtp", marks=pytest.mark.product)]
)
def test_a_model_in_blocks(name):
    """Loss and every gradient on packed rows, scanned and rematerialised; float64: sums of a few hundred
    terms of order 1."""
    cfg = MODELS[name]
    with jax.enable_x64(True):
        params, state = transformer.init_model(cfg, jax.random.key(0))
        params = jax.tree.map(lambda a: a.astype("float64"), params)
        batch = jax.tree.map(jnp.asarray, synthetic_batch(30, 2, 32))

        @functools.partial(jax.jit, static_argnums=2)
        def run(params, batch, block):
            compute = ComputeConfig(dtype="float64", attention_block=block, **WAYS[name])
            of = lambda p: loss_fn(  # noqa: E731
                p, state, batch, cfg, objective=ObjectiveConfig(), compute=compute
            )[0]
            return jax.value_and_grad(of)(params)

        want, got = jax.device_get((run(params, batch, 30), run(params, batch, 8)))
    assert 1 < want[0] < 10
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, want)


@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_a_second_part_in_blocks(name):
    """Read into the cache, and further tokens against it (MLA: absorbed)."""
    cfg = MODELS[name]
    params = init_params(transformer.param_specs(cfg), jax.random.key(1))
    state = transformer.init_router_state(cfg)
    tokens = jax.random.randint(jax.random.key(2), (2, 29), 0, 32)

    @functools.partial(jax.jit, static_argnums=0)
    def run(block):
        read = functools.partial(
            transformer.forward,
            params,
            state,
            cfg=cfg,
            compute=ComputeConfig(attention_block=block),
        )
        first = read(tokens[:, :19], cache=init_cache(cfg, 2, 32), prefill=True)
        at = jnp.broadcast_to(jnp.arange(19, 29)[None], (2, 10))
        second = read(tokens[:, 19:], cache=first.cache, positions_BS=at)
        return jnp.concatenate([first.hidden_BSD, second.hidden_BSD], axis=1)

    # float32, values of order 1.
    np.testing.assert_allclose(run(4), run(32), rtol=1e-4, atol=1e-4)


def test_the_length_decides():
    size = block_attention.block_size
    assert [size(n) for n in (1, 256, 512, 513, 4096)] == [0, 0, 0, 256, 256]
    assert size(100, 64) == 64 and size(64, 64) == 0 and size(4096, 4096) == 0
