"""A comparison of runs as one picture: how far each group is from the baseline, and how sure that is."""

import math

from matplotlib.figure import Figure

from moejax.cost.plot import CURVE_COLOURS, check_path
from moejax.evals.charts import plain_text
from moejax.evals.comparison import Comparison, Result

_SURE, _UNSURE = CURVE_COLOURS[0], "#8a8f98"


def plot(c: Comparison, path: str) -> None:
    """Writes `picture(c)` to `path`, in the format of its suffix. Raises ConfigError as `check_path`."""
    check_path(path)
    picture(c).savefig(path, dpi=110, facecolor="white")


def picture(c: Comparison) -> Figure:
    """The comparison, drawn.

    A row for each group. On the left its difference to the baseline, paired by seed: the mean with the 95%
    interval of Student's t, in blue where that leaves out 0, and every seed as a small dot above it. On the
    right its MaxVio, where there are experts.
    """
    rows = list(reversed(c.results))
    balance = [r.means.get("max_vio", math.nan) for r in rows]
    wide = not all(map(math.isnan, balance))
    figure = Figure(figsize=(8.5 if wide else 6.5, 1.1 + 0.27 * len(rows)), layout="constrained")
    panels = figure.subplots(
        1, 1 + wide, sharey=True, squeeze=False, width_ratios=(2.2, 1)[: 1 + wide]
    )
    left, *right = panels[0]
    for y, result in enumerate(rows):
        _difference(left, y, result)
    left.axvline(0, color="#222222", lw=0.8)
    unit = "bits per byte" if c.metric.startswith("bits") else "nats per token"
    left.set_xlabel(
        f"{plain_text(c.metric)}: difference to {plain_text(c.results[0].name)}, {unit}", fontsize=9
    )
    left.set_yticks(range(len(rows)), [plain_text(r.name) for r in rows], fontsize=8.5)
    for axes in right:
        axes.barh(range(len(rows)), balance, height=0.55, color=_UNSURE)
        axes.set_xlabel("MaxVio (0 = balanced)", fontsize=9)
    for axes in (left, *right):
        axes.grid(axis="x", alpha=0.25)
        axes.tick_params(axis="x", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _difference(axes, y: int, result: Result) -> None:
    d = result.difference
    if d is None:
        said = "" if result.diverged == 0 else f" {result.diverged} of its runs diverged"
        axes.plot([0] * (not said), [y] * (not said), "|", color="#222222", ms=9)
        axes.text(0, y, said, va="center", fontsize=8, color=_UNSURE, style="italic")
        return
    colour = _SURE if d.resolved else _UNSURE
    axes.plot(d.each, [y + 0.24] * len(d.each), "o", color=colour, alpha=0.45, ms=3.5, mew=0)
    if not math.isnan(d.student[0]):
        axes.plot(d.student, [y, y], color=colour, lw=1.6)
    axes.plot(d.mean, y, "o", color=colour, ms=6)
