"""The lines in which a run writes what it measures: strict JSON, each step once."""

import json
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

from moejax.config import ConfigError
from moejax.runs import folder


def line(row: dict) -> str:
    """A row as one line of strict JSON: NaN and the infinities, which JSON lacks, are null."""
    return json.dumps(_finite(row), allow_nan=False) + "\n"


def append_line(path: pathlib.Path, row: dict) -> None:
    """Add a row at the end of a file, on a line of its own. Raises folder.SaveError."""
    try:
        with path.open("ab+") as file:
            file.seek(max(file.seek(0, 2) - 1, 0))
            whole = file.read() in (b"", b"\n")  # else a crash cut the last line off
            file.write((b"" if whole else b"\n") + line(row).encode())
    except OSError as e:
        raise folder.SaveError(f"{path} cannot be written: {e.strerror}. Free some space") from e


def _finite(value):
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def cut(path: pathlib.Path, last: int) -> None:
    """Leave only whole rows of steps up to `last`, what a run that goes on from there has behind it. Either the
    whole file is rewritten or, if there is nothing to cut, none of it. Raises OSError."""
    if not path.exists():
        return
    part, changed = path.with_name(path.name + ".part"), False
    with path.open("rb") as old, part.open("wb") as new:
        for text in old:
            row = _row(text)
            keep = row is not None and row["step"] <= last and text.endswith(b"\n")
            changed |= not keep
            if keep:
                new.write(text)
        new.flush()
        os.fsync(new.fileno())
    if changed:
        part.replace(path)
    else:
        part.unlink()


def _row(text: bytes) -> dict | None:
    """The row in a line; None if it is none, or was cut off."""
    try:
        row = json.loads(text)
    except ValueError:
        return None
    good = isinstance(row, dict) and type(row.get("step")) is int and type(row.get("kind")) is str
    return row if good else None


def _rows(path: pathlib.Path) -> Iterator[dict]:
    with path.open("rb") as file:
        for text in file:
            if (row := _row(text)) is not None:
                yield _with_nan(row)


def _with_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _with_nan(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_with_nan(v) for v in value]
    return math.nan if value is None else value


def read_metrics(workdir: pathlib.Path) -> dict[str, dict[int, dict]]:
    """The metrics of a run as kind -> step -> row; the kinds are those of `moejax.train.metrics.Log`. What was
    not finite is NaN.

    Of a step that is there twice (moejax 0.1.0 left such after a crash) the later row counts. Raises
    ConfigError if there is no log, or no evaluation in it yet.
    """
    path = workdir / folder.METRICS
    if not path.exists():
        raise ConfigError(f"{workdir} has no {folder.METRICS}: moejax train writes it")
    rows: dict[str, dict[int, dict]] = {}
    for row in _rows(path):
        rows.setdefault(row["kind"], {})[row["step"]] = row
    if "train" not in rows or "validation" not in rows:
        raise ConfigError(f"{path} holds no finished evaluation yet; go on training and try again")
    return {kind: dict(sorted(by_step.items())) for kind, by_step in rows.items()}


def last_logged(workdir: pathlib.Path, most: int = 2**20) -> int:
    """The step of the last whole row in the last `most` bytes of the log; 0 without one. Cheap, also beside a
    writer."""
    try:
        with (workdir / folder.METRICS).open("rb") as file:
            file.seek(max(file.seek(0, 2) - most, 0))
            rows = map(_row, reversed(file.read().split(b"\n")))
    except OSError:
        return 0
    return next((row["step"] for row in rows if row is not None), 0)


def last_step(workdir: pathlib.Path) -> int:
    """The last step that a run has logged."""
    return max(read_metrics(workdir)["train"])
