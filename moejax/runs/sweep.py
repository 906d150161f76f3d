"""The folder of a sweep: FOLDER/VARIANT/seed_SEED is a run, FOLDER/sweep.json says what is compared with what.

FOLDER/sweep.json           the experiment file, its variants, seeds and baseline
FOLDER/VARIANT/seed_0/      the folder of a run
FOLDER/logs/VARIANT.0       what its process printed
"""

import json
import os
import pathlib

from moejax.runs import folder

SWEEP = "sweep.json"
_SEED = "seed_"


def run_folder(root: pathlib.Path, variant: str, seed: int) -> pathlib.Path:
    return root / variant / f"{_SEED}{seed}"


def log_file(root: pathlib.Path, variant: str, seed: int) -> pathlib.Path:
    return root / "logs" / f"{variant}.{seed}"


def write(root: pathlib.Path, values: dict) -> None:
    """Write sweep.json. Several machines may do so at once: each writes a file of its own and renames it."""
    folder.check_writable(root)
    root.mkdir(parents=True, exist_ok=True)
    part = root / f"{SWEEP}.{os.getpid()}.part"
    part.write_text(json.dumps(values, indent=1) + "\n", "utf-8")
    part.replace(root / SWEEP)


def read(root: pathlib.Path) -> dict:
    """What sweep.json holds; empty if it is not there, or damaged."""
    try:
        values = json.loads((root / SWEEP).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def variants_of(root: pathlib.Path) -> dict[str, list[pathlib.Path]]:
    """The runs in a folder of a sweep, by variant: the baseline first, then in the order of sweep.json, then by
    name. Empty if there is none."""
    plan = read(root)
    order = [plan.get("baseline"), *list(plan.get("variants", ()))]
    found = {p.name: seeds_of(p) for p in sorted(root.iterdir()) if p.is_dir()}
    names = sorted(found, key=lambda n: order.index(n) if n in order else len(order))
    return {n: found[n] for n in names if found[n]}


def seeds_of(variant: pathlib.Path) -> list[pathlib.Path]:
    """The folders of the runs of one variant, by seed."""
    seeds = {}
    for path in variant.iterdir():
        if is_seed(path) and is_run(path):
            seeds[int(path.name.removeprefix(_SEED))] = path
    return [seeds[s] for s in sorted(seeds)]


def is_seed(path: pathlib.Path) -> bool:
    """Whether a folder is called as a run of a sweep is."""
    number = path.name.removeprefix(_SEED)
    return path.name != number and number.isascii() and number.isdigit()


def is_run(path: pathlib.Path) -> bool:
    """Whether a folder is that of a run."""
    return (path / folder.CONFIG).is_file()
