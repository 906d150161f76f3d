"""PEER: product keys by hand, and against a search of all experts in NumPy with every gradient."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from router_contract import sizes
from weights_oracle import check, softmax

from moejax.routers import ROUTERS
from moejax.routers.contract import tokens_of

PEER = ROUTERS["peer"]
X_TD = np.random.default_rng(0).normal(size=(6, 5))


def config(num_experts=9, k=4, **options):
    cfg = sizes(PEER, **options)
    return dataclasses.replace(cfg, num_experts=num_experts, experts_per_token=k, d_model=5)


def parameters(cfg):
    rng = np.random.default_rng(6)
    return {name: rng.normal(size=spec.shape) for name, spec in PEER.param_specs(cfg).items()}


def test_by_hand():
    """Four experts, keys +1 and -1 in both halves, query (1, 0.5): expert 0 scores 1.5, 1 (keys +, -) 0.5, 2
    (-, +) -0.5. The best two, 0 and 1, weigh 1 / (1 + e^-1) = 0.7311 and the rest. A second head with the
    query (1, -2) finds 1 (3) and 3 (1): expert 1 is one route with both weights, 0.2689 + 0.8808, and one slot
    is empty."""
    cfg = dataclasses.replace(config(4, 4, heads=2, key_dim=2, query_norm="none"), d_model=1)
    keys = jnp.array([[1.0], [-1.0]])
    params = {"query": jnp.array([[1.0, 0.5, 1.0, -2.0]]), "keys_1": keys, "keys_2": keys}
    index, weights = PEER.route(params, {}, tokens_of(jnp.ones((1, 1)), 1), cfg).routing
    np.testing.assert_array_equal(index, [[0, 1, -1, 3]])
    np.testing.assert_allclose(weights, [[0.7311, 1.1497, 0, 0.1192]], atol=1e-4)


@pytest.mark.parametrize("norm", ["none", "rms"])
@pytest.mark.parametrize("k", [2, 4])  # with 2, each head has one, and its weight is 1
def test_against_numpy(norm, k):
    """2407.04153 algorithm 1, every expert scored: heads' softmax over their own k, summed where they meet."""
    cfg = config(9, k, heads=2, key_dim=4, query_norm=norm)
    met = []

    def oracle(p, x_TD, _):
        query = (x_TD @ p["query"]).reshape(6, 2, 2, 2)
        if norm == "rms":
            query = (
                query / np.sqrt((query**2).mean(axis=-1, keepdims=True) + 1e-6) * p["query_scale"]
            )
        weights_TK = np.zeros((6, k))
        for t in range(6):
            of = {}
            for h in range(2):
                scores = {
                    3 * i + j: query[t, h, 0] @ p["keys_1"][i] + query[t, h, 1] @ p["keys_2"][j]
                    for i in range(3)
                    for j in range(3)
                }
                best = sorted(scores, key=lambda e, s=scores: -s[e])[: k // 2]
                for e, w in zip(best, softmax(np.array([scores[e] for e in best]))):
                    of.setdefault(e, []).append(w)
            met.append(any(len(w) > 1 for w in of.values()))
            # Sorted by number; a second find leaves its place empty.
            at = 0
            for e in sorted(of):
                weights_TK[t, at] = sum(of[e])
                at += len(of[e])
        return [weights_TK]

    check(PEER, cfg, oracle, parameters(cfg), X_TD, 3)
    assert k == 2 or (any(met) and not all(met))


@pytest.mark.parametrize(
    "change, text",
    [(dict(num_experts=8), "num_experts=8 must be a square for product keys; 4 or 9 would work"),
     (dict(experts_per_token=3), "experts_per_token=3 must be a multiple of model.moe.router.heads=2")],
)  # fmt: skip
def test_bad_sizes(change, text):
    cfg = dataclasses.replace(config(heads=2, key_dim=4), **change)
    assert any(text in p for p in PEER.problems(cfg, "model.moe."))
