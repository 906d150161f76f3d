"""Reads runs to be compared, in groups of one config and several seeds."""

import dataclasses
import hashlib
import json
import math
import pathlib
import statistics
from collections.abc import Sequence
from typing import Any

from moejax.config import ConfigError, ExperimentConfig
from moejax.config_io import to_json
from moejax.cost.receipt import model_flops_per_token
from moejax.runs import folder, provenance, sweep
from moejax.runs.metrics import read_metrics
from moejax.runs.open import read_config
from moejax.runs.progress import DIVERGED, FINISHED, progress

# Keys in which the runs of a group may differ: the seeds, and what they are called.
SAME = ("train.seed", "data.seed", "name")
LAST = 0.1  # of the steps: over so many, at the end, what is noisy in a single batch is averaged


# Of the last tenth of the steps.
OF_EXPERTS = ("max_vio", "dead_experts", "experts_per_token")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
      path, seed, state, step, steps: which, how far, of how many.
      cfg: its config.
      rows: its metrics, kind -> step -> row.
      tokenizer, text: what its held-out text was split by, and which text that was.
      at: the step of the held-out metrics in `values`; None if there are none to be compared.
      values: held-out metrics, `tokens_per_second`, and the means of `OF_EXPERTS`, where known.
      made: commit and devices of its parts.
      starts: the steps at which its parts began.
    """

    path: str
    seed: str
    state: str
    step: int
    steps: int
    cfg: ExperimentConfig
    rows: dict[str, dict[int, dict]]
    tokenizer: str
    text: tuple
    at: int | None
    values: dict[str, float]
    made: tuple[str, ...]
    starts: tuple[int, ...]

    @property
    def flops_per_token(self) -> float:
        """Of training, by the cost model."""
        return model_flops_per_token(self.cfg)


@dataclasses.dataclass(frozen=True)
class Group:
    """The runs of one config, by seed."""

    name: str
    runs: dict[str, Run]


def read_groups(paths: Sequence[pathlib.Path], step: int | None) -> list[Group]:
    """The groups of `comparison.compare`. ConfigError for a folder that is no run, and one seed twice."""
    groups: list[tuple[str, list[pathlib.Path]]] = []
    alone: dict[str, list[pathlib.Path]] = {}
    for path in paths:
        if sweep.is_run(path):
            key = json.dumps(flat_config(read_config(path)))
            if key not in alone:
                where = path.absolute()
                name = where.parent.name if sweep.is_seed(where) else where.name
                groups.append((name, alone.setdefault(key, [])))
            alone[key].append(path)
            continue
        if not path.is_dir():
            raise ConfigError(f"{path} is no folder; name folders of runs, or of a sweep")
        seeds, variants = sweep.seeds_of(path), sweep.variants_of(path)
        if not seeds and not variants:
            raise ConfigError(
                f"{path} is not the folder of a run (it has no {folder.CONFIG}) nor of a sweep (it has no run "
                "in VARIANT/seed_0)"
            )
        groups += [(path.absolute().name, seeds)] if seeds else list(variants.items())
    out: list[Group] = []
    for name, members in groups:
        runs: dict[str, Run] = {}
        for path in members:
            run = read_run(path, step)
            if run.seed in runs:
                raise ConfigError(
                    f"{runs[run.seed].path} and {path} are runs of one config and one seed; name one of them"
                )
            runs[run.seed] = run
        same = sum(g.name == name or g.name.startswith(f"{name} (") for g in out)
        out.append(Group(f"{name} ({same + 1})" if same else name, runs))
    return out


def read_run(path: pathlib.Path, step: int | None = None) -> Run:
    """One run, with its values after `step` (None: at its end, if it has finished)."""
    cfg = read_config(path)
    try:
        rows = read_metrics(path)
    except ConfigError:
        rows = {}  # nothing is evaluated yet
    at = progress(path, cfg.train.steps)
    held_out = rows.get("validation", {})
    last = max(held_out, default=None)
    state = at.state
    if last is not None and not math.isfinite(held_out[last].get("loss", math.nan)):
        state = DIVERGED
    use = last if state == FINISHED and step is None else step if step in held_out else None
    values = _values(rows, use) if use is not None else {}
    parts = [r for r in provenance.read(path) if r.get("kind") == "start"]
    seeds = [str(cfg.train.seed), str(cfg.data.seed)]
    return Run(
        path=str(path),
        seed=seeds[0] if seeds[0] == seeds[1] else "/".join(seeds),
        state=state,
        step=at.step,
        steps=cfg.train.steps,
        cfg=cfg,
        rows=rows,
        tokenizer=_tokenizer(path, cfg),
        text=_held_out(path, cfg, held_out.get(use or last or 0, {})),
        at=use,
        values=values,
        made=tuple(sorted({_made(r) for r in parts})),
        starts=tuple(r["step"] for r in parts if isinstance(r.get("step"), int)),
    )


def _values(rows: dict, step: int) -> dict[str, float]:
    train = {s: r for s, r in rows["train"].items() if s <= step}
    end = [r for s, r in train.items() if s > step - LAST * step] or list(train.values())[-1:]
    out = {k: float(v) for k, v in rows["validation"][step].items() if k not in ("step", "kind")}
    for key in OF_EXPERTS:
        if all(key in r for r in end):
            out[key] = statistics.fmean(r[key] for r in end)
    speeds = [r["tokens_per_second"] for r in train.values()]
    out["tokens_per_second"] = statistics.median(speeds[1:] or speeds)
    return out


def _tokenizer(path: pathlib.Path, cfg: ExperimentConfig) -> str:
    """'byte', or the name and a hash of the run's own tokenizer."""
    try:
        content = (path / folder.TOKENIZER).read_bytes()
    except FileNotFoundError:
        return cfg.data.tokenizer
    return f"{cfg.data.tokenizer} {hashlib.sha256(content).hexdigest()[:8]}"


def _held_out(path: pathlib.Path, cfg: ExperimentConfig, row: dict) -> tuple:
    """Equal for runs that were evaluated on the same text: what it was taken from, and how much it was."""
    try:
        domains = json.loads((path / folder.CORPUS).read_text("utf-8"))["domains"]
        sums = tuple((name, d["sha256"][:8]) for name, d in domains.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        sums = ()
    return sums, cfg.data.validation_fraction, row.get("bytes"), row.get("tokens")


def _made(start: dict) -> str:
    return f"{str(start.get('commit'))[:10]} on {start.get('devices')} x {start.get('device')}"


def in_order(seed: str) -> tuple[int, ...]:
    """A key that sorts seeds as numbers."""
    return tuple(map(int, seed.split("/")))


def flat_config(cfg: ExperimentConfig) -> dict[str, Any]:
    """The options by dotted key, but for those in which the runs of a group may differ."""

    def walk(values: dict, prefix: str):
        for key, value in values.items():
            if isinstance(value, dict):
                yield from walk(value, f"{prefix}{key}.")
            elif prefix + key not in SAME:
                yield prefix + key, value

    return dict(walk(json.loads(to_json(cfg)), ""))
