"""Damages every file of a checkpoint in random ways; each run must then go on from what was saved, or say so.

    python tests/chaos/mutate_checkpoint.py --count=1000

Prints one line: how many mutations were harmless, fell back to the step before, or were refused with a message;
and the two that must be zero: silently wrong values, and tracebacks (or a death of the process).
"""

import argparse
import collections
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import warnings

from damage import Found, mutate

ROOT = pathlib.Path(__file__).parents[2]
BATCH = 25  # mutations read by one process: a death costs only the rest of them


def config():
    """A small model on a byte vocabulary."""
    from moejax.config import AttentionConfig, DataConfig, ExperimentConfig, ModelConfig, MoEConfig

    return ExperimentConfig(
        model=ModelConfig(
            vocab_size=32,
            d_model=16,
            num_layers=2,
            d_ff=32,
            attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
            moe=MoEConfig(num_experts=4, d_expert=8),
        ),
        data=DataConfig(seq_len=8, batch_size=8, tokenizer="byte"),
    )


def make(workdir: pathlib.Path) -> None:
    """A run with the steps 1 and 2."""
    import jax
    import jax.numpy as jnp

    from moejax.runs.checkpoint import Checkpoints
    from moejax.train.state import create_state, save_state

    checkpoints = Checkpoints(workdir, config())
    for step in (1, 2):
        state = create_state(config(), jax.random.key(step), None)
        save_state(checkpoints, state._replace(step=jnp.int32(step)), {"next_index": step})
    checkpoints.close()


def outcome(workdir: pathlib.Path, right: dict) -> dict:
    """What reading the run gives: 'harmless', 'fell back', 'refused', 'WRONG' or 'TRACEBACK'."""
    from moejax.config import ConfigError
    from moejax.runs.checkpoint import Checkpoints
    from moejax.train.state import restore_state

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            checkpoints = Checkpoints(workdir, config())
            state, position = restore_state(checkpoints)  # pyright: ignore
            checkpoints.close()
        except ConfigError as e:
            return {"is": "refused", "text": str(e)}
        except Exception as e:
            return {"is": "TRACEBACK", "text": f"{type(e).__name__}: {e}"[:500]}
    said = [str(w.message) for w in caught]
    step = position["next_index"]  # pyright: ignore
    if fingerprint(state) != right[str(step)] or (step == 1 and not said):
        return {"is": "WRONG", "text": f"step {step}: {said}"}
    return {"is": "harmless" if step == 2 else "fell back", "text": " ".join(said)}


def fingerprint(state) -> str:
    """A hash of every byte of a state, by NumPy alone."""
    import hashlib

    import jax
    import numpy as np

    leaves = [np.asarray(a) for a in jax.tree.leaves(state)]
    return hashlib.sha256(b"".join(a.tobytes() for a in leaves)).hexdigest()


def read_all(folders: list[str], right: dict) -> None:
    for folder in folders:
        print("RESULT " + json.dumps(outcome(pathlib.Path(folder), right)), flush=True)


def campaign(count: int, seed: int, where: pathlib.Path) -> int:
    from moejax.runs.checkpoint import Checkpoints
    from moejax.train.state import restore_state

    whole = where / "whole"
    make(whole)
    right = {}
    for step in (2, 1):
        checkpoints = Checkpoints(whole, config())
        right[str(step)] = fingerprint(restore_state(checkpoints)[0])  # pyright: ignore
        checkpoints.close()
        if step == 2:
            (whole / "checkpoints" / "2").rename(where / "2")
    (where / "2").rename(whole / "checkpoints" / "2")
    names = [p.relative_to(whole) for p in (whole / "checkpoints" / "2").rglob("*") if p.is_file()]
    names.sort()
    rng, tally, found = random.Random(seed), collections.Counter(), Found(count)
    for begin in range(0, count, BATCH):
        made = []
        for number in range(begin, min(begin + BATCH, count)):
            copy = where / "copies" / str(number)
            shutil.copytree(whole, copy)
            name = names[number % len(names)]
            made.append((copy, name, mutate(copy / name, rng)))
        results = _read_apart([str(copy) for copy, _, _ in made], right)
        for (_, name, kind), result in zip(made, results, strict=True):
            tally[result["is"]] += 1
            if result["is"] in ("WRONG", "TRACEBACK"):
                found.say(f"{name} {kind}: {result['text']}")
        shutil.rmtree(where / "copies")
        found.advance(len(made))
    return found.end(
        f"{count} mutations of {len(names)} files: {tally['harmless']} harmless, {tally['fell back']} fell "
        f"back, {tally['refused']} refused; silently wrong {tally['WRONG']}, tracebacks {tally['TRACEBACK']}"
    )


def _read_apart(folders: list[str], right: dict) -> list[dict]:
    """The outcome for each folder; of one that ends the process, or prints a traceback, that."""
    results: list[dict] = []
    while len(results) < len(folders):
        rest = folders[len(results) :]
        command = [sys.executable, __file__, "--right", json.dumps(right), "--read", *rest]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=20 * BATCH, check=False
            )
            out, err, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as e:
            out, err, code = (e.stdout or b"").decode(), "it hangs", 1
        lines = [x for x in out.splitlines() if x.startswith("RESULT ")]
        results += [json.loads(line.removeprefix("RESULT ")) for line in lines]
        if code and len(lines) < len(rest):
            results.append({"is": "TRACEBACK", "text": f"exit {code}: {err[-500:]}"})
        elif "Traceback" in err:
            results[-1] = {"is": "TRACEBACK", "text": err[:3000]}
    return results


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--right")
    parser.add_argument("--read", nargs="*")
    args = parser.parse_args()
    if args.read:
        from absl import logging

        logging.set_verbosity(logging.FATAL)  # as the commands do
        read_all(args.read, json.loads(args.right))
    else:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(bool(campaign(args.count, args.seed, pathlib.Path(folder))))
