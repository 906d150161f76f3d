"""The commands from outside: a run really killed and resumed, and bad input answered clearly."""

import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import tiny
from compile_flags import UNOPTIMISED

ROOT = pathlib.Path(__file__).parents[2]
TINY = tiny.flags({"train.checkpoint_every": 5})


def command(workdir, *flags):
    return [
        *(sys.executable, "-m", "moejax", "train", "--noreport"),
        f"--config={ROOT / 'experiments/quickstart.py'}",
        f"--workdir={workdir}",
        *TINY,
        *flags,
    ]


def environment(workdir):
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        # The runs of a test are compiled once.
        "JAX_COMPILATION_CACHE_DIR": str(workdir.parent / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
        "XLA_FLAGS": UNOPTIMISED,
    }


def run(workdir, *flags, before=()):
    return subprocess.run(
        [*before, *command(workdir, *flags)],
        env=environment(workdir),
        capture_output=True,
        text=True,
        timeout=600,
    )


def losses(workdir):
    """The last loss written for each step."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}


# ulimit counts in KiB; python ignores the signal, so that a write fails as on a full disk.
LIMITED = 'ulimit -f 20; exec "$@"'


@pytest.mark.product
def test_killed_run_resumes_to_the_same_losses(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    flags = ["--config.train.steps=60"]
    done = run(whole, *flags)
    assert done.returncode == 0, done.stderr
    # No terminal, so no bar.
    assert "step 0/60: compiling" in done.stdout and "step 60/60: loss" in done.stdout
    assert "step/s" not in done.stderr
    process = subprocess.Popen(
        command(killed, *flags),
        env=environment(killed),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 600
    while not (killed / "metrics.jsonl").exists() or len(losses(killed)) < 12:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert max(losses(killed)) < 60  # it really was cut off
    # Resume, ask it politely to stop, and resume again.
    before = max(losses(killed))
    process = subprocess.Popen(
        command(killed, *flags), env=environment(killed), stdout=subprocess.PIPE, text=True
    )
    while max(losses(killed)) <= before:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0
    saved = re.search(r"at step (\d+), which is saved", out)
    assert "resuming" in out and saved, out
    resumed = run(killed, *flags)
    assert resumed.returncode == 0, resumed.stderr
    assert f"at step {saved[1]}" in resumed.stdout
    assert losses(killed) == losses(whole)  # bit for bit: the same floats


@pytest.mark.product
def test_a_damaged_checkpoint_and_a_full_disk(tmp_path):
    """The run goes on from the checkpoint before, and says so."""
    killed = tmp_path / "killed"
    assert run(killed, "--config.train.steps=60").returncode == 0
    for file in (killed / "checkpoints" / "60").rglob("*"):
        if file.is_file():
            file.write_bytes(b"")
    text = [
        subprocess.run(
            [sys.executable, "-m", "moejax", "generate", f"--workdir={killed}", "--max_new=8"],
            env=environment(killed),
            capture_output=True,
            text=True,
            timeout=200,
        )
        for _ in range(2)
    ]
    assert text[0].returncode == 0, text[0].stderr
    assert text[0].stdout == text[1].stdout
    assert "falling back to step 55" in text[0].stderr

    # No space while saving: no file may grow beyond 20 KiB (metrics.jsonl begins anew: it is longer).
    (killed / "metrics.jsonl").unlink()
    jump = "--config.train.rate_may_jump=true"  # of the cosine, which is longer
    flags = ["--config.train.steps=65", jump, "--config.train.log_every=5"]  # few and small rows
    full = run(killed, *flags, before=("bash", "-c", LIMITED, "-"))
    assert full.returncode == 2, full.stderr
    assert "saving a checkpoint in" in full.stderr and "File too large" in full.stderr
    assert "step 55 is the last whole one" in full.stderr
    assert "the same command goes on from there" in full.stderr
    assert "at step 55" in run(killed, "--config.train.steps=56", jump).stdout  # so it does

    other = run(killed, "--config.train.steps=60", "--config.optimizer.learning_rate=0.5")
    assert other.returncode == 2
    assert "the learning rate would jump from" in other.stderr


def test_bad_input_is_named_before_any_compute(tmp_path):
    out = run(tmp_path / "a", "--config.model.moe.experts_per_token=9")
    assert out.returncode == 2
    assert "model.moe.experts_per_token=9" in out.stderr
    assert not (tmp_path / "a").exists()
