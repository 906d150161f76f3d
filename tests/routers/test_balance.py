"""Balance losses and bias rules against numbers worked by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.options import choices_of
from moejax.routers import balance

LOAD_E = jnp.array([4.0, 2.0, 1.0, 1.0])  # T = 4, K = 2
SCORE_SUM_E = jnp.array([2.0, 1.0, 0.6, 0.4])  # P = .5 .25 .15 .1


def test_hand_worked_values():
    # f = E/(KT) load = load/2 = 2 1 .5 .5; sum f P = 1 + .25 + .075 + .05.
    np.testing.assert_allclose(balance.expert_level(SCORE_SUM_E, LOAD_E, 4.0, 2), 1.375, rtol=1e-6)
    # Two groups: f' = 1.5 .5 (means), P' = .75 .25 (sums).
    np.testing.assert_allclose(
        balance.device_level(SCORE_SUM_E, LOAD_E, 4.0, 2, 2), 1.25, rtol=1e-6
    )
    # D/(M T) = 2/4: f'' = 2 1 for 4 and 2 tokens; 1.5 + .25.
    np.testing.assert_allclose(
        balance.communication(SCORE_SUM_E, jnp.array([4.0, 2.0]), 4.0, 1), 1.75, rtol=1e-6
    )
    # logsumexp(0, 0) = log 2; the second token is padding.
    z = balance.router_z(jnp.array([[0.0, 0.0], [5.0, 5.0]]), jnp.array([1.0, 0.0]), 1.0)
    np.testing.assert_allclose(z, np.log(2.0) ** 2, rtol=1e-6)


def test_perfect_balance_is_one():
    load, scores = jnp.full((4,), 2.0), jnp.full((4,), 1.0)
    np.testing.assert_allclose(balance.expert_level(scores, load, 4.0, 2), 1.0, rtol=1e-6)
    np.testing.assert_allclose(balance.device_level(scores, load, 4.0, 2, 2), 1.0, rtol=1e-6)
    groups = jnp.array([2.0, 2.0])
    np.testing.assert_allclose(balance.communication(scores, groups, 4.0, 1), 1.0, rtol=1e-6)
    routes = jnp.stack([jnp.array([[1.0, 0.0], [0.0, 1.0]])] * 2)
    even = jnp.full((2, 2, 2), 0.5)
    value = balance.sequence_wise(even, routes, jnp.ones((2, 2)), 2.0, 1)
    np.testing.assert_allclose(value, 1.0, rtol=1e-6)


def test_sequence_wise_by_hand_and_fully_masked_sequence():
    # Row 0: both tokens take expert 0 (f = 2 0) with P = .75 .25: 1.5. Row 1 is padding: 0.
    scores = jnp.stack([jnp.array([[0.8, 0.2], [0.7, 0.3]])] * 2)
    routes = jnp.stack([jnp.array([[1.0, 0.0], [1.0, 0.0]])] * 2)
    mask = jnp.array([[1.0, 1.0], [0.0, 0.0]])
    loss = lambda s, m, n: balance.sequence_wise(s, routes, m, n, 1)  # noqa: E731
    np.testing.assert_allclose(loss(scores, mask, 1.0), 1.5, rtol=1e-6)
    value, grad = jax.value_and_grad(loss)(scores, jnp.zeros((2, 2)), 0.0)
    assert value == 0.0
    np.testing.assert_array_equal(grad, 0.0)


@pytest.mark.parametrize(
    ("rule", "want"),
    [
        ("sign", [-0.1, 0.0, 0.1, 0.1]),
        ("sign_centered", [-0.125, -0.025, 0.075, 0.075]),
        ("proportional", [-0.1, 0.0, 0.05, 0.05]),
        ("none", [0.0] * 4),
    ],
)
def test_update_bias(rule, want):
    assert rule in choices_of(balance.BalanceConfig, "bias_update")
    start = jnp.array([1.0, 2.0, 3.0, 4.0])
    got = balance.update_bias(start, LOAD_E, rule, 0.1)  # mean load 2
    np.testing.assert_allclose(got - start, want, atol=1e-6)  # float32 near 4: 5e-7
