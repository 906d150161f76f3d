"""How sure a figure is, and what chance would give: intervals and null models on counts.

Interval: the text is cut into F folds of whole stretches of rows; delete-a-group jackknife,
    value -+ t(0.975, F - 1) sqrt((F - 1) / F sum_f (theta_f - mean theta)^2),
theta_f the figure without fold f (Efron and Tibshirani 1993, chapter 11). Tokens of one document lie in one or
two folds, so what makes documents differ is in the interval.

Null models: domains permuted over stretches of text (`permuted`); the experts of a token given to another
one of its batch (`counts.count`); experts of a token that have nothing to do with each other
(`independent_pairs`); a router that draws at random (`random_loads`). The null interval holds the middle 95%
of what they give.

Here: F folds; U units, stretches of text with one domain.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
DRAWS = 200  # of permutations and loads
MOST_CELLS = (
    40_000_000  # to draw for one figure: fewer draws of large tables, whose figures hardly vary
)


class Estimate(NamedTuple):
    """Arrays of one shape. NaN where there is nothing: too few folds for an interval, no null model.

    Attributes:
      value: the figure.
      low, high: its 95% interval.
      null: what chance gives on average, and null_low, null_high the middle 95% of it.
    """

    value: np.ndarray
    low: np.ndarray
    high: np.ndarray
    null: np.ndarray
    null_low: np.ndarray
    null_high: np.ndarray


def estimate(
    fn: Callable,
    counts_F: Sequence[np.ndarray],
    nulls: Iterable = (),
    shuffled_F: Sequence[np.ndarray] = (),
) -> Estimate:
    """A figure with its interval and its chance.

    Args:
      fn: from counts of all text to the figure, an array.
      counts_F: fn's arguments, each with a leading axis of folds.
      nulls: draws of the figure under the null model, each of its shape; or
      shuffled_F: the same counts of the text shuffled once. The null interval is then that of the difference to
        a shuffled text: sqrt(2) times as wide as its own.
    """
    value, half = jackknife(fn, counts_F)
    if len(shuffled_F):
        null, spread = jackknife(fn, shuffled_F)
        chance = null, null - np.sqrt(2) * spread, null + np.sqrt(2) * spread
    else:
        chance = middle(nulls, value.shape)
    return Estimate(value, value - half, value + half, *chance)


def jackknife(fn: Callable, counts_F: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A figure of all folds, and half of its interval; NaN of a single fold with anything in it."""
    counts_F = [np.asarray(c, np.float64) for c in counts_F]
    total = [c.sum(axis=0) for c in counts_F]
    value = np.asarray(fn(*total), np.float64)
    full = [f for f in range(len(counts_F[0])) if any(c[f].any() for c in counts_F)]
    n = len(full)
    if n < 2:
        return value, np.full_like(value, np.nan)
    without = [fn(*(t - c[f] for t, c in zip(total, counts_F))) for f in full]
    error = np.sqrt((n - 1) * np.var(np.array(without, np.float64), axis=0))
    return value, stdtrit(n - 1, (1 + CONFIDENCE) / 2) * error


def middle(draws: Iterable, shape: tuple) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(mean, low, high) of draws. Of fewer than 40, -+ t times the deviation: quantiles would be extremes."""
    drawn = [np.asarray(d, np.float64) for d in draws]
    if not drawn:
        nothing = np.full(shape, np.nan)
        return nothing, nothing, nothing
    mean = np.mean(drawn, axis=0)
    n = len(drawn)
    if n < 40:
        half = stdtrit(n - 1, (1 + CONFIDENCE) / 2) * np.std(drawn, axis=0, ddof=1)
        return mean, mean - half * np.sqrt(1 + 1 / n), mean + half * np.sqrt(1 + 1 / n)
    low, high = np.nanquantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return mean, low, high


def beyond(e: Estimate) -> np.ndarray:
    """Where the figure lies outside of what chance gives, and its own interval leaves out the null's mean."""
    outside = (e.value < e.null_low) | (e.value > e.null_high)
    sure = np.isnan(e.low) | (e.low > e.null) | (e.high < e.null)
    return outside & sure


def with_mean(value: np.ndarray) -> np.ndarray:
    """The figure of each layer and, last, their mean."""
    return np.concatenate([value, value.mean(axis=0, keepdims=True)])


# --------------------------------------------------------------------------------------------------
# Null models.


def permuted(domain_U: np.ndarray, num_domains: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Who has which domain, [U, domain] of zeros and ones, with the domains permuted over the units: they are
    equally long, so under the null any order is as likely."""
    rng = np.random.default_rng(seed)
    for _ in range(DRAWS):
        yield np.eye(num_domains)[rng.permutation(domain_U)]


def expected_pairs(pairs_LEE: np.ndarray, rounds: int = 200) -> np.ndarray:
    """Pairs of different experts in one token if all that counts is how often each is used: quasi-independence
    (Goodman 1968), N_ij = a_i a_j for i != j with the observed sums over j, by proportional fitting. The
    diagonal, which says nothing, is 0."""
    off = 1.0 - np.eye(pairs_LEE.shape[-1])
    want_LE = (pairs_LEE * off).sum(axis=2)
    a_LE = np.sqrt(want_LE + 1e-300)
    for _ in range(rounds):
        others_LE = a_LE.sum(axis=1, keepdims=True) - a_LE
        # The square root damps what would otherwise swing between two states.
        a_LE = np.sqrt(a_LE * want_LE / np.maximum(others_LE, 1e-300))
    return a_LE[:, :, None] * a_LE[:, None, :] * off


def independent_pairs(
    pairs_LEE: np.ndarray, draws: int = 20, seed: int = 0
) -> Iterator[np.ndarray]:
    """Symmetric tables of Poisson counts around `expected_pairs`."""
    rng = np.random.default_rng(seed)
    upper = np.triu(expected_pairs(pairs_LEE), 1)
    for _ in range(draws):
        drawn = rng.poisson(upper).astype(np.float64)
        yield drawn + drawn.swapaxes(1, 2)


def random_loads(
    routes_L: np.ndarray, experts: int, tokens: float, seed: int = 0
) -> Iterator[np.ndarray]:
    """Loads [L, E] of a router that gives every token `routes_L` / tokens different experts at random. Binomial
    counts, moved to the sum that is fixed and scaled to the variance that they then have."""
    rng = np.random.default_rng(seed)
    share_L1 = np.clip(routes_L / max(tokens, 1) / experts, 0, 1)[:, None]
    scale = np.sqrt(experts / max(experts - 1, 1))
    for _ in range(DRAWS):
        drawn = rng.binomial(int(tokens), share_L1, (len(share_L1), experts))
        off = drawn - drawn.mean(axis=1, keepdims=True)
        yield np.maximum(np.rint(tokens * share_L1 + scale * off), 0)
