"""Reads what a run has logged."""

import json
import pathlib

from moejax.config import ConfigError
from moejax.runs import folder


def read_metrics(workdir: pathlib.Path) -> dict[str, dict[int, dict]]:
    """The metrics of a run as kind -> step -> row; the kinds are those of `moejax.train.metrics.Log`.

    A step that was run again after a crash counts once, as it was run last; a last line cut off by a
    crash is left out. Raises ConfigError if there is no log, or no evaluation in it yet.
    """
    path = workdir / folder.METRICS
    if not path.exists():
        raise ConfigError(f"{workdir} has no {folder.METRICS}: moejax train writes it")
    rows: dict[str, dict[int, dict]] = {}
    for line in path.read_text("utf-8").split("\n"):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        rows.setdefault(row["kind"], {})[row["step"]] = row
    if "train" not in rows or "validation" not in rows:
        raise ConfigError(f"{path} holds no finished evaluation yet; go on training and try again")
    return {kind: dict(sorted(by_step.items())) for kind, by_step in rows.items()}


def last_step(workdir: pathlib.Path) -> int:
    """The last step that a run has logged."""
    return max(read_metrics(workdir)["train"])
