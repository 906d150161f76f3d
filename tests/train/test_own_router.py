"""A router of one's own is one file and one line: nothing else of moejax knows of those in tests/own_routers.

Each is copied to a folder of its own, imported from there and added to ROUTERS. Then it keeps the contract,
trains with accumulation, has its state updated, is resumed, evaluated, reported and planned, and generates
if it can.
"""

import contextlib
import importlib
import io
import json
import pathlib
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny
from flat import change, experiment
from router_contract import CHECKS, sizes

from moejax.__main__ import main
from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.models.mtp import mtp_targets
from moejax.routers import ROUTERS, balance, token_choice
from moejax.routers.contract import Router
from moejax.runs.open import load_run
from moejax.train.state import create_state
from moejax.train.step import loss_and_grads, train_step

ROOT = pathlib.Path(__file__).parents[2]
# Options with which all that a router does can be seen in two steps.
OPTIONS = {"relu": dict(coefficient=0.1), "threshold": {}, "hashed": {}}
CFG = experiment(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_dense_layers=0,
    init_std=0.3,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mtp_depth=1,
    num_experts=8,
    d_expert=8,
    seq_len=8,
    batch_size=4,
    clip_norm=0.0,
    dispatcher="dense",  # compiles fastest; the others are proved equal to it
)


@pytest.fixture(
    scope="module",
    params=["relu", *(pytest.param(n, marks=pytest.mark.product) for n in ("threshold", "hashed"))],
)
def name(request, tmp_path_factory):
    """The name of a router that is in the table while this module's tests need it."""
    folder = tmp_path_factory.mktemp("elsewhere")
    shutil.copy(ROOT / f"tests/own_routers/{request.param}.py", folder / f"my_{request.param}.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        module = importlib.import_module(f"my_{request.param}")  # the file
        patch.setitem(ROUTERS, request.param, module.ROUTER)  # and the line
        yield request.param


@pytest.mark.parametrize("check", CHECKS)
def test_contract(name, check):
    CHECKS[check](ROUTERS[name], sizes(ROUTERS[name], **OPTIONS[name]))


# --------------------------------------------------------------------------------------------------
# Two steps.


def make_batch(rows=4):
    """Row 1 is all padding, row 2 ends in padding."""
    batch = {k: np.array(v) for k, v in synthetic_batch(8, rows, 32).items()}
    for a in batch.values():
        a[1], a[2, 5:] = 0, 0
    return jax.tree.map(jnp.asarray, batch)


def two_steps(cfg):
    """The first step's gradients; all metrics of both; the router's state before, between and after."""
    state, batch = create_state(cfg, jax.random.key(0), None), make_batch()
    step = jax.jit(lambda state, batch: train_step(state, batch, cfg))
    states, metrics, moments = [state.router_state], [], []
    for _ in range(2):
        state, seen = step(state, batch)
        states.append(state.router_state)
        metrics.append(seen)
        moments.append(optax.tree.get(state.opt_state, "mu"))
    # Adam's first moment begins at 0, and nothing is clipped.
    grads = jax.tree.map(lambda m: m / (1 - cfg.optimizer.b1), moments[0])
    return grads, metrics, states


@pytest.fixture(scope="module")
def steps(name):
    """By accumulation; with every loss that the router can have."""
    cfg = change(
        CFG, router=name, z_loss=0.1 * ("z_loss" in ROUTERS[name].balance), **OPTIONS[name]
    )
    return {n: two_steps(change(cfg, accumulation=n)) for n in (1, 2)}


def test_accumulation_changes_nothing(name, steps):
    """Losses, gradients, stats and the states that follow from them."""
    grads, metrics, states = steps[1]
    losses = {k: v for k, v in metrics[0].items() if k.startswith("balance/")}
    own = {"relu": {"balance/gates"}, "threshold": {"balance/z"}, "hashed": set()}
    assert set(losses) == own[name] and all(v > 0.01 for v in losses.values())
    chex.assert_tree_all_finite(steps[1])
    assert float(optax.tree.norm(grads)) == pytest.approx(float(metrics[0]["grad_norm"]), rel=1e-5)
    # Sums of 32 float32 terms in another order; gradients are of order 0.1 and below.
    chex.assert_trees_all_close(steps[2][0], grads, rtol=1e-5, atol=2e-6)
    chex.assert_trees_all_close(steps[2][1][0], metrics[0], rtol=1e-5, atol=2e-6)
    # Adam divides by the size of a gradient, so that small ones' rounding shows.
    chex.assert_trees_all_close(steps[2][1][1], metrics[1], rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(steps[2][2], states, rtol=1e-6, atol=1e-7)
    routes = metrics[0]["stats/moe_blocks/load"].sum(axis=1)
    tokens = metrics[0]["tokens"]
    assert tokens == 21 and (routes > 0).all()
    assert ROUTERS[name].form == "slot" or (routes <= 2 * tokens).all()


def test_its_state_moves_by_its_rule(name, steps):
    """In each layer, MTP's too, from what that layer counted."""
    _, metrics, states = steps[2]
    batch = {k: np.asarray(v) for k, v in make_batch().items()}
    # Multi-token prediction routes the positions that have a target.
    real = {"moe_blocks": batch["segment_ids"] > 0, "mtp": mtp_targets(batch, 1).real_BS > 0}
    assert real["moe_blocks"].sum() == 21 > real["mtp"].sum() > 0
    for blocks, mask in real.items():
        count = int(mask.sum())
        for seen, before, after in zip(metrics, states, states[1:]):
            stats = {s.rpartition("/")[2]: np.asarray(v) for s, v in seen.items() if blocks in s}
            before, after = before[blocks], after[blocks]
            if name == "relu":
                more = np.sign(stats["open"].sum(axis=1) / count - 1.5)
                assert (stats["tokens"] == count).all() and more.any()
                key, want = "coefficient", before["coefficient"] * 1.2**more
            elif name == "threshold":
                key = "threshold"
                want = np.maximum(before[key] + 0.01 * np.sign(stats["load"] / count - 2 / 8), 0)
                assert want.max() > 0
            else:
                tokens = batch["tokens"][np.asarray(mask)]
                key, want = "met", before["met"] + np.bincount(tokens, minlength=32)[None]
                np.testing.assert_array_equal(after["table"], before["table"])
            np.testing.assert_allclose(after[key], want, rtol=1e-6)


def test_a_state_knows_its_layer_and_the_vocabulary(name, steps):
    if name != "hashed":
        return
    _, metrics, states = steps[1]
    tables = [*states[0]["moe_blocks"]["table"], *states[0]["mtp"]["table"]]
    chex.assert_shape(tables, (32, 2))
    assert all((a != b).any() for i, a in enumerate(tables) for b in tables[:i])
    # A layer's load is what its own table says of the batch.
    batch = make_batch()
    tokens = np.asarray(batch["tokens"])[np.asarray(batch["segment_ids"]) > 0]
    for load_E, table in zip(metrics[0]["stats/moe_blocks/load"], tables):
        want = np.bincount(np.asarray(table)[tokens].ravel(), minlength=8)
        np.testing.assert_array_equal(load_E, want)


# --------------------------------------------------------------------------------------------------
# The commands.


def command(*argv) -> tuple[int, str]:
    """Exit code, and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(a) for a in argv])
    return code, said.getvalue()


def flags(name, **train):
    """The quickstart, tiny, with another router and nothing that it would not read."""
    changes = {"model.moe.router.name": name, "mesh.data": 1, "optimizer.schedule": "constant"}
    changes |= {"optimizer.warmup_steps": 1}  # a warm-up ends with the run at the latest
    changes |= {f"model.moe.router.{k}": v for k, v in OPTIONS[name].items()}
    changes |= {"objective.sequence_loss": 0.0, "objective.bias_update": "none"}
    changes |= {f"train.{k}": v for k, v in train.items()}
    return [f"--config={ROOT / 'experiments/quickstart.py'}", *tiny.flags(changes)]


@pytest.fixture(scope="module")
def run(name, tmp_path_factory):
    """The folder of a run of two steps that went on to three, and what was said when it did."""
    workdir = tmp_path_factory.mktemp("runs") / name
    for steps in (2, 3):
        code, said = command(
            "train", "--noreport", f"--workdir={workdir}", *flags(name, steps=steps)
        )
        assert code == 0, said
    return workdir, said


def losses(workdir):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}


@pytest.mark.product
def test_is_resumed(name, run, tmp_path):
    workdir, said = run
    assert f"resuming {workdir} at step 2" in said
    code, said = command("train", "--noreport", f"--workdir={tmp_path}", *flags(name, steps=3))
    assert code == 0, said
    assert losses(tmp_path) == losses(workdir) and len(losses(workdir)) == 3
    whole, resumed = load_run(tmp_path), load_run(workdir)
    chex.assert_trees_all_equal(resumed.router_state, whole.router_state)
    start = transformer.init_router_state(whole.cfg.model)
    moved = [
        (a != b).any() for a, b in zip(jax.tree.leaves(start), jax.tree.leaves(whole.router_state))
    ]
    assert any(moved)


@pytest.mark.product
def test_evaluates(name, run, tmp_path):
    out = tmp_path / "results.json"
    code, said = command("evaluate", f"--workdir={run[0]}", "--batches=1", f"--json={out}")
    assert code == 0, said
    assert 0 < json.loads(out.read_text())["loss"] < 10


@pytest.mark.product
def test_generates_or_is_refused(name, run):
    code, said = command(
        "generate", f"--workdir={run[0]}", "--prompt=def ", "--max_new=4", "--greedy"
    )
    if ROUTERS[name].causal:
        assert code == 0 and said.startswith("def "), said
    else:
        assert code == 2 and f"router.name={name!r} is not causal" in said, said


@pytest.mark.product
def test_is_reported(name, run):
    code, said = command("report", f"--workdir={run[0]}")
    assert code == 0, said
    page = (run[0] / "report.html").read_text()
    assert (
        "<h2>Load of every expert over time</h2>" in page and "<h2>What experts read</h2>" in page
    )
    assert (f"The router {name!r} is not causal" in page.replace("&#39;", "'")) != ROUTERS[
        name
    ].causal


@pytest.mark.product
def test_is_planned(name, run):
    """By its own word on how many experts compute for a token, and with its own parameters."""
    code, said = command("plan", *flags(name))
    assert code == 0, said
    used = ROUTERS[name].experts_used(sizes(ROUTERS[name]))
    assert used == {"relu": 1.5, "threshold": 2, "hashed": 2}[name]
    assert f"4 routed experts, {used:g} per token" in said
    router = {"relu": 16 * 4, "threshold": 16 * 4, "hashed": 0}[name]
    lines = [line.split() for line in said.splitlines()]
    assert [int(words[1]) for words in lines if words[:1] == ["router"]] == [router] * (router > 0)


# --------------------------------------------------------------------------------------------------
# What a router may count on.


def own(noise: float):
    """Token choice by scores with noise, and the expert-level loss (2401.06066 eq. 12) whatever the config."""

    def route(params, state, tokens, cfg):
        out = token_choice.route(params, state, tokens, cfg)
        if noise:
            drawn_TE = noise * jax.random.uniform(tokens.key, out.scores_TE.shape)
            _, index_TK = jax.lax.top_k(out.scores_TE + drawn_TE, cfg.experts_per_token)
            return token_choice.route(params, state, tokens._replace(forced_TK=index_TK), cfg)
        load_E, k = tokens.total(out.stats, "load"), cfg.experts_per_token
        score_sum_E = (out.scores_TE * tokens.mask_T[:, None]).sum(axis=0)
        loss = balance.expert_level(score_sum_E, load_E, tokens.totals.num_tokens, k)
        return out._replace(losses={"own": 0.1 * loss})

    return Router(
        token_choice.Options(),
        route,
        "token",
        causal=True,
        param_specs=token_choice.ROUTER.param_specs,
    )


def test_its_loss_does_not_depend_on_accumulation(monkeypatch):
    """One that counts, which no option of the config asks for."""
    monkeypatch.setitem(ROUTERS, "counting", own(noise=0.0))
    cfg = change(CFG, router="counting", mtp_depth=0)
    state, batch = create_state(cfg, jax.random.key(0), None), synthetic_batch(8, 4, 32)

    def at(accumulation):
        cfg_n = change(cfg, accumulation=accumulation)
        run = jax.jit(lambda p: loss_and_grads(p, state.router_state, batch, cfg_n))
        loss, parts, grads = run(state.params)
        return loss, parts.balance["own"], grads

    whole, parts = at(1), at(2)
    # Sums of 64 float32 terms in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    assert whole[1] > 0.05


def test_its_noise_differs_by_layer_and_micro_batch(monkeypatch):
    monkeypatch.setitem(ROUTERS, "noisy", own(noise=1e3))
    cfg = change(CFG, router="noisy", mtp_depth=0)
    params = create_state(cfg, jax.random.key(0), None).params
    batch, key = synthetic_batch(8, 4, 32), jax.random.key(1)
    out = transformer.forward(
        params, {}, batch["tokens"], cfg.model, mask_BS=jnp.ones((4, 8)), key=key
    )
    first, second = out.aux["moe_blocks"].routing.expert_index_TK
    assert (first != second).any()
    # Two equal micro-batches: with the same noise every load would be even.
    twice = {k: jnp.repeat(jnp.asarray(v[:2]), 2, axis=0) for k, v in batch.items()}
    parts = loss_and_grads(params, {}, twice, change(cfg, accumulation=2), key=key)[1]
    assert (parts.aux["moe_blocks"].stats["load"] % 2 == 1).any()
