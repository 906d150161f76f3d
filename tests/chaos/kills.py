"""Kills training at random instants; the run that is started again each time must end as one that never was.

    python tests/chaos/kills.py --count=200

Instants are spread over start, steps, evaluation and saving. Prints one line: kills, where they fell, and the
two that must be zero: steps lost beyond the last save, and rows of metrics.jsonl that differ from those of one
that was never killed.
"""

import argparse
import collections
import json
import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from damage import Found  # noqa: E402
from tiny import OVERRIDES  # noqa: E402

SAVE_EVERY, EVAL_EVERY = 5, 7
FLAGS = OVERRIDES | {
    "model.num_layers": 1,
    "model.num_dense_layers": 0,
    "optimizer.schedule": "constant",  # so that train.steps is only where a run ends
    "optimizer.warmup_steps": 1,
    "train.eval_every": EVAL_EVERY,
    "train.checkpoint_every": SAVE_EVERY,
}
# What depends on the clock.
TIMES = ("tokens_per_second", "flops_per_second", "planned_tokens_per_second")


def start(workdir: pathlib.Path, steps: int, cache: pathlib.Path, out) -> subprocess.Popen:
    flags = {**FLAGS, "train.steps": steps}
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "moejax", "train", "--noreport", f"--workdir={workdir}"),
            f"--config={ROOT / 'experiments' / 'quickstart.py'}",
            *(f"--config.{k}={v}" for k, v in flags.items()),
        ],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        },
        stdout=out,
        stderr=subprocess.STDOUT,
    )


def rows(workdir: pathlib.Path) -> list[dict]:
    """The rows without what depends on the clock; raises ValueError for a line that is no JSON."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    kept = [json.loads(line) for line in lines]
    return [{k: v for k, v in r.items() if k not in TIMES} for r in kept if r["kind"] != "receipt"]


def saved(workdir: pathlib.Path) -> int:
    folder = workdir / "checkpoints"
    return max((int(p.name) for p in folder.glob("*") if p.name.isdigit()), default=0)


def one_kill(
    workdir: pathlib.Path, log: pathlib.Path, cache, rng: random.Random
) -> tuple[str, str]:
    """Go on and kill the run at a random instant. Returns where it fell, and what was wrong, if anything."""
    before, steps = saved(workdir), saved(workdir) + 1000
    with log.open("w") as out:
        process = start(workdir, steps, cache, out)
        moment = rng.choice(["start", "steps", "save", "save", "any"])
        began, deadline = time.monotonic(), time.monotonic() + 300
        if moment == "start":
            time.sleep(rng.uniform(0, 8))
        else:
            while saved(workdir) == before and time.monotonic() < deadline:
                if moment == "save" and list((workdir / "checkpoints").glob("*tmp*")):
                    break  # it is being written
                if process.poll() is not None:
                    break
                time.sleep(0.002)
            time.sleep(rng.uniform(0, {"save": 0.05, "steps": 0.5, "any": 3.0}[moment]))
        alive = process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
    text = log.read_text()
    if not alive:
        return "ended", f"it ended by itself after {time.monotonic() - began:.0f} s: {text[-600:]}"
    resumed = re.search(r"at step (\d+)", text)
    if resumed and int(resumed[1]) != before:
        return moment, f"step {before} was saved, it went on from {resumed[1]}"
    if "Traceback" in text:
        return moment, text[-600:]
    return moment, ""


def campaign(count: int, seed: int, where: pathlib.Path) -> int:
    rng, falls, found = random.Random(seed), collections.Counter(), Found(count)
    killed, whole, cache = where / "killed", where / "whole", where / "cache"
    for number in range(count):
        moment, problem = one_kill(killed, where / "log", cache, rng)
        falls[moment] += 1
        if problem:
            found.say(f"kill {number} ({moment}): {problem}")
        found.advance()
    steps = saved(killed) + 3
    for workdir in (killed, whole):
        with (where / "log").open("w") as out:
            if start(workdir, steps, cache, out).wait():
                found.say(f"{workdir.name}: {(where / 'log').read_text()[-600:]}")
    pairs = {}
    for name, workdir in (("killed", killed), ("whole", whole)):
        for row in rows(workdir):
            pairs.setdefault((row["step"], row["kind"]), {}).setdefault(name, []).append(row)
    # The whole run has no evaluation where a killed one was prolonged, and the other way round.
    both = {k: v for k, v in pairs.items() if k[1] != "routing" or len(v) == 2}
    differ = [
        k
        for k, v in both.items()
        if len(v.get("killed", [])) > 1
        or (len(v) == 2 and v["killed"] != v["whole"])
        or (len(v) == 1 and k[1] == "train")
    ]
    problems = found.number
    if differ:
        found.say(f"rows that differ: {differ}")
    where_they_fell = ", ".join(f"{n} at {m}" for m, n in sorted(falls.items()))
    return found.end(
        f"{count} kills ({where_they_fell}), {steps} steps: {problems} steps lost or errors, "
        f"{len(differ)} of {len(pairs)} rows differ"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sys.exit(bool(campaign(args.count, args.seed, pathlib.Path(folder))))
