"""The numbers that people watch, on loads whose answers are known."""

import jax.numpy as jnp
import numpy as np
import pytest

from moejax.moe import stats
from moejax.moe.routing import Routing, SlotRouting


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
    got = stats.summarize(load_LE, jnp.array([1.0, 3.0]))
    want = {"max_vio": 2.0, "load_entropy": 0.25, "dead_experts": 2.5, "drop_fraction": 0.25}
    assert {k: float(v) for k, v in got.items()} == pytest.approx(want)
    # Averaging first would hide that layers collapse onto different experts.
    assert stats.max_violation(load_LE.mean(axis=0)) != got["max_vio"]


def test_load_by_label_of_both_forms():
    domain_T = jnp.array([0, 1, 1])
    token_form = Routing(jnp.array([[0, 2], [2, -1], [1, 2]]), jnp.ones((3, 2)))
    slot_form = SlotRouting(jnp.array([[0, -1, -1], [2, -1, -1], [0, 1, 2]]), jnp.ones((3, 3)))
    want = [[1, 0, 1], [0, 1, 2]]
    for routing in (token_form, slot_form):
        np.testing.assert_array_equal(stats.load_by_label(routing, domain_T, 2, 3), want)
