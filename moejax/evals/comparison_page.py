"""A comparison of runs as one self-contained page: its tables, and curves laid over one another."""

import pathlib
import statistics
from collections.abc import Callable, Sequence

import jinja2
import markupsafe
import numpy as np

from moejax.evals.charts import Curve, curves
from moejax.evals.comparison import Comparison
from moejax.evals.comparison_tables import tables
from moejax.evals.run_groups import Group, Run
from moejax.runs.progress import DIVERGED
from moejax.text import Table, count_text, flops_text, seconds_text

AXES: dict[str, Callable[[float], str]] = {
    "steps": "{:g}".format,
    "tokens": count_text,
    "FLOPs": flops_text,
    "time of the steps": seconds_text,
}
_WINDOW = 0.02  # of the run: training losses are averaged over so much


def page(c: Comparison) -> str:
    """The page as HTML."""
    intro = (
        f"Runs compared by {c.metric}. Lines are means over the seeds, bands reach from the least to the "
        "greatest; a thin line that ends in a cross is a run that diverged."
    )
    title = " · ".join(g.name for g in c.groups)
    return tables_page(title, "compare", intro, tables(c), charts(c))


def tables_page(
    title: str, command: str, intro: str, tables: Sequence[Table], charts: Sequence[str]
) -> str:
    """Charts (SVG elements) and tables as one self-contained page of HTML. All other text is escaped."""
    here = pathlib.Path(__file__).parent
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, undefined=jinja2.StrictUndefined
    )
    return environment.get_template("comparison.html").render(
        title=title,
        command=command,
        intro=intro,
        tables=tables,
        charts=[markupsafe.Markup(svg) for svg in charts],
    )


def charts(c: Comparison) -> list[str]:
    """Held-out text against steps, tokens, FLOPs and time; the training loss and MaxVio against steps."""
    unit = "bits per byte" if c.metric.startswith("bits") else "nats per token"
    out = [
        curves(
            f"Held-out text: {c.metric}",
            axis,
            unit,
            [line for g in c.groups for line in lines(g, "validation", c.metric, axis)],
            text,
        )
        for axis, text in AXES.items()
    ]
    if len({r.tokenizer for g in c.groups for r in g.runs.values()}) == 1:
        training = [line for g in c.groups for line in lines(g, "train", "cross_entropy", "steps")]
        out.append(curves("Training text: cross-entropy", "steps", "nats per token", training))
    balance = [line for g in c.groups for line in lines(g, "train", "max_vio", "steps")]
    if any(len(line.x) for line in balance):
        out.append(curves("MaxVio (0 = balanced)", "steps", "max load / mean - 1", balance))
    return out


def lines(group: Group, kind: str, key: str, axis: str) -> list[Curve]:
    """The mean of a group's runs at the steps that all have, its band from least to greatest; and a line
    for each run that diverged."""
    good = [r for r in group.runs.values() if r.state != DIVERGED and kind in r.rows]
    out = []
    if good:
        curves = [_curve(r, kind, key) for r in good]
        steps = sorted(set.intersection(*(set(c) for c in curves)))
        y_RS = np.array([[c[s] for s in steps] for c in curves]).reshape(len(good), len(steps))
        x_RS = np.array([_x(r, steps, axis) for r in good]).reshape(len(good), len(steps))
        band = (y_RS.min(axis=0).tolist(), y_RS.max(axis=0).tolist()) if len(good) > 1 else ((), ())
        out.append(Curve(group.name, x_RS.mean(axis=0).tolist(), y_RS.mean(axis=0).tolist(), *band))
    for run in group.runs.values():
        if run.state == DIVERGED and kind in run.rows:
            curve = _curve(run, kind, key)
            out.append(
                Curve(group.name, _x(run, list(curve), axis), list(curve.values()), thin=True)
            )
    return out


def _curve(run: Run, kind: str, key: str) -> dict[int, float]:
    """Step -> value; training losses as running means."""
    found = {s: float(r[key]) for s, r in run.rows[kind].items() if key in r}
    if kind != "train" or not found:
        return found
    values, window = np.array(list(found.values())), max(1, round(_WINDOW * len(found)))
    total = np.cumsum(np.concatenate([np.zeros(window), values]))
    counts = np.minimum(np.arange(1, len(values) + 1), window)
    return dict(zip(found, ((total[window:] - total[:-window]) / counts).tolist()))


def _x(run: Run, steps: list[int], axis: str) -> list[float]:
    data = run.cfg.data
    tokens = [float(s * data.batch_size * data.seq_len) for s in steps]
    match axis:
        case "tokens":
            return tokens
        case "FLOPs":
            return [t * run.flops_per_token for t in tokens]
        case "time of the steps":
            seconds = step_seconds(run)
            at = [0, *seconds], [0.0, *seconds.values()]
            return np.interp(steps, *at).tolist()
    return [float(s) for s in steps]


def step_seconds(run: Run) -> dict[int, float]:
    """Logged step -> seconds of all steps up to it, as they were measured: without evaluation and saving. The
    first reading of each part of a run holds its compilation; there the median speed stands for it."""
    train = run.rows.get("train", {})
    speeds = {s: r["tokens_per_second"] for s, r in train.items()}
    typical = statistics.median(list(speeds.values())[1:] or speeds.values()) if speeds else 0.0
    firsts = {min((s for s in speeds if s > start), default=0) for start in (0, *run.starts)}
    per_step, total, before, out = run.cfg.data.batch_size * run.cfg.data.seq_len, 0.0, 0, {}
    for step, speed in speeds.items():
        total += (step - before) * per_step / (typical if step in firsts else speed)
        out[step], before = total, step
    return out
