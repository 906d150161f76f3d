"""Routers that balance the batch in training and take each token alone afterwards: BASE, S-BASE, token
rounding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from router_contract import sizes
from scipy.optimize import linear_sum_assignment
from weights_oracle import check, sigmoid, softmax

from moejax.routers import ROUTERS
from moejax.routers.base import assign
from moejax.routers.contract import tokens_of
from moejax.routers.sinkhorn import balance_logits
from moejax.routers.token_rounding import Options, round_to_tiles

RNG = np.random.default_rng(0)
X_TD, KERNEL_DE = RNG.normal(size=(12, 16)), 0.5 * RNG.normal(size=(16, 4))
MASK_T = np.array([1] * 9 + [0] * 3)


def config(name, training, **fields):
    cfg = sizes(ROUTERS[name], **fields.pop("options", {}))
    return dataclasses.replace(cfg, training=training, **fields)


def best_total(scores_TE, room):
    """The largest sum of scores with at most `room` tokens for an expert, and who gets whom."""
    columns = np.repeat(np.arange(scores_TE.shape[1]), room)
    row, column = linear_sum_assignment(-scores_TE[:, columns])
    return scores_TE[:, columns][row, column].sum(), columns[column]


# --------------------------------------------------------------------------------------------------
# BASE.


def test_base_by_hand():
    """Two tokens for each of two experts. All four prefer expert 0, by 4, 1, 0.5 and 2: the two that lose
    least go to expert 1. sigmoid(3) = 0.9526; in evaluation all go to expert 0, sigmoid(4) = 0.9820."""
    scores = jnp.array([[5, 1], [4, 3], [3, 2.5], [2, 0]])
    np.testing.assert_array_equal(assign(scores, jnp.ones(4), 0.01), [0, 1, 1, 0])
    params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
    router = ROUTERS["base"]
    cfg = config("base", True, num_experts=2, d_model=2)
    for training, index, weight in ((True, [0, 1, 1, 0], 0.9526), (False, [0, 0, 0, 0], 0.9820)):
        here = dataclasses.replace(cfg, training=training)
        out = router.route(params, {}, tokens_of(scores, 2), here)
        np.testing.assert_array_equal(out.routing.expert_index_TK[:, 0], index)
        assert out.routing.combine_weights_TK[1, 0] == pytest.approx(weight, abs=1e-4)


@pytest.mark.parametrize(
    "tokens, experts, epsilon", [(32, 4, 1e-4), (30, 4, 0.01), (7, 8, 1e-3), (5, 1, 0.1)]
)
def test_the_auction_is_within_epsilon_of_the_best(tokens, experts, epsilon):
    """Against SciPy's exact assignment; no expert gets more than its share, rounded up; padding nobody."""
    for seed in range(5):
        rng = np.random.default_rng(seed)
        scores_TE = rng.normal(size=(tokens + 3, experts)) + 2 * rng.normal(size=experts)
        mask_T = np.arange(tokens + 3) < tokens
        got_T = np.asarray(assign(jnp.float32(scores_TE), jnp.float32(mask_T), epsilon))
        assert (got_T[tokens:] == -1).all() and (got_T[:tokens] >= 0).all()
        room = -(-tokens // experts)
        assert np.bincount(got_T[:tokens]).max() <= room
        total = scores_TE[np.arange(tokens), got_T[:tokens]].sum()
        best, expert_T = best_total(scores_TE[:tokens], room)
        assert total >= best - tokens * (epsilon * np.ptp(scores_TE[:tokens]) + 2e-6)
        if epsilon <= 1e-4:  # and with so small a step it is the best
            np.testing.assert_array_equal(got_T[:tokens], expert_T)


@pytest.mark.parametrize(
    "scores", [jnp.zeros((8, 4)), jnp.full((8, 4), jnp.nan), jnp.full((8, 4), jnp.inf)]
)
def test_the_auction_ends_whatever_the_scores(scores):
    got_T = assign(scores, jnp.ones(8), 0.01)
    np.testing.assert_array_equal(np.bincount(got_T), 2)


@pytest.mark.parametrize("training", [False, True])
def test_base_against_numpy(training):
    """Weights sigmoid(h . w) of the assigned expert (2103.16716 eq. 2) and their gradients."""

    def oracle(p, x_TD, _):
        scores_TE = x_TD @ p["kernel"]
        expert_T = scores_TE.argmax(axis=1)
        if training:
            expert_T[:9] = best_total(scores_TE[:9], 3)[1]
        return [(MASK_T * sigmoid(scores_TE)[np.arange(12), expert_T])[:, None]]

    cfg = config("base", training, options=dict(epsilon=1e-4))
    check(ROUTERS["base"], cfg, oracle, {"kernel": KERNEL_DE}, X_TD, 4, MASK_T)


def test_base_takes_one_expert():
    cfg = config("base", True, experts_per_token=2)
    assert (
        "1 would work, or the router 'sinkhorn'" in ROUTERS["base"].problems(cfg, "model.moe.")[0]
    )


# --------------------------------------------------------------------------------------------------
# S-BASE.


def test_sinkhorn_by_hand():
    """Two tokens prefer expert 0 by 1 and by 0.5. The masses sigmoid(1 - d) + sigmoid(0.5 - d) are balanced,
    1, at d = 0.75: so the first stays with expert 0 and the second goes to expert 1."""
    logits = jnp.array([[2.0, 1.0], [1.0, 0.5]])
    log_v_E = balance_logits(logits, jnp.ones(2), 1e-6, 1000)
    assert log_v_E[1] - log_v_E[0] == pytest.approx(0.75, abs=1e-5)
    np.testing.assert_array_equal((logits + log_v_E[None]).argmax(axis=1), [0, 1])


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("training", [False, True])
def test_sinkhorn_against_numpy(training, k):
    """The plan by 300 plain iterations over rows and columns; weights from the plain logits (2202.01169)."""

    def oracle(p, x_TD, _):
        logits_TE = x_TD @ p["kernel"]
        plan_TE = np.exp(logits_TE[:9])
        for _ in range(300 * training):
            plan_TE /= plan_TE.sum(axis=1, keepdims=True)
            plan_TE *= 9 / 4 / plan_TE.sum(axis=0, keepdims=True)
        index_TK = np.argsort(-plan_TE, axis=1)[:, :k]
        scores_TE = sigmoid(logits_TE) if k == 1 else softmax(logits_TE)
        weights_TK = np.zeros((12, k))
        weights_TK[:9] = np.take_along_axis(scores_TE[:9], index_TK, axis=1)
        return [weights_TK]

    options = dict(tolerance=1e-9, iterations=2000)
    cfg = config("sinkhorn", training, experts_per_token=k, options=options)
    check(ROUTERS["sinkhorn"], cfg, oracle, {"kernel": KERNEL_DE}, X_TD, 4, MASK_T)


def test_sinkhorn_balances():
    """Logits that all prefer expert 0: the plan's masses are T / E within the tolerance, its choice nearly
    so."""
    logits_TE = jax.random.normal(jax.random.key(0), (256, 4)) + jnp.array([3.0, 0, 0, 0])[None]
    mask_T = jnp.ones(256).at[200:].set(0)
    log_v_E = balance_logits(logits_TE, mask_T, 1e-3, 100)
    plan_TE = jax.nn.softmax(logits_TE + log_v_E[None], axis=1)[:200]
    np.testing.assert_allclose(plan_TE.sum(axis=0), 50, rtol=2e-3)
    chosen = np.bincount((logits_TE + log_v_E[None])[:200].argmax(axis=1), minlength=4)
    plain = np.bincount(logits_TE[:200].argmax(axis=1), minlength=4)
    assert chosen.max() < 70 < 170 < plain.max()


# --------------------------------------------------------------------------------------------------
# Token rounding.


def test_rounding_by_hand():
    """Tiles of 2. Expert 0 was chosen by tokens 0, 1, 2: 1.5 tiles, which round to 2 (to even), so it takes
    one more, of 3 and 4 the one with the larger score: 4. Down it is 1 tile, and the last in line goes: token
    2. Expert 1 was chosen by 3 and 4, a whole tile."""
    chosen = jnp.array([[1, 0], [1, 0], [1, 0], [0, 1], [0, 1]]) > 0
    scores = jnp.array([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.2, 0.8], [0.4, 0.6]])
    for rounding, first in (("nearest", [0, 1, 2, 4]), ("up", [0, 1, 2, 4]), ("down", [0, 1])):
        taken = round_to_tiles(chosen, scores, jnp.ones(5), 2, Options(tile=2, rounding=rounding))
        np.testing.assert_array_equal(np.flatnonzero(taken[:, 0]), first)
        np.testing.assert_array_equal(np.flatnonzero(taken[:, 1]), [3, 4])
    # Without room nobody is added; without a token neither.
    full = round_to_tiles(chosen, scores, jnp.ones(5), 1, Options(tile=2))
    np.testing.assert_array_equal(full, chosen)
    alone = round_to_tiles(chosen, scores, jnp.ones(5).at[4].set(0), 2, Options(tile=2))
    assert alone[3, 0] and not alone[4, 0]


def numpy_rounding(scores_TE, index_TK, tile):
    """Which tokens each expert takes, room for all (the two sorts of the authors' code), one by one."""
    num_tokens, num_experts = scores_TE.shape
    taken = np.zeros(scores_TE.shape, bool)
    for e in range(num_experts):
        chose = [t for t in range(num_tokens) if e in index_TK[t]]
        weight = {t: scores_TE[t, e] / scores_TE[t, index_TK[t]].sum() for t in chose}
        rest = [t for t in range(num_tokens) if t not in chose]
        order = sorted(chose, key=lambda t, w=weight: -w[t])
        order += sorted(rest, key=lambda t, e=e: -scores_TE[t, e])
        taken[order[: int(np.round(len(chose) / tile)) * tile], e] = True
    return taken


@pytest.mark.parametrize("training", [False, True])
def test_rounding_against_numpy(training):
    """Weights are the plain scores of the experts that take the token (2512.14080), and their gradients."""
    params = {"kernel": KERNEL_DE}

    def oracle(p, x_TD, _):
        scores_TE = softmax(x_TD @ p["kernel"])
        index_TK = np.argsort(-scores_TE, axis=1)[:, :2]
        taken_TE = np.zeros((12, 4), bool)
        np.put_along_axis(taken_TE, index_TK, True, axis=1)
        taken_TE[9:] = False
        if training:
            taken_TE[:9] = numpy_rounding(scores_TE[:9], index_TK[:9], 3)
            assert not np.array_equal(taken_TE[:9].sum(axis=1), np.full(9, 2))
        # Rows by falling score, as routes are listed.
        return [-np.sort(-np.where(taken_TE, scores_TE, 0), axis=1)]

    cfg = config("token_rounding", training, options=dict(tile=3))
    check(ROUTERS["token_rounding"], cfg, oracle, params, X_TD, 4, MASK_T)
    if training:
        out = ROUTERS["token_rounding"].route(
            jax.tree.map(jnp.float32, params),
            {},
            tokens_of(jnp.float32(X_TD), 4, jnp.array(MASK_T)),
            cfg,
        )
        assert (out.stats["load"] % 3 == 0).all() and out.stats["chosen"].sum() == 18


def test_rounding_needs_room():
    router = ROUTERS["token_rounding"]
    for room, refused in ((1, True), (2, False), (0, False)):
        problems = router.problems(
            config("token_rounding", True, options=dict(max_experts=room)), ""
        )
        assert (
            any("max_experts=1 is less than experts_per_token=2" in p for p in problems) == refused
        )
