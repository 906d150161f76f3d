"""Latent attention among chosen keys: the choice by brute force, the model however it is computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dsa_case import (
    CFG,
    DENSE,
    DSA,
    POSITIONS,
    SEGMENTS,
    SHARING,
    TOKENS,
    S,
    batch,
    index_of,
    weights,
)

from moejax.attention.block_attention import Sight
from moejax.attention.selection import choose, chosen, gathered, scores
from moejax.config_checks import model_problems
from moejax.evals.generate import prepare
from moejax.models import transformer
from moejax.models.cache import cache_bytes, init_cache, init_layers
from moejax.models.loss import loss_fn
from moejax.params import by_path

every_cfg = pytest.mark.parametrize("cfg", [CFG, SHARING], ids=["own", "shared"])


@functools.partial(jax.jit, static_argnames=("cfg", "compute", "prefill"))
def forward(model, cfg, tokens, compute, cache, prefill, positions, segments):
    params, state = model
    out = transformer.forward(
        params, state, tokens, cfg, compute=compute, cache=cache, prefill=prefill,
        positions_BS=positions, segment_ids_BS=segments,
    )  # fmt: skip
    return out.hidden_BSD, out.cache


def hidden(cfg, tokens, compute=DENSE, cache=None, prefill=False, positions=None, segments=None):
    return forward(weights(cfg), cfg, tokens, compute, cache, prefill, positions, segments)


# --------------------------------------------------------------------------------------------------
# The choice.


def brute_force(score_BST, topk):
    """For each query: among the keys of its document up to its own, the best ones; of equals the earlier."""
    out = np.zeros(score_BST.shape, bool)
    for row in range(score_BST.shape[0]):
        for t in range(score_BST.shape[1]):
            seen = [s for s in range(t + 1) if SEGMENTS[row, s] == SEGMENTS[row, t]]
            best = sorted(seen, key=lambda s: (-score_BST[row, t, s], s))[:topk]
            out[row, t, best] = True
    return out


@pytest.mark.parametrize("block", [0, 3, 4])
def test_the_best_keys_of_the_document_are_chosen(block):
    """Three heads: many scores are 0 exactly, so the order among equals counts. In blocks, too."""
    index = index_of(7)
    # float64 by hand: sum_j w_j relu(q_j . k).
    q, w, k = (np.asarray(a, np.float64) for a in index)
    want = np.einsum("bsj,bsjt->bst", w, np.maximum(np.einsum("bsji,bti->bsjt", q, k), 0))
    got = np.asarray(scores(index), np.float64)
    np.testing.assert_allclose(got, want, atol=1e-5)  # float32, of order 1
    assert (got == 0).sum() > 20
    sight = Sight(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS)
    bits = choose(index, sight, 4, block)
    mask = sight._replace(chosen=chosen(bits, S)).mask_BST()
    np.testing.assert_array_equal(mask, brute_force(got, 4))


def test_zeros_of_both_signs_are_equal():
    """A head with a negative weight gives -0, which must not rank below 0."""
    index = index_of(0, heads=1)
    index = index._replace(q_BSJI=-jnp.ones((2, S, 1, 5)), k_BTI=jnp.ones((2, S, 5)))
    assert np.signbit(scores(index)).any() and not np.signbit(scores(index)).all()
    bits = choose(index, Sight(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS), 4)
    want = brute_force(np.zeros((2, S, S)), 4)
    seen = Sight(POSITIONS, POSITIONS, SEGMENTS, SEGMENTS, chosen=chosen(bits, S)).mask_BST()
    np.testing.assert_array_equal(seen, want)


# --------------------------------------------------------------------------------------------------
# The model.


def test_few_keys_are_latent_attention_to_the_bit():
    few = dataclasses.replace(CFG, attention=dataclasses.replace(DSA, index_topk=S))
    mla = dataclasses.replace(CFG, attention=dataclasses.replace(DSA, kind="mla"))
    params, state = weights(CFG)
    rest = {k: v for k, v in params.items() if k != "indexed_attn"}
    run = lambda cfg, p: jax.jit(  # noqa: E731
        lambda p: transformer.forward(p, state, TOKENS, cfg, compute=DENSE).hidden_BSD
    )(p)
    np.testing.assert_array_equal(run(few, params), run(mla, rest))
    assert np.abs(hidden(CFG, TOKENS)[0] - run(mla, rest)).max() > 0.01


@every_cfg
def test_cached_equals_full(cfg):
    """A prompt of 6, then token by token; with stacks of layers and with lists."""
    want, _ = hidden(cfg, TOKENS)
    unrolled = dataclasses.replace(DENSE, scan_layers=False)
    for cache, how in ((init_cache(cfg, 2, 12), DENSE), (init_layers(cfg, 2, 12), unrolled)):
        first, cache = hidden(cfg, TOKENS[:, :6], how, cache, prefill=True)
        got = [first]
        for i in range(6, S):
            at = jnp.full((2, 1), i)
            more, cache = hidden(cfg, TOKENS[:, i : i + 1], how, cache, positions=at)
            got.append(more)
        # float32, of order 1; decoding multiplies in another order. A key more or less is above 0.01.
        np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, atol=1e-4)


@every_cfg
def test_a_later_token_changes_nothing(cfg):
    other = TOKENS.at[:, 8].add(1) % 32
    (a, _), (b, _) = hidden(cfg, TOKENS), hidden(cfg, other)
    same = (np.asarray(a) == np.asarray(b)).all(axis=(0, 2))
    assert same[:8].all() and not same[8]


@every_cfg
def test_packed_documents_are_documents_alone(cfg):
    packed, _ = hidden(cfg, TOKENS, positions=POSITIONS, segments=SEGMENTS)
    for row, start, stop in ((0, 0, 6), (0, 6, 11), (1, 0, 8), (1, 8, 10)):
        alone, _ = hidden(cfg, TOKENS[row : row + 1, start:stop])
        # float32, of order 1, summed in another order.
        np.testing.assert_allclose(packed[row : row + 1, start:stop], alone, atol=1e-4)


@functools.partial(jax.jit, static_argnames=("cfg", "compute"))
def gradient(params, state, cfg, compute):
    return jax.grad(lambda p: loss_fn(p, state, batch(), cfg, compute=compute)[0])(params)


@pytest.mark.parametrize(
    "how",
    [
        pytest.param(dict(attention_block=4), marks=pytest.mark.product),
        dict(scan_layers=False),
        dict(remat="full", attention_block=3),
    ],
    ids=["blocks", "unrolled", "remat-blocks"],
)
def test_gradients_however_it_is_computed(how):
    """Of everything but the indexer, whose choice has none."""
    model = weights(SHARING)
    want = by_path(gradient(*model, SHARING, DENSE))
    got = by_path(gradient(*model, SHARING, dataclasses.replace(DENSE, **how)))
    assert {path for path in want if not np.any(want[path])} == {
        path for path in want if "indexer" in path
    }
    for path, a in want.items():
        # float32, and gradients of order 0.01 to 1.
        np.testing.assert_allclose(got[path], a, atol=2e-5, err_msg=path)


def test_scores_stay_wide():
    """As published: a bfloat16 model has float32 weights of the indexer's heads."""
    indexer = prepare(weights(CFG)[0], "bfloat16")["indexed_attn"][0]["indexer"]
    assert (indexer["w_heads"].dtype, indexer["w_q"].dtype) == (jnp.float32, jnp.bfloat16)


def test_what_is_cached():
    """Of each token a latent and a rotated key, and in layers with an indexer its key."""
    token = 8 + 4
    assert cache_bytes(CFG, 1, 10) == 4 * 10 * 3 * (token + 6)
    assert cache_bytes(SHARING, 1, 10) == 4 * 10 * (3 * token + 2 * 6)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"index_topk": 0}, "attention.index_topk=0 must be positive for 'dsa'"),
        ({"q_lora_rank": 0}, "attention.q_lora_rank=0 must be positive for 'dsa'"),
        ({"index_head_dim": 3}, "attention.index_head_dim=3 must be at least"),
        (
            {"index_shared_at": (0, 1)},
            r"index_shared_at=(0, 1) must be numbers of layers, in order",
        ),
        ({"index_shared_at": (3,)}, "num_layers - 1 = 2"),
    ],
)
def test_what_does_not_fit(change, message):
    cfg = dataclasses.replace(CFG, attention=dataclasses.replace(DSA, **change))
    assert any(message in p for p in model_problems(cfg))


def test_a_single_query_gathers_what_was_chosen():
    """Four of 8 keys; the second row sees two of its four."""
    keys = {
        "latent": jax.random.normal(jax.random.key(0), (2, 8, 3)),
        "rope_key": jnp.arange(16.0).reshape(2, 8),
    }
    sight = Sight(jnp.array([[5], [1]]), jnp.arange(8)[None])
    on_BT = np.array([[1, 0, 1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]], bool)
    bits = jnp.asarray(np.packbits(on_BT, axis=-1, bitorder="little"))[:, None]
    got, seen = gathered(keys, bits, sight, 4)
    np.testing.assert_array_equal(got["rope_key"][0], [0, 2, 3, 5])
    np.testing.assert_array_equal(got["latent"][0], keys["latent"][0, np.array([0, 2, 3, 5])])
    np.testing.assert_array_equal(got["rope_key"][1], [8, 9, 10, 11])
    np.testing.assert_array_equal(seen.mask_BST()[:, 0], [[True] * 4, [True, True, False, False]])
