"""Which experts matter: by use, by what they add, and by ESFT's scores; and super experts. [L, E]."""

import numpy as np

from moejax.evals.analysis.chance import Estimate, estimate

SUPER_QUANTILE, SUPER_SHARE = 0.995, 0.1


def _with_chance(e: Estimate, null) -> Estimate:
    null = np.broadcast_to(null, e.value.shape)
    return Estimate(*e[:3], null, null, null)


def frequency(load_FLE: np.ndarray) -> Estimate:
    """n_e / sum n: the share of the routes. Chance: 1 / E."""
    fn = lambda n: n / np.maximum(n.sum(axis=1, keepdims=True), 1e-9)  # noqa: E731
    return _with_chance(estimate(fn, [load_FLE]), 1 / load_FLE.shape[2])


def reap(gate_norm_FLE: np.ndarray, load_FLE: np.ndarray) -> Estimate:
    """REAP (2510.13999): the mean over the tokens X_e that have expert e of g_e(x) |f_e(x)|_2. 0 for an expert
    without tokens. Chance: the mean of the layer over all routes, what every expert had if all were alike."""
    fn = lambda s, n: np.where(n > 0, s / np.maximum(n, 1e-9), 0)  # noqa: E731
    s_L1, n_L1 = (a.sum(axis=(0, 2))[:, None] for a in (gate_norm_FLE, load_FLE))
    return _with_chance(estimate(fn, [gate_norm_FLE, load_FLE]), s_L1 / np.maximum(n_L1, 1e-9))


def esft(sums_FLE: np.ndarray) -> Estimate:
    """ESFT's scores (2407.01906, section 3.2) as shares of the layer, so that they add up to 1. Chance: 1 / E.

    Gate score: mean over the tokens of the expert's weight g_e. Token score: mean over the tokens of
    1[g_e > 0] / K. The means over samples of the paper are over all tokens here.
    """
    fn = lambda n: n / np.maximum(n.sum(axis=1, keepdims=True), 1e-9)  # noqa: E731
    return _with_chance(estimate(fn, [sums_FLE]), 1 / sums_FLE.shape[2])


def select(score_E: np.ndarray, p: float) -> list[int]:
    """ESFT's selection: the fewest experts, by falling score, whose scores add up to at least the share p of
    the whole. All if no score is positive."""
    order = np.argsort(-score_E, kind="stable")
    cumulative = np.cumsum(score_E[order]) / max(score_E.sum(), 1e-300)
    enough = cumulative >= p - 1e-9
    return [int(e) for e in order[: enough.argmax() + 1 if enough.any() else None]]


def super_experts(most_LE: np.ndarray) -> list[tuple[int, int]]:
    """(layer, expert) of the super experts (2507.23279), greatest first: those whose greatest down-projection
    output is above the 99.5% quantile of all experts' and above a tenth of the greatest of all.

    The paper also asks for layers in which massive activations form; none are left out here. A quantile is
    always passed by some: of few experts the greatest is one, so look at how far it stands out.
    """
    enough = (most_LE > np.quantile(most_LE, SUPER_QUANTILE)) & (
        most_LE > SUPER_SHARE * most_LE.max()
    )
    found = [(int(i), int(e)) for i, e in np.argwhere(enough)]
    return sorted(found, key=lambda at: -most_LE[at])
