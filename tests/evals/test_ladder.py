"""`moejax ladder`: sizes of equal compute, what it refuses, and its tables against numbers that are known."""

import dataclasses
import json
import pathlib

import numpy as np
import pytest
import tiny
from run_folders import write_run

from moejax.commands import ladder, ladder_sizes, sweep_file
from moejax.config import ConfigError
from moejax.cost.architecture import of_model
from moejax.cost.receipt import model_flops_per_token
from moejax.data.vocabulary import expected_tokens, with_vocabulary
from moejax.evals import ladder as results
from moejax.evals.ladder import Point
from moejax.evals.laws import LAWS
from moejax.text import render

QUICKSTART = str(pathlib.Path(__file__).parents[2] / "experiments/quickstart.py")
BYTES = ["--config.data.tokenizer=byte"]


def test_rungs_are_one_design_at_equal_compute():
    plan = sweep_file.read(QUICKSTART, BYTES)
    rungs = ladder_sizes.ladder(plan, ["dense", "moe"], [6, 2], 20.0)
    assert [(r.heads, r.variant) for r in rungs] == [
        *((2, "dense"), (2, "moe"), (6, "dense"), (6, "moe"))
    ]
    whole = ladder_sizes.as_sweep(plan, rungs)
    assert whole.baseline == "dense-h2"
    base = plan.experiment("moe", 0).model
    for rung in rungs:
        cfg = whole.experiment(rung.name, 0)
        m = cfg.model
        # Per head, per layer and per expert nothing changes.
        assert m.d_model / m.attention.num_heads == base.d_model / base.attention.num_heads
        assert m.attention.head_dim == base.attention.head_dim and m.num_layers == base.num_layers
        assert m.moe.num_experts == (32 if rung.variant == "moe" else 0)
        assert m.attention.num_heads == m.attention.num_kv_heads == rung.heads
        cfg = with_vocabulary(cfg, expected_tokens(cfg.data))
        assert rung.tokens == cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
        assert rung.compute == model_flops_per_token(cfg) * rung.tokens
        # Matrices of the baseline that a token is multiplied by, from the model's own parameters.
        if rung.variant == "dense":
            used = sum(p.active_matrix for p in of_model(cfg.model).parts)
            assert ladder_sizes.multiplied(cfg) == used
            assert rung.tokens == pytest.approx(20 * used, abs=cfg.data.batch_size * 256)
    for small, large in ((0, 1), (2, 3)):  # to the nearest step
        assert rungs[small].compute == pytest.approx(rungs[large].compute, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--heads=2,x"], "must be numbers of heads"),
        (["--heads=2", "--variants=moe"], "name the baseline and one variant of dense, moe"),
        (["--heads=2", "--variants=moe,moe2"], "unknown variant 'moe2'; did you mean moe"),
        (["--heads=2", "--page=no/where.html"], "there is no such folder"),
        (["--heads=2", "--config.train.steps=9"], "a ladder sets the steps of each size"),
        (
            ["--heads=3", "--config.model.attention.num_kv_heads=3"],
            r"with 3 heads model.attention.num_kv_heads=3 would be 1.5.*--heads=2,4,6,8 would work",
        ),
    ],
)
def test_what_cannot_be_is_refused_before_anything_starts(tmp_path, flags, message):
    with pytest.raises(ConfigError, match=message):
        ladder.main([f"--config={QUICKSTART}", f"--workdir={tmp_path}/x", *flags])
    assert not (tmp_path / "x").exists()


def test_a_dry_run_says_what_it_would_cost(tmp_path, capsys):
    flags = [f"--config={QUICKSTART}", f"--workdir={tmp_path}/x", "--heads=2,4", "--seeds=0"]
    assert ladder.main([*flags, *BYTES, "--dry_run"]) == 0
    said = capsys.readouterr().out
    assert "2 heads: " in said and "dense-h4/seed_0" in said and "moe-h2/seed_0" in said
    assert not (tmp_path / "x").exists()


POWER = {"floor": 1.5, "A": 60.0, "alpha": 0.1}


def made(seeds=3, saved=2.0, speed=0.5):
    """Three sizes on a known law; the variant's is that of `saved` times the compute, at `speed` of the speed.
    A seed moves both by the same."""
    rungs = {}
    for heads, compute in ((2, 1e13), (4, 1e14), (8, 1e15)):
        both = []
        for factor, rate in ((1.0, 1e10), (saved, speed * 1e10)):
            loss = float(LAWS["power"].predict(POWER, {"compute": np.float64(compute * factor)}))
            both.append(Point(compute, {s: loss + 1e-4 * s for s in range(seeds)}, rate))
        rungs[heads] = tuple(both)
    return rungs


def test_a_variant_worth_twice_the_compute_at_half_the_speed():
    found = results.ladder(("dense", "moe"), made(seeds=1))
    assert found.floor == pytest.approx(1.5, abs=0.02)
    text = render(results.tables(found))
    for heads in ("2", "4", "8"):
        [row] = [line for line in text.splitlines() if line.startswith(heads.rjust(5))]
        assert row.split()[-2:] == ["2.00", "1.00"] and "one seed" in row
    data = json.loads(json.dumps(results.as_data(found)))
    assert data["laws"][0]["alpha"] == pytest.approx(0.1, rel=0.05)
    # What it projects: at 100 times the last size the law itself.
    want = LAWS["power"].predict(POWER, {"compute": np.float64(1e17)})
    assert found.fits[0] is not None
    assert found.fits[0].predict(compute=1e17) == pytest.approx(float(want), abs=0.01)


def test_a_seed_that_the_variant_lacks_changes_no_speedup():
    """The variant is the baseline, trained with one seed; the baseline's other one came out worse."""
    rungs = {}
    for heads, (base, _) in made(seeds=1).items():
        assert base is not None
        losses = {0: base.losses[0], 1: base.losses[0] + 0.05}
        rungs[heads] = dataclasses.replace(base, losses=losses), base
    text = render(results.tables(results.ladder(("dense", "moe"), rungs, floor=1.5)))
    found = [r.split()[-2:] for r in text.splitlines() if r[:5].strip() in ("2", "4", "8")]
    assert found == [["1.00", "1.00"]] * 3


def test_few_sizes_need_a_floor_and_what_is_missing_is_left_out():
    rungs = made()
    two = {h: rungs[h] for h in (2, 4)}
    found = results.ladder(("dense", "moe"), two)
    text = render(results.tables(found))
    assert found.fits == (None, None) and "three sizes or more, or --floor" in text
    given = results.ladder(("dense", "moe"), two, floor=1.5)
    assert given.fits[0] is not None and given.fits[0].coefficients["floor"] == 1.5
    # Seeds move both alike: paired, the difference has no spread.
    d = results.paired(*[p for p in rungs[4] if p is not None])
    assert d is not None and d.resolved and d.error < 1e-9
    part = results.ladder(("dense", "moe"), {**two, 8: (None, rungs[8][1])}, floor=1.5)
    [row] = [
        line.split() for line in render(results.tables(part)).splitlines() if line[:5] == "    8"
    ]
    variant = rungs[8][1]
    assert variant is not None and row[2:4] == ["-", f"{variant.mean:.4f}"] and len(row) == 6


def test_finished_runs_are_shown_and_none_is_trained(tmp_path, capsys):
    """Runs as `moejax train` leaves them, of the law above; the mixture is worth twice the compute. The command
    line's width is that of its own number of heads."""
    root = tmp_path / "x"
    flags = [*tiny.flags({"mesh.data": 1}), "--config.train.eval_every=1"]
    plan = dataclasses.replace(sweep_file.read(QUICKSTART, flags), seeds=(0, 1))
    rungs = ladder_sizes.ladder(plan, ["dense", "moe"], [1, 2], 20.0)
    whole = ladder_sizes.as_sweep(plan, rungs)
    for rung in rungs:
        worth = np.float64(rung.compute * (2.0 if rung.variant == "moe" else 1.0))
        loss = float(LAWS["power"].predict(POWER, {"compute": worth}))
        for seed in (0, 1):
            cfg = whole.experiment(rung.name, seed)
            assert cfg.model.d_model == 8 * rung.heads and cfg.train.eval_every == 1
            cfg = with_vocabulary(cfg, expected_tokens(cfg.data))
            path = root / rung.name / f"seed_{seed}"
            write_run(path, {cfg.train.steps: loss + 1e-3 * seed}, cfg)
    argv = [f"--config={QUICKSTART}", f"--workdir={root}", "--heads=1,2", *flags]
    argv += ["--seeds=0,1", "--floor=1.5", f"--page={tmp_path}/x.html", f"--json={tmp_path}/x.json"]
    assert ladder.main(argv) == 0
    said = capsys.readouterr().out
    assert said.count("finished already") == 8 and "2.00" in said
    assert "<svg" in (tmp_path / "x.html").read_text()
    assert json.loads((tmp_path / "x.json").read_text())["names"] == ["dense", "moe"]
