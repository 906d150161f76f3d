"""`moejax sweep`: what it reads, what it refuses before anything starts, how it runs, skips and stops."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import pytest
import tiny
from compile_flags import UNOPTIMISED

from moejax.commands import sweep, sweep_file, sweep_jobs
from moejax.config import ConfigError, ExperimentConfig, ModelConfig
from moejax.config_io import to_json
from moejax.runs import lock
from moejax.runs import sweep as folders
from moejax.runs.progress import progress
from moejax.train import fits

ROOT = pathlib.Path(__file__).parents[2]
QUICKSTART = str(ROOT / "experiments/quickstart.py")
GOOD = {"variants": {"a": {}, "b": {"optimizer.learning_rate": 0.5}}, "seeds": (0, 1)}
FILE = """\
from moejax.config import ExperimentConfig
from moejax.config_io import to_config_dict


def get_config(variant="plain"):
    return to_config_dict(ExperimentConfig(name=variant))


def get_sweep():
    return {sweep!r}
"""


@pytest.fixture
def write(tmp_path):
    def write(values) -> str:
        path = tmp_path / "x.py"
        path.write_text(FILE.format(sweep=values))
        return str(path)

    return write


def test_a_variant_is_the_argument_and_the_overrides_of_its_flags(write):
    variants = {
        "plain": {},
        "wide": {
            "variant": "other",
            "model.d_model": 256,
            "optimizer.decay_at": (0.5,),
            "optimizer.groups": ["role=head lr=0.1"],
            "model.tie_embeddings": True,
            "data.tokenizer": "byte",
            "optimizer.learning_rate": 1e-5,
            "data.weights": (),
        },
    }
    file = write({"variants": variants, "seeds": [3, 5], "baseline": "wide"})
    plan = sweep_file.read(file, ["--config.train.steps=7", "--workdir=x"])
    assert (plan.baseline, plan.seeds) == ("wide", (3, 5))
    cfg = plan.experiment("wide", 5)
    assert (cfg.name, cfg.model.d_model, cfg.model.tie_embeddings) == ("other", 256, True)
    assert (cfg.optimizer.decay_at, cfg.optimizer.groups) == ((0.5,), ("role=head lr=0.1",))
    assert (cfg.data.tokenizer, cfg.optimizer.learning_rate, cfg.data.weights) == ("byte", 1e-5, ())
    assert (cfg.train.seed, cfg.data.seed, cfg.train.steps) == (5, 5, 7)
    plain = plan.experiment("plain", 3)
    assert (plain.name, plain.train.seed, plain.data.seed) == ("plain", 3, 3)
    assert plan.flags("plain", 3)[0] == f"--config={file}"


BAD = {
    "no dict": ([1], "it must return a dict with variants, seeds"),
    "unknown key": ({**GOOD, "seedz": 1}, "unknown key 'seedz'"),
    "no seeds": ({"variants": {"a": {}}}, "'seeds' must be whole numbers"),
    "negative seed": ({**GOOD, "seeds": (-1,)}, "not (-1,)"),
    "a seed twice": ({**GOOD, "seeds": (1, 1)}, "names a seed twice"),
    "no variants": ({**GOOD, "variants": {}}, "'variants' must be a dict"),
    "a path": ({**GOOD, "variants": {"../a": {}}}, "the name becomes a folder"),
    "hidden": ({**GOOD, "variants": {".a": {}}}, "a letter or digit first"),
    "case": ({**GOOD, "variants": {"A": {}, "a": {}}}, "A and a would be one folder"),
    "baseline": ({**GOOD, "baseline": "c"}, "'baseline' 'c' is none of the variants a, b"),
    "no overrides": ({**GOOD, "variants": {"a": 3}}, "variant a must be a dict"),
    "no key": ({**GOOD, "variants": {"a": {"steps": 3}}}, "'steps' is no dotted key"),
    "no value": ({**GOOD, "variants": {"a": {"train.steps": None}}}, "not None"),
    "a seed": ({**GOOD, "variants": {"a": {"train.seed": 3}}}, "train.seed is moved by 'seeds'"),
}


@pytest.mark.parametrize("values, text", BAD.values(), ids=BAD)
def test_a_bad_sweep_is_named(write, values, text):
    with pytest.raises(ConfigError) as e:
        sweep_file.read(write(values), [])
    assert text in str(e.value)


def test_what_the_command_line_cannot_change(write):
    file = write(GOOD)
    for argv, text in (
        (
            ["--config.optimizer.learning_rate=1"],
            "is for every variant, but b sets optimizer.learning_rate",
        ),
        (["--config.data.seed=1"], "is a seed: use --seeds"),
    ):
        with pytest.raises(ConfigError, match=text):
            sweep_file.read(file, argv)
    with pytest.raises(ConfigError, match="name the file alone"):
        sweep_file.read(file + ":dense", [])
    (path := pathlib.Path(file)).write_text("def get_config():\n    pass\n")
    with pytest.raises(ConfigError, match=r"the file has no get_sweep\(\)"):
        sweep_file.read(str(path), [])


@pytest.fixture
def all_fit(monkeypatch):
    monkeypatch.setattr(
        fits, "find", lambda configs, jobs: [fits.Finding("", "1M", 60.0)] * len(configs)
    )


def run_main(file, workdir, *argv) -> int:
    return sweep.main([f"--config={file}", f"--workdir={workdir}", *argv])


def test_every_bad_variant_is_named_and_none_starts(write, tmp_path, monkeypatch):
    variants = {
        "good": {},
        "typo": {"model.d_modl": 3},
        "clash": {"model.attention.num_heads": 3, "train.steps": -1},
    }
    file = write({"variants": variants, "seeds": (0,)})
    monkeypatch.setattr(sweep, "run_jobs", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(ConfigError) as e:
        run_main(file, tmp_path / "out")
    text = str(e.value)
    assert "nothing was started" in text and "variant good" not in text
    assert "variant typo" in text and "did you mean model.d_model?" in text
    assert "variant clash" in text and "train.steps=-1" in text
    assert not (tmp_path / "out").exists()


def test_a_variant_that_does_not_fit_is_named_and_none_starts(write, tmp_path, monkeypatch):
    found = [fits.Finding("", "1M", 1.0), fits.Finding("it needs 3 TiB", "9T", 1.0)]
    monkeypatch.setattr(fits, "find", lambda configs, jobs: found)
    monkeypatch.setattr(sweep, "run_jobs", lambda *_: pytest.fail("a run was started"))
    with pytest.raises(ConfigError, match="variant b: it needs 3 TiB"):
        run_main(write(GOOD), tmp_path / "out")
    found[0] = found[1]
    with pytest.raises(ConfigError, match="variants a, b: it needs 3 TiB"):  # said once
        run_main(write(GOOD), tmp_path / "out")


def test_force_runs_what_may_not_fit(write, tmp_path, monkeypatch):
    found = [fits.Finding("", "1M", 1.0), fits.Finding("it needs 3 TiB", "9T", 1.0)]
    monkeypatch.setattr(fits, "find", lambda configs, jobs: found)
    started = []
    monkeypatch.setattr(sweep, "run_jobs", lambda jobs, _: started.extend(jobs) or 0)
    assert run_main(write(GOOD), tmp_path / "out", "--force") == 0
    assert started and all(job.flags[-1] == "--force" for job in started)
    # Devices that do not match are no question of memory.
    found[1] = fits.Finding("8 devices are needed, 1 is there", "", 0.0)
    with pytest.raises(ConfigError, match="variant b: 8 devices"):
        run_main(write(GOOD), tmp_path / "out2", "--force")


def test_what_fits_on_this_machine():
    small = ExperimentConfig()
    assert fits._finding(small, 1).problem == "" and fits._finding(small, 1).seconds > 0
    huge = ExperimentConfig(model=ModelConfig(d_model=2**17, num_layers=96, d_ff=2**19))
    assert "it needs" in fits._finding(huge, 1).problem
    too_many = fits._finding(small, 10**9)  # each alone would fit
    assert "a share of 1000000000 at once" in too_many.problem


def test_the_devices_are_asked_in_another_process():
    (found,) = fits.find([ExperimentConfig()], 1)
    assert found.problem == "" and "active" in found.plan and found.seconds > 0


def test_which_runs_are_whose(write, tmp_path, all_fit, capsys):
    def listed(*argv):
        assert run_main(file, tmp_path / "out", "--dry_run", *argv) == 0
        return [
            line.split()[0] for line in capsys.readouterr().out.splitlines() if "/seed_" in line
        ]

    file = write({**GOOD, "seeds": (0, 1, 2)})
    every = ["a/seed_0", "b/seed_0", "a/seed_1", "b/seed_1", "a/seed_2", "b/seed_2"]
    assert listed() == every  # all of one seed first: pairs are there early
    parts = [listed(f"--element={i}/4") for i in range(4)]
    assert sorted(name for part in parts for name in part) == sorted(every) and parts[1] == [
        "b/seed_0",
        "b/seed_2",
    ]
    assert listed("--only=b", "--seeds=7,2") == ["b/seed_7", "b/seed_2"]
    assert not (tmp_path / "out").exists()
    for argv, text in (
        (["--element=4/4"], "i from 0 to n - 1"),
        (["--element=1"], "write i/n"),
        (["--only=c"], "unknown variant 'c'; variants: a, b"),
        (["--seeds=1,x"], "--seeds must be whole numbers"),
    ):
        with pytest.raises(ConfigError, match=text):
            run_main(file, tmp_path / "out", *argv)


def test_a_run_of_another_config_or_of_more_steps_is_refused(write, tmp_path, all_fit):
    file = write(GOOD)
    there = folders.run_folder(tmp_path, "b", 1)
    there.mkdir(parents=True)
    cfg = sweep_file.read(file, []).experiment("b", 1)
    (there / "config.json").write_text(to_json(cfg))
    assert run_main(file, tmp_path, "--dry_run") == 0
    with pytest.raises(
        ConfigError, match=r"variant b: .*seed_1 belongs to a run with another config"
    ):
        run_main(file, tmp_path, "--dry_run", "--config.model.d_model=64")
    (there / "metrics.jsonl").write_text('{"step": 300, "kind": "train"}\n')
    with pytest.raises(ConfigError, match="was trained for 300 steps, more than the 20 wanted"):
        run_main(file, tmp_path, "--dry_run", "--config.train.steps=20")


# --------------------------------------------------------------------------------------------------
# Running, with a stand-in for `moejax train` that counts to its number of steps.

TRAIN = """\
import json, pathlib, signal, sys, time
workdir, steps, how = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
workdir.mkdir(parents=True, exist_ok=True)
(workdir / "config.json").write_text("{}")
(workdir / "begun").open("a").write("x")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
lines = (workdir / "metrics.jsonl").open("a")
def log(**row): lines.write(json.dumps(row) + "\\n"); lines.flush()
def end(why, step):
    row = {"kind": "end", "why": why, "step": step}
    (workdir / "provenance.jsonl").write_text(json.dumps(row))
if how == "fail": print("warming up"); sys.exit("the disk is on fire")
for step in range(1, steps + 1):
    log(step=step, kind="train", cross_entropy=1.0)
    if how == "diverge" and step == 2: end("Diverged", step); sys.exit(2)
    if stop: end("stopped", step); sys.exit(0)
    if how == "slow": time.sleep(0.05)
log(step=steps, kind="validation", loss=2.5)
end("finished", steps)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    program = tmp_path / "train.py"
    program.write_text(TRAIN)
    monkeypatch.setattr(sweep_jobs, "COMMAND", (sys.executable, str(program)))

    def job(name, how="", steps=3):
        workdir = tmp_path / name / "seed_0"
        log = workdir.with_suffix(".log")
        return sweep_jobs.Job(
            f"{name}/seed_0", workdir, log, (str(workdir), str(steps), how), steps
        )

    return job


def begun(job) -> int:
    return len((job.workdir / "begun").read_text())


def test_runs_all_whatever_becomes_of_one_and_skips_what_has_ended(job, capsys):
    jobs = [job("good"), job("bad", "fail"), job("wild", "diverge"), job("last")]
    assert sweep_jobs.run_jobs(jobs, 2) == 2
    out = capsys.readouterr().out
    assert "good/seed_0: finished in" in out and "validation loss 2.5000" in out
    assert "bad/seed_0: failed with status 1: the disk is on fire" in out
    assert "wild/seed_0: diverged at step 2" in out
    assert "last/seed_0: finished in" in out
    assert "warming up" in jobs[1].log.read_text()
    assert sweep_jobs.run_jobs([jobs[0], *jobs[2:]], 1) == 0
    out = capsys.readouterr().out
    assert "good/seed_0: finished already" in out and "remove" in out
    assert [begun(j) for j in jobs] == [1, 1, 1, 1]
    longer = sweep_jobs.Job(
        **{**vars(jobs[0]), "steps": 5, "flags": (str(jobs[0].workdir), "5", "")}
    )
    assert sweep_jobs.run_jobs([longer], 1) == 0 and begun(longer) == 2


def test_a_run_that_another_process_trains_is_left_alone(job, capsys):
    ours, theirs = job("ours"), job("theirs")
    with lock.writing(theirs.workdir):
        (theirs.workdir / "config.json").write_text("{}")
        assert sweep_jobs.run_jobs([theirs, ours], 1) == 0
    out = capsys.readouterr().out
    assert f"theirs/seed_0: left alone, process {os.getpid()} on" in out
    assert "ours/seed_0: finished" in out and not (theirs.workdir / "begun").exists()


def test_ctrl_c_stops_what_runs_and_the_same_call_goes_on(job, capsys):
    jobs = [job("a", "slow", 1000), job("b", "slow", 1000), job("c")]
    before = signal.getsignal(signal.SIGINT)

    def press():
        deadline = time.monotonic() + 60
        while not all((j.workdir / "metrics.jsonl").exists() for j in jobs[:2]):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        time.sleep(0.3)  # the stand-in handles signals before it logs
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=press)
    thread.start()
    assert sweep_jobs.run_jobs(jobs, 2) == 130
    thread.join()
    assert signal.getsignal(signal.SIGINT) is before
    out = capsys.readouterr().out
    assert "a/seed_0: stopped at step" in out and "b/seed_0: stopped at step" in out
    assert "1 runs were not begun" in out and not jobs[2].workdir.exists()
    assert progress(jobs[0].workdir, 1000).state == "part"


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux has it")
def test_runs_side_by_side_have_cores_of_their_own():
    every = os.sched_getaffinity(0)
    if len(every) < 2:
        pytest.skip("one core")
    shares = []
    for slot in range(2):
        with sweep_jobs._some_cores(slot, 2):
            shares.append(os.sched_getaffinity(0))
        assert os.sched_getaffinity(0) == every
    assert shares[0] | shares[1] == every and not shares[0] & shares[1]
    with sweep_jobs._some_cores(0, len(every) + 1):
        assert os.sched_getaffinity(0) == every


@pytest.mark.slow
@pytest.mark.product
def test_a_real_sweep_goes_on_after_a_kill_and_ends_with_the_comparison(tmp_path):
    root = tmp_path / "sweep"
    flags = tiny.flags({"train.steps": 40, "train.checkpoint_every": 5})
    command = [
        sys.executable,
        "-m",
        "moejax",
        "sweep",
        f"--config={QUICKSTART}",
        f"--workdir={root}",
    ]
    command += ["--seeds=0,1", "--only=moe", *flags]
    env = os.environ | {
        "XLA_FLAGS": UNOPTIMISED,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.3",
    }
    whole = tmp_path / "whole"
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    first = folders.run_folder(root, "moe", 0)
    deadline = time.monotonic() + 300
    while not (first / "checkpoints" / "5").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    owner = lock.writer(first)
    assert owner is not None
    process.kill()
    os.kill(int(owner.split()[1]), signal.SIGKILL)
    process.wait()
    while lock.writer(first):  # until it is really dead
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert progress(first, 40).state == "part"
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "moe/seed_0: goes on from step" in done.stdout
    assert "moe/seed_1: finished in" in done.stdout
    assert "What it gives" in done.stdout and "loss by seed" in done.stdout
    alone = [sys.executable, "-m", "moejax", "train", "--noreport", f"--config={QUICKSTART}"]
    alone += [f"--workdir={whole}", *flags, "--config.train.seed=1", "--config.data.seed=1"]
    subprocess.run(alone, env=env, capture_output=True, check=True, timeout=600)

    def last(workdir):
        rows = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
        return [r["loss"] for r in rows if r["kind"] == "validation"]

    assert last(whole) == last(folders.run_folder(root, "moe", 1))  # one of the sweep is one alone
    assert last(whole) != last(first)
