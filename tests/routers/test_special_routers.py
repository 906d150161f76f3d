"""Routers with special experts by hand and against NumPy: AdaMoE, MoE++ and LongCat."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax.routers import ROUTERS

ADA, MOEPP, LONGCAT = ROUTERS["ada_moe"], ROUTERS["moe_pp"], ROUTERS["longcat"]
P = np.array([[0.4, 0.1, 0.3, 0.2], [0.1, 0.2, 0.3, 0.4], [0.25, 0.45, 0.2, 0.1]])


def top_k(score_TN, mask_T, k):
    """1 where a token has the expert."""
    routes_TN = np.zeros_like(score_TN)
    for t in np.flatnonzero(mask_T):
        routes_TN[t, oracle.best(score_TN[t], k)] = 1
    return routes_TN


# --------------------------------------------------------------------------------------------------
# AdaMoE.


def test_ada_moe_by_hand():
    """Two experts, two null experts, K = 2. Token 0 takes expert 0 and null 2: all weight is the
    expert's. Token 1 takes both nulls: nothing. Token 2 takes both experts, .25 and .45 of .7. Loads are
    2, 1, 2, 1; the nulls count as 1.5 each, mean scores are .25, .25, .8/3, .7/3, so with N/(K T) = 4/6
    the loss is 4/6 (2 * .25 + 1 * .25 + 1.5 * .5) = 1."""
    cfg = oracle.config(ADA, 2, 2, 4, dict(expert_loss=1.0))
    out = oracle.on_logits(ADA, cfg, np.log(P))
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[0, 2], [3, 2], [1, 0]])
    weights = [[1, 0], [0, 0], [0.45 / 0.7, 0.25 / 0.7]]
    np.testing.assert_allclose(out.routing.combine_weights_TK, weights, rtol=1e-5)
    np.testing.assert_array_equal(out.stats["load"], [2, 1, 2, 1])
    np.testing.assert_allclose(out.losses["expert"], 1.0, rtol=1e-5)
    assert ADA.specials(cfg) == ("zero", "zero") and ADA.experts_used(cfg) == 1


def test_ada_moe_against_numpy():
    cfg = oracle.config(ADA, 3, 3, 5, dict(expert_loss=0.3, z_loss=0.1), null_experts=2)

    def numpy(params, x_TD, mask_T, _):
        logits_TN = x_TD @ params["kernel"]
        s_TN, n = oracle.softmax(logits_TN), mask_T.sum()
        routes_TN = top_k(s_TN, mask_T, 3)
        weights_TN = routes_TN * s_TN
        weights_TN[:, 3:] = 0
        weights_TN /= np.where(routes_TN[:, :3].any(axis=1), weights_TN.sum(axis=1), 1)[:, None]
        load_N = routes_TN.sum(axis=0)
        load_N[3:] = load_N[3:].mean()
        loss = sum(5 / (3 * n) * load_N[i] * (s_TN[:, i] @ mask_T) / n for i in range(5))
        z = np.log(np.exp(logits_TN).sum(axis=1)) ** 2 @ mask_T / n
        return weights_TN, {"expert": 0.3 * loss, "z": 0.1 * z}

    oracle.compare(ADA, cfg, numpy)


# --------------------------------------------------------------------------------------------------
# MoE++.


def test_moe_pp_by_hand():
    """Two FFNs, a zero and a copy expert, K = 2. Loads are 2, 1, 2, 1 and mean scores .25, .25, .8/3,
    .7/3; with tau = .5 the loss is 4/6 (.5 + .25 + .5 (1.6/3 + .7/3)). With tau = .5 an FFN shall have
    half as many tokens as another expert: of K = 2 routes 2 * 1/3."""
    cfg = oracle.config(
        MOEPP, 2, 2, 4, dict(expert_loss=1.0), constant_experts=0, tau=0.5, gating_residual=False
    )
    out = oracle.on_logits(MOEPP, cfg, np.log(P))
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[0, 2], [3, 2], [1, 0]])
    weights = [[0.4, 0.3], [0.4, 0.3], [0.45, 0.25]]
    np.testing.assert_allclose(out.routing.combine_weights_TK, weights, rtol=1e-5)
    want = 4 / 6 * (0.75 + 0.5 * (1.6 + 0.7) / 3)
    np.testing.assert_allclose(out.losses["expert"], want, rtol=1e-5)
    assert MOEPP.specials(cfg) == ("zero", "copy") and out.carry_TW is None
    assert MOEPP.experts_used(cfg) == pytest.approx(2 / 3)


def test_moe_pp_against_numpy():
    """And what it carries, with gradients of what arrives and of the matrix on it."""
    cfg = oracle.config(MOEPP, 2, 2, 5, dict(expert_loss=0.3, z_loss=0.1), constant_experts=1)

    def numpy(params, x_TD, mask_T, carried_TW):
        z_TN = x_TD @ params["kernel"] + carried_TW @ params["residual"]
        s_TN, n = oracle.softmax(z_TN), mask_T.sum()
        routes_TN = top_k(s_TN, mask_T, 2)
        eta, loss = [1, 1, 0.75, 0.75, 0.75], 0.0
        for i in range(5):
            f = 5 / (2 * n) * routes_TN[:, i].sum()
            loss += eta[i] * f * (s_TN[:, i] @ mask_T) / n
        z = np.log(np.exp(z_TN).sum(axis=1)) ** 2 @ mask_T / n
        return np.concatenate([routes_TN * s_TN, z_TN], axis=1), {
            "expert": 0.3 * loss,
            "z": 0.1 * z,
        }

    oracle.compare(MOEPP, cfg, numpy)


def test_moe_pp_options():
    cfg = oracle.config(MOEPP, 8, 2, 4)
    assert MOEPP.specials(cfg) == ("zero", "copy", "constant", "constant")
    assert MOEPP.carries(cfg) == 12
    none = dict(zero_experts=0, copy_experts=0, constant_experts=0)
    assert MOEPP.problems(oracle.config(MOEPP, 4, 2, 4, tau=0.5, **none), "m.")
    assert not MOEPP.problems(oracle.config(MOEPP, 4, 2, 4, **none), "m.")


# --------------------------------------------------------------------------------------------------
# LongCat.


def test_longcat_by_hand():
    """Two FFNs, two identity experts, K = 2. A bias of .35 on expert 0 brings it to token 1, with its own
    score as weight, times 6."""
    cfg = oracle.config(LONGCAT, 2, 2, 4, identity_experts=2)
    state = {"expert_bias": jnp.array([0.35, 0, 0, 0])}
    out = oracle.on_logits(LONGCAT, cfg, np.log(P), state)
    assert oracle.chosen(out) == [{0, 2}, {0, 3}, {0, 1}]
    weights = [[2.4, 1.8], [0.6, 2.4], [1.5, 2.7]]
    np.testing.assert_allclose(out.routing.combine_weights_TK, weights, rtol=1e-5)
    assert LONGCAT.specials(cfg) == ("copy", "copy")


def test_longcat_rule():
    """K = 2, E = 2, 10 tokens, K_e = 1.2 (so .3 of all routes to each FFN). Expert 0 had 8 of 20 routes,
    expert 1 had 4, the identity experts, which no bias moves, 8: by mu = .1, b moves by .1 (.3 - .4) and
    .1 (.3 - .2)."""
    balance = dict(bias_rate=0.1)
    cfg = oracle.config(LONGCAT, 2, 2, 4, balance, identity_experts=2, expected_experts=1.2)
    state = {"expert_bias": jnp.array([0.5, 0.0, 0.25, 0.0])}
    stats = {"load": jnp.array([8.0, 4, 5, 3]), "tokens": jnp.float32(10)}
    got = LONGCAT.update(state, stats, cfg)["expert_bias"]
    np.testing.assert_allclose(got, [0.49, 0.01, 0.25, 0.0], rtol=1e-5, atol=1e-8)
    nothing = {"load": jnp.zeros(4), "tokens": jnp.float32(0)}
    np.testing.assert_array_equal(
        LONGCAT.update(state, nothing, cfg)["expert_bias"], state["expert_bias"]
    )
    assert LONGCAT.experts_used(cfg) == 1.2
    assert LONGCAT.experts_used(oracle.config(LONGCAT, 2, 2, 4)) == pytest.approx(4 / 3)


def test_longcat_comes_to_the_mean_that_is_wanted():
    """The closed loop: whatever the scores, K_e FFNs for a token, equally loaded."""
    cfg = oracle.config(LONGCAT, 4, 3, 6, dict(bias_rate=0.05), expected_experts=1.5)
    logits = np.random.default_rng(0).normal(size=(64, 6)) + [0, 0, 1, 0, 1, 1]
    state = LONGCAT.init_state(cfg, 0)
    for _ in range(150):
        stats = oracle.on_logits(LONGCAT, cfg, logits, state).stats
        state = LONGCAT.update(state, stats, cfg)
    np.testing.assert_allclose(stats["load"][:4] / 64, 1.5 / 4, atol=0.05)


def test_longcat_against_numpy():
    cfg = oracle.config(LONGCAT, 3, 2, 5, identity_experts=2)
    bias_N = np.array([0.2, -0.1, 0.0, 0.1, 0.0], np.float32)

    def numpy(params, x_TD, mask_T, _):
        s_TN = oracle.softmax(x_TD @ params["kernel"])
        return 6 * top_k(s_TN + bias_N, mask_T, 2) * s_TN, {}

    oracle.compare(LONGCAT, cfg, numpy, {"expert_bias": jnp.asarray(bias_N)})


def test_longcat_bad_options():
    problems = LONGCAT.problems(oracle.config(LONGCAT, 4, 2, 4, expected_experts=2.5), "m.")
    assert "m.router.expected_experts=2.5 is more than m.experts_per_token=2" in problems[0]
