"""The comparison as a picture: parameters, compute per token and cache, one row for each model."""

import pathlib

from moejax.config import ConfigError
from moejax.cost.compare import Row

BLUE, LIGHT, ORANGE, GREEN = "#1f5fa8", "#a9c9ea", "#d9822b", "#3a8f5c"


def plot(rows: list[Row], path: str, context: int) -> None:
    """Writes a PNG (or what the suffix says) to `path`; its directory must exist."""
    if not pathlib.Path(path).parent.is_dir():
        raise ConfigError(f"--plot={path}: {pathlib.Path(path).parent} does not exist")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    height = 1.6 + 0.42 * len(rows)
    figure, axes = plt.subplots(
        1, 3, figsize=(12, height), sharey=True, layout="constrained", width_ratios=(1.3, 1, 1)
    )
    places = range(len(rows))
    panels = (
        (axes[0], [("total", LIGHT), ("active", BLUE)], 1e9, "parameters (billions)"),
        (axes[1], [("flops", ORANGE)], 1e9, "training GFLOPs per token"),
        (
            axes[2],
            [("cache_context", GREEN)],
            2**20,
            f"KV cache in MiB, up to {context:,} tokens",
        ),
    )
    for ax, series, unit, label in panels:
        values = {key: [_number(getattr(r, key), unit) for r in rows] for key, _ in series}
        known = [v for vs in values.values() for v in vs if v]
        least = min(known, default=1.0) / 3
        for key, color in series:
            for y, v in zip(places, values[key]):
                if v:
                    # From the axis' lower end: bars on a log scale have no zero.
                    ax.barh(y, v - least, left=least, height=0.68, color=color)
        for y, row in zip(places, rows):
            texts = [_label(getattr(row, k), values[k][y]) for k, _ in series]
            end = max([values[k][y] or least for k, _ in series])
            text = " / ".join(dict.fromkeys(texts))
            ax.text(end * 1.12, y, text, va="center", fontsize=8, color="#333333")
        ax.set_xscale("log")
        ax.set_xlim(least, max(known, default=1.0) * 12)
        ax.set_xlabel(f"{label}, log scale", fontsize=9)
        ax.tick_params(labelsize=8.5, length=0)
        ax.set_ylim(len(rows) - 0.5, -0.5)
        ax.spines[["top", "right", "left"]].set_visible(False)
    axes[0].set_yticks(list(places), [r.name for r in rows])
    handles = [plt.Rectangle((0, 0), 1, 1, color=c) for c in (LIGHT, BLUE)]
    axes[0].legend(
        handles,
        ["total", "active"],
        fontsize=8,
        frameon=False,
        ncols=2,
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _number(value, unit) -> float | None:
    return None if value is None or isinstance(value, str) else value / unit


def _label(value, scaled) -> str:
    if scaled is None:
        return value or "unknown"
    return f"{scaled:,.0f}" if scaled >= 100 else f"{scaled:.3g}"
