"""Attention to a window and to compressed keys (DeepSeek-V4, 2606.19348 section 2.3) against float64 NumPy.

Both sides are float64, but moejax's angles, up to 25 radians, are float32: 1e-5 of values near 1. Between two
ways of moejax there is rounding alone, 1e-10.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compressed_case import CFG, KINDS, LENGTHS, A, batch, oracle, params, taught

from moejax.attention import compressed, kind_of
from moejax.attention.contract import Call, Where
from moejax.config import ObjectiveConfig
from moejax.config_checks import model_problems

near = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
same = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-10)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64():
        yield


def where_of(position, document=None):
    position = jnp.asarray(position)
    document = None if document is None else jnp.asarray(document)
    return Where(position, document, kind_of(A).rotation(CFG, position))


@functools.partial(jax.jit, static_argnames=("kind", "block", "cfg"))
def run(p, x, where, kind, block=0, cfg=CFG):
    return kind_of(A).attend(p, x, cfg, Call(where, kind, block=block)).y_BSD


# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_documents_equal_the_equations_of_each_alone(kind, block):
    """At once, and in blocks of 4 queries that the documents and windows do not respect."""
    x, position, document = batch()
    got = np.asarray(run(params(kind), x, where_of(position, document), kind, block))
    for row in range(2):
        for number in range(1, len(LENGTHS[row]) + 1):
            here = document[row] == number
            want = oracle(params(kind), x[row, here], kind)
            near(got[row, here], want)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_before_a_document_is_not_seen(kind):
    """As a left-padded batch comes: padding at position 0, then the document from position 0 on."""
    x = np.random.default_rng(3).normal(size=(1, 20, 12))
    position = np.clip(np.arange(20) - 7, 0, None)[None]
    document = (np.arange(20) >= 7).astype(int)[None]
    got = run(params(kind), x, where_of(position, document), kind)[0, 7:]
    near(got, oracle(params(kind), x[0, 7:], kind))


def test_a_part_of_a_document_makes_entries_of_whole_windows_alone():
    """A row may begin inside a document: the window that it cuts, and what overlaps with it, are not there."""
    x = np.random.default_rng(4).normal(size=(1, 12, 12))
    position = np.arange(4, 16)[None]
    of = compressed.compress.windows(where_of(position), 3)
    np.testing.assert_array_equal(of.at_BE[0, :3], [8, 11, 14])
    np.testing.assert_array_equal(of.end_BE[0, :3], [4, 7, 10])
    np.testing.assert_array_equal(of.alone_BE[0, :3], [True, False, False])
    assert of.at_BE[0, 3] == compressed.NOWHERE
    assert np.isfinite(run(params("csa"), x, where_of(position), "csa")).all()


@pytest.mark.parametrize("kind", ["csa", "hca"])
def test_gradients(kind):
    """Against central differences along a random direction, in blocks too; the indexer learns nothing."""
    x, position, document = batch()
    where, p = where_of(position, document), jax.tree.map(jnp.asarray, params(kind))
    noise = np.random.default_rng(5)
    out = jnp.asarray(noise.normal(size=x.shape) * (document > 0)[..., None])

    def loss(p, x, block=0):
        return (run(p, x, where, kind, block) * out).sum()

    at = (p, jnp.asarray(x))
    grads = jax.grad(loss, (0, 1))(*at)
    in_blocks = jax.grad(lambda p, x: loss(p, x, 4), (0, 1))(*at)
    jax.tree.map(same, grads, in_blocks)
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads[0]):
        assert (np.abs(leaf).max() > 1e-6) == ("indexer" not in str(path)), path
    # Nothing may step over a pick of the indexer: it stands still.
    moves = jax.tree_util.tree_map_with_path(
        lambda path, a: (
            (0 if kind == "csa" and ("indexer" in str(path) or "q_" in str(path)) else 1)
            * noise.normal(size=a.shape)
        ),
        at[0],
    )
    step = 1e-5
    shift = lambda by: loss(jax.tree.map(lambda a, d: a + by * d, at[0], moves), x)  # noqa: E731
    want = sum(jax.tree.leaves(jax.tree.map(lambda a, b: (a * b).sum(), grads[0], moves)))
    np.testing.assert_allclose((shift(step) - shift(-step)) / (2 * step), want, rtol=1e-6)


@functools.partial(jax.jit, static_argnames=("objective", "block"))
def attended(p, x, where, mask, objective, block=0):
    call = Call(where, "csa", block=block, objective=objective, mask_BS=mask)
    return kind_of(A).attend(p, x, CFG, call)


@pytest.mark.parametrize("dense", [False, True], ids=["sparse", "warm-up"])
def test_the_indexer_is_taught_by_attention_to_entries(dense):
    """Over entries alone, the tokens before the first one left out; in blocks the same. The indexer learns from
    it what central differences say and nothing else does; from the layer's output it learns nothing."""
    x, position, document = batch()
    objective = ObjectiveConfig(index_loss=0.5, index_dense=dense)
    p, where = jax.tree.map(jnp.asarray, params("csa")), where_of(position, document)
    of = functools.partial(attended, where=where, mask=document > 0, objective=objective)
    loss = lambda p, x, block=0: of(p, x, block=block).losses["index"]  # noqa: E731
    rows = [(row, n) for row in range(2) for n in range(1, len(LENGTHS[row]) + 1)]
    each = [taught(params("csa"), x[row, document[row] == n], dense) for row, n in rows]
    near(loss(p, x), 0.5 * sum(each))  # one layer of the three has an indexer
    same(loss(p, x, 4), loss(p, x))
    # While it warms up, attention sees all entries.
    seen = dataclasses.replace(A, index_topk=99) if dense else A
    same(of(p, x).y_BSD, run(p, x, where, "csa", cfg=dataclasses.replace(CFG, attention=seen)))
    to_p, to_x = jax.grad(loss, (0, 1))(p, x)
    for path, leaf in jax.tree_util.tree_leaves_with_path(to_p):
        assert np.any(np.asarray(leaf)) == ("indexer" in str(path)), path
    assert not np.any(np.asarray(to_x))
    indexer = jax.grad(lambda p: (of(p, x).y_BSD ** 2).sum())(p)["indexer"]
    assert not any(np.any(np.asarray(a)) for a in jax.tree.leaves(indexer))
    if dense:  # picks step
        noise, step = np.random.default_rng(7), 1e-5
        moves = jax.tree.map(lambda a: noise.normal(size=a.shape), p["indexer"])
        moved = lambda by: {  # noqa: E731
            **p,
            "indexer": jax.tree.map(lambda a, d: a + by * d, p["indexer"], moves),
        }
        want = (loss(moved(step), x) - loss(moved(-step), x)) / (2 * step)
        got = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), to_p["indexer"], moves)))
        np.testing.assert_allclose(got, want, rtol=1e-6)


def test_a_row_without_an_entry_teaches_nothing():
    where = where_of(np.arange(2)[None])
    x = np.ones((1, 2, 12))
    out = attended(params("csa"), x, where, np.ones((1, 2)), ObjectiveConfig(index_loss=1.0))
    assert out.losses["index"] == 0.0


def test_an_indexer_loss_needs_an_indexer():
    only = dataclasses.replace(CFG, attention=dataclasses.replace(A, layer_kinds=("hca",) * 3))
    (said,) = model_problems(only, objective=ObjectiveConfig(index_loss=1.0))
    assert "index_loss=1.0 teaches nothing: no layer has an indexer" in said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("per_pass", [1, 2])
def test_step_by_step_equals_one_pass(kind, per_pass):
    """Right-padded prompts of 1, 8 and 14 tokens, then the rest by one or two tokens; what stands behind a
    prompt is absurd, and of two tokens the second is first a wrong guess that is written over."""
    kept = np.array([1, 8, 14])
    x = np.random.default_rng(6).normal(size=(3, 26, 12))
    p = jax.tree.map(jnp.asarray, params(kind))
    position = np.broadcast_to(np.arange(26), (3, 26))
    want = np.asarray(run(p, x, where_of(position), kind))
    slots = kind_of(A).cache(CFG, kind, 3, 26)
    cache = {
        n: jnp.full((2, *s.shape), 7.0) for n, s in slots.items()
    }  # two layers; the second is ours
    prompt = np.where((position < kept[:, None])[..., None], x, 1e3)[:, :14]
    attend = kind_of(A).attend
    call = functools.partial(Call, layer_kind=kind, slot=1)

    @jax.jit
    def prefill(cache):
        here = position[:, :14]
        to = call(where_of(here), cache=cache, prefill=True, mask_BS=here < kept[:, None])
        return attend(p, jnp.asarray(prompt), CFG, to)[:2]

    @jax.jit
    def step(x, at, cache):
        return attend(p, x, CFG, call(where_of(at), cache=cache))[:2]

    y, cache = prefill(cache)
    for row, n in enumerate(kept):
        same(y[row, :n], want[row, :n])
    rows = np.arange(3)
    for i in range(10):
        at = kept[:, None] + i + np.arange(per_pass)[None]
        new = x[rows[:, None], at]
        if per_pass == 2 and i % 3 < 2:
            new[:, 1] = 50.0  # rejected: the next pass begins with the right one
        y, cache = step(new, at, cache)
        assert cache is not None
        same(y[:, 0], want[rows, at[:, 0]])
        if per_pass == 2 and i % 3 == 2:
            same(y[:, 1], want[rows, at[:, 1]])
    for a in cache.values():
        assert (a[0] == 7).all()


@pytest.mark.parametrize("kind", KINDS)
def test_memory_grows_with_the_length_of_a_row(kind):
    """Forward and backward in blocks of 32: twice the tokens take twice the memory. All scores at once would be
    four times those of half the row: 4 heads, 8 bytes."""
    p = jax.tree.map(jnp.asarray, params(kind))

    def peak(length):
        where = where_of(np.arange(length)[None])
        loss = lambda p, x: run(p, x, where, kind, 32).sum()  # noqa: E731
        x = jax.ShapeDtypeStruct((1, length, 12), "float64")
        return jax.jit(jax.grad(loss)).lower(p, x).compile().memory_analysis().temp_size_in_bytes

    small, large = peak(1024), peak(2048)
    assert large < 2.2 * small
    assert large < 2048 * 2048 * 4 * 8 / 3


def test_all_entries_are_picked_where_there_are_few():
    x, position, document = batch()
    many = dataclasses.replace(A, index_topk=99)
    p = params("csa")
    wide = dataclasses.replace(CFG, attention=many)
    few = run(p, x, where_of(position, document), "csa")
    every = run(p, x, where_of(position, document), "csa", cfg=wide)
    short = (document > 0) & (position < 3 * (A.index_topk + 1) - 1)
    same(every[short], few[short])
    assert np.abs(np.asarray(every - few)[~short & (document > 0)]).max() > 1e-3


@pytest.mark.parametrize(
    "changes, text",
    [
        (
            {"layer_kinds": ("csa", "hca")},
            "must name one of 'sliding', 'csa', 'hca' for each of the num_layers=3",
        ),
        ({"layer_kinds": ("csa", "hca", "full")}, "layer_kinds=('csa', 'hca', 'full') must name"),
        ({"index_topk": 0}, "attention.index_topk=0 must be positive"),
        ({"sliding_window": 0}, "attention.sliding_window=0 must be positive"),
        (
            {"o_groups": 3},
            "num_heads=4 must be a multiple of attention.o_groups=3; 1, 2 or 4 would work",
        ),
        ({"qk_rope_head_dim": 8}, "qk_rope_head_dim=8 must be even, positive and at most 6"),
        ({"windows": (4,)}, "windows=(4,) is not read by 'compressed'"),
    ],
)
def test_what_does_not_fit_is_said(changes, text):
    cfg = dataclasses.replace(CFG, attention=dataclasses.replace(A, **changes))
    assert any(text in line for line in model_problems(cfg, "")), model_problems(cfg, "")
