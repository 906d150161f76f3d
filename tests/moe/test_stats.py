"""The numbers that people watch, on loads whose answers are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import stats
from moejax.routers.contract import MergeRouting, Routing, SlotRouting, SoftRouting


def test_max_violation():
    # 2408.15664 section 4.1: (max - mean) / mean.
    assert stats.max_violation(jnp.array([4.0, 4.0, 4.0, 4.0])) == 0
    assert stats.max_violation(jnp.array([1.0, 2.0, 3.0, 10.0])) == pytest.approx(10 / 4 - 1)
    assert stats.max_violation(jnp.zeros(4)) == -1  # nothing routed: no division by zero


def test_load_entropy():
    assert stats.load_entropy(jnp.full(8, 3.0)) == pytest.approx(1)
    assert stats.load_entropy(jnp.array([0.0, 5.0, 0.0, 0.0])) == pytest.approx(0)
    assert stats.load_entropy(jnp.array([1.0, 1.0, 0.0, 0.0])) == pytest.approx(0.5)


def test_summary_is_computed_per_layer_and_then_averaged():
    load_LE = jnp.array([[0.0, 4.0, 0.0, 4.0], [8.0, 0.0, 0.0, 0.0]])
    want = {"max_vio": 2.0, "load_entropy": 0.25, "dead_experts": 2.5, "drop_fraction": 0.25}
    want |= {"experts_per_token": 2.0}  # 8 routes of 4 tokens
    seen = {"load": load_LE, "dropped": jnp.array([1.0, 3.0])}
    got = stats.summarize(seen, 4, 4.0)
    assert {k: float(v) for k, v in got.items()} == pytest.approx(want)
    # A special expert is used, not balanced: its routes count where drops are compared with routes, only.
    special_L1 = jnp.array([[3.0], [5.0]])
    more = {"load": jnp.concatenate([load_LE, special_L1], axis=1), "dropped": seen["dropped"]}
    more |= {"stray": jnp.array([0.0, 2.0]), "score_entropy": jnp.array([2.0, 6.0])}
    got = stats.summarize(more, 4, 4.0)
    want |= {"drop_fraction": 4 / 24, "stray_routes": 2.0, "score_entropy": 1.0}
    assert {k: float(v) for k, v in got.items()} == pytest.approx(want)
    # Averaging first would hide that layers collapse onto different experts.
    assert stats.max_violation(load_LE.mean(axis=0)) != got["max_vio"]


def test_load_by_label_of_every_form():
    domain_T = jnp.array([0, 1, 1])
    token_form = Routing(jnp.array([[0, 2], [2, -1], [1, 2]]), jnp.ones((3, 2)))
    slot_form = SlotRouting(jnp.array([[0, -1, -1], [2, -1, -1], [0, 1, 2]]), jnp.ones((3, 3)))
    want = [[1, 0, 1], [0, 1, 2]]
    for routing in (token_form, slot_form):
        np.testing.assert_array_equal(stats.load_by_label(routing, domain_T, 2, 3), want)
    special = Routing(
        jnp.array([[0, 2], [2, 4], [1, 2]]), jnp.ones((3, 2))
    )  # 3 and 4 are no experts
    np.testing.assert_array_equal(stats.load_by_label(special, domain_T, 2, 3), want)
    # Soft: the shares of a token in two slots of an expert add up.
    mix_TEC = jnp.array([[[0.5, 0.5], [0, 0]], [[0.25, 0], [1, 0]], [[0.25, 0.5], [0, 1]]])
    got = stats.load_by_label(SoftRouting(mix_TEC[None], mix_TEC[None]), domain_T, 2, 2)
    np.testing.assert_allclose(got, [[1.0, 0.0], [1.0, 2.0]])
    # Merged: a token counts by the weights of its group.
    merged = MergeRouting(jnp.array([[0.25, 0.75], [1.0, 0.0]]))
    got = stats.load_by_label(merged, jnp.array([0, 1, 1, 1]), 2, 2)
    np.testing.assert_allclose(got, [[0.25, 0.75], [2.25, 0.75]])


def test_logits_are_counted_by_size_but_for_padding():
    edges = np.array(stats.LOGIT_EDGES)
    assert (np.diff(edges) > 0).all() and np.array_equal(edges, -edges[::-1])
    assert np.allclose(edges[2:][edges[2:] > 0.1], 2 * edges[:-2][edges[2:] > 0.1])
    logits_TE = np.array([[0.0, -0.01], [5.0, -1e9], [7.0, 7.0]], np.float32)
    counts = np.array(stats.logit_counts(jnp.asarray(logits_TE), jnp.array([1.0, 1.0, 0.0])))
    expected, _ = np.histogram(logits_TE[:2], [-np.inf, *edges, np.inf])
    assert np.array_equal(counts, expected) and counts.sum() == 4
    assert counts[0] == 1 and counts[len(edges) // 2] == 2


def test_the_size_below_which_most_logits_are():
    edges = [-2.0, -1.0, 1.0, 2.0]
    of = lambda share: stats.size_below([1, 10, 60, 20, 9], edges, share)  # noqa: E731
    assert [of(s) for s in (0.5, 0.6, 0.61, 0.9, 0.91, 1.0)] == [1, 1, 2, 2, np.inf, np.inf]
    assert stats.size_below([0] * 5, edges, 0.99) == 0  # no token was routed
