"""The folder of a run: the name of everything in it, which config it belongs to, and who may write there.

config.json             the ExperimentConfig of the run
tokenizer.json          its tokenizer, if it has one that is not 'byte'
separators.json         of an imported model: which tokens stand around a document
corpus.json             which files it read, with their checksums
checkpoints/STEP/       see `moejax.runs.checkpoint`
damaged/                checkpoints that could not be read
writer.lock             held by the process that writes here, see `moejax.runs.lock`
provenance.jsonl        where its numbers come from, see `moejax.runs.provenance`
metrics.jsonl           see `moejax.train.metrics.Log`, and `moejax.runs.metrics` to read it
tensorboard/            the same as charts
wandb_id, wandb/        if asked for: which run of Weights & Biases this is, and what that keeps here
report.html             from `moejax report`
analysis.json, .parquet from `moejax analyze`
knockout.json, .html    from `moejax knockout`
profile/                traces of steps, see `moejax.train.profile`
hf/                     of an imported model, and what began from it: the files that came with its weights
"""

import json
import os
import pathlib
import warnings
from collections.abc import Mapping
from typing import Any

from moejax.config import ConfigError, ExperimentConfig
from moejax.config_io import from_stored, to_json
from moejax.data import separators
from moejax.data.tokenizer import JsonTokenizer, Tokenizer

CONFIG = "config.json"
TOKENIZER = "tokenizer.json"
SEPARATORS = separators.FILE_NAME
CORPUS, CORPUS_BEFORE = "corpus.json", "corpus.before.json"
CHECKPOINTS = "checkpoints"
DAMAGED = "damaged"
LOCK = "writer.lock"
PROVENANCE = "provenance.jsonl"
METRICS = "metrics.jsonl"
TENSORBOARD = "tensorboard"
WANDB_ID = "wandb_id"
REPORT = "report.html"
ANALYSIS, ANALYSIS_TABLE = "analysis.json", "analysis.parquet"
KNOCKOUT, KNOCKOUT_PAGE = "knockout.json", "knockout.html"
PROFILE = "profile"
HF = "hf"

# Groups of options (and a name) that may change when a run goes on: none of them changes what a checkpoint
# means. The learning rate's course may change too; `moejax.train.prolong` asks before it jumps. What a run
# began from is in `train`, and must not change.
SCHEDULE = ("learning_rate", "schedule", "warmup_steps", "min_lr_ratio", "decay_at", "decay_factor")
FREE = ("name", "train", "mesh", "compute", *(f"optimizer.{key}" for key in SCHEDULE))


class SaveError(OSError):
    """Something of a run could not be written; the checkpoints before are whole."""


def check_path(workdir: pathlib.Path) -> None:
    """ConfigError for a path at which orbax cannot keep a checkpoint, or loses it."""
    path = os.path.realpath(workdir)
    if not path.isascii() and path.encode("utf-8", "ignore").decode() != path:
        raise ConfigError(f"--workdir={os.fsencode(path)!r} is not UTF-8; use another path")
    if path == "/":
        raise ConfigError("--workdir=/ is no folder for a run; name one below it")
    for letter in ("[", "\\"):
        if letter in path:
            raise ConfigError(
                f"--workdir={path}: a checkpoint cannot be kept below a folder with {letter!r} in its name; "
                "use another path"
            )


def check_writable(workdir: pathlib.Path) -> None:
    """ConfigError if the workdir cannot be made or written, as far as that can be known without writing."""
    check_path(workdir)
    nearest = next(p for p in (workdir.absolute(), *workdir.absolute().parents) if p.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise ConfigError(
            f"--workdir={workdir} cannot be written: {nearest} is not a writable folder"
        )


def check_workdir(workdir: pathlib.Path, cfg: ExperimentConfig) -> None:
    """Raises ConfigError naming the keys in which the run of this workdir, if any, has another config, or if it
    is an imported model.

    What is in FREE may differ: a run can be prolonged, and go on on other devices.
    """
    if not (workdir / CONFIG).exists():
        return
    if steps(workdir) and not is_trained(workdir):
        raise ConfigError(
            f"{workdir} is an imported model, which training would replace: begin from it in another "
            f"--workdir, with --config.train.init_from={workdir}"
        )
    check_same(read_config_values(workdir), cfg, workdir)


def check_same(values: dict, cfg: ExperimentConfig, where: pathlib.Path) -> None:
    """ConfigError naming the keys in which a stored config is another than `cfg`, of those that must not be."""
    theirs, ours = (json.loads(to_json(c)) for c in (from_stored(values), cfg))
    keys = differences(theirs, ours, free=FREE)
    for key in ("init_from", "upcycle"):
        a, b = theirs["train"][key], ours["train"][key]
        if a != b:
            keys.append((f"train.{key}", a, b))
    if keys:
        raise ConfigError(
            f"{where} belongs to a run with another config:\n"
            + "\n".join(f"  - {key}: {a!r} there, {b!r} now" for key, a, b in keys)
            + "\nuse another --workdir, or the same config"
        )


def read_config_values(workdir: pathlib.Path) -> dict:
    """What config.json of a run holds. Raises ConfigError if there is none, or it is damaged."""
    path = workdir / CONFIG
    if not path.exists():
        raise ConfigError(f"{workdir} is not the folder of a run: it has no {CONFIG}")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is not JSON: {e}; restore it, or use another --workdir") from e
    if not isinstance(values, dict) or not values.keys() >= {"model", "data"}:
        raise ConfigError(
            f"{path} is not the config of a run; restore it, or use another --workdir"
        )
    return values


def claim_workdir(
    workdir: pathlib.Path,
    cfg: ExperimentConfig,
    tokenizer: Tokenizer | None = None,
    manifest: dict | None = None,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write the config, the tokenizer, the manifest of the corpus and other `files`, by name, after
    `check_workdir`."""
    check_workdir(workdir, cfg)
    contents = {CONFIG: to_json(cfg).encode(), **(files or {})}
    if isinstance(tokenizer, JsonTokenizer):
        contents[TOKENIZER] = tokenizer.text.encode()
    if manifest is not None:
        contents[CORPUS] = json.dumps(manifest, indent=1).encode()
    try:
        for name, content in contents.items():
            path = workdir / name
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.part")  # a killed run must not leave half a file
            part.write_bytes(content)
            part.replace(path)
    except OSError as e:
        raise ConfigError(f"--workdir={workdir} cannot be written: {e.strerror}") from e


def check_corpus(workdir: pathlib.Path, manifest: dict) -> None:
    """Warn if the corpus changed since this run was last trained: resuming then sees different batches."""
    path = workdir / CORPUS
    if not path.exists() or not is_trained(workdir):
        return
    try:
        before = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        before = {"sha256": "?", "domains": {}}
    if before["sha256"] == manifest["sha256"]:
        return
    old, new = before["domains"], manifest["domains"]
    changed = [d for d in {**old, **new} if old.get(d) != new.get(d)]
    aside = workdir / CORPUS_BEFORE
    path.replace(aside)
    warnings.warn(
        f"{workdir} was trained on another text (domains that differ: {', '.join(changed)}; files are listed "
        f"in {aside} and {path}): from here on its batches and held-out documents are not those of "
        "an uninterrupted run",
        stacklevel=3,
    )


def is_trained(workdir: pathlib.Path) -> bool:
    """Whether there is a checkpoint of training: an imported model is step 0, which training never saves."""
    return any(p.name != "0" for p in steps(workdir))


def steps(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The folders of the checkpoints; one that is still being written has another name."""
    try:
        found = list((workdir / CHECKPOINTS).iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [p for p in found if p.name.isascii() and p.name.isdigit()]


def differences(old, new, key: str = "", free: tuple[str, ...] = ()) -> list[tuple[str, Any, Any]]:
    """(dotted key, old, new) for every value that differs, but for the groups and keys in `free`."""
    if key in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = key + "." if key else ""
        return [
            row
            for k in sorted(old.keys() | new.keys())
            for row in differences(old.get(k), new.get(k), prefix + k, free)
        ]
    return [] if old == new else [(key, old, new)]
