"""Two processes of four devices: one run, stopped by a signal to either, the same losses as one process."""

import contextlib
import json
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
import tiny
from compile_flags import UNOPTIMISED

from moejax.config import ConfigError, ExperimentConfig, MeshConfig
from moejax.sharding import make_layout, place_rows, place_whole, rows_here
from moejax.train import processes

ROOT = pathlib.Path(__file__).parent.parent.parent
FLAGS = tiny.flags(
    {
        "model.num_layers": 1,
        "model.num_dense_layers": 0,
        "data.batch_size": 8,
        "optimizer.schedule": "constant",  # so that train.steps is only where a run ends
        "optimizer.warmup_steps": 1,
        "train.eval_every": 10000,
        "train.checkpoint_every": 10000,
    }
)
MESH = ["--config.mesh.data=2", "--config.mesh.expert=2", "--config.mesh.tensor=2"]


class Command:
    """A training process; what it writes goes to files, which no amount of progress bars can fill up."""

    def __init__(self, workdir, *flags, devices=1):
        self.out = workdir.parent / f"{workdir.name}{len(flags)}{flags[0]}{flags[-1]}".replace(
            ":", ""
        )
        env = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(ROOT),
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {UNOPTIMISED}",
        }
        config = f"--config={ROOT / 'experiments/quickstart.py'}"
        args = [config, f"--workdir={workdir}", *FLAGS, *flags]
        with self.out.open("w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "moejax", "train", "--noreport", *args],
                env=env,
                stdout=out,
                stderr=subprocess.STDOUT,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def finish(self):
        code = self.process.wait(timeout=300)
        assert code == 0, self.out.read_text()
        return self.out.read_text()


def losses(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.product
def test_two_processes_are_one_run(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    flags = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", *MESH]
    flags.append("--config.train.steps=100000")
    with (
        Command(two, *flags, "--process_id=0", devices=4) as first,
        Command(two, *flags, "--process_id=1", devices=4) as second,
    ):
        deadline = time.monotonic() + 300
        while len(losses(two)) < 3:
            assert time.monotonic() < deadline
            for command in (first, second):
                assert command.process.poll() is None, command.out.read_text()
            time.sleep(0.02)
        # To one of them: both stop, after the same step.
        second.process.send_signal(signal.SIGTERM)
        out, silent = first.finish(), second.finish()
    stopped = re.search(r"at step (\d+), which is saved", out)
    assert stopped, out
    saved = int(stopped[1])
    assert max(losses(two)) == saved
    assert "parameters" in out and "parameters" not in silent  # process 0 speaks, and only it

    # Go on from what two processes saved, in one process on one device, for three steps.
    steps = f"--config.train.steps={saved + 3}"
    with Command(two, steps) as resumed:
        assert f"at step {saved}" in resumed.finish()
    with Command(one, steps, *MESH, devices=8) as whole:
        whole.finish()
    assert list(losses(two)) == list(losses(one)) == list(range(1, saved + 4))
    # Sums in another order: 1e-7 a step in float32, which Adam's division by small moments amplifies. A
    # row taken twice, or gradients of half the batch, would change the losses by over 1e-3.
    np.testing.assert_allclose(list(losses(two).values()), list(losses(one).values()), rtol=1e-4)


@pytest.fixture(scope="module")
def four_steps(tmp_path_factory):
    """A run of two processes with the steps 2 and 4, each process's arrays in files of its own."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    flags = ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.train.checkpoint_every=2"]
    with both(workdir, *flags, "--config.train.steps=4") as (first, second):
        first.finish(), second.finish()
    return workdir, flags


@contextlib.contextmanager
def both(workdir, *flags):
    joined = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", *flags]
    with (
        Command(workdir, *joined, "--process_id=0") as first,
        Command(workdir, *joined, "--process_id=1") as second,
    ):
        yield first, second


@pytest.mark.product
def test_processes_go_on_from_a_checkpoint_that_all_can_read(four_steps):
    """One of them lacks its part of the newest: neither waits for the other at a step of its own."""
    workdir, flags = four_steps
    parts = [
        p for p in (workdir / "checkpoints/4/model").rglob("*") if "process_1" in str(p.parent)
    ]
    data = [p for p in parts if p.is_file() and p.parent.name == "d"]
    assert data
    for path in data:
        path.unlink()
    with both(workdir, *flags, "--config.train.steps=5") as (first, second):
        out = first.finish()
        second.finish()
    assert "checkpoints/4 cannot be read" in out and "falling back to step 2" in out
    assert "at step 2" in out and (workdir / "damaged" / "4").exists()
    assert list(losses(workdir)) == [1, 2, 3, 4, 5]


@pytest.mark.product
def test_a_process_that_is_killed_leaves_the_other_with_a_clear_end(tmp_path):
    """Within three minutes, of which the runtime of jax.distributed waits 100 seconds for a sign of life."""
    workdir = tmp_path / "run"
    flags = ["--config.mesh.data=2", "--config.train.steps=100000"]
    for victim in (0, 1):
        with both(workdir, *flags) as pair:
            deadline, before = time.monotonic() + 300, max(losses(workdir), default=0)
            while max(losses(workdir), default=0) < before + 3:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            killed, left = pair[victim], pair[1 - victim]
            killed.process.kill()
            code = left.process.wait(timeout=180)
            text = left.out.read_text()
        assert code == 3, text
        assert f"process {1 - victim} lost another one" in text
        assert "goes on from the newest checkpoint" in text and "Traceback" not in text


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (dict(mode="always"), "choices are none, auto"),
        (dict(process_id=1), "--process_id needs --coordinator"),
        (dict(coordinator="localhost:1"), "needs --num_processes and --process_id"),
        (dict(coordinator="here", num_processes=2, process_id=0), "must be HOST:PORT"),
    ],
)
def test_what_is_missing_to_start_is_named(args, message):
    with pytest.raises(ConfigError, match=message):
        processes.start(**args)


def test_rows_of_one_process_are_the_whole_batch():
    cfg = ExperimentConfig(mesh=MeshConfig(data=2, fsdp=2, tensor=2))
    layout = make_layout(cfg)
    assert rows_here(layout, 8, 4) == (0, 1)
    rows = {"tokens": np.arange(32, dtype=np.int32).reshape(8, 4)}
    for placed in (place_rows(rows, layout, 8), place_whole(rows, layout)):
        np.testing.assert_array_equal(placed["tokens"], rows["tokens"])
        assert {s.data.shape for s in placed["tokens"].addressable_shards} == {(2, 4)}


def test_without_a_cluster_auto_says_what_to_give(monkeypatch):
    def no_cluster(*_):
        raise ValueError("coordinator_address should be defined.")  # what jax says

    monkeypatch.setattr(jax.distributed, "initialize", no_cluster)
    with pytest.raises(ConfigError, match="--coordinator=HOST:PORT --num_processes=N"):
        processes.start("auto")
