"""The contract of every router in ROUTERS, and group-limited selection against a numpy oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import CHOICES, MoEConfig
from moejax.moe.dispatch import DISPATCHERS
from moejax.moe.routers import ROUTERS
from moejax.moe.routers.token_choice import limit_groups
from moejax.params import init_params

CFG = MoEConfig(num_experts=4, experts_per_token=2, score="sigmoid", bias_update="sign")
X_TD = jax.random.normal(jax.random.key(1), (8, 16))
TOKEN_ROUTERS = sorted(n for n, r in ROUTERS.items() if r.form == "token")


def call(name, cfg=CFG, state=None, **args):
    router = ROUTERS[name]
    params = init_params(router.param_specs(cfg, 16, 0.5), jax.random.key(0))
    state = router.init_state(cfg) if state is None else state
    return router.route(params, state, X_TD, cfg, seq_len=4, **args)


def test_config_lists_the_tables():
    assert set(CHOICES["moe.router"]) == set(ROUTERS)
    assert set(CHOICES["moe.dispatcher"]) == set(DISPATCHERS)


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_padding_is_never_counted(name):
    mask = jnp.array([1, 1, 1, 0, 0, 0, 0, 0])
    out = call(name, mask_T=mask)
    index, weights = out.routing
    if ROUTERS[name].form == "token":
        assert (index[3:] == -1).all() and (index[:3] >= 0).all()
        assert out.load_E.sum() == 3 * CFG.experts_per_token
    else:
        assert index.max() < 3
        np.testing.assert_array_equal(out.load_E, (index >= 0).sum(axis=1))
    np.testing.assert_array_equal(np.where(index < 0, weights, 0.0), 0.0)


@pytest.mark.parametrize("name", TOKEN_ROUTERS)
def test_bias_moves_selection_only_and_replay_reproduces(name):
    plain = call(name)
    biased = call(name, state={"expert_bias": jnp.array([0.0, 0.0, 0.0, 9.0])})
    index = biased.routing.expert_index_TK
    assert (index == 3).any(axis=1).all()
    assert not (plain.routing.expert_index_TK == 3).any(axis=1).all()
    np.testing.assert_array_equal(biased.scores_TE, plain.scores_TE)
    unbiased = np.take_along_axis(np.asarray(plain.scores_TE), np.asarray(index), axis=1)
    np.testing.assert_allclose(biased.routing.combine_weights_TK, unbiased, rtol=1e-6)
    replayed = call(name, replay_TK=index)
    np.testing.assert_array_equal(replayed.routing.expert_index_TK, index)
    np.testing.assert_array_equal(
        replayed.routing.combine_weights_TK, biased.routing.combine_weights_TK
    )


@pytest.mark.parametrize("kind", CHOICES["moe.group_score"])
@pytest.mark.parametrize("size", [2, 4])
def test_limit_groups(kind, size):
    """V2 ranks groups by their best member (2405.04434 section 2.1.2); V3 by the sum of the best two
    (2412.19437 section 2.1.2), which with groups of four is neither the best nor the sum of all."""
    cfg = MoEConfig(num_experts=4 * size, num_groups=4, topk_groups=2, group_score=kind)
    choice = np.random.default_rng(0).random((32, 4 * size), np.float32)
    want = np.full_like(choice, -np.inf)
    picks = {"max": [], "top2_sum": [], "sum": []}
    for t, row in enumerate(choice.reshape(32, 4, size)):
        best = -np.sort(-row, axis=1)
        values = {"max": best[:, 0], "top2_sum": best[:, :2].sum(axis=1), "sum": best.sum(axis=1)}
        for name, value in values.items():
            picks[name].append(set(np.argsort(-value)[:2].tolist()))
        for g in picks[kind][-1]:
            want[t, size * g : size * (g + 1)] = row[g]
    assert picks["max"] != picks["top2_sum"]  # the data tells the rules apart
    assert size == 2 or picks["top2_sum"] != picks["sum"]
    np.testing.assert_array_equal(limit_groups(jnp.asarray(choice), cfg), want)
