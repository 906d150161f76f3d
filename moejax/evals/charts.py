"""The pictures of reports and comparisons: matplotlib figures as PNG or SVG, without any global state."""

import dataclasses
import io
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from moejax.cost.plot import CURVE_COLOURS

COLOURS = ("#2f6fb3", "#d1662a", "#3c8f4b", "#8a5fb0", "#b8860b", "#5b6770", "#c2427b", "#1b8a8f")
# With CURVE_COLOURS, and dashes, which print keeps: 28 looks.
DASHES = ("-", "--", ":", "-.")


@dataclasses.dataclass(frozen=True)
class Curve:
    """A line with an optional band around it; points that are not finite are left out.

    Attributes:
      name: in the legend; curves of one name have one look, and one entry.
      x, y: the points.
      low, high: the band, at every x.
      thin: drawn thinly, with a cross at its end: a run that broke off.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    thin: bool = False


def curves(
    title: str,
    x_label: str,
    y_label: str,
    given: Sequence[Curve],
    x_text: Callable[[float], str] = "{:g}".format,
) -> str:
    """One chart as an SVG element that refers to nothing elsewhere. `x_text` writes a number of the x axis."""
    figure = Figure(figsize=(6.5, 4.0), layout="constrained")
    axes = figure.subplots()
    names = list(dict.fromkeys(c.name for c in given))
    for number, name in enumerate(names):
        colour = CURVE_COLOURS[number % len(CURVE_COLOURS)]
        dash, label = DASHES[number % len(DASHES)], plain_text(name)
        for c in (c for c in given if c.name == name):
            points = np.array([c.x, c.y])[:, np.isfinite(c.x) & np.isfinite(c.y)]
            few = points.shape[1] <= 12
            ends = {"marker": "x", "markevery": [-1]} if c.thin else {"marker": "o" * few, "ms": 4}
            width = 1 if c.thin else 2
            axes.plot(*points, dash, color=colour, lw=width, label=label, **ends)
            label = None
            if c.low:
                axes.fill_between(c.x, c.low, c.high, color=colour, alpha=0.15, lw=0)
    axes.set_title(plain_text(title), fontsize=10, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.xaxis.set_major_formatter(lambda x, _: x_text(x))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len(names) > 1:
        axes.legend(fontsize=8, frameon=False)
    return svg(figure, title)


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element that refers to nothing elsewhere. Those of one page have different names."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(
            text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    element = "<svg" + text.getvalue().partition("<svg")[2]
    element = element.replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    return element.replace("xlink:href", "href")


def plain_text(text: str) -> str:
    """A name from elsewhere, for matplotlib: no mathematics in it, and in the legend however it begins."""
    return "\u200b" * text.startswith("_") + text.replace("$", r"\$")


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight")
    return buffer.getvalue()


def lines(panels: list[tuple[str, str, dict]], width: float = 10.0, x_label: str = "step") -> bytes:
    """Panels side by side, each (title, y label, {name: (x, y)}); a single point is drawn as a dot."""
    figure = Figure(figsize=(width, 3.2), layout="constrained")
    for axes, (title, label, series) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels
    ):
        for (name, (x, y)), colour in zip(series.items(), COLOURS * (len(series) // 8 + 1)):
            few = len(x) <= 12
            axes.plot(x, y, label=name, color=colour, lw=1.6, marker="o" if few else "", ms=3.5)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel(x_label)
        axes.set_ylabel(label)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            axes.legend(fontsize=8, frameon=False)
    return png(figure)


def load_over_time(steps: list[int], load_sLE: np.ndarray, layers: list[int]) -> bytes:
    """A heat map per layer: step by expert, load over the mean load (1 = balanced)."""
    figure = Figure(figsize=(10, 1.0 + 2.3 * (-(-len(layers) // 3))), layout="constrained")
    columns = min(3, len(layers))
    grid = figure.subplots(-(-len(layers) // columns), columns, squeeze=False).ravel()
    image = None
    for axes, layer in zip(grid, layers):
        load_sE = load_sLE[:, layer]
        relative = load_sE / np.maximum(load_sE.mean(axis=1, keepdims=True), 1e-9)
        edges = [*steps, steps[-1] + (steps[-1] - steps[-2] if len(steps) > 1 else 1)]
        image = axes.pcolormesh(
            edges, np.arange(load_sE.shape[1] + 1), relative.T, cmap="viridis", vmin=0, vmax=2.5
        )
        axes.set_title(f"MoE layer {layer}", fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("expert")
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    figure.colorbar(image, ax=list(grid), label="load / mean load", shrink=0.85, extend="max")
    return png(figure)


def values_over_time(
    name: str, steps: list[int], value_sLE: np.ndarray, layers: list[int]
) -> bytes:
    """A panel per layer: one thin line for every expert."""
    rows = -(-len(layers) // 3)
    figure = Figure(figsize=(10, 0.6 + 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, min(3, len(layers)), squeeze=False, sharey=True).ravel()
    for axes, layer in zip(grid, layers):
        axes.plot(steps, value_sLE[:, layer], lw=0.7, alpha=0.7, color=COLOURS[0])
        axes.set_title(f"{name}, MoE layer {layer}", fontsize=10, loc="left")
        axes.set_xlabel("step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(layers) :]:
        axes.set_visible(False)
    return png(figure)


def domains_to_experts(domain_dLE: np.ndarray, domains: list[str], layers: list[int]) -> bytes:
    """A heat map per layer: how often each domain uses each expert, over the uniform share.

    Experts are sorted by the domain they favour, so specialists of one domain stand side by side; unused
    experts come last.
    """
    d, _, e = domain_dLE.shape
    figure = Figure(figsize=(10, (0.75 + 0.28 * d) * len(layers) + 0.4), layout="constrained")
    grid = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    image = None
    for axes, layer in zip(grid, layers):
        share_dE = domain_dLE[:, layer] / np.maximum(
            domain_dLE[:, layer].sum(axis=1, keepdims=True), 1
        )
        relative = share_dE * e
        favourite = np.where(relative.max(axis=0) > 0, relative.argmax(axis=0), d)
        order = np.lexsort((-relative.max(axis=0), favourite))
        image = axes.imshow(relative[:, order], aspect="auto", cmap="viridis", vmin=0, vmax=2.5)
        axes.set_title(f"MoE layer {layer}", fontsize=10, loc="left")
        axes.set_yticks(range(d), domains, fontsize=8)
        if e <= 64:
            axes.set_xticks(range(e), [str(i) for i in order], fontsize=6)
        else:
            axes.set_xticks([])
    grid[-1].set_xlabel("expert")
    figure.colorbar(image, ax=list(grid), label="share / uniform share", shrink=0.9, extend="max")
    return png(figure)
