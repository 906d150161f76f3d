"""Scaling laws: three published forms, a fitter with intervals, and what a variant is worth in compute.

A law predicts the loss (nats per token) from named inputs. Fits are of log losses, with Huber's loss, from many
starts, as Hoffmann et al. do (2203.15556, appendix D.2); intervals come from refits on resampled runs.
"""

import dataclasses
import math
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

DELTA = 1e-3  # Huber's: errors of log loss above it count linearly
STARTS, RESAMPLES = 60, 200
CONFIDENCE = 0.95

Inputs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Law:
    """A form, whose coefficients are fitted.

    Attributes:
      source: paper and equation.
      inputs: what it predicts from, each positive.
      ranges: coefficient -> where starts are drawn from. `positive` ones are drawn and fitted as logs.
      positive: coefficients that are above 0.
      predict: (coefficients, inputs) -> losses.
    """

    source: str
    inputs: tuple[str, ...]
    ranges: Mapping[str, tuple[float, float]]
    positive: tuple[str, ...]
    predict: Callable[[Mapping[str, float], Inputs], np.ndarray]


def _power(p, x):
    return p["floor"] + p["A"] * x["compute"] ** -p["alpha"]


def _granularity(p, x):
    of_size = p["g"] / x["granularity"] ** p["gamma"] + p["a"]
    return p["c"] + of_size * x["parameters"] ** -p["alpha"] + p["b"] * x["tokens"] ** -p["beta"]


def _joint(p, x):
    log_e = np.log(saturating_experts(x["experts"], p["e_start"], p["e_max"]))
    size = p["a"] * np.exp(p["delta"] * log_e) * x["active"] ** (p["alpha"] + p["gamma"] * log_e)
    data = p["b"] * np.exp(p["omega"] * log_e) * x["tokens"] ** (p["beta"] + p["zeta"] * log_e)
    return size + data + p["c"]


def saturating_experts(experts: np.ndarray, e_start: float, e_max: float) -> np.ndarray:
    """E^ of Clark et al. (2202.01169): 1/E^ = 1/(E - 1 + 1/(1/e_start - 1/e_max)) + 1/e_max. It is e_start
    at one expert, and stays below e_max."""
    offset = 1 / (1 / e_start - 1 / e_max)
    return 1 / (1 / (experts - 1 + offset) + 1 / e_max)


LAWS: Mapping[str, Law] = types.MappingProxyType(
    {
        "power": Law(
            "L(C) = floor + A C^-alpha (2001.08361, with a floor)",
            ("compute",),
            {"floor": (0.3, 3.0), "A": (1.0, 1e6), "alpha": (0.03, 0.6)},
            ("floor", "A", "alpha"),
            _power,
        ),
        "granularity": Law(
            "L(N, D, G) = c + (g / G^gamma + a) N^-alpha + b D^-beta (2402.07871)",
            ("parameters", "tokens", "granularity"),
            {
                **{"c": (0.3, 2.0), "g": (0.1, 10.0), "gamma": (0.2, 1.5), "a": (1.0, 100.0)},
                **{"alpha": (0.05, 0.5), "b": (1.0, 300.0), "beta": (0.05, 0.5)},
            },
            ("c", "g", "gamma", "a", "alpha", "b", "beta"),
            _granularity,
        ),
        "joint": Law(
            "L(N, D, E) = a E^^delta N^(alpha + gamma ln E^) + b E^^omega D^(beta + zeta ln E^) + c, "
            "N active parameters, E^ saturating (2502.05172)",
            ("active", "tokens", "experts"),
            {
                **{"a": (3.0, 300.0), "delta": (-0.3, 0.3), "alpha": (-0.4, -0.1)},
                **{"gamma": (-0.02, 0.02), "b": (3.0, 300.0), "omega": (-0.3, 0.3)},
                **{"beta": (-0.4, -0.1), "zeta": (-0.02, 0.02), "c": (0.5, 2.0)},
                **{"e_start": (1.5, 3.0), "e_max": (100.0, 600.0)},
            },
            ("a", "b", "c", "e_start", "e_max"),
            _joint,
        ),
    }
)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A fitted law.

    Attributes:
      law: which.
      coefficients: of the fit to all runs.
      error: root of the mean square error of log loss.
      resampled: coefficients of the refits.
    """

    law: Law
    coefficients: dict[str, float]
    error: float
    resampled: tuple[dict[str, float], ...]

    def predict(self, **inputs: ArrayLike) -> np.ndarray:
        """Losses, for inputs by name."""
        return self.law.predict(self.coefficients, _arrays(self.law, inputs))

    def interval(self, **inputs: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """95% of the refits' predictions lie between these. They hold what the choice of runs changes, not
        whether the form is right beyond them."""
        x = _arrays(self.law, inputs)
        return _middle([self.law.predict(p, x) for p in self.resampled])

    def coefficient_interval(self, name: str) -> tuple[float, float]:
        """The same of a coefficient."""
        low, high = _middle([np.float64(p[name]) for p in self.resampled])
        return float(low), float(high)


def fit(
    law: Law,
    losses: ArrayLike,
    inputs: Mapping[str, ArrayLike],
    *,
    starts: int = STARTS,
    resamples: int = RESAMPLES,
    seed: int = 0,
    fixed: Mapping[str, float] | None = None,
) -> Fit:
    """Fit a law to runs.

    Args:
      law: one of LAWS.
      losses: of the runs, nats per token.
      inputs: of the runs, by name.
      starts: from which the fit is tried.
      resamples: refits on as many runs drawn with replacement.
      seed: of starts and draws: the same runs give the same fit.
      fixed: coefficients that are not fitted.

    Raises ValueError for inputs that the law does not have, that are not positive and finite, or for fewer
    different runs than coefficients.
    """
    x, y = _arrays(law, inputs), np.asarray(losses, np.float64)
    fixed = dict(fixed or {})
    unknown = sorted(set(fixed) - set(law.ranges))
    if unknown:
        raise ValueError(f"fixed: no coefficient {unknown[0]}; there are {', '.join(law.ranges)}")
    free = [n for n in law.ranges if n not in fixed]
    if any(a.shape != y.shape for a in x.values()) or y.ndim != 1:
        raise ValueError("losses and inputs must be lists of one length, a number for each run")
    if not (np.isfinite(y).all() and (y > 0).all()):
        raise ValueError("losses must be positive and finite: leave runs that diverged out")
    places = len(set(zip(*(a.tolist() for a in x.values()))))
    if places < len(free):
        raise ValueError(
            f"{places} different sizes cannot fix {len(free)} coefficients ({', '.join(free)}): run more "
            "sizes, or give some in `fixed`"
        )
    rng = np.random.default_rng(seed)

    def named(values):
        found = {n: math.exp(v) if n in law.positive else v for n, v in zip(free, values)}
        return {n: float(fixed.get(n, found.get(n, math.nan))) for n in law.ranges}

    def solve(start, rows):
        def residuals(values):
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                off = np.log(law.predict(named(np.clip(values, -500, 500)), x)) - np.log(y)
            return np.nan_to_num(off, nan=1e3, posinf=1e3, neginf=-1e3)[rows]

        found = least_squares(residuals, start, loss="huber", f_scale=DELTA, x_scale="jac")
        return found.cost, found.x

    def drawn():
        out = []
        for name in free:
            low, high = law.ranges[name]
            if name in law.positive:
                low, high = math.log(low), math.log(high)
            out.append(rng.uniform(low, high))
        return np.array(out)

    everything = np.arange(len(y))
    _, best = min((solve(drawn(), everything) for _ in range(starts)), key=lambda s: s[0])
    refits = []
    while len(refits) < resamples:
        rows = rng.integers(len(y), size=len(y))
        if len({tuple(a[i] for a in x.values()) for i in rows}) >= len(free):
            refits.append(named(solve(best, rows)[1]))
    off = np.log(law.predict(named(best), x)) - np.log(y)
    return Fit(law, named(best), float(np.sqrt((off**2).mean())), tuple(refits))


def _arrays(law: Law, inputs: Mapping) -> dict[str, np.ndarray]:
    if set(inputs) != set(law.inputs):
        raise ValueError(f"the law's inputs are {', '.join(law.inputs)}, not {', '.join(inputs)}")
    x = {n: np.asarray(a, np.float64) for n, a in inputs.items()}
    bad = [n for n, a in x.items() if not (np.isfinite(a).all() and (a > 0).all())]
    if bad:
        raise ValueError(f"{bad[0]} must be positive and finite")
    return x


def _middle(values: list) -> tuple[np.ndarray, np.ndarray]:
    if not values:
        return np.float64(math.nan), np.float64(math.nan)  # pyright: ignore[reportReturnType]
    low, high = np.quantile(np.stack(values), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


@dataclasses.dataclass(frozen=True)
class Speedup:
    """What a variant is worth.

    Attributes:
      compute: how many times the compute the baseline would need for the variant's loss.
      time: the same of wall time, with the speed at which each trains.
    """

    compute: float
    time: float


def effective_speedup(
    power: Mapping[str, float],
    *,
    baseline: float,
    variant: float,
    baseline_flops_per_second: float = 1.0,
    variant_flops_per_second: float = 1.0,
) -> Speedup:
    """How much more compute, and time, the baseline would need to reach the loss of a variant at equal compute.

    On the baseline's curve L = floor + A C^-alpha through its own loss, C' with L(C') = variant:

        C' / C = ((baseline - floor) / (variant - floor))^(1 / alpha)

    and its time is C' over the baseline's FLOP/s, that of the variant C over the variant's.

    Args:
      power: 'floor' and 'alpha' of the baseline's power law.
      baseline, variant: losses at the same compute.
      baseline_flops_per_second, variant_flops_per_second: useful FLOPs over wall time.

    Returns infinity where the variant's loss is not above the floor: no compute gives the baseline that. Raises
    ValueError for a baseline below its own floor.
    """
    floor, alpha = power["floor"], power["alpha"]
    if baseline <= floor:
        raise ValueError(
            f"the baseline's loss {baseline} is not above the floor {floor} of its law"
        )
    if variant <= floor:
        return Speedup(math.inf, math.inf)
    compute = ((baseline - floor) / (variant - floor)) ** (1 / alpha)
    return Speedup(compute, compute * variant_flops_per_second / baseline_flops_per_second)
