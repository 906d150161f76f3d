"""Interventions against oracles: by hand in NumPy, another router state, a model that never had the part."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from intervene_case import DEEPSEEK, LAYOUTS, OLMOE

from moejax.commands import evaluate as evaluate_command
from moejax.config import (
    ComputeConfig,
    ConfigError,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
)
from moejax.evals import intervene
from moejax.evals.generate import generate
from moejax.evals.intervene import Model
from moejax.evals.intervene_run import RESAMPLES, Sums, _resampled, compare, intervene_run
from moejax.evals.intervene_text import apply_all, check_all, parse
from moejax.evals.routes import routes_of
from moejax.evals.writer import mesh_layout
from moejax.models.replay import with_routes
from moejax.models.transformer import init_model, param_specs
from moejax.moe.layer import moe
from moejax.params import init_params
from moejax.routers import ROUTERS, router_options
from moejax.routers.contract import tokens_of

BATCH = {
    "tokens": jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 6))),
    "positions": jnp.broadcast_to(jnp.arange(6), (2, 6)),
    "segment_ids": jnp.ones((2, 6), jnp.int32).at[1, 4:].set(0),
}
REAL_T = np.asarray(BATCH["segment_ids"]).ravel() > 0


@functools.cache
def model(cfg: ModelConfig) -> Model:
    """Biases are drawn like everything else: zero ones would hide a bias that stays."""
    params, state = init_model(cfg, jax.random.key(0))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, keys)]
    return Model(cfg, tree.unflatten(leaves), state)


@functools.partial(jax.jit, static_argnums=0)
def _seen(cfg, params, state, batch):
    compute = ComputeConfig(dispatcher="dense")
    return routes_of(params, state, batch, cfg, compute, inputs=True)


@functools.partial(jax.jit, static_argnums=0)
def one_layer(cfg, params, x_BSD):
    compute = ComputeConfig(dispatcher="dense")
    return moe(params, {}, x_BSD, cfg, compute=compute, mask_BS=BATCH["segment_ids"] > 0)


def seen(m: Model, batch=BATCH):
    return jax.device_get(_seen(m.cfg, m.params, m.router_state, batch))


def by_hand(m: Model, x_TD, expert_TK, weights_TK, at: int) -> np.ndarray:
    """Routed and shared experts of one layer in float64."""
    p = jax.tree.map(lambda a: np.float64(a[at]), m.params["moe_blocks"]["moe"])

    def ffn(w, x):
        gate, up = (x @ w[f"w_{n}"] + w.get(f"b_{n}", 0) for n in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ w["w_down"] + w.get("b_down", 0)

    y_TD = ffn(p["shared"], x_TD) if "shared" in p else np.zeros(x_TD.shape)
    for t, (experts, weights) in enumerate(zip(expert_TK, weights_TK)):
        for e, w in zip(experts, weights):
            if e >= 0:
                y_TD[t] += w * ffn({n: a[e] for n, a in p["experts"].items()}, x_TD[t])
    return y_TD


@pytest.mark.parametrize("name", LAYOUTS)
def test_silent_experts_are_routes_left_out(name):
    """Routing stays; what the expert would add, its bias too, is missing. Layer by layer, against NumPy."""
    before = model(LAYOUTS[name])
    places = parse(["experts=0/2+*/5+*/6:silent"])
    check_all(places, before.cfg)
    after = apply_all(places, before)
    routes = seen(before)
    for at in range(2):
        x_TD = np.float64(routes.inputs_LTD[at])
        layer = jax.tree.map(lambda a, at=at: a[at], after.params["moe_blocks"]["moe"])
        got, aux = one_layer(before.cfg, layer, routes.inputs_LTD[at].reshape(2, 6, -1))
        np.testing.assert_array_equal(aux.routing.expert_index_TK, routes.expert_LTK[at])
        kept_TK = np.where(
            np.isin(routes.expert_LTK[at], (2, 5, 6) if at == 0 else (5, 6)),
            -1,
            routes.expert_LTK[at],
        )
        assert (kept_TK != routes.expert_LTK[at]).any()
        want = by_hand(before, x_TD, kept_TK, routes.weights_LTK[at], at)
        # float32 against float64 in sums of some 30 terms of order 1.
        np.testing.assert_allclose(
            np.asarray(got).reshape(12, -1)[REAL_T], want[REAL_T], rtol=1e-4, atol=1e-5
        )


def test_rerouting_is_a_selection_bias_of_minus_infinity():
    moe_cfg = dataclasses.replace(
        DEEPSEEK.moe,
        router=router_options(
            score="sigmoid", normalize_weights=True, expert_bias=True, num_groups=2, topk_groups=1
        ),
    )
    before = model(dataclasses.replace(DEEPSEEK, moe=moe_cfg))
    one = parse(["experts=0/2+*/5"])
    check_all(one, before.cfg)
    out_LE = intervene.given((2, 8), [(0, 2), (None, 5)])
    blocks = {
        "expert_bias": jnp.where(out_LE, -jnp.inf, before.router_state["moe_blocks"]["expert_bias"])
    }
    got, want = (
        seen(apply_all(one, before)),
        seen(before._replace(router_state={"moe_blocks": blocks})),
    )
    for field in ("expert_LTK", "weights_LTK", "scores_LTE", "hidden_BSD"):
        np.testing.assert_array_equal(getattr(got, field), getattr(want, field))
    assert not (got.expert_LTK[0] == 2).any() and not (got.expert_LTK == 5).any()
    assert (seen(before).expert_LTK == 5).any()
    assert (got.expert_LTK[:, REAL_T] >= 0).all()  # the next best took the place


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_token_without_its_best(name):
    """Of layer 1 alone: those ranked 3 to 2 + K by its scores; layer 0 as ever."""
    before = model(LAYOUTS[name])
    one = parse(["best=2:layers=1"])
    check_all(one, before.cfg)
    got, plain = seen(apply_all(one, before)), seen(before)
    np.testing.assert_array_equal(got.expert_LTK[0], plain.expert_LTK[0])
    k = before.cfg.moe.experts_per_token
    ranked = np.argsort(-got.scores_LTE[1], axis=1)[:, 2 : 2 + k]
    np.testing.assert_array_equal(got.expert_LTK[1][REAL_T], ranked[REAL_T])
    scores = np.take_along_axis(got.scores_LTE[1], ranked, axis=1)
    np.testing.assert_allclose(got.weights_LTK[1][REAL_T], scores[REAL_T], rtol=1e-6)


def test_without_shared_experts_it_is_a_model_that_has_none():
    before = model(DEEPSEEK)
    plain, more = (apply_all(parse([t]), before) for t in ("no_shared", "no_shared:one_more"))
    assert more.cfg.moe.experts_per_token == 4 and plain.cfg.moe.experts_per_token == 3
    fresh, _ = init_model(plain.cfg, jax.random.key(0))
    assert jax.tree.structure(plain.params) == jax.tree.structure(fresh)
    silent = jax.tree.map(lambda a: a, before.params)
    shared = silent["moe_blocks"]["moe"]["shared"]
    shared |= {n: jnp.zeros_like(shared[n]) for n in ("w_down", "b_down")}
    want = seen(before._replace(params=silent)).hidden_BSD
    np.testing.assert_allclose(seen(plain).hidden_BSD, want, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(
        (seen(more).expert_LTK >= 0).sum(axis=2), np.broadcast_to(4 * REAL_T, (2, 12))
    )
    assert "shared" in before.params["moe_blocks"]["moe"]  # what was given is as it was


@pytest.mark.parametrize("name", ROUTERS)
def test_temperature_divides_logits_or_is_refused(name):
    """A router that is linear scores x with W / T as it scores x / T with W; one that is not is refused."""
    router = ROUTERS[name]
    k = dict(router.recipe).get("model.moe.experts_per_token", 2)
    options = dataclasses.replace(router.options, name=name)
    if name == "peer":
        options = dataclasses.replace(options, heads=1, key_dim=4)
    cfg = dataclasses.replace(
        OLMOE,
        moe=MoEConfig(num_experts=16, experts_per_token=min(k, 2), d_expert=8, router=options),
    )
    static = cfg.router_config()
    params = init_params(router.param_specs(static), jax.random.key(0))
    linear = set(params) <= {"kernel", "bias"} and params
    try:
        intervene.check_temperature(cfg)
    except ConfigError as e:
        assert "a linear router" in str(e)
        assert not linear
        return
    if name not in ("token_choice", "expert_threshold", "remoe", "sparse_mixer"):
        return  # one of each way to score is enough
    whole = {"moe_blocks": {"moe": {"router": jax.tree.map(lambda a: a[None], params)}}}
    cooled = intervene.with_temperature(Model(cfg, whole, {}), 2.0).params["moe_blocks"]["moe"][
        "router"
    ]
    x_TD = jax.random.normal(jax.random.key(1), (4, 16))

    def scores(params, x_TD):
        state = router.init_state(static, 0)
        tokens = tokens_of(x_TD, 4, ids_T=jnp.arange(4))
        return np.asarray(router.route(params, state, tokens, static).scores_TE)

    got = scores(jax.tree.map(lambda a: a[0], cooled), x_TD)
    np.testing.assert_allclose(got, scores(params, x_TD / 2), rtol=1e-5)
    assert not np.allclose(got, scores(params, x_TD), rtol=1e-2)


def test_uniform_routes():
    """Distinct, every expert as often as another, and taken by the model with weights of its own scores."""
    routes = intervene.uniform_routes(OLMOE, (40, 50), (3, 0))
    assert routes.shape == (40, 50, 2, 2) and (routes[..., 0] != routes[..., 1]).all()
    load = np.bincount(routes[:, :, 0].ravel(), minlength=8)
    assert abs(load - 500).max() < 5 * np.sqrt(500)  # five deviations
    assert (routes == intervene.uniform_routes(OLMOE, (40, 50), (3, 0))).all()
    assert (routes != intervene.uniform_routes(OLMOE, (40, 50), (4, 0))).any()
    told = intervene.uniform_routes(OLMOE, (2, 6), (0, 0))
    got = seen(model(OLMOE), with_routes(BATCH, told, OLMOE))
    np.testing.assert_array_equal(
        got.expert_LTK[:, REAL_T], told.reshape(12, 2, 2).swapaxes(0, 1)[:, REAL_T]
    )


def test_which_experts():
    values = np.array([[3, 1, 3, 0], [0, 5, 2, 9]])
    np.testing.assert_array_equal(intervene.largest(values, 2), [[1, 0, 1, 0], [0, 1, 0, 1]])
    drawn = intervene.drawn((3, 8), 2, 0)
    assert (drawn.sum(axis=1) == 2).all() and (drawn != intervene.drawn((3, 8), 2, 1)).any()


# --------------------------------------------------------------------------------------------------
# The cost, with its interval.


def sums(nll_P, targets_P, domain_P, load=0.0):
    """Rows of one piece each."""
    batch = {
        "segment_ids": np.ones((len(nll_P), 4), int),
        "loss_mask": np.arange(4)[None] < np.asarray(targets_P)[:, None],
        "domain": np.broadcast_to(np.asarray(domain_P)[:, None], (len(nll_P), 4)),
    }
    nll_BS = np.zeros((len(nll_P), 4))
    nll_BS[:, 0] = nll_P
    return Sums(*_resampled(nll_BS, batch, 2, 0), np.zeros(()))


def test_interval_is_that_of_a_paired_bootstrap():
    """Against pieces drawn with replacement. Losses vary tenfold more between pieces than the change does: an
    unpaired interval would be far wider."""
    rng = np.random.default_rng(0)
    targets, domain = rng.integers(1, 5, 200), rng.integers(0, 2, 200)
    before = 10 * rng.random(200) * targets
    after = before + rng.normal(0.3, 0.5, 200) * targets
    got = compare(sums(before, targets, domain), [sums(after, targets, domain)], ["a", "b"])
    assert list(got) == ["all", "a", "b"] and got["a"].pieces + got["b"].pieces == 200
    picked = rng.integers(0, 200, (4000, 200))
    means = (after - before)[picked].sum(axis=1) / targets[picked].sum(axis=1)
    want = np.quantile(means, [0.025, 0.975])
    assert got["all"].difference == pytest.approx((after - before).sum() / targets.sum())
    # Quantiles of 1000 and 4000 draws, each off by a few percent of the width.
    np.testing.assert_allclose([got["all"].low, got["all"].high], want, atol=0.15 * np.ptp(want))
    chosen = domain == 1
    assert got["b"].changed == pytest.approx(after[chosen].sum() / targets[chosen].sum())
    both = compare(sums(before, targets, domain), [sums(after, targets, domain)] * 2, ["a", "b"])
    assert both["all"].low == got["all"].low and len(both["all"].seeds) == 2
    assert RESAMPLES >= 1000


def test_pieces_are_what_of_a_document_lies_in_a_row():
    batch = {
        "segment_ids": np.array([[1, 1, 2, 2], [1, 1, 1, 0]]),
        "loss_mask": np.array([[1, 0, 1, 1], [1, 1, 0, 0]]),
        "domain": np.array([[0, 0, 1, 1], [0, 0, 0, 0]]),
    }
    nll_Rd, targets_Rd, pieces_d = _resampled(np.array([[1.0, 0, 2, 3], [4, 5, 0, 0]]), batch, 2, 5)
    np.testing.assert_array_equal(nll_Rd[0], [10, 5])
    np.testing.assert_array_equal(targets_Rd[0], [3, 2])
    np.testing.assert_array_equal(pieces_d, [2, 1])
    # The whole piece has one weight.
    np.testing.assert_allclose(nll_Rd[1:, 1], 2.5 * targets_Rd[1:, 1])


@pytest.mark.product
def test_a_run_on_its_own_routes_costs_nothing(trained):
    changes = intervene_run(trained, parse([f"routes_from={trained}"]), num_batches=2)
    assert {name for name in changes} == {"all", "lower", "digits"}
    assert all(c.difference == 0 and c.low == c.high == 0 for c in changes.values())


def test_evaluate_command(trained, tmp_path, capsys):
    """Without the shared and all routed experts but the few that a token needs, the text is harder."""
    out = tmp_path / "out.json"
    argv = [f"--workdir={trained}", "--batches=2", "--intervene=random=6:seeds=2", f"--json={out}"]
    assert evaluate_command.main(argv) == 0
    said = capsys.readouterr().out
    assert "random=6:seeds=2" in said and "95% interval" in said and "lower" in said
    results = json.loads(out.read_text())
    one = results["all"]
    assert len(one["seeds"]) == 2 and one["low"] < one["difference"] < one["high"]
    assert one["changed"] == pytest.approx(np.mean(one["seeds"]))
    assert one["difference"] == pytest.approx(one["changed"] - one["untouched"])
    with pytest.raises(ConfigError, match="there is no expert 9"):
        evaluate_command.main([f"--workdir={trained}", "--intervene=experts=0/9"])
    other = tmp_path / "nowhere"
    with pytest.raises(ConfigError, match=str(other)):
        evaluate_command.main([f"--workdir={trained}", f"--intervene=routes_from={other}"])


@pytest.mark.product
def test_generation_without_experts():
    """Prefill and decoding see what the router state brings: the text of a selection bias of -inf, on one
    device and on a mesh."""
    moe_cfg = dataclasses.replace(
        OLMOE.moe, router=router_options(score="sigmoid", expert_bias=True)
    )
    before = model(dataclasses.replace(OLMOE, moe=moe_cfg, max_seq_len=32))
    out_LE = intervene.drawn((2, 8), 4, 0)
    barred = intervene.bar(before, out_LE)
    bias_LE = jnp.where(out_LE, -jnp.inf, 0.0)
    prompts = [[3, 7, 1, 30, 2], [5, 9], [11]]
    args = before.cfg, prompts, 8
    want = generate(before.params, {"moe_blocks": {"expert_bias": bias_LE}}, *args)
    assert generate(barred.params, barred.router_state, *args) == want
    assert generate(before.params, before.router_state, *args) != want
    layout = mesh_layout(ExperimentConfig(model=before.cfg), "data=2,expert=2,tensor=2")
    assert layout is not None
    params = jax.device_put(barred.params, layout.of_specs(param_specs(before.cfg)))
    state = jax.device_put(barred.router_state, layout.replicated)
    assert generate(params, state, *args, layout=layout) == want


@pytest.mark.product
def test_on_a_mesh(trained):
    """Sums of float32 in another order; routes are told in the same way."""
    for text in ("top=2", "best=2", "uniform", "experts=*/1:silent"):
        one, many = (
            intervene_run(trained, parse([text]), num_batches=2, mesh=mesh)["all"]
            for mesh in (None, "data=2,expert=2")
        )
        assert many.changed == pytest.approx(one.changed, rel=1e-5)
        assert many.difference == pytest.approx(one.difference, abs=1e-5)
