"""Compares runs: groups of seeds, the baseline first, a metric of held-out text, what differs and how surely.

Everything here is data; `moejax.evals.comparison_tables` and `comparison_page` show it.
"""

import dataclasses
import json
import pathlib
import statistics
from collections.abc import Sequence

from moejax.config import ConfigError, ExperimentConfig
from moejax.cost.architecture import counts, of_model
from moejax.cost.receipt import model_flops_per_token
from moejax.evals.run_groups import Group, Run, flat_config, in_order, read_groups
from moejax.evals.statistics import Difference, difference, standard_error
from moejax.runs.progress import DIVERGED, FINISHED


@dataclasses.dataclass(frozen=True)
class Result:
    """One group.

    Attributes:
      means: of its runs' `values`, where all that count have one; the metric is missing if a run diverged.
      error: the standard error of the metric's mean.
      counted, left_out, diverged: seeds that count, why others do not, and how many of them diverged.
      cost: parameters, active parameters, FLOPs per token and tokens of training, and their product.
      difference: to the baseline, by seed; None for the baseline itself and where no seed is in both.
      seeds: those of the difference.
    """

    name: str
    means: dict[str, float]
    error: float
    counted: tuple[str, ...]
    left_out: dict[str, str]
    diverged: int
    cost: dict[str, float]
    difference: Difference | None
    seeds: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Attributes:
    metric: such as 'loss'.
    groups, results: the runs, and what they say; the baseline first.
    config: dotted keys in which the groups differ -> a value for each group ('-': there is no such key).
    notes: what a reader must know before believing a number.
    """

    metric: str
    groups: tuple[Group, ...]
    results: tuple[Result, ...]
    config: dict[str, tuple[str, ...]]
    notes: tuple[str, ...]


def compare(
    paths: Sequence[pathlib.Path], metric: str = "loss", baseline: str = "", step: int | None = None
) -> Comparison:
    """Compare runs.

    Args:
      paths: folders of runs, of a variant of a sweep, or of sweeps. Runs whose configs differ by their seeds
        alone are a group.
      metric: of held-out text: 'loss', 'bits_per_byte', or one of a domain, such as 'loss/code'.
      baseline: the name of a group; the first if empty.
      step: compare after this step; None: at the end of each run, of those that are finished.

    Raises ConfigError for a folder that is no run, an unknown baseline or metric, and losses that mean
    different things: of other tokenizers or other held-out text.
    """
    groups = read_groups(paths, step)
    names = [g.name for g in groups]
    if baseline and baseline not in names:
        raise ConfigError(f"--baseline={baseline} is none of the groups {', '.join(names)}")
    groups.sort(key=lambda g: g.name != (baseline or names[0]))
    notes = _comparable(groups, metric)
    results = []
    for group in groups:
        results.append(_result(group, groups[0], metric))
    config = config_difference({g.name: next(iter(g.runs.values())).cfg for g in groups})
    notes += _notes(groups, results)
    return Comparison(metric, tuple(groups), tuple(results), config, tuple(notes))


# --------------------------------------------------------------------------------------------------
# What differs.


def config_difference(configs: dict[str, ExperimentConfig]) -> dict[str, tuple[str, ...]]:
    """The dotted keys in which the configs differ, with each one's value as text ('-': it has no such key)."""
    flat = [flat_config(c) for c in configs.values()]
    keys = list(dict.fromkeys(k for f in flat for k in f))
    rows = {k: tuple(json.dumps(f[k]) if k in f else "-" for f in flat) for k in keys}
    return {k: tuple(t.strip('"') for t in row) for k, row in rows.items() if len(set(row)) > 1}


def cost_of(cfg: ExperimentConfig) -> dict[str, float]:
    """Parameters and FLOPs of training, by the cost model."""
    size = counts(of_model(cfg.model))["with embeddings"]
    flops = model_flops_per_token(cfg)
    tokens = cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
    return {
        "parameters": size.total,
        "active": size.active,
        "flops_per_token": flops,
        "tokens": tokens,
        "flops": flops * tokens,
    }


def _result(group: Group, base: Group, metric: str) -> Result:
    counted = {s: r for s, r in group.runs.items() if metric in r.values}
    left_out = {s: _why(r) for s, r in group.runs.items() if s not in counted}
    diverged = _diverged(group)
    keys = [k for k in dict.fromkeys(k for r in counted.values() for k in r.values)]
    means = {
        k: statistics.fmean(r.values[k] for r in counted.values())
        for k in keys
        if all(k in r.values for r in counted.values())
    }
    if diverged:  # the mean of those that went well would be that of another question
        means.pop(metric, None)
    theirs = {s: r for s, r in base.runs.items() if metric in r.values}
    seeds = tuple(s for s in counted if s in theirs)
    pairs = None
    if group is not base and seeds and not diverged and not _diverged(base):
        values = ([runs[s].values[metric] for s in seeds] for runs in (counted, theirs))
        pairs = difference(*values)
    return Result(
        name=group.name,
        means=means,
        error=standard_error([r.values[metric] for r in counted.values()]),
        counted=tuple(counted),
        left_out=left_out,
        diverged=diverged,
        cost=cost_of(next(iter(group.runs.values())).cfg),
        difference=pairs,
        seeds=seeds,
    )


def _diverged(group: Group) -> int:
    return sum(r.state == DIVERGED for r in group.runs.values())


def _why(run: Run) -> str:
    if run.state == DIVERGED:
        return f"diverged at step {run.step}"
    if run.state == FINISHED:
        return f"no such evaluation (finished at step {run.step})"
    going = {"occupied": "going on", "part": "stopped"}[run.state]
    return f"{going} at step {run.step} of {run.steps}"


# --------------------------------------------------------------------------------------------------
# Whether it may be compared, and what must be known.


def _comparable(groups: list[Group], metric: str) -> list[str]:
    """What must be said of runs that are compared all the same. Raises ConfigError for those that cannot be."""
    runs = [r for g in groups for r in g.runs.values() if r.at is not None]
    if not runs:
        states = "; ".join(f"{r.path}: {_why(r)}" for g in groups for r in g.runs.values())
        raise ConfigError(
            f"nothing to compare: {states}. --step=N compares after an earlier evaluation"
        )
    known = {k for r in runs for k in r.values}
    if not any(metric in r.values for r in runs):
        names = sorted(k for k in known if k.startswith(("loss", "bits_per_byte")))
        raise ConfigError(f"no run has the metric {metric!r}; known: {', '.join(names)}")
    per_byte = metric.startswith("bits_per_byte")
    first, notes = runs[0], []
    for what, key in (("tokenizers", "tokenizer"), ("held-out text", "text")):
        other = next((r for r in runs if getattr(r, key) != getattr(first, key)), None)
        if other is None:
            continue
        if not per_byte:
            raise ConfigError(
                f"{first.path} and {other.path} have different {what}: {_text(first, key)}, and "
                f"{_text(other, key)}. Their losses mean different things; --metric=bits_per_byte compares "
                "bits per byte of text"
            )
        notes.append(
            f"Different {what}: {first.path} {_text(first, key)}, {other.path} {_text(other, key)}. Bits per "
            "byte do not depend on the tokenizer, but on the text."
        )
    return notes


def _text(run: Run, key: str) -> str:
    if key == "tokenizer":
        return run.tokenizer
    sums, fraction, size, tokens = run.text
    text = ", ".join(f"{name} {s}" for name, s in sums) or "unknown text"
    return f"{text} ({fraction:g} held out; {size} bytes, {tokens} tokens evaluated)"


def _notes(groups: list[Group], results: list[Result]) -> list[str]:
    notes = []
    for group, result in zip(groups, results):
        if result.left_out:
            which = "; ".join(f"seed {s} {why}" for s, why in result.left_out.items())
            notes.append(f"{group.name}: {which}.")
        if result.diverged:
            notes.append(
                f"{group.name}: no mean and no difference, for a run diverged: those that did not are not a "
                "fair sample. Their values stand by seed."
            )
        missing = set(groups[0].runs) ^ set(group.runs)
        if missing:
            notes.append(
                f"{group.name}: unpaired seeds {', '.join(sorted(missing, key=in_order))} are in no difference."
            )
    flops = [r.cost["flops"] for r in results]
    if max(flops) > 1.02 * min(flops):
        notes.append(
            f"Not at equal compute: the most costly group trains with {max(flops) / min(flops):.3g} times the "
            "FLOPs of the cheapest."
        )
    made = sorted({m for g in groups for r in g.runs.values() for m in r.made})
    if len(made) > 1:
        notes.append(f"Computed by different code or on different devices: {', '.join(made)}.")
    if any(r.difference is not None and 1 < len(r.seeds) < 10 for r in results):
        notes.append(
            "The bootstrap interval is too narrow for fewer than 10 seeds: believe Student's t. It takes the "
            "differences as normal."
        )
    tried = sum(r.difference is not None for r in results)
    if tried > 2:
        notes.append(
            f"{tried} groups are compared with one baseline: of 20 groups without any effect, one seems to "
            "have one at this level."
        )
    return notes
