"""How evenly the experts are used. Chance: a router that draws each token's experts at random."""

from collections.abc import Callable

import numpy as np
from scipy.special import stdtrit

from moejax.evals.analysis.chance import (
    CONFIDENCE,
    Estimate,
    estimate,
    middle,
    random_loads,
    with_mean,
)

COLD = 0.1  # of the fair share


def max_violation(load_LE: np.ndarray) -> np.ndarray:
    """MaxVio = max_e n_e / mean_e n_e - 1 (2408.15664, section 4.1), [L]; 0 is even, E - 1 a single expert."""
    return load_LE.max(axis=1) / np.maximum(load_LE.mean(axis=1), 1e-9) - 1


def entropy(load_LE: np.ndarray) -> np.ndarray:
    """-sum_e p_e log p_e / log E, p = n / sum n, [L]; 1 is even, 0 a single expert."""
    p_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1e-9)
    return plogp(p_LE).sum(axis=1) / -np.log(max(load_LE.shape[1], 2))


def plogp(p: np.ndarray) -> np.ndarray:
    return np.where(p > 0, p * np.log(np.maximum(p, 1e-300)), 0.0)


def dead(load_LE: np.ndarray) -> np.ndarray:
    """Experts without a token, [L]."""
    return (load_LE == 0).sum(axis=1).astype(float)


def cold(load_LE: np.ndarray) -> np.ndarray:
    """Experts with less than a tenth of the fair share, dead ones included, [L]."""
    return (load_LE < COLD * load_LE.mean(axis=1, keepdims=True)).sum(axis=1).astype(float)


FIGURES: dict[str, Callable] = {
    "max_vio": max_violation,
    "load_entropy": entropy,
    "dead_experts": dead,
    "cold_experts": cold,
}


def load_figures(load_FLE: np.ndarray, tokens: float) -> dict[str, Estimate]:
    """Each of FIGURES over all of the text, [L + 1], the last the mean of the layers."""
    routes_L, experts = load_FLE.sum(axis=(0, 2)), load_FLE.shape[2]
    random = list(random_loads(routes_L, experts, tokens))
    return {
        name: estimate(
            lambda load_LE, fn=fn: with_mean(fn(load_LE)),
            [load_FLE],
            [with_mean(fn(r)) for r in random],
        )
        for name, fn in FIGURES.items()
    }


def batch_violation(sums: np.ndarray, batches: int, load_LE: np.ndarray, tokens: float) -> Estimate:
    """Mean MaxVio of single batches, [L + 1]; the interval is Student's over batches. Chance: as many tokens
    routed at random. `sums`: of MaxVio and of its square over the batches, [2, L]."""
    n = batches
    mean_L = sums[0] / n
    half_L = np.full_like(mean_L, np.nan)
    if n > 1:
        deviation_L = np.sqrt(np.maximum(sums[1] / n - mean_L**2, 0) * n / (n - 1))
        half_L = stdtrit(n - 1, (1 + CONFIDENCE) / 2) * deviation_L / np.sqrt(n)
    value, half = with_mean(mean_L), with_mean(half_L)
    random = random_loads(load_LE.sum(axis=1) / n, load_LE.shape[1], round(tokens / n))
    nulls = middle([with_mean(max_violation(r)) for r in random], value.shape)
    return Estimate(value, value - half, value + half, *nulls)


def expert_load(load_FLE: np.ndarray, tokens_F: np.ndarray) -> Estimate:
    """Share of the tokens that each expert has, n_e / tokens, [L, E]: K / E on average."""
    tokens, routes_L = tokens_F.sum(), load_FLE.sum(axis=(0, 2))
    random = random_loads(routes_L, load_FLE.shape[2], tokens)
    return estimate(
        lambda load_LE, tokens: load_LE / np.maximum(tokens, 1),
        [load_FLE, tokens_F],
        [r / max(tokens, 1) for r in random],
    )
