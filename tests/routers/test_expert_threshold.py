"""Expert threshold by hand and against NumPy: routes, the quantile out of counts, the moving average."""

import jax.numpy as jnp
import numpy as np
import oracle

from moejax.routers import ROUTERS
from moejax.routers.expert_threshold import upper_quantile

THRESHOLD = ROUTERS["expert_threshold"]


def state_of(threshold_E, weight=0.5):
    average = weight * np.asarray(threshold_E)
    return {"average": jnp.asarray(average, jnp.float32), "weight": jnp.float32(weight)}


def logit(p):
    return np.log(p) - np.log1p(-np.asarray(p))


def test_by_hand():
    """Thresholds .5, .7, .2. A token with scores .6, .6, .3 has the first and third expert, one with .4, .8, .1
    the second, one with .1, .1, .1 none; a score is its expert's weight."""
    cfg = oracle.config(THRESHOLD, 3, 1, 3)
    scores = [[0.6, 0.6, 0.3], [0.4, 0.8, 0.1], [0.1, 0.1, 0.1]]
    out = oracle.on_logits(THRESHOLD, cfg, logit(scores), state_of([0.5, 0.7, 0.2]))
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[0, 2, -1], [1, -1, -1], [-1] * 3])
    want = [[0.6, 0.3, 0], [0.8, 0, 0], [0] * 3]
    np.testing.assert_allclose(out.routing.combine_weights_TK, want, rtol=1e-5)


def test_before_the_first_step_each_token_takes_its_k_best():
    cfg = oracle.config(THRESHOLD, 3, 2, 3)
    out = oracle.on_logits(THRESHOLD, cfg, logit([[0.6, 0.5, 0.3], [0.1, 0.8, 0.2]]))
    assert oracle.chosen(out) == [{0, 1}, {1, 2}]


def test_against_numpy():
    cfg = oracle.config(THRESHOLD, 4, 2, 5, dict(z_loss=0.1))
    threshold_E = np.array([0.3, 0.5, 0.6, 0.7])

    def numpy(params, x_TD, mask_T, _):
        logits_TE = x_TD @ params["kernel"]
        r_TE = 1 / (1 + np.exp(-logits_TE))
        weights_TE = np.where((r_TE > threshold_E) & (mask_T[:, None] > 0), r_TE, 0.0)
        z = np.log(np.exp(logits_TE).sum(axis=1)) ** 2 @ mask_T / mask_T.sum()
        return weights_TE, {"z": 0.1 * z}

    oracle.compare(THRESHOLD, cfg, numpy, state_of(threshold_E))


def test_quantile_by_hand():
    """Four bins. Of 1, 3, 4, 2 scores a fifth, 2, is all of the last bin: .75. Half, 5, takes 3 of the 4
    in the bin before: a quarter above its lower edge of .5. All: 0. Two scores in one bin, half of them:
    its middle."""
    counts = jnp.array([[1.0, 3, 4, 2], [0, 2, 0, 0]])
    np.testing.assert_allclose(upper_quantile(counts, 0.2)[0], 0.75, rtol=1e-6)
    np.testing.assert_allclose(upper_quantile(counts, 0.5), [0.5 + 0.25 / 4, 0.375], rtol=1e-6)
    np.testing.assert_allclose(upper_quantile(counts, 1.0), [0.0, 0.25], atol=1e-7)


def test_thresholds_come_within_a_bin_of_the_quantile():
    """As counted by `route` from 400 tokens; then nearly K/E of them pass."""
    cfg = oracle.config(THRESHOLD, 4, 1, 4, bins=256)
    logits = np.random.default_rng(0).normal(size=(400, 4)) * [0.1, 1, 2, 3] + [0, 1, 0, -1]
    out = oracle.on_logits(THRESHOLD, cfg, logits)
    assert out.stats["score_counts"].shape == (4, 256)
    new = THRESHOLD.update(THRESHOLD.init_state(cfg, 0), out.stats, cfg)
    scores = 1 / (1 + np.exp(-logits))
    want = np.sort(scores, axis=0)[-100]  # the 100 best of 400 are at least so high
    np.testing.assert_allclose(new["average"] / new["weight"], want, atol=1 / 256)
    load = oracle.on_logits(THRESHOLD, cfg, logits, new).stats["load"]
    np.testing.assert_allclose(load, 100, atol=8)  # as many scores as lie in one bin of the first


def test_rule():
    """The average of two steps' quantiles q, corrected for its start: (d (1-d) q1 + (1-d) q2) / (1 -
    d^2). A step without a token moves nothing."""
    cfg = oracle.config(THRESHOLD, 2, 1, 2, decay=0.9, bins=2)
    # Half of the scores: those of the upper bin, or half of each of equal bins' sum.
    first, second = jnp.array([[5.0, 5], [5, 5]]), jnp.array([[0.0, 8], [4, 4]])
    state = THRESHOLD.update(THRESHOLD.init_state(cfg, 0), {"score_counts": first}, cfg)
    np.testing.assert_allclose(state["average"] / state["weight"], [0.5, 0.5], rtol=1e-6)
    state = THRESHOLD.update(state, {"score_counts": second}, cfg)
    want = (0.09 * 0.5 + 0.1 * np.array([0.75, 0.5])) / 0.19
    np.testing.assert_allclose(state["average"] / state["weight"], want, rtol=1e-5)
    same = THRESHOLD.update(state, {"score_counts": jnp.zeros((2, 2))}, cfg)
    np.testing.assert_array_equal(same["average"], state["average"])
    np.testing.assert_array_equal(same["weight"], state["weight"])


def test_bad_options():
    assert THRESHOLD.problems(oracle.config(THRESHOLD, 4, 2, 4, max_experts=5), "m.")
