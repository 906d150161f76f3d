"""An analysis drawn, as SVG elements that refer to nothing elsewhere. Captions say what chance would give."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from matplotlib.figure import Figure

from moejax.evals.analysis.table import matrix
from moejax.evals.analysis.text import TITLES
from moejax.evals.charts import CURVE_COLOURS, Curve, curves, plain_text, svg

BY_LAYER = (
    *("domain_information", "token_information", "previous_information"),
    *("layer_information", "position_information", "repetition"),
    *("co_activation_strength", "transition_concentration", "max_vio"),
)
_MOST_LAYERS = 3  # of pictures of pairs


class Picture(NamedTuple):
    """Attributes:
    title: of the section.
    text: the caption: what is drawn, and what chance gives.
    svgs: the drawings.
    """

    title: str
    text: str
    svgs: tuple[str, ...]


def pictures(found: dict[str, Any], table: pa.Table) -> list[Picture]:
    """Of what analysis.json and analysis.parquet hold."""
    layers = found["layers"]
    few = [
        layers[round(i)] for i in np.linspace(0, len(layers) - 1, min(_MOST_LAYERS, len(layers)))
    ]
    few = sorted(set(few))
    out = [by_layer(found)]
    if len(found["domains"]) > 1:
        out.append(domains(found, table, few))
    if len(found["steps"]) > 1:
        out.append(saturation(found))
    out += [
        pairs(
            found,
            table,
            few,
            "co_activation",
            "Which experts work together",
            "Of the tokens that have the expert of a row, the share that has the column's too, over what it "
            "would be if all that counted were how often each is used. 1 is chance.",
        ),
        pairs(
            found,
            table,
            [i for i in few if i + 1 in (*layers, layers[-1] + 1)],
            "transition",
            "From one layer to the next",
            "Of the routes of an expert (row), the share that goes on to an expert of the next MoE layer "
            "(column), over that expert's share of all. 1 is chance.",
        ),
        importance(found),
        pairs(
            found,
            table,
            few,
            "cka",
            "How alike experts compute",
            "Linear CKA of two experts' outputs on the same tokens: 1 if they compute the same but for a "
            f"rotation. {_chance_of(found, 'cka_mean')}",
            over_chance=False,
        ),
    ]
    return [p for p in out if p.svgs]


def _of(found: dict[str, Any], figure: str, step: int | None = None) -> list[dict]:
    step = found["steps"][-1] if step is None else step
    rows = [r for r in found["figures"] if (r["figure"], r["step"]) == (figure, step)]
    return sorted((r for r in rows if not r["domain"]), key=lambda r: r["layer"])


def _chance_of(found: dict[str, Any], figure: str) -> str:
    null = [r["null"] for r in _of(found, figure) if r["layer"] == -1 and r["null"] is not None]
    return f"With the tokens in another order it is {null[0]:.3f} on average." if null else ""


def by_layer(found: dict[str, Any]) -> Picture:
    """Figures of every layer with their intervals, over the band that chance gives."""
    panels = [(f, [r for r in _of(found, f) if r["layer"] >= 0]) for f in BY_LAYER]
    panels = [(f, rows) for f, rows in panels if rows]
    figure = Figure(figsize=(10, 2.3 * -(-len(panels) // 3)), layout="constrained")
    grid = figure.subplots(-(-len(panels) // 3), 3, squeeze=False).ravel()
    number = lambda rows, name: np.array([np.nan if r[name] is None else r[name] for r in rows])  # noqa: E731
    for axes, (name, rows) in zip(grid, panels):
        x, y = number(rows, "layer"), number(rows, "value")
        for i, low, high in zip(x, number(rows, "null_low"), number(rows, "null_high")):
            wide = max(high - low, 0.004 * max(np.nanmax(y), high))  # a hairline would not be seen
            axes.bar(i, wide, bottom=low, width=0.8, color="#b8bec6", lw=0)
        error = np.nan_to_num([y - number(rows, "low"), number(rows, "high") - y])
        axes.errorbar(x, y, np.maximum(error, 0), fmt="o", ms=4, lw=1.2, color=CURVE_COLOURS[0])
        axes.set_title(TITLES[name], fontsize=9, loc="left")
        axes.set_ylim(0, None)
        _whole_numbers(axes.xaxis, x)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("MoE layer", fontsize=8)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    text = (
        "Dots with their 95% intervals; grey is where the middle 95% of chance lies. A dot in the grey says "
        "nothing. docs/analysis.md has the null model of each figure."
    )
    return Picture("Figures beside chance, by layer", text, (svg(figure, "by layer"),))


def _whole_numbers(axis, values: np.ndarray) -> None:
    step = max(1, -(-len(values) // 12))
    axis.set_ticks([int(v) for v in values[::step]])


def heat_maps(
    maps: list[np.ndarray],
    titles: list[str],
    label: str,
    name: str,
    *,
    most: float,
    rows: Sequence[str] = (),
    columns: list[list[int]] | None = None,
    marks: list[np.ndarray] | None = None,
    wide: bool = False,
) -> str:
    """Maps on one scale from 0 to `most`, in cividis, which print and the colour-blind keep apart. `wide`:
    under each other; `marks`: cells with a dot."""
    across = 1 if wide else len(maps)
    height = sum(0.7 + 0.28 * len(m) for m in maps) if wide else 10 / max(across, 2) * 0.95
    figure = Figure(figsize=(10, height), layout="constrained")
    grid = figure.subplots(len(maps) // across, across, squeeze=False).ravel()
    image = None
    for i, (axes, values, title) in enumerate(zip(grid, maps, titles)):
        masked = np.ma.masked_invalid(values)
        options: dict[str, Any] = {"cmap": "cividis", "vmin": 0, "vmax": most}
        if values.size <= 1600:  # cells as vectors
            edges = [np.arange(n + 1) - 0.5 for n in values.shape[::-1]]
            image = axes.pcolormesh(*edges, masked, **options)
            axes.invert_yaxis()
        else:
            image = axes.imshow(masked, aspect="auto", interpolation="none", **options)
        if marks is not None:
            y, x = np.nonzero(marks[i])
            size = max(2.0, min(14.0, 500 / values.shape[1]))
            axes.scatter(x, y, s=size, color="white", edgecolors="black", linewidths=0.5)
        axes.set_title(title, fontsize=9, loc="left")
        if rows:
            axes.set_yticks(range(len(rows)), [plain_text(r) for r in rows], fontsize=8)
        if columns is not None and values.shape[1] <= 64:
            axes.set_xticks(range(values.shape[1]), [str(c) for c in columns[i]], fontsize=6)
        axes.tick_params(labelsize=7)
        if not rows:
            axes.set_ylabel("expert", fontsize=8)
        if not wide or i == len(maps) - 1:
            axes.set_xlabel("expert", fontsize=8)
    figure.colorbar(image, ax=list(grid), label=label, shrink=0.9, extend="max")
    return svg(figure, name)


def domains(found: dict[str, Any], table: pa.Table, layers: list[int]) -> Picture:
    """Each domain's use of each expert over what chance gives it; experts sorted by the domain they favour."""
    step, experts, names = found["steps"][-1], found["experts"], found["domains"]
    maps, columns, marks = [], [], []
    for layer in layers:
        of = {}
        for column in ("value", "null", "null_low", "null_high"):
            rows = [
                matrix(table, "domain_share", step, layer, experts, column=column, domain=d)
                for d in names
            ]
            of[column] = np.stack(rows)
        ratio_dE = of["value"] / np.maximum(of["null"], 1e-9)
        order = np.lexsort((-ratio_dE.max(axis=0), ratio_dE.argmax(axis=0)))
        beyond = (of["value"] < of["null_low"]) | (of["value"] > of["null_high"])
        maps.append(ratio_dE[:, order])
        marks.append(beyond[:, order])
        columns.append([int(e) for e in order])
    text = (
        "The share of a domain's tokens that have an expert, over what it would be if domains were dealt to "
        "the same stretches of text at random: 1 is chance. A dot marks what such a deal gives in less than 5% "
        "of cases, so by chance one cell in twenty has one."
    )
    titles = [f"MoE layer {i}" for i in layers]
    drawn = heat_maps(
        maps,
        titles,
        "times chance",
        "domains",
        most=2.5,
        rows=names,
        columns=columns,
        marks=marks,
        wide=True,
    )
    return Picture("Which domain uses which expert, beside chance", text, (drawn,))


def saturation(found: dict[str, Any]) -> Picture:
    """Saturation and specialisation over the checkpoints, with chance as a curve of its own."""
    out = []
    for name in ("saturation", "domain_information", "token_information"):
        steps = [s for s in found["steps"] for r in _of(found, name, s) if r["layer"] == -1]
        rows = [r for s in steps for r in _of(found, name, s) if r["layer"] == -1]
        if not rows:
            continue
        column = lambda key, rows=rows: [float("nan") if r[key] is None else r[key] for r in rows]  # noqa: E731
        out.append(
            curves(
                TITLES[name],
                "step",
                "share",
                [
                    Curve("measured", steps, column("value"), column("low"), column("high")),
                    Curve("chance", steps, column("null"), column("null_low"), column("null_high")),
                ],
            )
        )
    text = (
        "Means over the MoE layers at every checkpoint, with 95% intervals; the dashed curve is chance: for "
        "saturation, two routers with the same loads that know nothing of each other."
    )
    return Picture("How routes settle", text, tuple(out))


def pairs(
    found: dict[str, Any],
    table: pa.Table,
    layers: list[int],
    figure: str,
    title: str,
    text: str,
    over_chance: bool = True,
) -> Picture:
    """A map of pairs of experts for each layer."""
    step, experts = found["steps"][-1], found["experts"]
    maps, shown = [], []
    for layer in layers:
        value = matrix(table, figure, step, layer, experts, experts)
        if over_chance:
            null = matrix(table, figure, step, layer, experts, experts, column="null")
            value = value / np.where(null > 0, null, np.nan)
        if np.isfinite(value).any():
            maps.append(value)
            shown.append(f"MoE layer {layer}" + f" to {layer + 1}" * (figure == "transition"))
    if not maps:
        return Picture(title, text, ())
    most, label = (3.0, "times chance") if over_chance else (1.0, figure.upper())
    return Picture(title, text, (heat_maps(maps, shown, label, figure, most=most),))


def importance(found: dict[str, Any]) -> Picture:
    """REAP and frequency of every expert, and how far the greatest outputs stand out."""
    maps, titles = [], []
    for name, title in (
        ("reap", "REAP: mean gate x output norm"),
        ("frequency", "share of the routes"),
    ):
        score_LE = np.array(found["importance"][name])[found["layers"]]
        maps.append(score_LE / np.maximum(score_LE.mean(axis=1, keepdims=True), 1e-12))
        titles.append(title)
    image = heat_maps(
        maps,
        titles,
        "over the layer's mean",
        "importance",
        most=2.5,
        rows=[f"layer {i}" for i in found["layers"]],
        wide=True,
    )
    stand_out = [
        f"expert {s['expert']} of layer {s['layer']} "
        f"({s['greatest_output'] / max(found['median_greatest_output'], 1e-12):.1f} times the median)"
        for s in found["super_experts"][:5]
    ]
    text = (
        "1 is what every expert would have if all of a layer were alike. The greatest outputs of a down "
        "projection, which would show super experts (by its quantile one expert in 200 is always named): "
        f"{', '.join(stand_out) or 'none'}."
    )
    return Picture("Which experts matter", text, (image,))
