"""What a longer context costs: FLOPs of one decoded token and bytes of the cache, as curves."""

from collections.abc import Mapping, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from moejax.config import ConfigError
from moejax.cost.architecture import Architecture
from moejax.cost.flops import flops_per_token
from moejax.cost.memory import cache_bytes
from moejax.cost.plot import CURVE_COLOURS, INK, check_path
from moejax.text import bytes_text, flops_text

CONTEXTS = tuple(2**n for n in range(10, 21))  # 1k to 1M tokens
PANELS = ("FLOPs of one decoded token", "cache of one sequence")


def decoded(arch: Architecture, context: int) -> tuple[float | None, float | None]:
    """(FLOPs of one token that is decoded behind `context` others, bytes of their cache in BF16 or as
    published); None where that is unknown."""
    return flops_per_token(arch, "decode", context).total, cache_bytes(arch, context)


def plot(archs: Mapping[str, Architecture | None], path: str) -> None:
    """Draws the models against CONTEXTS into `path`. Beyond a model's maximum its curve is dotted.

    ConfigError for a model whose attention is not known, and as `check_path`.
    """
    check_path(path, "context_plot")
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    draw(figure.subplots(1, 2), archs, CONTEXTS)
    figure.savefig(path, dpi=120, facecolor="white")


def draw(
    panels: Sequence,
    archs: Mapping[str, Architecture | None],
    contexts: Sequence[int],
    points: Mapping[str, Mapping[int, tuple[float, float]]] | None = None,
) -> None:
    """Curves of `decoded` on two axes of matplotlib; `points`: measured ones by name and context, as dots."""
    for (name, arch), colour in zip(
        archs.items(), CURVE_COLOURS * (len(archs) // len(CURVE_COLOURS) + 1)
    ):
        if arch is None or arch.attention is None:
            raise ConfigError(f"{name}: its attention is not published, so no curve can be drawn")
        for panel, axes in enumerate(panels):
            known = [n for n in contexts if n <= arch.max_seq_len]
            beyond = [*known[-1:], *(n for n in contexts if n > arch.max_seq_len)]
            value = lambda n, arch=arch, panel=panel: decoded(arch, n)[panel]  # noqa: E731
            axes.plot(known, [value(n) for n in known], color=colour, lw=2, label=name)
            axes.plot(beyond, [value(n) for n in beyond], ":", color=colour, lw=1.2)
            at = (points or {}).get(name, {})
            axes.plot(list(at), [at[n][panel] for n in at], "o", color=colour, ms=5)
    for axes, title, text, base in zip(panels, PANELS, (flops_text, bytes_text), (10, 16)):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=base)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("tokens of context")
        axes.xaxis.set_major_formatter(
            lambda x, _: f"{x / 1024:g}k" if x < 2**20 else f"{x / 2**20:g}M"
        )
        axes.yaxis.set_major_formatter(lambda y, _, text=text: text(y))
        axes.tick_params(labelsize=8)
        if base == 10:
            axes.yaxis.set_major_locator(LogLocator(10, subs=(1, 3)))
        axes.yaxis.set_minor_formatter(lambda y, _: "")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(fontsize=8, frameon=False)
