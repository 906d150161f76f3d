"""Damages every file of Hugging Face folders in random ways; each import must give a run, or say what is wrong.

    python tests/chaos/mutate_hf.py --count=5000

Prints one line: how many folders were imported how many refused with a message, and what must be zero:
tracebacks (or a death of the process), hangs, files outside the new run, and leftovers of a refused one.
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
import time

from damage import Found, mutate

ROOT = pathlib.Path(__file__).parents[2]
FAMILIES = ("llama", "deepseek_v3", "gpt_oss", "qwen2_moe", "deepseek")
BATCH, SECONDS = 20, 60  # folders of one process; what one import may take


def outcome(folder: pathlib.Path) -> dict:
    """What importing FOLDER/hf into FOLDER/run gives: 'imported', 'refused', or what must not be."""
    from moejax.config import ConfigError
    from moejax.interop.convert import import_run

    before, began = files(folder), time.monotonic()
    try:
        import_run(folder / "hf", folder / "run")
        result = {"is": "imported", "text": ""}
    except ConfigError as e:
        result = {"is": "refused", "text": str(e)}
        if len(str(e)) > 10_000 or any(ord(c) < 32 and c not in "\n\t" for c in str(e)):
            result = {"is": "UNPRINTABLE", "text": repr(str(e)[:500])}
    except Exception as e:
        result = {"is": "TRACEBACK", "text": f"{type(e).__name__}: {e}"[:500]}
    took, made = time.monotonic() - began, files(folder) - before
    inside = {p for p in made if p.parts[0] == "run"}
    if result["is"] == "imported":
        made -= inside
    if made:
        result = {"is": "LEFTOVER", "text": f"{sorted(map(str, made))[:5]} {result['text'][:200]}"}
    if took > SECONDS:
        result = {"is": "HANG", "text": f"{took:.0f} s"}
    return result


def files(folder: pathlib.Path) -> set[pathlib.Path]:
    return {p.relative_to(folder) for p in folder.rglob("*")}


def read_all(folders: list[str]) -> None:
    for folder in folders:
        print("RESULT " + json.dumps(outcome(pathlib.Path(folder))), flush=True)


def campaign(count: int, seed: int, where: pathlib.Path) -> int:
    sys.path.insert(0, str(ROOT / "tests" / "interop"))
    from test_import_export import checkpoint

    for family in FAMILIES:
        (where / family).mkdir()
        checkpoint(where / family / "hf", family)
    rng, tally, found = random.Random(seed), collections.Counter(), Found(count)
    for begin in range(0, count, BATCH):
        made = []
        for number in range(begin, min(begin + BATCH, count)):
            family, copy = rng.choice(FAMILIES), where / "copies" / str(number) / "x"
            shutil.copytree(where / family, copy)
            names = sorted(p.relative_to(copy) for p in (copy / "hf").rglob("*.*[nse]"))
            names = [n for n in names if n.suffix in (".json", ".safetensors")]
            done = []
            for name in rng.choices(names, k=rng.choice((1, 1, 2))):
                if (copy / name).is_file():
                    done.append(f"{name.name} {mutate(copy / name, rng)}")
            made.append((copy, family, done))
        for (_, family, done), result in zip(
            made, _read_apart([str(c) for c, _, _ in made]), strict=True
        ):
            tally[result["is"]] += 1
            if result["is"] not in ("imported", "refused"):
                found.say(f"{family} {', '.join(done)}: {result['is']} {result['text']}")
        outside = {p.name for p in (where / "copies").iterdir()} - {
            str(n) for n in range(begin, begin + BATCH)
        }
        beside = [p for p in (where / "copies").glob("*/*") if p.name != "x"]
        if outside or beside:
            tally["OUTSIDE"] += 1
            found.say(f"written outside: {outside or beside}")
        shutil.rmtree(where / "copies")
        found.advance(len(made))
    return found.end(
        f"{count} damaged folders: {tally['imported']} imported, {tally['refused']} refused; tracebacks "
        f"{tally['TRACEBACK']}, hangs {tally['HANG']}, unprintable messages {tally['UNPRINTABLE']}, left "
        f"behind {tally['LEFTOVER']}, written outside {tally['OUTSIDE']}"
    )


def _read_apart(folders: list[str]) -> list[dict]:
    """The outcome for each folder; of one that ends the process, or hangs, that."""
    results: list[dict] = []
    while len(results) < len(folders):
        rest = folders[len(results) :]
        command = [sys.executable, __file__, "--read", *rest]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=SECONDS * len(rest), check=False
            )
            out, err, code = done.stdout, done.stderr, done.returncode
        except subprocess.TimeoutExpired as e:
            out, err, code = (e.stdout or b"").decode(), "", None
        lines = [x for x in out.splitlines() if x.startswith("RESULT ")]
        results += [json.loads(line.removeprefix("RESULT ")) for line in lines]
        if code != 0 and len(lines) < len(rest):
            what = "HANG" if code is None else "TRACEBACK"
            results.append({"is": what, "text": f"exit {code}: {err[-500:]}"})
    return results


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    sys.path.insert(0, str(ROOT))
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--read", nargs="*")
    args = parser.parse_args()
    if args.read:
        read_all(args.read)
    else:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(bool(campaign(args.count, args.seed, pathlib.Path(folder))))
