"""The contract of every router in ROUTERS (a new one is covered by being in it); scores, expert choice and
group-limited selection against NumPy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MoEConfig
from moejax.config_checks import CHOICES
from moejax.moe.dispatch import DISPATCHERS
from moejax.moe.routers import ROUTERS
from moejax.moe.routers.token_choice import limit_groups
from moejax.moe.routing import count_totals
from moejax.params import init_params

CFG = MoEConfig(num_experts=4, experts_per_token=2, score="sigmoid", bias_update="sign")
X_TD = jax.random.normal(jax.random.key(1), (8, 16))


def call(name, cfg=CFG, state=None, **args):
    router = ROUTERS[name]
    params = init_params(router.param_specs(cfg, 16, 0.5), jax.random.key(0))
    state = router.init_state(cfg) if state is None else state
    given = dict(seq_len=4, key=jax.random.key(2), token_ids_T=jnp.arange(8))
    return router.route(params, state, X_TD, cfg, **given, **args)


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


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_shapes_and_dtypes(name):
    out = call(name)
    index, weights = out.routing
    slots = (8, 2) if ROUTERS[name].form == "token" else (4, index.shape[1])
    chex.assert_shape([index, weights], slots)
    chex.assert_shape([out.scores_TE, out.load_E, out.group_load_G], [(8, 4), (4,), (1,)])
    chex.assert_type([index, weights, out.scores_TE, out.load_E], [jnp.int32] + 3 * [jnp.float32])
    ordered = np.sort(index, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    assert not twice.any()  # experts of a token, or tokens of an expert
    np.testing.assert_array_equal(out.load_E.sum(), (index >= 0).sum())


@pytest.mark.parametrize("name", sorted(n for n, r in ROUTERS.items() if r.causal))
def test_a_causal_router_does_not_look_ahead(name):
    """Sequences of 4: what follows the second token of each says nothing about the first two."""
    early = jnp.tile(jnp.array([True, True, False, False]), 2)
    router = ROUTERS[name]
    params = init_params(router.param_specs(CFG, 16, 0.5), jax.random.key(0))

    def routes(x_TD, token_ids_T):
        args = dict(seq_len=4, key=jax.random.key(2), token_ids_T=token_ids_T)
        return router.route(params, router.init_state(CFG), x_TD, CFG, **args).routing

    ids = jnp.arange(8)
    before = routes(X_TD, ids)
    after = routes(jnp.where(early[:, None], X_TD, -X_TD), jnp.where(early, ids, 9 - ids))
    chex.assert_trees_all_equal(*(jax.tree.map(lambda a: a[early], r) for r in (before, after)))


@pytest.mark.parametrize("name", sorted(ROUTERS))
def test_weights_and_losses_have_finite_gradients(name):
    """Also where a token is padding; an idle token gets none."""
    router, cfg = ROUTERS[name], dataclasses.replace(CFG, z_loss=0.1)
    params = init_params(router.param_specs(cfg, 16, 0.5), jax.random.key(0))
    args = dict(seq_len=4, key=jax.random.key(2), token_ids_T=jnp.arange(8))

    def total(params, x_TD):
        mask_T = jnp.array([1, 1, 1, 0, 1, 1, 0, 0])
        out = router.route(params, router.init_state(cfg), x_TD, cfg, mask_T=mask_T, **args)
        return (out.routing[1] ** 2).sum() + sum(out.losses.values(), 0.0)

    dparams, dx_TD = jax.grad(total, argnums=(0, 1))(params, X_TD)
    chex.assert_tree_all_finite((dparams, dx_TD))
    np.testing.assert_array_equal(dx_TD[jnp.array([3, 6, 7])], 0.0)
    # A router without parameters has nothing to learn.
    assert not params or max(abs(g).max() for g in jax.tree.leaves(dparams)) > 0


LINEAR = dataclasses.replace(CFG, sequence_loss=0.1, z_loss=0.1)
COUNTING = dataclasses.replace(
    LINEAR, balance_groups=2, expert_loss=0.1, device_loss=0.1, communication_loss=0.1
)


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("cfg", [LINEAR, COUNTING], ids=["linear", "counting"])
def test_losses_of_parts_add_up(name, cfg):
    """What accumulation counts on: with the totals of the batch, and its loads where the router says that a
    loss needs them, the losses of its two halves are shares of the whole's."""
    router = ROUTERS[name]
    mask_T = jnp.array([1, 1, 1, 0, 1, 1, 1, 1])
    params = init_params(router.param_specs(cfg, 16, 0.5), jax.random.key(0))

    def route(rows, totals):
        args = dict(seq_len=4, key=jax.random.key(2), token_ids_T=jnp.arange(8)[rows])
        args |= dict(mask_T=mask_T[rows], totals=totals)
        return router.route(params, router.init_state(cfg), X_TD[rows], cfg, **args)

    whole = route(slice(8), None)
    totals = count_totals(mask_T.reshape(2, 4))
    if not router.linear_losses(cfg):
        totals = totals._replace(load_E=whole.load_E, group_load_G=whole.group_load_G)
    halves = [route(rows, totals).losses for rows in (slice(4), slice(4, 8))]
    added = jax.tree.map(jnp.add, *halves)
    chex.assert_trees_all_close(added, whole.losses, rtol=1e-6)  # sums of 8 float32 terms


@pytest.mark.parametrize("name", sorted(ROUTERS))
@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_products_are_float32_where_the_default_is_less(name, platform):
    router = ROUTERS[name]
    params = init_params(router.param_specs(CFG, 16, 0.5), jax.random.key(0))

    def route(params, x_TD):
        return router.route(params, router.init_state(CFG), x_TD, CFG, seq_len=4)

    lowered = jax.jit(route).trace(params, X_TD).lower(lowering_platforms=(platform,)).as_text()
    products = [line for line in lowered.splitlines() if "dot_general" in line]
    assert all("HIGHEST" in line for line in products), products


def test_bias_moves_selection_only_and_replay_reproduces():
    plain = call("token_choice")
    biased = call("token_choice", state={"expert_bias": jnp.array([0.0, 0.0, 0.0, 9.0])})
    index = biased.routing.expert_index_TK
    assert (index == 3).any(axis=1).all()
    assert not (plain.routing.expert_index_TK == 3).any(axis=1).all()
    np.testing.assert_array_equal(biased.scores_TE, plain.scores_TE)
    unbiased = np.take_along_axis(np.asarray(plain.scores_TE), np.asarray(index), axis=1)
    np.testing.assert_allclose(biased.routing.combine_weights_TK, unbiased, rtol=1e-6)
    replayed = call("token_choice", replay_TK=index)
    chex.assert_trees_all_equal(replayed.routing, biased.routing)


def test_groups_count_the_tokens_that_reach_them():
    """An expert choice, counted by hand: tokens with an expert in each half of the experts."""
    cfg = dataclasses.replace(CFG, balance_groups=2)
    out = call("expert_choice", cfg)
    halves = np.split(np.asarray(out.routing.token_index_EC), 2)
    want = [len(set(half.ravel().tolist()) - {-1}) for half in halves]
    np.testing.assert_array_equal(out.group_load_G, want)
    assert sum(want) < out.load_E.sum()  # some token has two experts of a half


SCORES = {
    "softmax": lambda a_E: np.exp(a_E) / np.exp(a_E).sum(),  # 2401.06066 eq. 11
    "sigmoid": lambda a_E: 1 / (1 + np.exp(-a_E)),  # 2412.19437 eq. 15
    "sqrt_softplus": lambda a_E: np.sqrt(np.log(1 + np.exp(a_E))),  # 2606.19348
}


def linear_router():
    """Parameters with a bias, and float64 logits of X_TD from -5 to 6: every score bends there."""
    rng = np.random.default_rng(0)
    kernel_DE, bias_E = 0.7 * rng.normal(size=(16, 4)), rng.normal(size=4)
    params = {"kernel": jnp.asarray(kernel_DE), "bias": jnp.asarray(bias_E)}
    return params, np.asarray(X_TD, np.float64) @ kernel_DE + bias_E


@pytest.mark.parametrize("kind", CHOICES["moe.score"])
@pytest.mark.parametrize("normalize", [False, True])
def test_scores_and_weights(kind, normalize):
    """g_i = s_i of the K largest, over their sum if normalised (2412.19437 eq. 13-14), times the scale."""
    cfg = MoEConfig(
        num_experts=4, score=kind, normalize_weights=normalize, routed_scaling=2.5, router_bias=True
    )
    params, logits_TE = linear_router()
    out = ROUTERS["token_choice"].route(params, {}, X_TD, cfg, seq_len=4)
    want = np.array([SCORES[kind](row) for row in logits_TE])
    np.testing.assert_allclose(out.scores_TE, want, rtol=1e-5)  # float32 logits, within 1e-6
    index, weights = out.routing
    for t, s_E in enumerate(want):
        best = np.argsort(-s_E)[:2]
        total = s_E[best].sum() if normalize else 1.0
        np.testing.assert_array_equal(index[t], best)
        np.testing.assert_allclose(weights[t], 2.5 * s_E[best] / total, rtol=1e-5)


def test_experts_choose_their_best_tokens():
    """2202.09368 eq. 1-2: S = softmax over experts; expert e takes the C tokens with the largest S_te, and
    weighs them by it. C = ceil(0.6 * 8 * 2 / 4) = 3; padding is taken by none."""
    cfg = MoEConfig(num_experts=4, capacity_factor=0.6, routed_scaling=2.5)
    params, logits_TE = linear_router()
    want = np.array([SCORES["softmax"](row) for row in logits_TE])
    real = [t for t in range(8) if t not in (want[:, 0].argmax(), 6)]  # expert 0's favourite is one
    mask_T = jnp.isin(jnp.arange(8), jnp.array(real))
    out = ROUTERS["expert_choice"].route(params, {}, X_TD, cfg, seq_len=4, mask_T=mask_T)
    np.testing.assert_array_equal(out.load_E, 3)
    for e in range(4):
        best = sorted(real, key=lambda t, e=e: -want[t, e])[:3]
        got = dict(zip(*(np.asarray(a[e]).tolist() for a in out.routing)))
        assert got == pytest.approx({t: 2.5 * want[t, e] for t in best}, rel=1e-5)


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
