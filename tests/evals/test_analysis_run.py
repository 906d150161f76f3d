"""`moejax analyze` on models: what their experts compute, a run whose domains are decidable from one token, and
a text whose domains are the same."""

import dataclasses
import json
import re
import shutil
import xml.etree.ElementTree as ET

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow.parquet as pq
import pytest

from moejax.__main__ import main
from moejax.config import (
    AttentionConfig,
    ComputeConfig,
    ConfigError,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
)
from moejax.config_io import to_json
from moejax.evals.analysis import outputs
from moejax.evals.analysis.pictures import pictures
from moejax.evals.analysis.run import analyze_run, read, write
from moejax.evals.analysis.units import FOLDS
from moejax.evals.evaluate import evaluate_run
from moejax.evals.report import sections_of
from moejax.evals.routes import routes_of
from moejax.models.transformer import init_model
from moejax.moe.experts import ffn, of_experts
from moejax.routers import router_options
from moejax.runs.open import read_config

E, K, D = 6, 2, 16
MODEL = ModelConfig(
    vocab_size=32,
    d_model=D,
    num_layers=2,
    num_dense_layers=0,
    init_std=0.3,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    moe=MoEConfig(num_experts=E, experts_per_token=K, d_expert=8),
)
SEGMENT_BS = jnp.ones((4, 8), jnp.int32).at[1, 6:].set(0)
BATCH = {
    "tokens": jnp.asarray(np.random.default_rng(0).integers(0, 32, (4, 8))),
    "positions": jnp.broadcast_to(jnp.arange(8), (4, 8)),
    "segment_ids": SEGMENT_BS,
}


def opened(**moe):
    cfg = dataclasses.replace(MODEL, moe=dataclasses.replace(MODEL.moe, **moe))
    params, state = init_model(cfg, jax.random.key(0))
    seen = jax.jit(lambda p: routes_of(p, state, BATCH, cfg, ComputeConfig(), inputs=True))(params)
    return cfg, params, state, seen


@pytest.mark.parametrize(
    "moe",
    [
        {},
        {"latent_dim": 12},
        {"router": router_options("moe_pp")},
        {"router": router_options("expert_choice")},
    ],
    ids=["plain", "latent", "special", "slots"],
)
def test_outputs_are_those_of_each_expert(moe):
    """One expert and one token at a time, against all routes at once; special experts and padding give none."""
    cfg, params, _, seen = opened(**moe)
    unit_B = jnp.array([0, 1, 9, 3], jnp.int32)
    sums = jax.jit(lambda p, r: outputs.output_sums(p, r, SEGMENT_BS, unit_B, cfg, ComputeConfig()))
    got = sums(params, seen)
    want = {"gate_norm": np.zeros((2, FOLDS, E)), "most": np.zeros((2, E))}
    layers = jax.tree.map(np.asarray, params["moe_blocks"]["moe"])
    for layer in range(2):
        one = jax.tree.map(lambda a, i=layer: a[i], layers)
        x_TD = np.asarray(seen.inputs_LTD[layer])
        x_TD = x_TD @ one["latent_down"] if cfg.moe.latent_dim else x_TD
        y_ETD = []
        for e in range(E):  # SwiGLU by its definition
            gate, up, down = (one["experts"][f"w_{n}"][e] for n in ("gate", "up", "down"))
            gated = x_TD @ gate
            y_ETD.append((gated / (1 + np.exp(-gated)) * (x_TD @ up)) @ down)
        y_ETD = np.stack(y_ETD)
        expert_TK, weights_TK = (np.asarray(a[layer]) for a in seen[:2])
        for t in range(32):
            for e, w in zip(expert_TK[t], weights_TK[t]):
                if 0 <= e < E:
                    norm, f = np.linalg.norm(y_ETD[e, t]), int(unit_B[t // 8]) % FOLDS
                    want["gate_norm"][layer, f, e] += w * norm
                    want["most"][layer, e] = max(want["most"][layer, e], np.abs(y_ETD[e, t]).max())
    for name, a in want.items():  # float32 products in another order
        np.testing.assert_allclose(got[name], a, rtol=2e-4, atol=1e-6, err_msg=name)
    routed = np.asarray(seen.expert_LTK)
    assert (routed.max() >= E) == ("special" in str(moe) or "moe_pp" in str(moe))


def test_similar_experts():
    """Expert 1 is expert 0; expert 2 has its hidden units in another order: the same function."""
    cfg, params, _, seen = opened()
    experts = dict(params["moe_blocks"]["moe"]["experts"])
    order = jnp.array([3, 0, 7, 1, 5, 2, 4, 6])
    for name, w in experts.items():
        mixed = w[:, 0][:, order] if name == "w_down" else w[:, 0][:, :, order]
        experts[name] = w.at[:, 1].set(w[:, 0]).at[:, 2].set(mixed)
    params["moe_blocks"]["moe"]["experts"] = experts
    rows_P = outputs.probe_rows(np.asarray(SEGMENT_BS), most=24)
    assert len(rows_P) == 24 and not set(rows_P) & {14, 15}
    shuffle = np.random.default_rng(0).permutation(24)
    got = outputs.similarity(params, seen.inputs_LTD[:, rows_P], shuffle, cfg)
    for name in ("weights", "outputs", "cka"):
        np.testing.assert_allclose(got[name][:, 0, 1], 1, atol=1e-5)
        np.testing.assert_allclose(np.diagonal(got[name], axis1=1, axis2=2), 1, atol=1e-5)
    for name in ("outputs", "cka"):
        np.testing.assert_allclose(got[name][:, 0, 2], 1, atol=1e-5)
        assert (got[f"{name}_chance"][:, 0, 2] < 0.9).all()
    assert (jnp.abs(got["weights"][:, 0, 2]) < 0.5).all()  # 128 entries a matrix: deviation 0.09
    # CKA of expert 3 and 4 by its definition, on one layer.
    one = jax.tree.map(lambda a: a[0], params["moe_blocks"]["moe"]["experts"])
    x_PD, act = seen.inputs_LTD[0, rows_P], of_experts(cfg.moe)
    y = [np.asarray(ffn({n: w[e] for n, w in one.items()}, x_PD, act)) for e in (3, 4)]
    a, b = (v.astype(np.float64) - v.mean(axis=0) for v in y)
    norm = np.linalg.norm
    want = norm(a.T @ b) ** 2 / (norm(a.T @ a) * norm(b.T @ b))
    np.testing.assert_allclose(got["cka"][0, 3, 4], want, rtol=1e-4)


def test_rounding_flips_what_is_close():
    """Two experts whose scores differ by less than bfloat16 can tell (2^-8) trade places; far ones do not."""
    cfg, params, state, _ = opened()
    unit_B = jnp.zeros(4, jnp.int32)

    ((name, w_LDE),) = params["moe_blocks"]["moe"]["router"].items()
    assert w_LDE.shape == (2, D, E)

    @jax.jit
    def sums(router_LDE):
        moe = {**params["moe_blocks"]["moe"], "router": {name: router_LDE}}
        changed = {**params, "moe_blocks": {**params["moe_blocks"], "moe": moe}}
        routes = routes_of(changed, state, BATCH, cfg, ComputeConfig(), inputs=True)
        return outputs.rounding_sums(changed, state, routes, BATCH, unit_B, cfg)

    def flips(router_LDE):
        got = sums(router_LDE)
        assert got["routed"].sum() == 2 * 30 * K
        return float(got["flipped"].sum())

    near = w_LDE[:, :, :1] + 1e-4 * jax.random.normal(jax.random.key(1), w_LDE.shape)
    coarse = w_LDE.astype(jnp.bfloat16).astype(jnp.float32)
    assert flips(near) > 10
    assert flips(20 * coarse) < 3  # of 120 routes; scores far apart, and only inputs are rounded


# --------------------------------------------------------------------------------------------------
# Runs.


@pytest.fixture(scope="module")
def analysed(trained, tmp_path_factory):
    """The trained run with the analysis of both its steps, and what the command printed."""
    run = tmp_path_factory.mktemp("analysed") / "run"
    shutil.copytree(trained, run)
    found, table = analyze_run(run, all_steps=True, num_batches=0)
    return run, found, table


def one(found, figure, step=20, layer=-1):
    (row,) = [
        r
        for r in found["figures"]
        if (r["figure"], r["step"], r["layer"], r["domain"]) == (figure, step, layer, "")
    ]
    return row


def test_a_run_whose_domains_are_decidable_from_one_token(analysed):
    run, found, table = analysed
    told = one(found, "domain_information")
    assert told["beyond_chance"] and told["value"] > 0.05 > told["null"]
    assert one(found, "token_information")["beyond_chance"]
    early = one(found, "saturation", step=10)
    assert early["null"] < early["value"] <= 1 and early["beyond_chance"]
    assert not [r for r in found["figures"] if r["figure"] == "saturation" and r["step"] == 20]
    assert found["steps"] == [10, 20] and found["domains"] == ["lower", "digits"]
    # Every token has K = 2 experts of 8, so the shares of a domain add up to 2.
    rows = [r for r in table.to_pylist() if r["figure"] == "domain_share" and r["step"] == 20]
    total = sum(r["value"] for r in rows if r["domain"] == "digits" and r["layer"] == 0)
    assert len(rows) == 2 * 2 * 8 and total == pytest.approx(2, rel=1e-5)
    assert np.sum(found["load"]) == 2 * 2 * found["text"]["tokens"]
    assert found["text"]["tokens"] == evaluate_run(run, num_batches=0)["tokens"]
    scores = found["importance"]
    assert set(scores) == {"frequency", "reap", "esft_token", "esft_gate"}
    assert {np.shape(v) for v in scores.values()} == {(2, 8)}
    np.testing.assert_allclose(
        scores["frequency"], np.array(found["load"]) / (2 * found["text"]["tokens"])
    )
    np.testing.assert_allclose(
        scores["esft_token"], scores["frequency"], rtol=1e-5
    )  # K is the same for all
    letters = {t for layer in found["favourite_tokens"].values() for e in layer for t in e}
    assert letters & set("abcdefgh") and letters & set("01234567")


def test_domains_that_are_the_same_are_within_chance(trained, tmp_path):
    """Two files of one kind of text: nothing to tell the domains by."""
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        lines = ["".join(rng.choice(list("abcd "), 60)) + "\n" for _ in range(150)]
        (tmp_path / f"{name}.txt").write_text("".join(lines))
    sources = tuple(f"{n}={tmp_path / n}.txt" for n in ("a", "b"))
    found, table = analyze_run(trained, sources)
    assert not one(found, "domain_information")["beyond_chance"]
    assert one(found, "token_information")["beyond_chance"]
    rows = [r for r in table.to_pylist() if r["figure"] == "domain_share"]
    out = sum(not r["null_low"] <= r["value"] <= r["null_high"] for r in rows)
    assert len(rows) == 32 and out <= 5  # 1.6 expected; experts of one layer go together


def test_command_writes_and_prints(analysed, capsys, tmp_path):
    run = analysed[0]
    args = ["analyze", f"--workdir={run}", "--batches=2", "--layers=1", "--step=10"]
    assert main([*args, f"--out={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    assert "route explained by the domain" in printed and "beyond chance" in printed
    found = json.loads((tmp_path / "analysis.json").read_text())
    table = pq.read_table(tmp_path / "analysis.parquet")
    assert found["steps"] == [10] and found["layers"] == [1]
    assert set(table["layer"].to_pylist()) == {1, -1}
    assert not (run / "analysis.json").exists()
    assert main([*args[:1], f"--workdir={run}", f"--workdir={run}", "--batches=2"]) == 0
    assert "Side by side" in capsys.readouterr().out
    assert main(["rebalance", f"--workdir={run}", "--devices=4"]) == 0
    assert "8 experts in 8 slots on 4 devices" in capsys.readouterr().out


def test_report_draws_it(analysed):
    """Every picture is whole XML that refers to nothing elsewhere, with an id of its own for each part."""
    run, found, table = analysed
    drawn = pictures(found, table)
    assert [p.title for p in drawn] == [
        "Figures beside chance, by layer",
        "Which domain uses which expert, beside chance",
        "How routes settle",
        "Which experts work together",
        "From one layer to the next",
        "Which experts matter",
        "How alike experts compute",
    ]
    svgs = [svg for p in drawn for svg in p.svgs]
    assert all(ET.fromstring(svg).tag.endswith("svg") for svg in svgs)
    links = [h for svg in svgs for h in re.findall(r'href="([^"]*)"', svg)]
    assert all(
        h.startswith(("#", "data:image/png")) for h in links
    )  # the bars of colours are images
    write(found, table, run)
    again = read(run)
    assert again is not None and again[0] == found and again[1].schema == table.schema
    for name in ("figure", "expert", "value", "null"):  # NaN where there is no null
        np.testing.assert_array_equal(again[1][name].to_numpy(), table[name].to_numpy())
    sections = sections_of(*again)
    assert [s.title for s in sections[:-1]] == [p.title for p in drawn] and sections[-1].table
    (run / "analysis.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"moejax analyze --workdir=.* writes it again"):
        read(run)


def test_one_domain_has_no_figures_of_domains(trained, tmp_path):
    (tmp_path / "a.txt").write_text("abc def\n" * 200)
    found, _ = analyze_run(trained, (f"a={tmp_path / 'a.txt'}",), num_batches=2)
    names = {r["figure"] for r in found["figures"]}
    assert "token_information" in names and "domain_information" not in names


def test_bad_input(trained, tmp_path, capsys):
    for args, what in [
        (["--step=11"], "no checkpoint of step 11; it has 10, 20"),
        (["--layers=2"], "--layers: 2 is no MoE layer of this model; they are 0 to 1"),
        (["--layers=x"], "numbers with commas"),
        (["--step=10", "--steps=all"], "give one of them"),
        (["--sources=texts/*.txt"], "a domain name"),
        (["--out=/nowhere/at/all"], "there is no such folder"),
        (["--seq_len=99999"], "exceeds the model's"),
    ]:
        assert main(["analyze", f"--workdir={trained}", *args]) == 2
        assert what in capsys.readouterr().err
    cfg = read_config(trained)
    model = dataclasses.replace(cfg.model, moe=MoEConfig())
    dense = dataclasses.replace(cfg, model=model, objective=ObjectiveConfig())
    (tmp_path / "config.json").write_text(to_json(dense))
    with pytest.raises(ConfigError, match="the model is dense"):
        analyze_run(tmp_path)
