"""Published token-choice routers: a token worked out by hand for each, and all of them against NumPy."""

import dataclasses
from math import log

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from router_contract import sizes
from router_oracle import best, compare, sigmoid, softmax

from moejax.routers import ROUTERS, parts, token_choice
from moejax.routers.contract import tokens_of

VALUES = [name for name, router in ROUTERS.items() if router.route is token_choice.route]
SMALL = dict(num_groups=2, topk_groups=1)  # where the paper's groups do not fit four experts


def config(name, **options):
    router = ROUTERS[name]
    groups = SMALL if router.options.num_groups > 1 else {}
    cfg = sizes(router, **{**groups, **options})
    return router, dataclasses.replace(cfg, experts_per_token=2)


# A token with these four logits. Softmax: e^z = 8, 4, 3, 1 of 16, so 1/2, 1/4, 3/16, 1/16. Sigmoid of log(o) is
# o / (1 + o): 8/9, 4/5, 3/4, 1/2. The selection bias, where there is one, is b.
SOFT = {
    # groups (8, 4) and (3, 1): the first has the best member; weights times 16
    "deepseek_v2": ([8, 4, 3, 1], None, {0: 8.0, 1: 4.0}),
    # 8/9 + 1/2 < 4/5 + 3/4: the second group, whose weights are 4/5 and 3/4, over 31/20, times 2.5
    "deepseek_v3": ([8, 1, 4, 3], None, {2: 2.5 * 16 / 31, 3: 2.5 * 15 / 31}),
    # softplus(log o) = log(1 + o): with o = e - 1 and e^4 - 1 the scores are 1 and 2; b lifts the first over 2
    "deepseek_v4": ([np.e - 1, np.e**4 - 1, 0.1, 0.1], [1.5, 0, 0, 0], {0: 0.5, 1: 1.0}),
    "mixtral": ([8, 4, 3, 1], None, {0: 2 / 3, 1: 1 / 3}),
    # with two groups of two (8, 1) is worth 9/16, (4, 3) 7/16
    "mistral4": ([8, 1, 4, 3], None, {0: 8 / 9, 1: 1 / 9}),
    # 3/16 + 1/8 = 5/16 > 1/4
    "ernie": ([8, 4, 3, 1], [0, 0, 1 / 8, 0], {0: 8 / 11, 2: 3 / 11}),
    # log 1 + 1.2 > log 3 = 1.0986, so the last is chosen; sigmoids, not divided by their sum
    "kolibri": ([8, 4, 3, 1], [0, -0.3, 0, 1.2], {0: 8 / 9, 3: 1 / 2}),
    "llama4": ([8, 4, 3, 1], None, {0: 8 / 9, 1: 4 / 5}),
    "dbrx": ([8, 4, 3, 1], None, {0: 2 / 3, 1: 1 / 3}),
    "switch": ([8, 4, 3, 1], None, {0: 1 / 2, 1: 1 / 4}),
}


@pytest.mark.parametrize("name", SOFT)
def test_by_hand(name):
    odds, bias, want = SOFT[name]
    options = dict(num_groups=2, topk_groups=1) if name == "mistral4" else {}
    router, cfg = config(name, **options)
    params = {"kernel": jnp.eye(4)}
    cfg = dataclasses.replace(cfg, d_model=4)
    state = {} if bias is None else {"expert_bias": jnp.array(bias, jnp.float32)}
    if bias is None:
        state = router.init_state(cfg, 0)
    x_TD = jnp.array([[log(o) for o in odds]])
    index_TK, weights_TK = router.route(params, state, tokens_of(x_TD, 1), cfg).routing
    got = dict(zip(index_TK[0].tolist(), weights_TK[0].tolist(), strict=True))
    assert got == pytest.approx(want, rel=1e-5)
    assert router.weighs_inputs(cfg) == (name == "llama4")


def test_two_norm_by_hand():
    """Softmax weights 1/2 and 1/4 over sqrt(1/4 + 1/16) = sqrt(5)/4."""
    router, cfg = config("dbrx", norm_power=2.0)
    x_TD = jnp.log(jnp.array([[8.0, 4.0, 3.0, 1.0]]))
    out = router.route({"kernel": jnp.eye(4)}, {}, tokens_of(x_TD, 1), cfg)
    np.testing.assert_allclose(out.routing.combine_weights_TK[0], [2 / 5**0.5, 1 / 5**0.5], 1e-6)


def test_inkling_by_hand():
    """Sigmoids 3/4, 1/2, 1/4, 1/10 and, of the two shared experts, 1/2 and 1/4. Chosen and shared add up to 2;
    times 8 and the learned 1/2 the weights are 4 s / 2."""
    router, cfg = config("inkling")
    params = {"kernel": jnp.eye(6), "scale": jnp.array([0.5])}
    x_TD = jnp.log(jnp.array([[3.0, 1.0, 1 / 3, 1 / 9, 1.0, 1 / 3]]))
    out = router.route(params, router.init_state(cfg, 0), tokens_of(x_TD, 1), cfg)
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[0, 1]])
    np.testing.assert_allclose(out.routing.combine_weights_TK, [[1.5, 1.0]], rtol=1e-6)
    np.testing.assert_allclose(out.shared_TS, [[1.0, 0.5]], rtol=1e-6)
    assert out.scores_TE.shape == (1, 4)


def test_gemma4_by_hand():
    """x = (3, 4) has a mean square of 12.5; times a = (2, 1) and 1/sqrt(2): z = (6, 4) / 5. Weights p and 1 - p
    with p = 1 / (1 + exp(-0.4)), times 2 and 3."""
    router, cfg = config("gemma4")
    cfg = dataclasses.replace(cfg, num_experts=2, d_model=2)
    params = {
        "kernel": jnp.eye(2),
        "input_scale": jnp.array([2.0, 1.0]),
        "expert_scale": jnp.array([2.0, 3.0]),
    }
    out = router.route(params, {}, tokens_of(jnp.array([[3.0, 4.0]]), 1), cfg)
    p = 1 / (1 + np.exp(-0.4))
    np.testing.assert_allclose(out.routing.combine_weights_TK, [[2 * p, 3 * (1 - p)]], rtol=1e-6)


def loop_of(cfg, bias_E, noise_TD=1.0):
    """Every option of token choice, one token at a time."""
    o, e, k = cfg.options, cfg.num_experts, cfg.experts_per_token

    def loop(params, x_TD, mask_T):
        weights_TE = np.zeros((len(x_TD), e))
        shared_TS = np.zeros((len(x_TD), cfg.shared_experts))
        for t, x_D in enumerate(x_TD * noise_TD):
            if mask_T[t] == 0:
                continue
            if o.input_norm:
                x_D = (
                    x_D / np.sqrt((x_D**2).mean() + 1e-6) * params["input_scale"] / len(x_D) ** 0.5
                )
            z = x_D @ params["kernel"] + params.get("bias", 0)
            s = {"softmax": softmax, "sigmoid": sigmoid, "sqrt_softplus": root}[o.score](z)
            rank = (z if o.select_by == "logit" else s)[:e] + bias_E
            if o.num_groups > 1:
                groups = rank.reshape(o.num_groups, -1)
                worth = [max(g) if o.group_score == "max" else sum(sorted(g)[-2:]) for g in groups]
                for out in np.argsort(worth)[: o.num_groups - o.topk_groups]:
                    groups[out] = -np.inf
                rank = groups.reshape(-1)
            chosen = best(rank, k)
            if o.normalize_with_shared:
                total = s[chosen].sum() + s[e:].sum()
                factor = o.routed_scaling * params["scale"][0] / total
                weights_TE[t, chosen], shared_TS[t] = factor * s[chosen], factor * s[e:]
                continue
            w = s[chosen]
            if o.normalize_weights:
                w = w / (w**o.norm_power).sum() ** (1 / o.norm_power)
            scale_E = params.get("expert_scale", np.ones(e))
            weights_TE[t, chosen] = w * o.routed_scaling * scale_E[chosen]
        return weights_TE, shared_TS if o.normalize_with_shared else None, {}

    return loop


def root(z):
    return np.sqrt(np.log1p(np.exp(z)))


@pytest.mark.parametrize("name", [*VALUES, "2-norm"])
def test_against_numpy(name):
    router, cfg = config("dbrx", norm_power=2.0) if name == "2-norm" else config(name)
    cfg = dataclasses.replace(cfg, d_model=5)
    bias_E = np.array([0.3, -0.2, 0.1, 0.0]) * bool(router.init_state(cfg, 0))
    state = {"expert_bias": jnp.array(bias_E)} if bias_E.any() else {}
    compare(router, cfg, loop_of(cfg, bias_E.astype(np.float32)), state=state)


def test_jitter_is_noise_on_the_input_and_only_with_a_key():
    router, cfg = config("switch", jitter=0.25)
    cfg = dataclasses.replace(cfg, d_model=5)
    compare(router, cfg, loop_of(cfg, 0.0))
    key = jax.random.key(3)
    with jax.enable_x64(True):
        noise_TD = np.asarray(parts.jitter(jnp.ones((8, 5)), key, 0.25))
    assert 0.75 <= noise_TD.min() < 0.85 and 1.15 < noise_TD.max() <= 1.25  # 40 draws
    compare(router, cfg, loop_of(cfg, 0.0, noise_TD), key=key)


@pytest.mark.parametrize("name", VALUES)
def test_recipes_fit_their_router(name):
    router, cfg = config(name)
    assert router.problems(cfg, "model.moe.") == []
    honoured = {f"objective.{f}" for f in router.balance}
    known = {"model.moe.experts_per_token", "model.moe.shared_experts", "objective.capacity_factor"}
    assert {key for key, _ in router.recipe} <= honoured | known


@pytest.mark.parametrize(
    "options, shared, said",
    [
        (dict(bias_multiplies=True), 2, "needs model.moe.router.expert_bias=True and"),
        (
            dict(normalize_with_shared=True, score="sigmoid"),
            0,
            "needs model.moe.shared_experts >= 1",
        ),
        (
            dict(normalize_with_shared=True),
            2,
            "router.score='sigmoid' or 'sqrt_softplus' would work",
        ),
        (
            dict(normalize_with_shared=True, score="sigmoid", expert_scale=True),
            2,
            "set model.moe.router.normalize_weights=False and model.moe.router.expert_scale=False",
        ),
    ],
)
def test_what_does_not_fit_together(options, shared, said):
    router = ROUTERS["token_choice"]
    cfg = dataclasses.replace(sizes(router, **options), shared_experts=shared)
    (problem,) = router.problems(cfg, "model.moe.")
    assert said in problem


def test_a_bias_that_multiplies_by_hand():
    """Sigmoids 3/4, 1/2, 1/4 and 1/10; times 1, 1, 4, 1 the third is the largest. Weights are the scores. One
    step of the rule: the loads 1, 0, 1, 0 lie 1/2 from their mean, so the factors move by 0.1 towards
    balance."""
    options = dict(score="sigmoid", expert_bias=True, bias_multiplies=True)
    router, cfg = config("token_choice", **options)
    balance = dataclasses.replace(cfg.balance, bias_update="sign", bias_rate=0.1)
    cfg = dataclasses.replace(cfg, d_model=4, balance=balance)
    np.testing.assert_array_equal(router.init_state(cfg, 0)["expert_bias"], np.ones(4))
    state = {"expert_bias": jnp.array([1.0, 1.0, 4.0, 1.0])}
    x_TD = jnp.log(jnp.array([[3.0, 1.0, 1 / 3, 1 / 9]]))
    out = router.route({"kernel": jnp.eye(4)}, state, tokens_of(x_TD, 1), cfg)
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[2, 0]])
    np.testing.assert_allclose(out.routing.combine_weights_TK, [[0.25, 0.75]], rtol=1e-6)
    new = router.update(state, out.stats, cfg)["expert_bias"]
    np.testing.assert_allclose(new, [0.9, 1.1, 3.9, 1.1], rtol=1e-6)
