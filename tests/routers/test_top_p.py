"""Top-P by hand and against NumPy."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax.routers import ROUTERS

TOP_P = ROUTERS["top_p"]
P = np.array([0.15, 0.5, 0.05, 0.3])


@pytest.mark.parametrize("threshold, want", [
    (0.4, {1}), (0.6, {1, 3}), (0.75, {1, 3}), (0.9, {0, 1, 3}), (0.97, {0, 1, 2, 3})])  # fmt: skip
def test_by_hand(threshold, want):
    """Sorted: .5, .3, .15, .05; added up: .5, .8, .95, 1."""
    cfg = oracle.config(TOP_P, 4, 2, 4, threshold=threshold)
    out = oracle.on_logits(TOP_P, cfg, np.log(P)[None] + 2.0)
    assert oracle.chosen(out) == [want]
    index, weights = out.routing
    np.testing.assert_allclose(weights[0], np.where(index[0] >= 0, P[index[0]], 0), rtol=1e-6)


def test_at_most_as_many_as_allowed():
    cfg = oracle.config(TOP_P, 4, 2, 4, threshold=0.97, max_experts=2)
    out = oracle.on_logits(TOP_P, cfg, np.log(P)[None])
    assert oracle.chosen(out) == [{1, 3}] and out.routing.expert_index_TK.shape == (1, 2)


def test_against_numpy():
    """The paper's balance loss is E sum_e f_e mean p_e, f_e the share of tokens that have e; whatever K is."""
    cfg = oracle.config(TOP_P, 4, 2, 5, dict(expert_loss=0.2), threshold=0.7, entropy_loss=0.1)

    def numpy(params, x_TD, mask_T, _):
        p_TE = oracle.softmax(x_TD @ params["kernel"])
        weights_TE, n = np.zeros_like(p_TE), mask_T.sum()
        for t in np.flatnonzero(mask_T):
            total = 0.0
            for e in oracle.best(p_TE[t], 4):
                if total < 0.7:
                    weights_TE[t, e] = p_TE[t, e]
                    total += p_TE[t, e]
        f_E = (weights_TE > 0).sum(axis=0) / n
        mean_E = (p_TE * mask_T[:, None]).sum(axis=0) / n
        entropy = -(p_TE * np.log(p_TE)).sum(axis=1) @ mask_T / n
        return weights_TE, {"expert": 0.2 * 4 * (f_E * mean_E).sum(), "entropy": 0.1 * entropy}

    oracle.compare(TOP_P, cfg, numpy)


def test_forced_routes_are_taken_whatever_they_add_up_to():
    cfg = oracle.config(TOP_P, 4, 2, 4)
    forced_TK = jnp.array([[2, 0, -1]], jnp.int32)
    out = oracle.on_logits(TOP_P, cfg, np.log(P)[None], forced_TK=forced_TK)
    np.testing.assert_array_equal(out.routing.expert_index_TK, forced_TK)
    np.testing.assert_allclose(out.routing.combine_weights_TK[0], [0.05, 0.15, 0], rtol=1e-5)


def test_bad_options():
    assert TOP_P.problems(oracle.config(TOP_P, 4, 2, 4, max_experts=9), "m.")
