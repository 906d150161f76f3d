"""Routers that draw: GShard, noisy top-k, SparseMixer; and X-MoE's cosine. By hand and beside NumPy."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from router_case import sizes
from router_oracle import best, compare, inputs, sigmoid, softmax

from moejax.routers import ROUTERS, sparse_mixer
from moejax.routers.balance import BalanceConfig, share, squared_cv
from moejax.routers.contract import tokens_of

KEY = jax.random.key(7)


def small(name, balance=None, **options):
    router = ROUTERS[name]
    cfg = sizes(router, balance, **options)
    return router, dataclasses.replace(cfg, d_model=5, experts_per_token=2)


def odds(router, cfg, rows, key=None):
    """Routing of tokens whose logits are the logarithms of `rows`."""
    cfg = dataclasses.replace(cfg, d_model=len(rows[0]))
    x_TD = jnp.log(jnp.array(rows, jnp.float32))
    return router.route({"kernel": jnp.eye(len(rows[0]))}, {}, tokens_of(x_TD, 1, key=key), cfg)


# --------------------------------------------------------------------------------------------------
# GShard.


def test_gshard_by_hand():
    """8, 4, 3 and 1 of 16: the two largest are 2/3 and 1/3 of their sum. c = (1, 0, 0, 0), m = (1/2, ..): the
    loss is 0.1 * 4 * 1/2."""
    router, cfg = small("gshard", BalanceConfig(expert_loss=0.1))
    out = odds(router, cfg, [[8, 4, 3, 1]])
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[0, 1]])
    np.testing.assert_allclose(out.routing.combine_weights_TK, [[2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(out.losses["expert"], 0.2, rtol=1e-6)


def test_gshard_keeps_the_second_expert_by_chance():
    """g2 = 1/4 is kept with probability 1/2, g2 = 1/2 always; g1 does not move. 2000 draws: the deviation of a
    share of one half is 0.011, five of them 0.056."""
    router, cfg = small("gshard")
    index, weights = odds(
        router, cfg, [[3, 1, 0.1, 0.1]] * 2000 + [[1, 1, 0.1, 0.1]] * 20, KEY
    ).routing
    kept = np.asarray(index[:, 1] >= 0)
    assert kept[2000:].all() and abs(kept[:2000].mean() - 0.5) < 0.056
    np.testing.assert_allclose(weights[:2000, 0], 0.75, rtol=1e-6)
    np.testing.assert_allclose(weights[:2000, 1], np.where(kept[:2000], 0.25, 0), rtol=1e-6)
    always = dataclasses.replace(cfg, options=dataclasses.replace(cfg.options, random_second=False))
    assert (odds(router, always, [[3, 1, 0.1, 0.1]] * 50, KEY).routing.expert_index_TK >= 0).all()


def test_gshard_against_numpy():
    router, cfg = small("gshard", BalanceConfig(expert_loss=0.3))

    def loop(params, x_TD, mask_T):
        weights_TE, first_E, sum_E, n = (
            np.zeros((len(x_TD), 4)),
            np.zeros(4),
            np.zeros(4),
            mask_T.sum(),
        )
        for t in np.flatnonzero(mask_T):
            p = softmax(x_TD[t] @ params["kernel"])
            one, two = best(p, 2)
            weights_TE[t, [one, two]] = p[[one, two]] / (p[one] + p[two])
            first_E[one] += 1
            sum_E += p
        return weights_TE, None, {"expert": 0.3 * 4 * (first_E / n * sum_E / n).sum()}

    compare(router, cfg, loop)


def test_gshard_takes_two():
    router, cfg = small("gshard")
    (said,) = router.problems(dataclasses.replace(cfg, experts_per_token=3), "model.moe.")
    assert said == "model.moe.experts_per_token=3: this router takes 2"


# --------------------------------------------------------------------------------------------------
# Noisy top-k.


def test_squared_cv_by_hand():
    """(1, 3): mean 2, variance 1. A part of the batch holds its share of the value, and the gradient of its
    own."""
    assert squared_cv(jnp.array([1.0, 3.0])) == 0.25
    assert squared_cv(jnp.zeros(3)) == 0
    total = jnp.array([1.0, 3.0])
    value, gradient = jax.value_and_grad(lambda v: share(squared_cv, v, total, 0.25))(total / 2)
    assert value == 0.0625
    np.testing.assert_allclose(gradient, jax.grad(squared_cv)(total))


def test_noisy_topk_by_hand():
    """Logits log 4, log 2, 0, 0: without noise the two largest weigh 2/3 and 1/3. softplus(0) = log 2 is the
    deviation, and the load of expert 1 is Phi((log 2 - 0) / log 2) = Phi(1)."""
    router, cfg = small("noisy_topk")
    cfg = dataclasses.replace(cfg, d_model=4)
    x_TD = jnp.log(jnp.array([[4.0, 2.0, 1.0, 1.0]]))
    params = {"kernel": jnp.eye(4), "noise": jnp.zeros((4, 4))}
    out = router.route(params, {}, tokens_of(x_TD, 1), cfg)
    np.testing.assert_allclose(out.routing.combine_weights_TK, [[2 / 3, 1 / 3]], rtol=1e-6)
    np.testing.assert_allclose(out.stats["smooth_load"][1], 0.8413447, rtol=1e-6)
    # importance (2/3, 1/3, 0, 0): mean 1/4, variance (4/9 + 1/9) / 4 - 1/16 = 11/144, over 1/16
    np.testing.assert_allclose(out.losses["importance"], 0.1 * 11 / 9, rtol=1e-6)


@pytest.mark.parametrize("key", [None, KEY])
def test_noisy_topk_against_numpy(key):
    router, cfg = small("noisy_topk", importance_loss=0.3, load_loss=0.2)
    params, x_TD, mask_T = inputs(router, cfg)
    noise_TE = np.zeros((len(x_TD), 4))
    if key is not None:
        with jax.enable_x64(True):
            noise_TE = np.asarray(jax.random.normal(key, noise_TE.shape, jnp.float64))

    def cv(v):
        return v.var() / v.mean() ** 2

    def loop(params, x_TD, mask_T):
        weights_TE, load_E = np.zeros((len(x_TD), 4)), np.zeros(4)
        for t in np.flatnonzero(mask_T):
            clean = x_TD[t] @ params["kernel"]
            deviation = np.log1p(np.exp(x_TD[t] @ params["noise"]))
            noisy = clean + noise_TE[t] * deviation
            chosen = best(noisy, 2)
            weights_TE[t, chosen] = softmax(noisy[chosen])
            for e in range(4):
                second = np.sort(np.delete(noisy, e))[-2]
                z = (clean[e] - second) / deviation[e]
                load_E[e] += 0.5 * (1 + math.erf(z / 2**0.5))
        losses = {"importance": 0.3 * cv(weights_TE.sum(0)), "smooth_load": 0.2 * cv(load_E)}
        return weights_TE, None, losses

    compare(router, cfg, loop, key=key, given=(params, x_TD, mask_T))


def test_noisy_topk_needs_one_expert_more():
    router, cfg = small("noisy_topk")
    (said,) = router.problems(dataclasses.replace(cfg, experts_per_token=4), "model.moe.")
    assert (
        said
        == "model.moe.router.load_loss needs model.moe.experts_per_token < model.moe.num_experts=4"
    )


# --------------------------------------------------------------------------------------------------
# Cosine.


def test_cosine_by_hand():
    """x = (3, 4) and embeddings along (1, 0), (0, -1), (0, 2): cosines 0.6, -0.8, 0.8, whatever the lengths,
    over 0.5."""
    router, cfg = small("cosine", score="sigmoid")
    cfg = dataclasses.replace(cfg, num_experts=3, d_model=2)
    embedding = jnp.array([[1.0, 0.0, 0.0], [0.0, -1.0, 2.0]])
    params = {"kernel": jnp.eye(2), "embedding": embedding, "log_scale": jnp.zeros(1)}
    out = router.route(params, {}, tokens_of(jnp.array([[3.0, 4.0]]), 1), cfg)
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[2, 0]])
    np.testing.assert_allclose(
        out.routing.combine_weights_TK[0], sigmoid(np.array([1.6, 1.2])), 1e-6
    )
    hot = {**params, "log_scale": jnp.full(1, 10.0)}  # tau = 0.5 exp(-10), held at 0.01
    out = router.route(hot, {}, tokens_of(jnp.array([[3.0, 4.0]]), 1), cfg)
    np.testing.assert_allclose(out.scores_TE[0], sigmoid(np.array([60.0, -80.0, 80.0])), rtol=1e-4)


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_cosine_against_numpy(score):
    router, cfg = small("cosine", score=score, dim=3, temperature=0.7)

    def loop(params, x_TD, mask_T):
        weights_TE = np.zeros((len(x_TD), 4))
        for t in np.flatnonzero(mask_T):
            h = x_TD[t] @ params["kernel"]
            lengths = np.sqrt((h**2).sum()) * np.sqrt((params["embedding"] ** 2).sum(axis=0))
            z = h @ params["embedding"] / lengths / 0.7 * np.exp(params["log_scale"][0])
            s = softmax(z) if score == "softmax" else sigmoid(z)
            chosen = best(z, 2)
            weights_TE[t, chosen] = s[chosen]
        return weights_TE, None, {}

    compare(router, cfg, loop)


# --------------------------------------------------------------------------------------------------
# SparseMixer.


def test_sparse_mixer_by_hand():
    """Logits 2, 1.9, 1 and r = 0.05: 1.9 is within 10% of 2, and weighs; 1 is not. Then, of 1.9 and 1, none but
    1.9."""
    router, cfg = small("sparse_mixer", jitter=0.05)
    cfg = dataclasses.replace(cfg, num_experts=3, d_model=3)
    tokens = tokens_of(jnp.array([[2.0, 1.9, 1.0]]), 1)
    out = router.route({"kernel": jnp.eye(3)}, {}, tokens, cfg)
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[0, 1]])
    want = [1 / (1 + np.exp(-0.1)), 1.0]
    np.testing.assert_allclose(out.routing.combine_weights_TK[0], want, rtol=1e-6)


def mixer_loop(index_TK, factor_TK, jitter):
    """Weights of the given experts, in turn; `factor_TK` multiplies them."""

    def loop(params, x_TD, mask_T):
        weights_TE = np.zeros((len(x_TD), 4))
        for t in np.flatnonzero(mask_T):
            z = x_TD[t] @ params["kernel"]
            free = np.ones(4, bool)
            for e, factor in zip(index_TK[t], factor_TK[t], strict=True):
                top = z[free].max()
                near = free & ((top - z) / np.maximum(abs(z), top) <= 2 * jitter)
                weights_TE[t, e] = factor * np.exp(z[e]) / np.exp(z[near]).sum()
                free[e] = False
        return weights_TE, None, {}

    return loop


def test_sparse_mixer_against_numpy():
    router, cfg = small("sparse_mixer", jitter=0.4)
    params, x_TD, mask_T = inputs(router, cfg)
    index_TK = [best(x @ params["kernel"], 2) for x in x_TD]
    loop = mixer_loop(index_TK, np.ones((len(x_TD), 2)), 0.4)
    compare(router, cfg, loop, given=(params, x_TD, mask_T))


def test_sparse_mixer_in_training():
    """Weights are p or p / 3, and gradients those of p: the loop with factors 1 has them."""
    router, cfg = small("sparse_mixer", jitter=0.8)
    params, x_TD, mask_T = inputs(router, cfg)
    with jax.enable_x64(True):
        exact = {k: jnp.asarray(v) for k, v in params.items()}
        tokens = tokens_of(jnp.asarray(x_TD), 4, jnp.asarray(mask_T), key=KEY)

        def weights(params):
            return router.route(params, {}, tokens, cfg).routing.combine_weights_TK

        index_TK = np.asarray(router.route(exact, {}, tokens, cfg).routing.expert_index_TK)
        got_TK, vjp = jax.vjp(weights, exact)
        target_TK = np.random.default_rng(2).normal(size=got_TK.shape)
        (gradient,) = vjp(jnp.asarray(target_TK))
    plain = mixer_loop(index_TK, np.ones(got_TK.shape), 0.8)

    def of(kernel):
        rows = plain({"kernel": kernel}, x_TD, mask_T)[0]
        return np.take_along_axis(rows, np.maximum(index_TK, 0), 1) * (index_TK >= 0)

    ratio = np.asarray(got_TK)[:-1] / of(params["kernel"])[:-1]  # the last is padding
    best_TK = np.array([best(x @ params["kernel"], 2) for x in x_TD])[:-1]
    assert np.isclose(ratio, 1).any() and np.isclose(ratio, 1 / 3).any()
    assert (np.isclose(ratio, 1) | np.isclose(ratio, 1 / 3)).all()
    assert np.isclose(
        ratio[:, 0][index_TK[:-1, 0] == best_TK[:, 0]], 1
    ).all()  # the largest is whole
    for at in np.ndindex(params["kernel"].shape):
        step = np.zeros(params["kernel"].shape)
        step[at] = 1e-6
        moved = (of(params["kernel"] + step) - of(params["kernel"] - step)) / 2e-6
        np.testing.assert_allclose(
            gradient["kernel"][at], (moved * target_TK).sum(), rtol=1e-5, atol=1e-7
        )


def test_sparse_mixer_draws_from_the_masked_softmax():
    """Logits log 3, log 2, log 1 and no mask: the first is drawn in 3 of 6 cases, the second in 2. 4000 draws:
    five deviations of a share are at most 0.04. Of those not the largest, a quarter is whole."""
    z = jnp.log(jnp.broadcast_to(jnp.array([3.0, 2.0, 1.0]), (4000, 3)))
    index_T, weights_T = sparse_mixer.choose(z, jnp.zeros(z.shape, bool), None, KEY, 100.0)
    shares = np.bincount(index_T, minlength=3) / 4000
    np.testing.assert_allclose(shares, [1 / 2, 1 / 3, 1 / 6], atol=0.04)
    second = np.asarray(weights_T)[np.asarray(index_T) == 1]
    assert abs(np.isclose(second, 1 / 3).mean() - 0.25) < 0.06  # of 1333 draws, deviation 0.012
    np.testing.assert_allclose(second[~np.isclose(second, 1 / 3)], 1 / 9, rtol=1e-6)
