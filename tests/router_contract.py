"""What every router must do, as functions of a `Router` and a `RouterConfig`. For a router of your own:

    from router_contract import CHECKS, sizes
    for check in CHECKS.values():
        check(ROUTER, sizes(ROUTER))

A check raises AssertionError where the router breaks its contract (`moejax.routers.contract`) or claims what is
not so. Options are arguments of `sizes`, so each can be tried. What a router computes is its own test's matter.
"""

import dataclasses
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
from router_case import (
    KEY,
    MASK_T,
    SETTINGS,
    B,
    S,
    T,
    by_token,
    count_experts,
    given,
    route,
    same,
    with_balance,
)
from router_case import sizes as sizes  # for whoever runs the checks

from moejax.routers.balance import BalanceConfig
from moejax.routers.contract import (
    FORMS,
    Routed,
    Router,
    RouterConfig,
    RouterOptions,
    count_totals,
)
from moejax.routers.specials import SPECIALS


def check_declaration(router: Router, cfg: RouterConfig) -> None:
    """What a router says of itself exists, and fits its config."""
    assert isinstance(router.options, RouterOptions) and isinstance(hash(cfg), int)
    assert router.form in FORMS
    declared = {f.name for f in dataclasses.fields(BalanceConfig)}
    assert set(router.balance) <= declared, set(router.balance) - declared
    assert set(router.specials(cfg)) <= set(SPECIALS)
    assert router.form == "token" or not router.specials(cfg), "only a token's route names one"
    assert router.problems(cfg, "model.moe.") == []
    most = router.routes_per_token(cfg) if router.form == "token" else cfg.num_experts
    assert 0 <= router.experts_used(cfg) <= most <= count_experts(router, cfg)
    if router.pooled:
        assert set(router.pooled) <= set(route(router, cfg, given(router, cfg)).stats)
    assert router.causal or router.causal_in_training, "not causal at all: causal=False says it"


def check_shapes_and_dtypes(router: Router, cfg: RouterConfig) -> None:
    """Whatever the hidden states' dtype, and with or without a key."""
    experts = count_experts(router, cfg)
    g = given(router, cfg)
    for case in (g, g._replace(key=KEY), g._replace(x_TD=g.x_TD.astype(jnp.bfloat16))):
        out = route(router, cfg, case)
        assert isinstance(out.routing, FORMS[router.form])
        first, weights = out.routing[0], out.routing[-1]
        if router.form == "token":
            chex.assert_shape([first, weights], (T, router.routes_per_token(cfg)))
        elif router.form == "slot":
            chex.assert_shape([first, weights], (cfg.num_experts, first.shape[1]))
        elif router.form == "soft":
            chex.assert_shape([first, weights], (B, S, cfg.num_experts, first.shape[3]))
        else:
            chex.assert_shape(weights, (first.shape[0], cfg.num_experts))
            assert T % first.shape[0] == 0, "groups are equal"
        named = router.form in ("token", "slot")  # by an index
        chex.assert_type(first, jnp.int32 if named else jnp.float32)
        chex.assert_type([weights, *out.stats.values(), *out.losses.values()], jnp.float32)
        chex.assert_shape(out.stats["load"], (experts,))
        chex.assert_shape(list(out.losses.values()), ())
        if out.scores_TE is not None:
            chex.assert_shape(out.scores_TE, (T, cfg.num_experts))
            chex.assert_type(out.scores_TE, jnp.float32)
        if out.choice_TN is not None:
            assert out.choice_TN.shape in [(T, cfg.num_experts), (T, experts)]
            chex.assert_type(out.choice_TN, jnp.float32)
        if out.logits_TE is not None:
            chex.assert_shape(out.logits_TE, (T, cfg.num_experts))
            chex.assert_type(out.logits_TE, jnp.float32)
            apart = [a[:, :, None] - a[:, None] for a in (out.logits_TE, out.scores_TE)]
            assert (apart[0] * apart[1] >= 0).all(), "scores do not rise with logits"
        if out.shared_TS is not None:
            chex.assert_shape(out.shared_TS, (T, cfg.shared_experts))
            chex.assert_type(out.shared_TS, jnp.float32)
        chex.assert_tree_all_finite(out)


def check_indices(router: Router, cfg: RouterConfig) -> None:
    """In range (special experts included), -1 in an empty slot, which weighs nothing; distinct; all counted."""
    if router.form not in ("token", "slot"):
        return
    out = route(router, cfg, given(router, cfg))
    index, weights = map(np.asarray, out.routing)
    end = count_experts(router, cfg) if router.form == "token" else T
    assert index.min() >= -1 and index.max() < end, f"indices from {index.min()} to {index.max()}"
    np.testing.assert_array_equal(weights[index < 0], 0.0)
    ordered = np.sort(index, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    assert not twice.any(), "experts of a token, or tokens of an expert, must be distinct"
    by_expert = np.bincount(index[index >= 0], minlength=end)
    load = by_expert if router.form == "token" else (index >= 0).sum(axis=1)
    np.testing.assert_array_equal(out.stats["load"], load, "stats['load'] counts routes")


def check_padding(router: Router, cfg: RouterConfig) -> None:
    """Never routed, never counted, and what lies there changes nothing."""
    idle = np.asarray(MASK_T) == 0
    g = given(router, cfg)
    out = route(router, cfg, g)
    if router.form == "token":
        assert (np.asarray(out.routing.expert_index_TK)[idle] == -1).all()
    elif router.form == "slot":
        assert not np.isin(np.asarray(out.routing.token_index_EC), np.flatnonzero(idle)).any()
    elif router.form == "soft":
        for mix_BSEC in out.routing:
            assert not np.asarray(mix_BSEC).reshape(T, -1)[idle].any()
    else:
        weights_GE = np.asarray(out.routing.weights_GE)
        assert not weights_GE[idle.reshape(len(weights_GE), -1).all(axis=1)].any()
    if out.shared_TS is not None:
        assert not np.asarray(out.shared_TS)[idle].any(), "shared experts weigh nothing there"
    x_TD, ids_T = jnp.where(idle[:, None], 5.0, g.x_TD), jnp.where(idle, 1, g.ids_T)
    changed = route(router, cfg, g._replace(x_TD=x_TD, ids_T=ids_T))
    same([out.routing, out.losses, out.stats], [changed.routing, changed.losses, changed.stats])
    nothing = route(router, cfg, g._replace(mask_T=jnp.zeros(T)))
    chex.assert_tree_all_finite(nothing)
    chex.assert_trees_all_equal(*_zero_and([nothing.stats, nothing.losses]))


def _zero_and(tree):
    return jax.tree.map(jnp.zeros_like, tree), tree


def check_pure(router: Router, cfg: RouterConfig) -> None:
    """The same twice, with a key too, and the same compiled."""
    g = given(router, cfg)._replace(key=KEY)
    first = route(router, cfg, g)
    chex.assert_trees_all_equal(route(router, cfg, g), first)
    same(jax.jit(lambda g: route(router, cfg, g))(g), first)


def check_causality(router: Router, cfg: RouterConfig) -> None:
    """A causal router's token looks at nothing that comes later, nor at other sequences; and since decoding
    shows one token at a time, not at earlier ones either. The same in training, unless the router says that it
    looks at the batch there: then it must."""
    if not router.causal:
        return
    _check_each_token_alone(router, dataclasses.replace(cfg, training=False))
    in_training = dataclasses.replace(cfg, training=True)
    if router.causal_in_training:
        _check_each_token_alone(router, in_training)
        return
    try:
        _check_each_token_alone(router, in_training)
    except AssertionError:
        return
    raise AssertionError("causal_in_training=False, and training looks at each token alone")


def _check_each_token_alone(router: Router, cfg: RouterConfig) -> None:
    g = given(router, cfg)._replace(mask_T=jnp.ones(T))
    for key in (None, KEY):
        g = g._replace(key=key)
        before = by_token(router, cfg, route(router, cfg, g), g.x_TD)
        for sequence, length in ((0, 1), (1, 3), (2, 2)):
            kept = np.arange(T) // S == sequence
            kept &= np.arange(T) % S < length
            other = jax.random.normal(jax.random.key(length), g.x_TD.shape)
            x_TD = jnp.where(kept[:, None], g.x_TD, other)
            moved = g._replace(x_TD=x_TD, ids_T=jnp.where(kept, g.ids_T, g.ids_T + 7))
            after = by_token(router, cfg, route(router, cfg, moved), x_TD)
            np.testing.assert_array_equal(after[kept], before[kept])
    g = g._replace(key=None)
    alone = [g.rows(slice(t, t + 1)) for t in range(T)]
    alone = [by_token(router, cfg, route(router, cfg, a, seq_len=1), a.x_TD)[0] for a in alone]
    same(jnp.stack(alone), by_token(router, cfg, route(router, cfg, g), g.x_TD))


def check_parts_add_up(router: Router, cfg: RouterConfig) -> None:
    """What accumulation counts on: with the totals of the batch, and its stats where the router says that a
    loss needs them, the losses of two halves are shares of the whole's, and so are their gradients."""
    g = given(router, cfg)
    totals = count_totals(MASK_T.reshape(B, S))
    if not router.linear_losses(cfg):
        totals = totals._replace(stats=route(router, cfg, g).stats)

    def losses(params, x_TD, rows, totals):
        here = g._replace(params=params, x_TD=x_TD, totals=totals).rows(rows)
        return route(router, cfg, here).losses

    def all_of(rows, totals):
        total = lambda *a: sum(losses(*a, rows, totals).values(), jnp.zeros(()))  # noqa: E731
        gradient = jax.grad(total, (0, 1))(g.params, g.x_TD)
        return losses(g.params, g.x_TD, rows, totals), gradient

    halves = [all_of(rows, totals) for rows in (slice(0, T // 2), slice(T // 2, T))]
    added, whole = jax.tree.map(jnp.add, *halves), all_of(slice(0, T), None)
    same(added[0], whole[0], rtol=1e-6)
    same(added[1], whole[1])


def check_stats(router: Router, cfg: RouterConfig) -> None:
    """Sums over tokens: those of two halves add up to the whole's. (Where tokens compete for slots the halves
    are routed otherwise, and only their shapes can be compared.) Without gradient."""
    g = given(router, cfg)
    halves = (slice(0, T // 2), slice(T // 2, T))
    parts = [route(router, cfg, g.rows(rows)).stats for rows in halves]
    added, whole = jax.tree.map(jnp.add, *parts), route(router, cfg, g).stats
    chex.assert_trees_all_equal_shapes_and_dtypes(added, whole)
    if router.causal and (router.causal_in_training or not cfg.training):
        same(added, whole)

    def total(params, x_TD):
        stats = route(router, cfg, g._replace(params=params, x_TD=x_TD)).stats
        return sum(s.sum() for s in stats.values())

    gradient = jax.grad(total, (0, 1))(g.params, g.x_TD)
    chex.assert_trees_all_equal(*_zero_and(gradient))


def check_gradients(router: Router, cfg: RouterConfig) -> None:
    """Weights and losses have finite ones; a padding token's is 0, and no parameter is there for nothing."""
    g = given(router, cfg)._replace(key=KEY)

    def total(params, x_TD):
        out = route(router, cfg, g._replace(params=params, x_TD=x_TD))
        weights = [a for a in out.routing if jnp.issubdtype(a.dtype, jnp.floating)]
        weights += [] if out.shared_TS is None else [out.shared_TS]
        weights += [] if out.carry_TW is None else [out.carry_TW * MASK_T[:, None]]
        return sum((w**2).sum() for w in weights) + sum(out.losses.values(), 0.0)

    dparams, dx_TD = jax.grad(total, argnums=(0, 1))(g.params, g.x_TD)
    chex.assert_tree_all_finite((dparams, dx_TD))
    np.testing.assert_array_equal(dx_TD[MASK_T == 0], 0.0)
    for path, a in jax.tree_util.tree_flatten_with_path(dparams)[0]:
        assert abs(a).max() > 0, f"no gradient reaches {jax.tree_util.keystr(path)}"


def check_carry(router: Router, cfg: RouterConfig) -> None:
    """What is passed on is as wide as declared, and what arrives has an effect on a token, with a gradient."""
    g, width = given(router, cfg), router.carries(cfg)
    out = route(router, cfg, g)
    if not width:
        assert out.carry_TW is None, "it carries what it does not declare"
        return
    chex.assert_shape(out.carry_TW, (T, width))
    chex.assert_type(out.carry_TW, jnp.float32)

    def of_weights(carried_TW):
        weights = by_token(
            router, cfg, route(router, cfg, g._replace(carried_TW=carried_TW)), g.x_TD
        )
        return (weights[:, : count_experts(router, cfg)] ** 2).sum()

    gradient = jax.grad(of_weights)(g.carried_TW)
    chex.assert_tree_all_finite(gradient)
    reached = (np.asarray(gradient) != 0).any(axis=1)
    np.testing.assert_array_equal(reached, MASK_T > 0, err_msg="weights depend on what arrives")


def check_float32_products(router: Router, cfg: RouterConfig) -> None:
    """Also where the hardware multiplies float32 with fewer bits unless told otherwise, and under bfloat16."""
    g = given(router, cfg)
    g = g._replace(x_TD=g.x_TD.astype(jnp.bfloat16))
    traced = jax.jit(lambda g: route(router, cfg, g)).trace(g)
    for platform in ("cuda", "tpu"):
        text = traced.lower(lowering_platforms=(platform,)).as_text()
        products = [line for line in text.splitlines() if "dot_general" in line]
        assert all("HIGHEST" in line and "bf16" not in line for line in products), products


def check_forced_routes(router: Router, cfg: RouterConfig) -> None:
    """Its own routes, forced, give the same routing; others are taken and weighed. Slots cannot be forced."""
    g = given(router, cfg)
    out = route(router, cfg, g)
    other_TK = (jnp.arange(T)[:, None] + jnp.arange(cfg.experts_per_token)[None] + 1) % 4
    if router.form != "token":
        try:
            route(router, cfg, g._replace(forced_TK=other_TK.astype(jnp.int32)))
        except ValueError:
            return
        raise AssertionError(
            "a router that names no experts of tokens must refuse forced routes by a ValueError"
        )
    again = route(router, cfg, g._replace(forced_TK=out.routing.expert_index_TK))
    same(again, out)
    forced = route(router, cfg, g._replace(forced_TK=other_TK.astype(jnp.int32)))
    want = np.where(MASK_T[:, None] > 0, other_TK, -1)
    np.testing.assert_array_equal(forced.routing.expert_index_TK, want)
    load = np.bincount(want[want >= 0], minlength=count_experts(router, cfg))
    np.testing.assert_array_equal(forced.stats["load"], load)
    chex.assert_tree_all_finite(forced)


def check_barred_experts(router: Router, cfg: RouterConfig) -> None:
    """Nobody chooses them; who had chosen none keeps its routes; a selection bias of -inf does the same; where
    all are barred no route is left; forced routes are taken as they are. Or a ValueError."""
    g = given(router, cfg)
    barring = lambda barred_TE: route(router, cfg, g._replace(barred_TE=barred_TE))  # noqa: E731
    plain, experts = route(router, cfg, g), cfg.num_experts
    one = jnp.arange(experts)[None] == 2  # (1, E)
    two = (jnp.arange(T)[:, None] + jnp.arange(experts)[None]) % experts < 2  # (T, E): by token
    try:
        alone = barring(one)
    except ValueError as e:
        assert "would work" in str(e), "who refuses says what would work"
        return
    assert router.form == "token", "only a token's choice can be narrowed; refuse by a ValueError"
    before = np.asarray(plain.routing.expert_index_TK)
    for barred_TE, out in ((one, alone), (two, barring(two))):
        index, weights = map(np.asarray, out.routing)
        barred = np.broadcast_to(barred_TE, (T, experts))
        barred = np.pad(barred, ((0, 0), (0, count_experts(router, cfg) - experts + 1)))  # and -1
        assert not np.take_along_axis(barred, index, axis=1).any(), "a barred expert was chosen"
        np.testing.assert_array_equal(weights[index < 0], 0.0)
        chex.assert_tree_all_finite(out)
        load = np.bincount(index[index >= 0], minlength=len(out.stats["load"]))
        np.testing.assert_array_equal(out.stats["load"], load)
        if router.causal_in_training or not cfg.training:
            untouched = ~np.take_along_axis(barred, before, axis=1).any(axis=1)
            np.testing.assert_array_equal(index[untouched], before[untouched])
    bias_N = g.state.get("expert_bias")
    additive = not getattr(cfg.options, "bias_multiplies", False) and "table" not in g.state
    if bias_N is not None and additive:
        state = {**g.state, "expert_bias": bias_N.at[2].set(-jnp.inf)}
        biased = route(router, cfg, g._replace(state=state)).routing
        same(alone.routing, biased)
    none = barring(jnp.ones((T, experts), bool))
    index = np.asarray(none.routing.expert_index_TK)
    assert ((index == -1) | (index >= experts)).all(), "all experts are barred"
    chex.assert_tree_all_finite(none)
    again = route(router, cfg, g._replace(forced_TK=plain.routing.expert_index_TK, barred_TE=one))
    same(again.routing, plain.routing)


def check_balance_fields(router: Router, cfg: RouterConfig) -> None:
    """What is not declared is not honoured; what is declared has an effect, a loss in proportion to its
    coefficient."""
    g = given(router, cfg)
    plain = route(router, cfg, g)
    load = plain.stats["load"]
    stats = {**plain.stats, "load": load * jnp.arange(1.0, len(load) + 1)}  # surely uneven
    plain_state = router.update(g.state, stats, with_balance(cfg))
    for field in dataclasses.fields(BalanceConfig):
        if field.name in SETTINGS:
            continue
        here = with_balance(cfg, field.name)
        if field.name not in router.balance:
            chex.assert_trees_all_equal(route(router, here, g), plain)
            chex.assert_trees_all_equal(router.update(g.state, stats, here), plain_state)
        elif router.problems(here, ""):
            continue
        elif isinstance(field.default, float):
            once = _sum(route(router, here, g)) - _sum(plain)
            assert once != 0, f"{field.name} is declared and changes no loss"
            twice = dataclasses.replace(here.balance, **{field.name: 0.2})
            twice = route(router, dataclasses.replace(here, balance=twice), g)
            same(_sum(twice) - _sum(plain), 2 * once)
        else:
            moved = jax.tree.leaves(router.update(g.state, stats, here))
            still = jax.tree.leaves(plain_state)
            assert any((a != b).any() for a, b in zip(moved, still, strict=True)), (
                f"{field.name} is declared and moves no state"
            )


def _sum(out: Routed):
    return sum(out.losses.values(), jnp.zeros(()))


def check_state(router: Router, cfg: RouterConfig) -> None:
    """Layers' states can be stacked, those of layers past the trunk (MTP) too; an update keeps their structure,
    and is the same for a stack of layers at once."""
    g = given(router, cfg)
    states = [router.init_state(cfg, layer) for layer in range(cfg.num_layers + 1)]
    chex.assert_trees_all_equal_shapes_and_dtypes(*states)
    stats = route(router, cfg, g).stats
    new = [router.update(s, stats, cfg) for s in states]
    chex.assert_trees_all_equal_shapes_and_dtypes(new[0], states[0])
    chex.assert_tree_all_finite(new)
    if not states[0]:
        return
    stack = lambda trees: jax.tree.map(lambda *a: jnp.stack(a), *trees)  # noqa: E731
    at_once = jax.vmap(lambda s, r: router.update(s, r, cfg))
    same(at_once(stack(states), stack([stats] * len(states))), stack(new))
    chex.assert_tree_all_finite(route(router, cfg, g._replace(state=new[0])))


Check = Callable[[Router, RouterConfig], None]


def under_each_balance(check: Check) -> Check:
    """The check with nothing balanced, with each field of BalanceConfig that the router honours and that fits
    its options, and with all of those."""

    def run(router: Router, cfg: RouterConfig) -> None:
        fits = [f for f in router.balance if f not in SETTINGS]
        fits = [f for f in fits if not router.problems(with_balance(cfg, f), "")]
        for fields in ((), *((f,) for f in fits), fits):
            check(router, with_balance(cfg, *fields))

    return run


def in_training_too(check: Check) -> Check:
    """The check in evaluation, and in training where the router says that it routes otherwise there."""

    def run(router: Router, cfg: RouterConfig) -> None:
        check(router, cfg)
        if not router.causal_in_training:
            check(router, dataclasses.replace(cfg, training=True))

    return run


CHECKS: dict[str, Check] = {
    "declaration": check_declaration,
    "shapes and dtypes": in_training_too(under_each_balance(check_shapes_and_dtypes)),
    "indices": in_training_too(check_indices),
    "padding": in_training_too(under_each_balance(check_padding)),
    "pure": in_training_too(check_pure),
    "causality": check_causality,
    "parts add up": in_training_too(under_each_balance(check_parts_add_up)),
    "stats": in_training_too(under_each_balance(check_stats)),
    "gradients": in_training_too(under_each_balance(check_gradients)),
    "carry": check_carry,
    "float32 products": in_training_too(check_float32_products),
    "forced routes": in_training_too(check_forced_routes),
    "barred experts": in_training_too(check_barred_experts),
    "balance fields": in_training_too(check_balance_fields),
    "state": under_each_balance(check_state),
}
