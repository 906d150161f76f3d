"""Figures as one long table: a row for each number, its interval, and what chance gives."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from moejax.evals.analysis.chance import Estimate, beyond

NUMBERS = ("value", "low", "high", "null", "null_low", "null_high")
COLUMNS = ("figure", "step", "layer", "expert", "other", "domain", *NUMBERS)
MOST_PAIRS = 2**19  # rows of one figure about pairs; of more, those furthest from chance
ALL = -1  # the layer, or expert, of a row that is about all of them


class Rows:
    """Collects figures of one step. `layers`: those that are kept."""

    def __init__(self, step: int, layers: list[int], domains: tuple[str, ...]):
        self.step, self.layers, self.domains = step, layers, domains
        self._parts: list[dict[str, np.ndarray]] = []

    def add(self, figure: str, e: Estimate, *axes: str) -> None:
        """Add a figure whose arrays have these axes: of 'domain', 'layer', 'expert', 'other', or 'layers':
        each layer and then their mean (which stays whatever layers are kept)."""
        where = dict(zip(axes, np.indices(e.value.shape).reshape(len(axes), -1)))
        keep = np.ones(e.value.size, bool)
        if "layers" in where:
            number = where.pop("layers")
            where["layer"] = np.where(
                number == e.value.shape[axes.index("layers")] - 1, ALL, number
            )
        if "layer" in where:
            keep &= np.isin(where["layer"], [*self.layers, ALL])
        if "other" in where:
            keep &= where["other"] != where["expert"] if figure in SAME_LAYER else keep
            keep = _furthest(keep, e)
        part = {name: np.ravel(a)[keep] for name, a in zip(NUMBERS, e)}
        n = int(keep.sum())
        for name in ("layer", "expert", "other"):
            part[name] = where[name][keep] if name in where else np.full(n, ALL)
        named = np.array([*self.domains, ""])
        part["domain"] = named[where["domain"][keep] if "domain" in where else np.full(n, -1)]
        self._parts.append({"figure": np.full(n, figure), "step": np.full(n, self.step), **part})

    def table(self) -> pa.Table:
        text = pa.dictionary(pa.int32(), pa.string())
        columns = {}
        for name in COLUMNS:
            a = np.concatenate([p[name] for p in self._parts])
            if name in ("figure", "domain"):
                columns[name] = pa.array(a.astype(object)).cast(text)
            else:
                columns[name] = pa.array(a.astype(np.float32 if name in NUMBERS else np.int32))
        return pa.table(columns)


# Figures about pairs of experts of one layer, whose diagonal says nothing.
SAME_LAYER = ("co_activation", "weight_similarity", "output_similarity", "cka")


def _furthest(keep: np.ndarray, e: Estimate) -> np.ndarray:
    if keep.sum() <= MOST_PAIRS:
        return keep
    far = np.where(keep, np.abs(e.value - np.nan_to_num(e.null)).ravel(), -1)
    return keep & (far >= np.partition(far, -MOST_PAIRS)[-MOST_PAIRS])


def summary(table: pa.Table) -> list[dict]:
    """The rows that are not about single experts, as JSON holds them (what is not finite is null), each with
    `beyond_chance`: true, false, or null where there is no null model."""
    of_all = table.filter(pc.equal(table["expert"], ALL))
    out = []
    for row in of_all.to_pylist():
        numbers = {
            n: row[n] if row[n] is not None and np.isfinite(row[n]) else None for n in NUMBERS
        }
        e = Estimate(*(np.array(row[n], np.float64) for n in NUMBERS))
        sure = None if numbers["null"] is None else bool(beyond(e))
        kept = {k: row[k] for k in ("figure", "step", "layer", "domain")}
        out.append({**kept, **numbers, "beyond_chance": sure})
    return out


def matrix(
    table: pa.Table,
    figure: str,
    step: int,
    layer: int,
    rows: int,
    columns: int = 0,
    *,
    column: str = "value",
    domain: str = "",
) -> np.ndarray:
    """One layer's numbers of a figure, [rows] by expert or [rows, columns] by expert and other; NaN where the
    table has none."""
    chosen = {"figure": figure, "step": step, "layer": layer, "domain": domain}
    part = table
    for name, value in chosen.items():
        part = part.filter(pc.equal(part[name], value))
    out = np.full((rows, columns) if columns else rows, np.nan)
    at = [part[name].to_numpy() for name in (("expert", "other") if columns else ("expert",))]
    out[tuple(at)] = part[column].to_numpy()
    return out
