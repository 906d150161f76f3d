"""Knock-out curves: the loss against the number of experts that are taken away, in several orders.

    best     of every token, the experts that it scores highest: DeepSeekMoE, 2401.06066 section 4.5, figure 4
    top      of each layer, the experts with the most routes on this text
    bottom   with the fewest
    random   drawn, the mean over seeds

Tokens take their next best, unless the experts are silent.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import Any

from moejax.config import ConfigError
from moejax.evals.charts import Curve, curves
from moejax.evals.comparison_page import tables_page
from moejax.evals.evaluate import open_text
from moejax.evals.intervene_run import (
    Change,
    as_json,
    compare,
    measure,
    model_of,
    run_interventions,
)
from moejax.evals.intervene_text import Intervention, check_all
from moejax.runs.open import read_config
from moejax.text import Table

ORDERS = {
    "best": "each token's best",
    "top": "most used",
    "bottom": "least used",
    "random": "random",
}
SHARES = (0.0, 1 / 16, 2 / 16, 3 / 16, 4 / 16)  # the paper's


@dataclasses.dataclass(frozen=True)
class Knockout:
    """Attributes:
    run: its name.
    num_experts: E.
    silent: whether nobody takes the place.
    curves: order -> experts taken from each layer -> 'all' or a domain -> Change.
    """

    run: str
    num_experts: int
    silent: bool
    curves: dict[str, dict[int, dict[str, Change]]]


def counts_of(num_experts: int, shares: Sequence[float]) -> list[int]:
    """Experts of each share of E, rounded, in rising order, each once."""
    bad = [s for s in shares if not 0 <= s <= 1]
    if bad:
        raise ConfigError(f"--shares: {bad[0]} is no share of the experts; 0 to 1 would work")
    return sorted({round(s * num_experts) for s in shares})


def knockout(
    workdir: pathlib.Path,
    orders: Sequence[str],
    *,
    counts: Sequence[int] | None = None,
    shares: Sequence[float] = SHARES,
    seeds: int = 3,
    silent: bool = False,
    sources: tuple[str, ...] = (),
    **how: Any,
) -> Knockout:
    """The curves of a checkpoint.

    Args:
      workdir: the run's folder.
      orders: of ORDERS.
      counts: experts to take from each layer; None: `shares` of them.
      seeds: of the random order.
      silent: their outputs are zero and nobody takes the place; not for 'best'.
      sources, how: see `evaluate.open_text`.

    Raises ConfigError, before weights are read, for what cannot be.
    """
    cfg = read_config(workdir).model
    if cfg.router is None:
        raise ConfigError("the model is dense, it has no experts; a model with experts would work")
    if silent and "best" in orders:
        raise ConfigError(
            "--silent: a token's best experts are taken from its choice, so it chooses others; "
            "--orders=top,bottom,random would work"
        )
    counts = counts_of(cfg.moe.num_experts, shares) if counts is None else sorted(set(counts))
    points = {order: {n: _point(order, n, seeds, silent) for n in counts if n} for order in orders}
    for one in (i for of_order in points.values() for i in of_order.values()):
        check_all([one], cfg)
    text = open_text(workdir, sources, **how)
    untouched = measure(model_of(text.run), text, name="untouched")
    nothing = compare(untouched, [untouched], text.domains)
    curves = {}
    for order, of_order in points.items():
        curves[order] = {0: nothing} if 0 in counts else {}
        for n, one in of_order.items():
            curves[order][n] = run_interventions([one], text, untouched=untouched)
    return Knockout(str(workdir), cfg.moe.num_experts, silent, curves)


def _point(order: str, count: int, seeds: int, silent: bool) -> Intervention:
    text = f"{order}={count}" + ":silent" * silent
    many = seeds if order == "random" else 1
    return Intervention(text, order, count, silent=silent, seeds=many)


def as_data(k: Knockout) -> dict:
    """For JSON: order -> number of experts -> domain -> fields of `Change`."""
    of = {o: {str(n): as_json(c) for n, c in points.items()} for o, points in k.curves.items()}
    return {"run": k.run, "num_experts": k.num_experts, "silent": k.silent, "curves": of}


def table(k: Knockout) -> Table:
    """A row for each order and number: the loss of all text, and what it costs by domain."""
    first = next(iter(next(iter(k.curves.values())).values()))
    domains = [d for d in first if d != "all"] if len(first) > 2 else []
    rows = []
    for order, points in k.curves.items():
        for n, changes in points.items():
            c = changes["all"]
            interval = f"{c.low:+.4f} to {c.high:+.4f}" if n else ""
            cells = [ORDERS[order], str(n), f"{n / k.num_experts:.1%}", f"{c.changed:.4f}"]
            cells += [f"{c.difference:+.4f}", interval]
            rows.append(cells + [f"{changes[d].difference:+.4f}" for d in domains])
    header = ["taken away", "experts", "share", "loss", "difference", "95% interval"]
    header += [f"in {d}" for d in domains]
    how = "their outputs are zero" if k.silent else "tokens take their next best"
    note = f"Nats per token; {how}. Intervals: paired bootstrap over pieces of documents."
    return Table(f"{k.run}: experts of each of its layers taken away", header, rows, note)


def page(k: Knockout) -> str:
    """The curves and their table as one page of HTML."""
    names = list(next(iter(next(iter(k.curves.values())).values())))
    charts = [_chart(k, name) for name in (names if len(names) > 2 else names[:1])]
    how = "their outputs are zero" if k.silent else "tokens take their next best"
    intro = (
        f"Held-out loss when experts are taken away from every MoE layer: {how}. Bands are 95% intervals of "
        "the difference to the untouched model on the same tokens."
    )
    return tables_page(k.run, "knockout", intro, [table(k)], charts)


def _chart(k: Knockout, name: str) -> str:
    lines = []
    for order, points in k.curves.items():
        changes = [c[name] for c in points.values()]
        low, high = ([c.untouched + getattr(c, side) for c in changes] for side in ("low", "high"))
        x = [n / k.num_experts for n in points]
        lines.append(Curve(ORDERS[order], x, [c.changed for c in changes], low, high))
    title = "all text" if name == "all" else name
    return curves(
        title, "share of the experts taken away", "nats per token", lines, "{:.0%}".format
    )
