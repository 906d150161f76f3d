"""What a ladder says: losses of baseline and variant by size, speedups, laws and what they project."""

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import numpy as np

from moejax.evals.laws import LAWS, Fit, effective_speedup, fit
from moejax.evals.statistics import Difference, difference, standard_error
from moejax.text import Table, flops_text

BEYOND = (10.0, 100.0)  # times the compute of the largest rung


@dataclasses.dataclass(frozen=True)
class Point:
    """The runs of one variant at one size, by seed.

    Attributes:
      compute: useful FLOPs of training.
      losses: held-out loss by seed.
      flops_per_second: useful FLOPs over wall time, median of the runs.
    """

    compute: float
    losses: Mapping[int, float]
    flops_per_second: float

    @property
    def mean(self) -> float:
        return statistics.fmean(self.losses.values())


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Attributes:
    names: baseline and variant.
    rungs: number of heads -> (baseline, variant); None: has no finished run.
    fits: of each, a power law with a floor common to both; None: too few sizes.
    floor: it, given or fitted; None: neither.
    """

    names: tuple[str, str]
    rungs: Mapping[int, tuple[Point | None, Point | None]]
    fits: tuple[Fit | None, Fit | None]
    floor: float | None


def ladder(
    names: tuple[str, str],
    rungs: Mapping[int, tuple[Point | None, Point | None]],
    floor: float | None = None,
) -> Ladder:
    """Fit both. With three sizes or more the floor is fitted to the baseline; with two it must be given. It is
    what no compute removes, and most of it the text's, so the variant's fit has the same."""
    fits: list[Fit | None] = []
    for i in range(2):
        points = [p for both in rungs.values() if (p := both[i]) is not None]
        needed = 3 if floor is None else 2
        found = None
        if len(points) >= needed and (i == 0 or floor is not None):
            runs = [(p.compute, loss) for p in points for loss in p.losses.values()]
            compute, losses = zip(*runs)
            fixed = {} if floor is None else {"floor": floor}
            found = fit(LAWS["power"], losses, {"compute": compute}, fixed=fixed)
            floor = found.coefficients["floor"]
        fits.append(found)
    return Ladder(names, rungs, (fits[0], fits[1]), floor)


def paired(baseline: Point, variant: Point) -> Difference | None:
    """Of the seeds that both have."""
    seeds = [s for s in baseline.losses if s in variant.losses]
    if not seeds:
        return None
    return difference([variant.losses[s] for s in seeds], [baseline.losses[s] for s in seeds])


def tables(found: Ladder) -> list[Table]:
    """The losses by size with their speedups, and the laws with their projections."""
    return [_losses(found), _laws(found)]


def _losses(found: Ladder) -> Table:
    rows = []
    for heads, (base, variant) in found.rungs.items():
        compute = next((p.compute for p in (base, variant) if p is not None), math.nan)
        row = [str(heads), flops_text(compute), _loss(base), _loss(variant), "", "", "", ""]
        if base is not None and variant is not None:
            d = paired(base, variant)
            if d is not None:
                row[4] = f"{d.mean:+.4f}"
                low, high = d.student
                row[5] = "one seed" if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"
                row[6], row[7] = _speedup(found, base, variant, d.mean)
        rows.append(row)
    header = ["heads", "FLOPs", *found.names, "difference", "95% interval"]
    header += ["speedup in compute", "in time"]
    if found.floor is None:
        note = "Speedups need a floor of the loss: three sizes or more, or --floor."
    else:
        note = (
            f"Held-out nats per token. Speedup: how many times its compute (time) {found.names[0]} would need "
            f"for the loss of {found.names[1]}, on its own curve above a floor of {found.floor:.3f}."
        )
    return Table("Baseline and variant at equal compute", header, rows, note)


def _loss(point: Point | None) -> str:
    if point is None:
        return "-"
    error = standard_error(list(point.losses.values()))
    return f"{point.mean:.4f}" + ("" if math.isnan(error) else f" ± {error:.4f}")


def _speedup(found: Ladder, base: Point, variant: Point, difference: float) -> tuple[str, str]:
    """`difference` is of the seeds that both have: a seed that one lacks says nothing of the variant."""
    law = found.fits[0]
    if law is None or base.mean <= law.coefficients["floor"]:
        return "", ""
    s = effective_speedup(
        law.coefficients,
        baseline=base.mean,
        variant=base.mean + difference,
        baseline_flops_per_second=base.flops_per_second,
        variant_flops_per_second=variant.flops_per_second,
    )
    return f"{s.compute:.2f}", f"{s.time:.2f}"


def _laws(found: Ladder) -> Table:
    last = max(p.compute for both in found.rungs.values() for p in both if p is not None)
    rows = []
    for name, law in zip(found.names, found.fits):
        if law is None:
            continue
        c = law.coefficients
        low, high = law.coefficient_interval("alpha")
        row = [name, f"{c['floor']:.3f}", f"{c['A']:.3g}", f"{c['alpha']:.4f}"]
        row.append(f"{low:.4f} to {high:.4f}")
        row += [_projection(law, times * last) for times in BEYOND]
        rows.append(row)
    header = ["", "floor", "A", "alpha", "95% interval"]
    header += [f"at {flops_text(times * last)}" for times in BEYOND]
    note = (
        "loss = floor + A FLOPs^-alpha. Intervals are of refits on resampled runs: they do not know whether "
        "the form holds beyond the largest size."
        if rows
        else "No law: it needs three sizes with finished runs, or two and --floor."
    )
    return Table("Laws and what they project", header, rows, note)


def _projection(law: Fit, compute: float) -> str:
    low, high = (np.asarray(a).item() for a in law.interval(compute=compute))
    return f"{law.predict(compute=compute).item():.3f} [{low:.3f}, {high:.3f}]"


def as_data(found: Ladder) -> dict:
    """For JSON."""

    def point(p: Point | None):
        return None if p is None else {**dataclasses.asdict(p), "losses": dict(p.losses)}

    return {
        "names": list(found.names),
        "floor": found.floor,
        "rungs": {str(h): [point(p) for p in both] for h, both in found.rungs.items()},
        "laws": [None if f is None else f.coefficients for f in found.fits],
    }


def curves_of(found: Ladder) -> Sequence[tuple[str, list[float], list[float]]]:
    """For a picture: name, FLOPs and mean losses."""
    out = []
    for i, name in enumerate(found.names):
        points = [p for both in found.rungs.values() if (p := both[i]) is not None]
        out.append((name, [p.compute for p in points], [p.mean for p in points]))
    return out
