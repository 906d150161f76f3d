"""How sure a difference between two variants is, from runs of a few seeds: pure functions of numbers.

Runs are compared in pairs, seed by seed: the order of the text is common to a pair, and most of what a seed
changes cancels in the difference.
"""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from scipy.special import stdtr, stdtrit

CONFIDENCE = 0.95
RESAMPLES = 10_000
POWER = 0.8  # the chance with which `seeds_needed` would find a difference
MOST_SEEDS = 1000


@dataclasses.dataclass(frozen=True)
class Difference:
    """Of pairs, one of each seed; NaN where there are too few.

    Attributes:
      each: the differences, in the order of the seeds.
      mean: their mean.
      error: its standard error, s / sqrt(n).
      student: the 95% interval of Student's t with n - 1 degrees of freedom.
      bootstrap: the 95% percentile interval of means of resampled pairs; too narrow for few seeds.
      p_value: of Student's t, two-sided.
      needed: seeds with which a difference of this size and spread would be found (see `seeds_needed`).
    """

    each: tuple[float, ...]
    mean: float
    error: float
    student: tuple[float, float]
    bootstrap: tuple[float, float]
    p_value: float
    needed: int | None

    @property
    def resolved(self) -> bool:
        """Whether Student's interval leaves out 0."""
        low, high = self.student
        return low > 0 or high < 0


def difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """`values` minus `baseline`, pair by pair; both in the order of the same seeds."""
    if len(values) != len(baseline) or not len(values):
        raise ValueError(f"{len(values)} values cannot be paired with {len(baseline)}")
    each = np.subtract(values, baseline, dtype=np.float64)
    n, mean = len(each), float(each.mean())
    error = standard_error(each)
    with_spread = n > 1 and error > 0
    p = float(2 * stdtr(n - 1, -abs(mean) / error)) if with_spread else math.nan
    return Difference(
        each=tuple(map(float, each)),
        mean=mean,
        error=error,
        student=student_interval(each),
        bootstrap=bootstrap_interval(each),
        p_value=p,
        needed=seeds_needed(mean, error * math.sqrt(n)) if n > 1 else None,
    )


def standard_error(values: Sequence[float] | np.ndarray) -> float:
    """s / sqrt(n), s with n - 1 in its denominator; NaN of a single value."""
    n = len(values)
    return float(np.std(values, ddof=1) / math.sqrt(n)) if n > 1 else math.nan


def student_interval(values: Sequence[float] | np.ndarray) -> tuple[float, float]:
    """mean -+ t(0.975, n - 1) s / sqrt(n); NaN of a single value."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return math.nan, math.nan
    half = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2)) * standard_error(values)
    return mean - half, mean + half


def bootstrap_interval(
    values: Sequence[float] | np.ndarray, *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float]:
    """Quantiles 0.025 and 0.975 of the means of samples drawn from the values with replacement (Efron's
    percentile interval); NaN of a single value. The same values and seed give the same interval."""
    values = np.asarray(values, np.float64)
    if len(values) < 2:
        return math.nan, math.nan
    drawn = np.random.default_rng(seed).integers(len(values), size=(resamples, len(values)))
    low, high = np.quantile(
        values[drawn].mean(axis=1), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]
    )
    return float(low), float(high)


def seeds_needed(mean: float, deviation: float) -> int | None:
    """The fewest pairs n with |mean| >= (t(0.975, n - 1) + t(0.8, n - 1)) deviation / sqrt(n): with so many,
    Student's interval would leave out 0 in about 80% of such experiments, were the difference really `mean` and
    the spread of pairs really `deviation`. None if that takes more than 1000."""
    if not deviation > 0:
        return 2 if mean else None
    n = np.arange(2, MOST_SEEDS + 1)
    t = stdtrit(n - 1, (1 + CONFIDENCE) / 2) + stdtrit(n - 1, POWER)
    enough = abs(mean) >= t * deviation / np.sqrt(n)
    return int(n[enough.argmax()]) if enough.any() else None
