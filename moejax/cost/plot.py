"""The comparison as a picture: parameters, compute per token and cache, one row for each model."""

import pathlib

from moejax.config import ConfigError
from moejax.cost.models import Row
from moejax.text import UNKNOWN, bytes_text, count_text, flops_text

MOE, DENSE, INK, PALE, BAND = "#1769aa", "#c4622d", "#222222", "#8a8f98", "#f4f5f7"
# Okabe and Ito's, which the colour-blind tell apart.
CURVE_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def plot(rows: list[Row], path: str, context: int) -> None:
    """Writes a PNG (or what the suffix says) to `path`; its directory must exist.

    Dots on logarithmic axes, since models differ by factors of thousands: active parameters filled,
    total hollow, joined by a line, so that a mixture of experts is as long as it is sparse.
    """
    from matplotlib.figure import Figure  # not pyplot: no window system, no global figures

    check_path(path)
    figure = Figure(figsize=(12.5, 1.75 + 0.4 * len(rows)), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True, width_ratios=(1.5, 1, 1))
    panels = (
        (axes[0], ("active", "total"), count_text, 10, "parameters"),
        (axes[1], ("flops",), flops_text, 10, "training FLOPs per token"),
        (axes[2], ("cache_context",), bytes_text, 16, f"KV cache at {context:,} tokens"),
    )
    for ax, keys, text, base, label in panels:
        _panel(ax, rows, keys, text, base)
        ax.set_title(label, loc="left", fontsize=10.5, color=INK, pad=10)
    axes[0].set_yticks(range(len(rows)), [r.name for r in rows], fontsize=10, color=INK)
    _legend(figure)
    figure.get_layout_engine().set(wspace=0.03)
    figure.savefig(path, dpi=160, facecolor="white")


def check_path(path: str, flag: str = "plot") -> None:
    """ConfigError, which names `flag`, if no picture can be written to `path`: no such folder, or a suffix that
    matplotlib does not know."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if not pathlib.Path(path).absolute().parent.is_dir():
        raise ConfigError(f"--{flag}={path}: {pathlib.Path(path).parent} does not exist")
    suffix = pathlib.Path(path).suffix.lstrip(".").lower() or "png"
    known = FigureCanvasAgg.get_supported_filetypes()
    if suffix not in known:
        raise ConfigError(f"--{flag}={path}: .{suffix} is not one of {', '.join(sorted(known))}")


def _panel(ax, rows: list[Row], keys: tuple[str, ...], text, base: int) -> None:
    values = [[v for k in keys if (v := _number(getattr(r, k)))] for r in rows]
    known = [v for row in values for v in row] or [1.0]
    ratio = max(known) / min(known)
    # Room for the labels: a fifth of the span to the left, two fifths to the right.
    low, high = min(known) / max(4, ratio**0.2), max(known) * max(9, ratio**0.42)
    for y, (row, found) in enumerate(zip(rows, values)):
        if y % 2 == 0:
            ax.axhspan(y - 0.5, y + 0.5, color=BAND, zorder=0)
        if not found:
            said = getattr(row, keys[0]) or UNKNOWN
            ax.text(low, y, f" {said}", va="center", fontsize=9, color=PALE, style="italic")
            continue
        color = MOE if row.kind == "MoE" else DENSE
        ax.plot([found[0], found[-1]], [y, y], color=color, lw=3, alpha=0.35, zorder=2)
        ax.plot(found[-1], y, "o", ms=9, mfc="white", mec=color, mew=2, zorder=3)
        ax.plot(found[0], y, "o", ms=9, mfc=color, mec=color, mew=2, zorder=4)
        right = dict(textcoords="offset points", va="center", fontsize=9, color=INK, zorder=5)
        ax.annotate(text(found[-1]), (found[-1], y), (9, -0.5), ha="left", **right)
        if found[-1] > found[0]:
            ax.annotate(text(found[0]), (found[0], y), (-9, -0.5), ha="right", **right)
    ax.set_xscale("log", base=base)
    ax.set(xlim=(low, high), ylim=(len(rows) - 0.5, -0.5))
    ax.xaxis.set_major_formatter(lambda x, _: text(x))
    ax.xaxis.set_minor_formatter(lambda x, _: "")
    ax.tick_params(labelsize=8.5, length=0, labelcolor=PALE)
    ax.tick_params(which="minor", length=0)
    ax.grid(axis="x", color="#dcdfe4", lw=0.8, zorder=1)
    ax.spines[:].set_visible(False)


def _legend(figure) -> None:
    from matplotlib.lines import Line2D

    def dot(color, fill, label):
        return Line2D([], [], marker="o", ls="", ms=8, mfc=fill, mec=color, mew=2, label=label)

    handles = [
        dot(MOE, MOE, "mixture of experts: active"),
        dot(MOE, "white", "mixture of experts: total"),
        dot(DENSE, DENSE, "dense"),
    ]
    figure.legend(
        handles=handles, loc="outside upper left", ncols=3, frameon=False, fontsize=9.5,
        handletextpad=0.2, columnspacing=1.6,
    )  # fmt: skip


def _number(value) -> float | None:
    return None if isinstance(value, str) else value
