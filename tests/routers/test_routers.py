"""The contract over every router in ROUTERS (a new one is covered by being in it), and that each of its checks
catches who breaks it; scores, expert choice and group-limited selection against NumPy."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from router_contract import CHECKS, MASK_T, sizes

from moejax.options import ConfigError, choices_of
from moejax.routers import ROUTERS, expert_choice, parts, router_of, router_options, token_choice
from moejax.routers.contract import (
    MergeRouting,
    Routed,
    Router,
    RouterOptions,
    Routing,
    SoftRouting,
    tokens_of,
)

TOKEN, EXPERT = ROUTERS["token_choice"], ROUTERS["expert_choice"]
X_TD = jax.random.normal(jax.random.key(1), (8, 16))

# Options under which a router takes other ways. All are tried at their defaults, or what is so called here.
V3 = dict(score="sigmoid", expert_bias=True, normalize_weights=True, routed_scaling=2.5)
VARIANTS = {
    "token_choice": {
        "V3": V3,
        "groups": dict(score="sqrt_softplus", num_groups=2, topk_groups=1, group_score="top2_sum"),
        "gpt-oss": dict(normalize_weights=True, router_bias=True),
        "factors": dict(score="sigmoid", expert_bias=True, bias_multiplies=True),
        "2-norm, noise": dict(normalize_weights=True, norm_power=2.0, jitter=0.1),
        "Llama 4": dict(score="sigmoid", select_by="logit", weigh_inputs=True),
        "Gemma 4": dict(normalize_weights=True, input_norm=True, expert_scale=True),
        "Inkling": dict(
            score="sigmoid", normalize_with_shared=True, router_bias=True, routed_scaling=8.0
        ),
    },
    "cosine": {"sigmoid": dict(score="sigmoid", dim=3)},
    "quantile": {"softmax": dict(score="softmax", normalize_weights=False, decay=0.0, bins=16)},
    "noisy_topk": {"no losses": dict(importance_loss=0.0, load_loss=0.0)},
    # So wide that several experts can be chosen: one alone has the weight 1, whatever its logit.
    "sparse_mixer": {"defaults": dict(jitter=0.5)},
    "expert_choice": {"tight": dict(capacity_factor=0.5, routed_scaling=2.0, router_bias=True)},
    "remoe": {"at most 2": dict(max_experts=2, coefficient=0.1)},
    "top_p": {"at most 3": dict(max_experts=3, threshold=0.9, entropy_loss=0.0)},
    "dyn_moe": {"at most 2": dict(max_experts=2, diversity_loss=0.0)},
    "expert_threshold": {"at most 2": dict(max_experts=2, bins=16)},
    "ada_moe": {"2 null": dict(null_experts=2)},
    "moe_pp": {"no residual": dict(gating_residual=False, zero_experts=0, tau=0.5)},
    "longcat": {"3 identity": dict(identity_experts=3, expected_experts=1.5)},
    "deepseek_v4_hash": {"scores": dict(hash_layers=0), "table": dict(hash_layers=1)},
    "token_rounding": {
        "defaults": dict(tile=2),
        "at most 3": dict(tile=3, rounding="up", max_experts=3),
    },
    "soft_moe": {"two slots": dict(slots_per_expert=2, normalize=False)},
    "lory": {"segments": dict(segment=2)},
    # Two experts for each of the few tokens here cannot be shared among 8 heads.
    "peer": {
        "defaults": dict(heads=1, key_dim=4),
        "plain": dict(heads=1, query_norm="none"),
    },
}
# Values of token_choice are told apart by its variants. All checks on each would be the same code many times.
VALUES = [name for name, router in ROUTERS.items() if router.route is token_choice.route][1:]
CASES = {
    f"{name}, {variant}": (name, options)
    for name in ROUTERS
    if name not in VALUES
    for variant, options in {"defaults": {}, **VARIANTS.get(name, {})}.items()
}
# At their defaults in every run of the tests, the variants in `pytest -m product`.
MARKED = [
    c if c.endswith(", defaults") else pytest.param(c, marks=pytest.mark.product) for c in CASES
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", MARKED)
def test_contract(case, check):
    name, options = CASES[case]
    CHECKS[check](ROUTERS[name], sizes(ROUTERS[name], **options))


@pytest.mark.parametrize(
    "check", ["declaration", "indices", "padding", "causality", "forced routes"]
)
@pytest.mark.parametrize("name", VALUES)
def test_contract_of_values(name, check):
    groups = dict(num_groups=2, topk_groups=1) if ROUTERS[name].options.num_groups > 1 else {}
    CHECKS[check](ROUTERS[name], sizes(ROUTERS[name], **groups))


def test_the_table():
    assert router_options().name in ROUTERS and router_of(router_options()) is TOKEN
    options = router_options("expert_choice", capacity_factor=2.0)
    assert options == expert_choice.Options("expert_choice", capacity_factor=2.0)
    with pytest.raises(ConfigError, match=r"did you mean 'token_choice'\?.*expert_choice"):
        router_options("token_choise")


def soft_moe(params, state, tokens, cfg):
    """Soft MoE (2308.00951 eq. 1-3), one slot per expert; the load is each expert's share of results."""
    if tokens.forced_TK is not None:
        raise ValueError("soft slots cannot be forced to the routes of tokens")
    parts.refuse_barred(tokens, "soft slots are mixes")
    b, s = tokens.mask_BS.shape
    logits_BSEC = parts.logits(params, tokens.x_TD).reshape(b, s, -1, 1)
    seen_BSEC = tokens.mask_BS[:, :, None, None] > 0
    mass_BSEC = jnp.where(seen_BSEC, jnp.exp(logits_BSEC), 0.0)
    combine_BSEC = jax.nn.softmax(logits_BSEC, axis=2) * seen_BSEC
    routing = SoftRouting(mass_BSEC / (mass_BSEC.sum(axis=1, keepdims=True) + 1e-9), combine_BSEC)
    load_E = jax.lax.stop_gradient(combine_BSEC.sum(axis=(0, 1, 3)))
    return Routed(routing, {}, {"load": load_E}, None)


def with_specials(params, state, tokens, cfg):
    """The best two of experts and special experts alike."""
    scores_TN = jax.nn.sigmoid(parts.logits(params, tokens.x_TD))
    index_TK = parts.select(scores_TN, tokens, cfg.experts_per_token)
    hot_TKN = parts.chosen(index_TK, cfg.num_experts + len(KINDS), jnp.float32)
    weights_TK = (hot_TKN * scores_TN[:, None]).sum(axis=-1)
    stats = {"load": hot_TKN.sum(axis=(0, 1))}
    return Routed(Routing(index_TK, weights_TK), {}, stats, scores_TN[:, : cfg.num_experts])


KINDS = ("copy", "zero", "constant")
OTHERS = {
    "soft": Router(RouterOptions(), soft_moe, "soft", causal=False, param_specs=lambda cfg: {
        "kernel": parts.kernel_spec(cfg)}),
    "special experts": Router(RouterOptions(), with_specials, "token", causal=True,
        param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg, cfg.num_experts + len(KINDS))},
        specials=lambda cfg: KINDS, experts_used=lambda cfg: 8 / 7),
}  # fmt: skip


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", OTHERS)
def test_contract_of_what_the_table_lacks(name, check):
    CHECKS[check](OTHERS[name], sizes(OTHERS[name]))


# --------------------------------------------------------------------------------------------------
# Routers that break the contract, and the check that must say so.


def bent(change, router=TOKEN, **claims):
    """A router whose `route` is followed by `change(out, tokens, state)`."""

    def route(params, state, tokens, cfg):
        return change(router.route(params, state, tokens, cfg), tokens, state)

    return dataclasses.replace(router, route=route, **claims)


def with_routing(index=lambda i, t: i, weights=lambda w, t: w):
    def change(out, tokens, state):
        i, w = out.routing
        return out._replace(routing=Routing(index(i, tokens), weights(w, tokens)))

    return bent(change)


def with_stats(stats):
    return bent(lambda out, tokens, state: out._replace(stats={**out.stats, **stats(out, tokens)}))


def looks_back(params, state, tokens, cfg):
    """Each token is routed as the one before it: what follows is not seen, and decoding goes wrong."""
    x_BSD = tokens.x_TD.reshape(-1, tokens.seq_len, cfg.d_model)
    before = jnp.pad(x_BSD[:, :-1], ((0, 0), (1, 0), (0, 0))).reshape(tokens.x_TD.shape)
    return TOKEN.route(params, state, tokens._replace(x_TD=before), cfg)


def in_bfloat16(params, state, tokens, cfg):
    scores_TE = jax.nn.softmax(jnp.dot(tokens.x_TD, params["kernel"].astype(tokens.x_TD.dtype)))
    return Routed(Routing(*jax.lax.top_k(scores_TE, 2)[::-1]), {}, {})


def ignores_forced(params, state, tokens, cfg):
    return TOKEN.route(params, state, tokens._replace(forced_TK=None), cfg)


def ignores_barred(params, state, tokens, cfg):
    return TOKEN.route(params, state, tokens._replace(barred_TE=None), cfg)


def empties_where_barred(out, tokens, state):
    """Takes every route of all tokens as soon as one expert is barred."""
    if tokens.barred_TE is None:
        return out
    return out._replace(routing=Routing(*(a - a - (a.dtype == jnp.int32) for a in out.routing)))


def slots_whatever(params, state, tokens, cfg):
    return EXPERT.route(params, state, tokens._replace(barred_TE=None), cfg)


def always_in_training(params, state, tokens, cfg):
    cfg = dataclasses.replace(cfg, training=True)
    return ROUTERS["sinkhorn"].route(params, state, tokens, cfg)


def merges_for_padding(out, tokens, state):
    return out._replace(routing=MergeRouting(jnp.maximum(out.routing.weights_GE, 0.1)))


def soft_over_padding(params, state, tokens, cfg):
    mix_BSEC = jnp.full((*tokens.mask_BS.shape, cfg.num_experts, 1), 0.1)
    return Routed(SoftRouting(mix_BSEC, mix_BSEC), {}, {"load": jnp.zeros(cfg.num_experts)})


NOT_LINEAR = dict(linear_losses=lambda cfg: True)
LAYER_SHAPES = dict(
    init_state=lambda cfg, layer: {"expert_bias": jnp.zeros((cfg.num_experts + layer,))}
)
BROKEN = {
    "declares a loss that is none": ("declaration", dataclasses.replace(TOKEN, balance=("loss",))),
    "unknown special expert": ("declaration", dataclasses.replace(TOKEN, specials=lambda cfg: ("x",))),
    "more experts than K": ("declaration", dataclasses.replace(TOKEN, experts_used=lambda cfg: 3.0)),
    "indices in int16": ("shapes and dtypes", with_routing(lambda i, t: i.astype(jnp.int16))),
    "weights as the input": (
        "shapes and dtypes", with_routing(weights=lambda w, t: w.astype(t.x_TD.dtype))),
    "load without special experts": (
        "shapes and dtypes", dataclasses.replace(TOKEN, specials=lambda cfg: ("zero",))),
    "the other form": ("shapes and dtypes", dataclasses.replace(TOKEN, form="slot")),
    "one expert too many": ("indices", with_routing(lambda i, t: jnp.where(i == 3, 4, i))),
    "an expert twice": ("indices", with_routing(lambda i, t: jnp.broadcast_to(i[:, :1], i.shape))),
    "weight in an empty slot": ("indices", with_routing(weights=lambda w, t: w + 0.1)),
    "a load that is a mean": ("indices", with_stats(lambda o, t: {"load": o.stats["load"] / 11})),
    "padding is routed": ("padding", with_routing(lambda i, t: jnp.maximum(i, 0))),
    "padding is counted": ("padding", with_stats(lambda o, t: {"all": t.x_TD.sum()})),
    "padding fills slots": ("padding", dataclasses.replace(TOKEN, route=soft_over_padding, form="soft")),
    "slots said to be causal": ("causality", dataclasses.replace(EXPERT, causal=True)),
    "soft said to be causal": ("causality", dataclasses.replace(OTHERS["soft"], causal=True)),
    "merging said to be causal": (
        "causality", dataclasses.replace(ROUTERS["smear"], causal=True)),
    "balances the batch in silence": (
        "causality", dataclasses.replace(ROUTERS["base"], causal_in_training=True)),
    "says in vain that it looks at the batch": (
        "causality", dataclasses.replace(TOKEN, causal_in_training=False)),
    "balances the batch in evaluation, too": (
        "causality", dataclasses.replace(ROUTERS["sinkhorn"], route=always_in_training)),
    "merges for padding": (
        "padding", bent(merges_for_padding, ROUTERS["smear"])),
    "looks back": ("causality", dataclasses.replace(TOKEN, route=looks_back)),
    "counts said to be linear": ("parts add up", dataclasses.replace(TOKEN, **NOT_LINEAR)),
    "a stat that is a mean": ("stats", with_stats(lambda o, t: {"mean": o.scores_TE.mean()})),
    "a stat with a gradient": ("stats", with_stats(lambda o, t: {"s": o.scores_TE[:, 0] @ t.mask_T})),
    "no gradient": ("gradients", with_routing(weights=lambda w, t: jax.lax.stop_gradient(w))),
    "NaN gradient": (
        "gradients", with_routing(weights=lambda w, t: w / (w.sum(axis=-1, keepdims=True)))),
    "carries what it does not declare": (
        "carry", bent(lambda o, t, s: o._replace(carry_TW=t.x_TD[:, :3]))),
    "ignores what it carries": (
        "carry",
        bent(lambda o, t, s: o._replace(carry_TW=t.x_TD[:, :3]), carries=lambda cfg: 3)),
    "carries less than it declares": (
        "carry",
        bent(lambda o, t, s: o._replace(carry_TW=t.x_TD[:, :2]), carries=lambda cfg: 3)),
    "carries what comes later": (
        "causality",
        bent(lambda o, t, s: o._replace(carry_TW=jnp.flip(t.x_TD, 0)), carries=lambda cfg: 16)),
    "pools what it does not count": ("declaration", dataclasses.replace(TOKEN, pooled=("open",))),
    "bfloat16": ("float32 products", dataclasses.replace(TOKEN, route=in_bfloat16)),
    "forced in vain": ("forced routes", dataclasses.replace(TOKEN, route=ignores_forced)),
    "slots forced in silence": (
        "forced routes", bent(lambda o, t, s: o, dataclasses.replace(TOKEN, form="slot"))),
    "barred in vain": ("barred experts", dataclasses.replace(TOKEN, route=ignores_barred)),
    "bars an expert's tokens": ("barred experts", bent(empties_where_barred)),
    "slots barred in silence": ("barred experts", dataclasses.replace(EXPERT, route=slots_whatever)),
    "honours what it does not declare": ("balance fields", dataclasses.replace(TOKEN, balance=())),
    "declares what it does not honour": (
        "balance fields", dataclasses.replace(EXPERT, balance=("z_loss", "sequence_loss"))),
    "a coefficient forgotten": (
        "balance fields",
        bent(lambda o, t, s: o._replace(losses={k: jnp.sign(v) for k, v in o.losses.items()}))),
    "layers that differ in shape": ("state", dataclasses.replace(TOKEN, **LAYER_SHAPES)),
    "a state of another dtype": (
        "state",
        dataclasses.replace(TOKEN, update=lambda state, stats, cfg: jax.tree.map(jnp.int32, state))),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_who_breaks_the_contract_is_caught(name):
    check, router = BROKEN[name]
    options = V3 if check == "state" else {}
    with pytest.raises(AssertionError):
        CHECKS[check](router, sizes(router, **options))


def test_a_rule_that_is_not_declared_is_caught():
    router = dataclasses.replace(
        TOKEN, balance=tuple(b for b in TOKEN.balance if b != "bias_update")
    )
    with pytest.raises(AssertionError):
        CHECKS["balance fields"](router, sizes(router, **V3))
    still = dataclasses.replace(TOKEN, update=lambda state, stats, cfg: state)
    with pytest.raises(AssertionError, match="bias_update is declared and moves no state"):
        CHECKS["balance fields"](still, sizes(still, **V3))


# --------------------------------------------------------------------------------------------------
# What the two routers compute.


def test_token_choice_routes_every_token_to_k_experts():
    out = TOKEN.route(
        {"kernel": jnp.eye(16, 4)}, {}, tokens_of(X_TD, 4, MASK_T[4:12]), sizes(TOKEN)
    )
    index = np.asarray(out.routing.expert_index_TK)
    assert ((index >= 0).sum(axis=1) == 2 * np.asarray(MASK_T[4:12])).all()
    assert out.stats["load"].sum() == 2 * 7
    # Entropies of the scores of the 7 tokens that are not padding.
    p_TE = np.asarray(out.scores_TE, np.float64)[np.asarray(MASK_T[4:12]) > 0]
    want = -(p_TE * np.log(p_TE)).sum()
    np.testing.assert_allclose(out.stats["score_entropy"], want, rtol=1e-5)


def test_bias_moves_selection_only_and_forcing_reproduces():
    cfg = sizes(TOKEN, score="sigmoid", expert_bias=True)
    params = {"kernel": jax.random.normal(jax.random.key(0), (16, 4)) / 2}

    def call(bias, **fields):
        return TOKEN.route(params, {"expert_bias": bias}, tokens_of(X_TD, 4, **fields), cfg)

    plain, biased = call(jnp.zeros(4)), call(jnp.array([0.0, 0.0, 0.0, 9.0]))
    index = biased.routing.expert_index_TK
    assert (index == 3).any(axis=1).all()
    assert not (plain.routing.expert_index_TK == 3).any(axis=1).all()
    np.testing.assert_array_equal(biased.scores_TE, plain.scores_TE)
    unbiased = np.take_along_axis(np.asarray(plain.scores_TE), np.asarray(index), axis=1)
    np.testing.assert_allclose(biased.routing.combine_weights_TK, unbiased, rtol=1e-6)
    forced = call(jnp.zeros(4), forced_TK=index)
    chex.assert_trees_all_equal(forced.routing, biased.routing)


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


@pytest.mark.parametrize("kind", choices_of(token_choice.Options, "score"))
@pytest.mark.parametrize("normalize", [False, True])
def test_scores_and_weights(kind, normalize):
    """g_i = s_i of the K largest, over their sum if normalised (2412.19437 eq. 13-14), times the scale."""
    options = dict(score=kind, normalize_weights=normalize, routed_scaling=2.5, router_bias=True)
    params, logits_TE = linear_router()
    out = TOKEN.route(params, {}, tokens_of(X_TD, 4), sizes(TOKEN, **options))
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
    cfg = sizes(EXPERT, capacity_factor=0.6, routed_scaling=2.5, router_bias=True)
    params, logits_TE = linear_router()
    want = np.array([SCORES["softmax"](row) for row in logits_TE])
    real = [t for t in range(8) if t not in (want[:, 0].argmax(), 6)]  # expert 0's favourite is one
    mask_T = jnp.isin(jnp.arange(8), jnp.array(real))
    out = EXPERT.route(params, {}, tokens_of(X_TD, 4, mask_T), cfg)
    np.testing.assert_array_equal(out.stats["load"], 3)
    for e in range(4):
        best = sorted(real, key=lambda t, e=e: -want[t, e])[:3]
        got = dict(zip(*(np.asarray(a[e]).tolist() for a in out.routing)))
        assert got == pytest.approx({t: 2.5 * want[t, e] for t in best}, rel=1e-5)


@pytest.mark.parametrize("kind", choices_of(token_choice.Options, "group_score"))
@pytest.mark.parametrize("size", [2, 4])
def test_limit_groups(kind, size):
    """V2 ranks groups by their best member (2405.04434 section 2.1.2); V3 by the sum of the best two
    (2412.19437 section 2.1.2), which with groups of four is neither the best nor the sum of all."""
    options = router_options(num_groups=4, topk_groups=2, group_score=kind)
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
    np.testing.assert_array_equal(token_choice.limit_groups(jnp.asarray(choice), options), want)
