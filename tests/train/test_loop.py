"""The loop in one process: what it writes down, on one device and on a mesh, and how it ends."""

import dataclasses
import json
import os
import signal

import jax
import numpy as np
import pytest

from moejax.config import (
    AttentionConfig,
    ComputeConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from moejax.routers import router_options
from moejax.runs.checkpoint import Checkpoints
from moejax.train.loop import Diverged, train, with_vocabulary
from moejax.train.signals import StopRequest
from moejax.train.state import restore_state

ONE, EIGHT = MeshConfig(data=1), MeshConfig(data=2, expert=2, tensor=2)


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    rng = np.random.default_rng(0)
    for domain, letters in {"vowels": "aeiou ", "digits": "0123456789\n"}.items():
        for i in range(20):
            (folder / f"{domain}{i}.txt").write_text("".join(rng.choice(list(letters), 400)))
    return ExperimentConfig(
        name="tiny",
        model=ModelConfig(
            d_model=16,
            num_layers=1,
            num_dense_layers=0,
            attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
            moe=MoEConfig(
                num_experts=4, d_expert=8, router=router_options(score="sigmoid", expert_bias=True)
            ),
        ),
        objective=ObjectiveConfig(bias_update="sign"),
        data=DataConfig(
            sources=tuple(f"{d}={folder}/{d}*.txt" for d in ("vowels", "digits")),
            tokenizer="byte",
            seq_len=32,
            batch_size=8,
            validation_fraction=0.2,
        ),
        optimizer=OptimizerConfig(warmup_steps=1, schedule="constant"),
        train=TrainConfig(steps=4, log_every=1, eval_every=4, eval_batches=2, checkpoint_every=2),
        mesh=ONE,
    )


def rows(workdir):
    out = {}
    for line in (workdir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        out.setdefault(row["kind"], {})[row["step"]] = row
    return out


@pytest.fixture(scope="module")
def finished(cfg, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    results = train(cfg, workdir)
    return workdir, results, rows(workdir)


def test_what_a_run_writes_down(finished):
    workdir, results, written = finished
    assert list(written["train"]) == [1, 2, 3, 4]
    for row in written["train"].values():
        assert {"loss", "grad_norm", "loss/vowels", "loss/digits", "max_vio", "load_entropy"} < set(
            row
        )
        assert {"dead_experts", "drop_fraction", "score_entropy", "learning_rate"} < set(row)
        assert row["tokens_per_second"] > 0
        # 6 FLOPs per active matmul parameter and token, and attention: about 1e5 for this model.
        assert 3e4 < row["flops_per_second"] / row["tokens_per_second"] < 3e5
    for row in written["load"].values():
        load_LE = np.array(row["load_LE"])
        # Packed rows of 32: all but the ends of the domains are full, 2 experts per token.
        assert load_LE.shape == (1, 4) and 400 < load_LE.sum() <= 8 * 32 * 2
    validation = written["validation"][4]
    assert results == {k: v for k, v in validation.items() if k not in ("step", "kind")}
    assert validation["perplexity"] == pytest.approx(np.exp(validation["loss"]))
    # One byte is one token but for the ends of documents: at least as many bits per byte as per token.
    assert validation["bits_per_byte"] >= validation["loss"] / np.log(2)
    receipt = written["receipt"][4]
    assert receipt["tokens_per_second"] > 0 and receipt["planned_tokens_per_second"] > 0
    assert list((workdir / "tensorboard").iterdir())
    assert json.loads((workdir / "corpus.json").read_text())
    assert (workdir / "config.json").exists()


def test_routes_are_counted_by_domain(finished):
    written = finished[2]
    routing = written["routing"][4]
    assert routing["domains"] == ["vowels", "digits"]
    load_dLE = np.array(routing["load_dLE"])
    assert load_dLE.shape == (2, 1, 4)
    assert (load_dLE.sum(axis=(1, 2)) > 0).all()  # both domains are held out
    assert 0 < load_dLE.sum() <= 2 * 8 * 32 * 2
    # Vowels and digits share no byte, so experts that see one more than the other must show up.
    share_dE = load_dLE[:, 0] / load_dLE.sum(axis=2)
    assert abs(share_dE[0] - share_dE[1]).max() > 0.02


def test_the_same_run_on_eight_devices_and_back_on_one(cfg, finished, tmp_path, capsys):
    train(dataclasses.replace(cfg, mesh=EIGHT), tmp_path)
    assert "mesh data=2, expert=2, tensor=2" in capsys.readouterr().out
    longer = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=6))
    train(longer, tmp_path)  # on one device, from what eight saved
    out = capsys.readouterr().out
    assert "resuming" in out and "at step 4" in out
    train(longer, finished[0])  # the run that never left its device
    one, eight = rows(finished[0]), rows(tmp_path)
    assert list(eight["train"]) == list(one["train"]) == [1, 2, 3, 4, 5, 6]
    for step, row in one["train"].items():
        # Sums in another order: 1e-7 a step, amplified by Adam's division in the first ones.
        assert eight["train"][step]["loss"] == pytest.approx(row["loss"], rel=2e-5)
    for step in (4, 6):
        assert eight["validation"][step]["loss"] == pytest.approx(
            one["validation"][step]["loss"], rel=2e-5
        )
    ours, theirs = (np.array(r["routing"][4]["load_dLE"]) for r in (eight, one))
    assert ours.sum() == theirs.sum()
    assert abs(ours - theirs).sum() <= 4  # a near tie may fall the other way: two routes moved


def test_a_finished_run_is_evaluated_again(cfg, finished, capsys):
    steps = max(rows(finished[0])["train"])
    again = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=steps))
    results = train(again, finished[0])
    assert f"finished at step {steps}" in capsys.readouterr().out
    last = rows(finished[0])["validation"][steps]
    assert results["loss"] == pytest.approx(last["loss"], rel=1e-6)


def test_divergence_stops_the_run_and_spares_the_checkpoint(cfg, tmp_path):
    bad = dataclasses.replace(
        cfg,
        optimizer=dataclasses.replace(cfg.optimizer, learning_rate=1e30, clip_norm=0.0),
        # Between log lines, too.
        train=dataclasses.replace(
            cfg.train, steps=50, log_every=50, eval_every=50, checkpoint_every=1, max_bad_steps=3
        ),
    )
    with pytest.raises(Diverged) as e:
        train(bad, tmp_path)
    assert "3 steps in a row" in str(e.value)
    assert str(tmp_path / "checkpoints") in str(e.value)
    assert str(tmp_path / "metrics.jsonl") in str(e.value)
    checkpoints = Checkpoints(tmp_path, with_vocabulary(bad, 258))
    state = restore_state(checkpoints)[0]  # pyright: ignore
    checkpoints.close()
    assert int(state.bad_in_a_row) == 3
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(state.params))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_request_and_a_second_one_an_order(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop.now(1)
        os.kill(os.getpid(), number)
        assert stop.now(2)
        assert signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_a_refused_command_leaves_the_run_alone(cfg, finished, tmp_path):
    before = {p.name: p.stat().st_mtime_ns for p in finished[0].iterdir()}
    bpe = dataclasses.replace(cfg.data, tokenizer="bpe", vocab_size=300)
    with pytest.raises(ConfigError, match=r"data.tokenizer: 'byte' there, 'bpe' now"):
        train(dataclasses.replace(cfg, data=bpe), finished[0])
    assert {p.name: p.stat().st_mtime_ns for p in finished[0].iterdir()} == before
    odd = dataclasses.replace(cfg, data=dataclasses.replace(bpe, vocab_size=301))
    with pytest.raises(ConfigError, match="vocab_size=301"):
        train(dataclasses.replace(odd, mesh=MeshConfig(data=4, tensor=2)), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written_is_named_before_the_corpus_is_read(cfg, tmp_path):
    (tmp_path / "file").write_text("")
    nowhere = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, sources=("a=none*.txt",)))
    with pytest.raises(ConfigError, match=r"--workdir=.*file/run cannot be written: .*file is no"):
        train(nowhere, tmp_path / "file" / "run")


def test_float64_needs_x64(cfg, tmp_path):
    wide = dataclasses.replace(cfg, compute=ComputeConfig(dtype="float64"))
    with pytest.raises(ConfigError, match="JAX_ENABLE_X64=1"):
        train(wide, tmp_path / "a")


def test_a_mesh_that_does_not_fit_is_named_before_the_corpus_is_read(cfg, tmp_path):
    with pytest.raises(ConfigError, match="needs 16 devices, there are 8"):
        train(dataclasses.replace(cfg, mesh=MeshConfig(data=16)), tmp_path / "a")
    with pytest.raises(ConfigError, match="num_experts=4 does not divide over 8 devices"):
        train(dataclasses.replace(cfg, mesh=MeshConfig(data=1, expert=8)), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_vocabulary(cfg):
    assert with_vocabulary(cfg, 258).model.vocab_size == 258
    external = dataclasses.replace(cfg.data, tokenizer="some/tokenizer.json")
    padded = dataclasses.replace(
        cfg, data=external, model=dataclasses.replace(cfg.model, vocab_size=1024)
    )
    assert with_vocabulary(padded, 1000).model.vocab_size == 1024  # published models pad
    assert with_vocabulary(padded, 2000).model.vocab_size == 2000
