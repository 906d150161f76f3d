"""The loop in one process: what it writes down, on one device and on a mesh, and how it ends."""

import dataclasses
import errno
import json
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from moejax import user_cache
from moejax.__main__ import main
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
from moejax.data.vocabulary import expected_tokens, with_vocabulary
from moejax.routers import router_options
from moejax.runs import lock, provenance
from moejax.runs.open import load_run
from moejax.train import loop
from moejax.train.loop import Diverged, train
from moejax.train.signals import StopRequest

ROOT = pathlib.Path(__file__).parents[2]
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
        compute=ComputeConfig(dispatcher="dense"),  # compiles faster, and the loop does not know
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


def test_a_run_that_began_in_memory_goes_on_with_kept_tokens(
    cfg, finished, tmp_path, monkeypatch, capsys
):
    workdir = tmp_path / "run"
    train(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=2)), workdir)
    monkeypatch.delenv(user_cache.SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(loop, "training_doubts", lambda cfg: ["a doubt"])
    results = [train(cfg, workdir), train(cfg, workdir)]  # the second one is finished
    said = capsys.readouterr().out
    assert "warning: a doubt" in said
    assert f"tokens of vowels, digits: read from {tmp_path}/cache/moejax/text, prepared" in said
    assert results == [finished[1]] * 2
    for step, row in finished[2]["train"].items():
        assert rows(workdir)["train"][step]["loss"] == row["loss"]


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
    # The first update blew the parameters up, so that every later step was bad: none of it is left.
    assert "No checkpoint is left" in str(e.value)
    # With half of it learned before, that half is.
    good = dataclasses.replace(bad.train, steps=2)
    fine = dataclasses.replace(bad.optimizer, learning_rate=1e-3)
    train(dataclasses.replace(bad, train=good, optimizer=fine), tmp_path)
    jump = dataclasses.replace(bad.train, rate_may_jump=True)
    with pytest.raises(Diverged, match=r"Step 2 is now the newest checkpoint in .*checkpoints: "):
        train(dataclasses.replace(bad, train=jump), tmp_path)
    # What the message advises works; without its second half the jump is refused before anything is written.
    lower = dataclasses.replace(
        bad, optimizer=dataclasses.replace(bad.optimizer, learning_rate=1e-9)
    )
    lower = dataclasses.replace(lower, train=dataclasses.replace(lower.train, steps=4))
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(ConfigError, match=r"would jump from 0.001 to 1e-09 at step 2"):
        train(lower, tmp_path)
    assert (tmp_path / "config.json").read_text() == before
    jump = dataclasses.replace(lower.train, rate_may_jump=True)
    assert np.isfinite(train(dataclasses.replace(lower, train=jump), tmp_path)["loss"])


def test_a_longer_run_says_that_its_learning_rate_would_jump(cfg, tmp_path):
    cosine = dataclasses.replace(
        cfg,
        optimizer=dataclasses.replace(cfg.optimizer, schedule="cosine", learning_rate=0.01),
        train=dataclasses.replace(cfg.train, steps=2, eval_every=100),
    )
    train(cosine, tmp_path)
    longer = dataclasses.replace(cosine, train=dataclasses.replace(cosine.train, steps=4))
    # At its end the cosine has fallen to min_lr_ratio = 0.1; two steps of four are a third of the way down
    # from step 1, where warm-up ends: 0.1 + 0.9 (1 + cos(pi / 3)) / 2 = 0.775.
    with pytest.raises(ConfigError, match=r"jump from 0.001 to 0.00775 at step 2") as e:
        train(longer, tmp_path)
    offered = re.search(r"schedule=(\w+) --config.optimizer.learning_rate=(\S+)", str(e.value))
    assert offered
    optimizer = dataclasses.replace(
        cosine.optimizer, schedule=offered[1], learning_rate=float(offered[2])
    )
    train(dataclasses.replace(longer, optimizer=optimizer), tmp_path)
    assert rows(tmp_path)["train"][4]["learning_rate"] == pytest.approx(0.001)
    # Not asked when nothing is left to train.
    train(dataclasses.replace(longer, optimizer=cosine.optimizer), tmp_path)


def test_one_writer(cfg, finished, tmp_path):
    """Two at once are refused, whoever they are; a reader is not, and sees who writes."""
    with lock.writing(finished[0]), pytest.raises(ConfigError, match=rf"process {os.getpid()} on "):
        train(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, steps=99)), finished[0])
    assert lock.writer(finished[0]) is None
    # A process that is killed leaves the file, but no lock.
    code = (
        "import pathlib, sys, os, signal\nfrom moejax.runs import lock\n"
        "with lock.writing(pathlib.Path(sys.argv[1])):\n    print('held', flush=True)\n    signal.pause()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert f"process {other.pid} on" in str(lock.writer(tmp_path))
        with (
            pytest.raises(
                ConfigError, match=f"process {other.pid} on .* Wait for its end, or stop it"
            ),
            lock.writing(tmp_path),
        ):
            pass
        other.kill()
    assert (tmp_path / "writer.lock").exists() and lock.writer(tmp_path) is None
    with lock.writing(tmp_path):
        pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", none)
    with pytest.warns(UserWarning, match="no locks"), lock.writing(tmp_path):
        pass
    assert lock.writer(tmp_path) is None


@pytest.mark.parametrize("name", ["a[1]", "a\\b", "a\udcff"])
def test_a_path_that_cannot_hold_a_checkpoint_is_refused(cfg, tmp_path, name):
    nowhere = dataclasses.replace(cfg, data=dataclasses.replace(cfg.data, sources=("a=none*.txt",)))
    with pytest.raises(ConfigError, match="use another path"):
        train(nowhere, tmp_path / name)
    with pytest.raises(ConfigError, match="name one below it"):
        train(nowhere, pathlib.Path("/"))


def test_a_run_says_where_it_comes_from(cfg, finished):
    start, end, *_ = provenance.read(finished[0])
    assert (
        start["kind"] == "start" and start["step"] == 0 and start["command"] == shlex.join(sys.argv)
    )
    for name in ("python", "jax", "jaxlib", "optax", "moejax"):
        assert start[name][0].isdigit()
    commit, _ = provenance.code_version()
    assert start["commit"] is None if commit is None else len(start["commit"]) == 40
    assert start["device"] == jax.devices()[0].device_kind and start["devices"] == 8
    assert end["kind"] == "end" and end["step"] == 4 and end["why"] == "finished"
    assert 0 < end["seconds"] < 600
    table = provenance.table(finished[0])
    assert table is not None and table.rows[0][1] == "0 to 4"
    assert (start["commit"] or "moejax")[:12] in table.rows[0][4]


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
    """As many rows as there are tokens, or as many as the config says; never fewer than tokens."""
    assert cfg.model.vocab_size == 0 and with_vocabulary(cfg, 258).model.vocab_size == 258
    said = dataclasses.replace(cfg, model=dataclasses.replace(cfg.model, vocab_size=1024))
    assert with_vocabulary(said, 1000) == said  # published models pad
    with pytest.raises(ConfigError, match=r"vocab_size=1024, but .* has 2000 tokens .*'byte'"):
        with_vocabulary(said, 2000)
    assert expected_tokens(DataConfig(tokenizer="byte")) == 258
    assert expected_tokens(DataConfig(vocab_size=512)) == 512


@pytest.mark.parametrize("given, works", [(299, False), (300, True), (384, True)])
def test_a_vocabulary_that_is_given_is_kept_or_refused(cfg, tmp_path, given, works):
    """Against a trained tokenizer, too; and a text too small for its tokens says so."""
    bpe = dataclasses.replace(cfg.data, tokenizer="bpe", vocab_size=300)
    said = dataclasses.replace(
        cfg, data=bpe, model=dataclasses.replace(cfg.model, vocab_size=given)
    )
    if works:
        said = dataclasses.replace(said, train=dataclasses.replace(cfg.train, steps=1))
        train(said, tmp_path / "a")
        assert load_run(tmp_path / "a").params["embed"]["tokens"].shape == (given, 16)
        assert json.loads((tmp_path / "a/config.json").read_text())["model"]["vocab_size"] == given
        return
    with pytest.raises(ConfigError, match=r"vocab_size=299.*300 would work, .*data.vocab_size=299"):
        train(said, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_vocabulary_given_by_a_flag_is_not_ignored(tmp_path, capsys):
    """By the command, before anything is written."""
    quickstart = f"--config={ROOT / 'experiments/quickstart.py'}"
    changes = {"data.tokenizer": "bpe", "data.vocab_size": 2048, "model.vocab_size": 1024}
    flags = tiny.flags({**changes, "mesh.data": 1})
    assert main(["train", quickstart, f"--workdir={tmp_path / 'a'}", *flags]) == 2
    assert "model.vocab_size=1024" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_a_text_too_small_for_its_tokenizer_says_so(cfg, tmp_path, capsys):
    many = dataclasses.replace(cfg.data, tokenizer="bpe", vocab_size=100_000)
    wide = MeshConfig(data=1, tensor=2)  # of an odd vocabulary: refused before anything is trained
    model = dataclasses.replace(cfg.model, vocab_size=100_001)
    with pytest.raises(ConfigError, match="vocab_size=100001 does not divide"):
        train(dataclasses.replace(cfg, data=many, mesh=wide, model=model), tmp_path / "a")
    assert re.search(r"gives only \d+ tokens of data.vocab_size=100000", capsys.readouterr().out)
