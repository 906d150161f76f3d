"""Quantile balancing by hand, beside NumPy, and that it balances."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from router_case import sizes
from router_oracle import best, compare, sigmoid

from moejax.routers import ROUTERS, quantile
from moejax.routers.contract import tokens_of

ROUTER = ROUTERS["quantile"]


def small(**options):
    return dataclasses.replace(sizes(ROUTER, **options), d_model=5)


def test_by_hand():
    """Two experts, one for each token. Sigmoids (3/4, 1/4), (3/4, 1/2), (1/2, 1/4): all choose the first. a is
    the other score: 1/4, 1/2, 1/4, and s - a is (1/2, 1/4, 1/4) for the first and 0 for the second. The
    value that T K / E = 1.5 tokens exceed: within 3/300 of 1/4 and of 0. With d = 0 the bars are those, less
    their mean."""
    cfg = dataclasses.replace(
        small(decay=0.0, bins=300), num_experts=2, experts_per_token=1, d_model=2
    )
    x_TD = jnp.log(jnp.array([[3.0, 1 / 3], [3.0, 1.0], [1.0, 1 / 3]]))
    state = ROUTER.init_state(cfg, 0)
    out = ROUTER.route({"kernel": jnp.eye(2)}, state, tokens_of(x_TD, 1), cfg)
    np.testing.assert_array_equal(out.routing.expert_index_TK[:, 0], [0, 0, 0])
    np.testing.assert_allclose(out.routing.combine_weights_TK, 1, rtol=1e-6)
    assert out.stats["margins"].sum() == 6
    np.testing.assert_allclose(
        ROUTER.update(state, out.stats, cfg)["bar"], [0.125, -0.125], atol=0.01
    )
    slow = dataclasses.replace(cfg, options=dataclasses.replace(cfg.options, decay=0.75))
    np.testing.assert_allclose(
        ROUTER.update(state, out.stats, slow)["bar"], [0.125 / 4, -0.125 / 4], atol=0.0025
    )
    nothing = jax.tree.map(jnp.zeros_like, out.stats)
    old = {"bar": jnp.array([0.3, -0.3])}
    np.testing.assert_array_equal(ROUTER.update(old, nothing, cfg)["bar"], old["bar"])


def test_quantiles_are_exact_to_a_bin():
    values_TE = np.random.default_rng(0).uniform(-0.9, 1.9, size=(400, 3))
    counts = quantile.histogram(jnp.asarray(values_TE, jnp.float32), jnp.ones(400), 600)
    got_E = quantile.quantiles(counts, jnp.array(100.0))
    want_E = np.sort(values_TE, axis=0)[::-1][100]  # the 101st largest
    np.testing.assert_allclose(got_E, want_E, atol=2 * 3 / 600)


def test_against_numpy():
    cfg = small(routed_scaling=2.0)
    bar_E = np.array([0.2, -0.1, -0.2, 0.1])

    def loop(params, x_TD, mask_T):
        weights_TE = np.zeros((len(x_TD), 4))
        for t in np.flatnonzero(mask_T):
            s = sigmoid(x_TD[t] @ params["kernel"])
            chosen = best(s - bar_E, 2)
            weights_TE[t, chosen] = 2 * s[chosen] / s[chosen].sum()
        return weights_TE, None, {}

    compare(ROUTER, cfg, loop, state={"bar": jnp.asarray(bar_E)})


def test_it_balances_in_a_few_steps():
    """Logits that favour some experts: the largest load is 1.5 times the mean or more, and within 10% of it
    later."""
    cfg = dataclasses.replace(small(decay=0.5), num_experts=4)
    rng = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)}
    x_TD = jnp.asarray(rng.normal(size=(256, 5)) + 1.0, jnp.float32)
    state, loads = ROUTER.init_state(cfg, 0), []
    step = jax.jit(lambda state: ROUTER.route(params, state, tokens_of(x_TD, 4), cfg).stats)
    for _ in range(12):
        stats = step(state)
        loads.append(float(stats["load"].max() / stats["load"].mean()))
        state = ROUTER.update(state, stats, cfg)
    assert loads[0] > 1.5 and loads[-1] < 1.1, loads


def test_the_next_best_expert_must_exist():
    (said,) = ROUTER.problems(dataclasses.replace(small(), experts_per_token=4), "model.moe.")
    assert said.startswith("model.moe.experts_per_token=4 must be below model.moe.num_experts=4")
