"""Experts in twos: in one token, in one after the other, in one layer after the other. [L, E, E] counts."""

import numpy as np

from moejax.evals.analysis.chance import (
    Estimate,
    estimate,
    expected_pairs,
    independent_pairs,
    middle,
    with_mean,
)


def co_activation(pairs_LFEE: np.ndarray) -> Estimate:
    """Expert co-activation (OLMoE, 2409.02060 section 5.2) over all pairs, [L, E, E]:

        N_{i,j} / N_i, of the tokens that have expert i the share that has j too.

    Chance: a token's experts have nothing to do with each other but how often each is used (`expected_pairs`);
    its interval is Poisson's of the count. 0 and NaN on the diagonal.
    """
    pairs_FLEE = pairs_LFEE.swapaxes(0, 1)
    e = estimate(_given_first, [pairs_FLEE])
    total = pairs_FLEE.sum(axis=0)
    used_LE1 = np.maximum(np.diagonal(total, axis1=1, axis2=2), 1)[:, :, None]
    mean = expected_pairs(total)
    half = 1.96 * np.sqrt(mean)
    null = (mean / used_LE1, np.maximum(mean - half, 0) / used_LE1, (mean + half) / used_LE1)
    diagonal = np.eye(total.shape[1], dtype=bool)
    return Estimate(*(np.where(diagonal, 0, a) for a in (e.value, e.low, e.high, *null)))


def _given_first(pairs_LEE: np.ndarray) -> np.ndarray:
    used_LE = np.diagonal(pairs_LEE, axis1=1, axis2=2)
    return pairs_LEE / np.maximum(used_LE, 1e-9)[:, :, None]


def co_activation_strength(pairs_LFEE: np.ndarray) -> Estimate:
    """How far co-activation is from chance, [L + 1]: total variation, sum |p_ij - q_ij| / 2 over pairs i != j,
    p the observed share of a pair and q that of `expected_pairs`; 0 none, 1 all. Chance: tables around q."""

    def fn(pairs_LEE):
        q = expected_pairs(pairs_LEE)
        p = pairs_LEE * (1 - np.eye(pairs_LEE.shape[1]))
        p, q = (a / np.maximum(a.sum(axis=(1, 2), keepdims=True), 1e-9) for a in (p, q))
        return with_mean(np.abs(p - q).sum(axis=(1, 2)) / 2)

    total = pairs_LFEE.sum(axis=1)
    nulls = [fn(n) for n in independent_pairs(total)]
    return estimate(fn, [pairs_LFEE.swapaxes(0, 1)], nulls)


def repetition(
    seen: tuple[np.ndarray, np.ndarray], shuffled: tuple[np.ndarray, np.ndarray]
) -> Estimate:
    """Consecutive-token repetition, [L + 1]: of the experts of a token with one before it in its document, the
    share that the token before had, too (Mixtral, 2401.04088 section 5, for the first expert).

    Chance: each token's experts given to another token of its batch, which is what the loads predict.

    Args:
      seen, shuffled: previous [L, F, E, E] and paired [L, F] of `counts.count`.
    """

    def fn(previous_LEE, paired_L):
        same_L = np.trace(previous_LEE, axis1=1, axis2=2)
        return with_mean(same_L / np.maximum(paired_L, 1))

    of_fold = ([a.swapaxes(0, 1) for a in counts] for counts in (seen, shuffled))
    return estimate(fn, next(of_fold), shuffled_F=next(of_fold))


def transition(next_LFEE: np.ndarray) -> Estimate:
    """Of the routes of a layer's expert i, in pairs with all routes of the same token in the next layer, the
    share that goes on to j, [L - 1, E, E]. Chance: j's share of all."""

    def fn(next_LEE):
        return next_LEE / np.maximum(next_LEE.sum(axis=2, keepdims=True), 1e-9)

    next_FLEE = next_LFEE[:-1].swapaxes(0, 1)
    e, total = estimate(fn, [next_FLEE]), next_FLEE.sum(axis=0)
    n_LE1 = total.sum(axis=2, keepdims=True)
    share_L1E = total.sum(axis=1, keepdims=True) / np.maximum(
        total.sum(axis=(1, 2))[:, None, None], 1
    )
    half = 1.96 * np.sqrt(share_L1E / np.maximum(n_LE1, 1))
    null = np.broadcast_to(share_L1E, e.value.shape)
    return Estimate(e.value, e.low, e.high, null, np.maximum(null - half, 0), null + half)


def concentration(next_LFEE: np.ndarray, shuffled_LFEE: np.ndarray) -> Estimate:
    """How concentrated transitions are, [L - 1 + 1]: the share of routes that go on to the expert's favourite
    in the next layer, sum_i max_j N_ij / sum_ij N_ij. Chance: the next layer's experts are another token's."""

    def fn(next_LEE):
        return with_mean(
            next_LEE.max(axis=2).sum(axis=1) / np.maximum(next_LEE.sum(axis=(1, 2)), 1)
        )

    seen, shuffled = (a[:-1].swapaxes(0, 1) for a in (next_LFEE, shuffled_LFEE))
    return estimate(fn, [seen], shuffled_F=[shuffled])


def saturation(
    common_LF: np.ndarray,
    routes_LF: np.ndarray,
    then_LE: np.ndarray,
    last_LE: np.ndarray,
    tokens: float,
) -> Estimate:
    """Router saturation (OLMoE, 2409.02060 section 5.1), [L + 1]: the share of a token's experts that are
    already those of the last checkpoint, sum_t |E_t and E_t^last| / sum_t |E_t|.

    Chance: two routers that know nothing of each other, with these loads (routes of each expert, [L, E]):
    sum_e (then_e / sum then) (last_e / tokens).
    """
    fn = lambda common_L, routes_L: with_mean(common_L / np.maximum(routes_L, 1))  # noqa: E731
    e = estimate(fn, [common_LF.T, routes_LF.T])
    p_LE = then_LE / np.maximum(then_LE.sum(axis=1, keepdims=True), 1)
    null_L = (p_LE * last_LE).sum(axis=1) / max(tokens, 1)
    rng = np.random.default_rng(0)
    n_L = np.maximum(routes_LF.sum(axis=1), 1)
    draws = [with_mean(rng.poisson(null_L * n_L) / n_L) for _ in range(100)]
    return Estimate(*e[:3], *middle(draws, e.value.shape))
