"""A comparison of runs as tables and as plain data."""

import dataclasses
import math
import textwrap
from typing import Any

from moejax.evals.comparison import Comparison, Result
from moejax.evals.run_groups import OF_EXPERTS, in_order
from moejax.evals.statistics import Difference
from moejax.text import Table, count_text, cut, flops_text, seconds_text

UNKNOWN = "-"
_MOST = 40  # characters of a value of the config
_SIDE_BY_SIDE = 8  # groups whose configs are columns


def tables(c: Comparison, *, width: int = 98) -> list[Table]:
    """What differs, what each group costs and gives, the differences, and every seed's value."""
    note = "\n".join(textwrap.fill(f"* {n}", width, subsequent_indent="  ") for n in c.notes)
    out = [config_table(c), cost_table(c), groups_table(c), difference_table(c), seeds_table(c)]
    shown = [t for t in out if t.rows]
    shown[-1] = dataclasses.replace(shown[-1], note="\n".join(filter(None, [shown[-1].note, note])))
    return shown


def config_table(c: Comparison) -> Table:
    """The keys that differ, a column for each group; of many groups, a line for each with what the baseline has
    otherwise."""
    names, config = _names(c), {k: [cut(v, _MOST) for v in vs] for k, vs in c.config.items()}
    if len(names) <= _SIDE_BY_SIDE:
        return Table("What differs", ["key", *names], [[k, *vs] for k, vs in config.items()])
    rows = []
    for i, name in enumerate(names[1:], 1):
        own = [f"{k}={vs[i]}" for k, vs in config.items() if vs[i] not in (vs[0], "-")]
        lines = textwrap.wrap("; ".join(own), 78, break_long_words=False, break_on_hyphens=False)
        rows += [["" if n else name, line] for n, line in enumerate(lines)]
    return Table(f"What differs from {names[0]}", ["group", "config"], rows)


def groups_table(c: Comparison) -> Table:
    """Held-out text, speed and balance; a line for each group."""
    head = ["group", "runs", c.metric, "±", *_others(c)]
    head += ["tokens/s", "MaxVio", "dead experts", "experts/token"]
    rows = []
    for r in c.results:
        m = r.means
        runs = f"{len(r.counted)}/{len(r.counted) + len(r.left_out)}"
        metric = _number(m.get(c.metric)) if c.metric in m else _missing(r)
        rows.append(
            [
                *(r.name, runs, metric, _number(r.error) if c.metric in m else UNKNOWN),
                *(_number(m.get(k)) if c.metric in m else UNKNOWN for k in _others(c)),
                f"{m['tokens_per_second']:,.0f}" if "tokens_per_second" in m else UNKNOWN,
                *(_number(m.get(k), 3) for k in OF_EXPERTS),
            ]
        )
    note = (
        "Means over the seeds, ± the standard error of that mean; what stands right of the speed over the last "
        "tenth of the steps."
    )
    return Table("What it gives", head, rows, textwrap.fill(note, 98))


def cost_table(c: Comparison) -> Table:
    rows = []
    for r in c.results:
        speed = r.means.get("tokens_per_second")
        counted = [count_text(r.cost[k]) for k in ("parameters", "active")]
        flops = [flops_text(r.cost[k]) for k in ("flops_per_token", "flops")]
        time = UNKNOWN if speed is None else seconds_text(r.cost["tokens"] / speed)
        rows.append([r.name, *counted, flops[0], count_text(r.cost["tokens"]), flops[1], time])
    head = ["group", "parameters", "active", "FLOPs/token", "tokens", "FLOPs", "time of the steps"]
    return Table("What it costs", head, rows)


def _others(c: Comparison) -> list[str]:
    """Metrics beside the one that is compared."""
    return [k for k in ("loss", "bits_per_byte") if k != c.metric and _one_tokenizer(c, k)]


def _one_tokenizer(c: Comparison, metric: str) -> bool:
    runs = [r for g in c.groups for r in g.runs.values() if r.at is not None]
    same = len({r.tokenizer for r in runs}) == 1 and len({r.text for r in runs}) == 1
    return same or metric.startswith("bits_per_byte")


def difference_table(c: Comparison) -> Table:
    base = c.results[0].name
    head = [
        "group",
        "seeds",
        "difference",
        "±",
        "95% Student's t",
        "95% bootstrap",
        "p",
        "verdict",
    ]
    rows = []
    for r in c.results[1:]:
        d = r.difference
        if d is None:
            of = next((x for x in (c.results[0], r) if x.diverged), r)
            rows.append([r.name, "0", *[UNKNOWN] * 5, _missing(of)])
            continue
        rows.append(
            [
                *(r.name, str(len(d.each)), f"{d.mean:+.4f}", _number(d.error)),
                *(_interval(i) for i in (d.student, d.bootstrap)),
                UNKNOWN if math.isnan(d.p_value) else f"{d.p_value:.2g}",
                verdict(d),
            ]
        )
    return Table(f"{c.metric}: difference to {base}, paired by seed", head, rows)


def verdict(d: Difference) -> str:
    """What the seeds say of a difference, in words; lower is better."""
    if len(d.each) < 2:
        return "one seed: its error is unknown"
    if d.resolved:
        wins = sum((v < 0) == (d.mean < 0) and v != 0 for v in d.each)
        return f"{'lower' if d.mean < 0 else 'higher'}, with {wins} of {len(d.each)} seeds"
    if d.needed is None:
        return "none that 1000 seeds would show"
    return f"too few seeds: about {d.needed} would show it"


def seeds_table(c: Comparison) -> Table:
    """The metric of every run; why a run has none."""
    seeds = sorted({s for g in c.groups for s in g.runs}, key=in_order)
    rows = []
    for seed in seeds:
        cells = []
        for group, result in zip(c.groups, c.results):
            run = group.runs.get(seed)
            value = run.values.get(c.metric) if run else None
            cells.append(
                _number(value) if value is not None else result.left_out.get(seed, UNKNOWN)
            )
        rows.append([seed, *cells])
    return Table(f"{c.metric} by seed", ["seed", *_names(c)], rows)


def run_table(c: Comparison) -> Table:
    """A line for each run, plain numbers: for a spreadsheet."""
    keys = ["loss", "bits_per_byte", "tokens_per_second", *OF_EXPERTS]
    keys = list(dict.fromkeys([c.metric, *keys]))
    rows = []
    for group, result in zip(c.groups, c.results):
        for run in group.runs.values():
            values = [repr(run.values[k]) if k in run.values else "" for k in keys]
            cost = [repr(result.cost[k]) for k in ("parameters", "active", "flops")]
            rows.append([group.name, run.seed, run.path, run.state, str(run.step), *values, *cost])
    head = ["group", "seed", "path", "state", "step", *keys, "parameters", "active", "flops"]
    return Table("", head, rows)


def as_data(c: Comparison) -> dict[str, Any]:
    """Everything but the curves, as JSON holds it; what is not finite is None."""
    groups = []
    for group, r in zip(c.groups, c.results):
        runs = {
            s: {
                "path": x.path,
                "state": x.state,
                "step": x.step,
                "steps": x.steps,
                "values": x.values,
            }
            for s, x in group.runs.items()
        }
        paired = None
        if r.difference is not None:
            paired = {
                "seeds": r.seeds,
                **dataclasses.asdict(r.difference),
                "verdict": verdict(r.difference),
            }
        groups.append(
            {
                **{"name": r.name, "means": r.means, "error": r.error, "cost": r.cost},
                **{"left_out": r.left_out, "difference": paired, "runs": runs},
            }
        )
    config = {k: dict(zip(_names(c), v)) for k, v in c.config.items()}
    out = {"metric": c.metric, "baseline": c.results[0].name, "config": config}
    return _finite({**out, "groups": groups, "notes": c.notes})


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list | tuple) else value


def _names(c: Comparison) -> list[str]:
    return [g.name for g in c.groups]


def _missing(r: Result) -> str:
    if r.diverged:
        return f"{r.name} diverged ({r.diverged} of {len(r.counted) + len(r.left_out)})"
    return "no pair" if r.counted else "nothing yet"


def _number(value: float | None, digits: int = 4) -> str:
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _interval(ends: tuple[float, float]) -> str:
    return UNKNOWN if math.isnan(ends[0]) else f"{ends[0]:+.4f} .. {ends[1]:+.4f}"
