"""What a route has to do with something else: domain, position, token, the token before, the layer before.

Here: A labels by B experts; d domains; U units (`units`).
"""

import numpy as np

from moejax.evals.analysis.chance import Estimate, estimate, permuted, with_mean
from moejax.evals.analysis.load import plogp


def information(table_LAB: np.ndarray) -> np.ndarray:
    """I(A; B) / H(B), [L]: the share of a route's entropy that the label explains (uncertainty coefficient).

    I = sum p_ab log(p_ab / (p_a p_b)) of the observed shares p. From finite counts it is above 0 by chance,
    about (A - 1)(B - 1) / 2n nats (Miller 1955): read it beside its null.
    """
    p_LAB = table_LAB / np.maximum(table_LAB.sum(axis=(1, 2), keepdims=True), 1e-300)
    h_A = -plogp(p_LAB.sum(axis=2)).sum(axis=1)
    h_B = -plogp(p_LAB.sum(axis=1)).sum(axis=1)
    joint = -plogp(p_LAB).sum(axis=(1, 2))
    return np.where(h_B > 1e-12, (h_A + h_B - joint) / np.maximum(h_B, 1e-12), 0.0)


def table_information(table_LFAB: np.ndarray, shuffled_LFAB: np.ndarray) -> Estimate:
    """`information` of a table of labels by experts, [L + 1]. Chance: each token's experts given to another
    token of its batch."""
    fn = lambda n_LAB: with_mean(information(n_LAB))  # noqa: E731
    return estimate(fn, [by_fold(table_LFAB)], shuffled_F=[by_fold(shuffled_LFAB)])


def by_fold(a_LFX: np.ndarray) -> np.ndarray:
    return a_LFX.swapaxes(0, 1)


# --------------------------------------------------------------------------------------------------
# Domains. Their null permutes whole stretches of text: what makes documents differ is in it.


def by_domain(a_UX: np.ndarray, has_Ud: np.ndarray) -> np.ndarray:
    """Sums over the units of each domain, [d, ..]."""
    return np.tensordot(has_Ud, a_UX, axes=(0, 0))


def domain_information(load_LUE: np.ndarray, domain_U: np.ndarray, fold_U: np.ndarray) -> Estimate:
    """`information` of domain and expert, [L + 1]. Chance: the domains permuted over stretches of text."""
    load_ULE, d = load_LUE.swapaxes(0, 1), int(domain_U.max()) + 1
    fn = lambda load_dLE: with_mean(information(load_dLE.swapaxes(0, 1)))  # noqa: E731
    nulls = [fn(by_domain(load_ULE, has_Ud)) for has_Ud in permuted(domain_U, d)]
    return estimate(fn, [folded(load_ULE, domain_U, fold_U)], nulls)


def specialisation(
    load_LUE: np.ndarray, tokens_U: np.ndarray, domain_U: np.ndarray, fold_U: np.ndarray
) -> Estimate:
    """Domain specialisation (OLMoE, 2409.02060 section 5.3), [d, L, E]:

        N_{e,d} / N_d, the share of the domain's tokens that have expert e among their K.

    Over the experts they add up to K. Chance: the domains permuted over stretches of text; on average what the
    expert has of all text.
    """
    load_ULE, d = load_LUE.swapaxes(0, 1), int(domain_U.max()) + 1

    def fn(load_dLE, tokens_d):
        return load_dLE / np.maximum(tokens_d, 1)[:, None, None]

    nulls = (fn(by_domain(load_ULE, h), by_domain(tokens_U, h)) for h in permuted(domain_U, d))
    counts = [folded(a, domain_U, fold_U) for a in (load_ULE, tokens_U)]
    return estimate(fn, counts, nulls)


def folded(a_UX: np.ndarray, domain_U: np.ndarray, fold_U: np.ndarray) -> np.ndarray:
    """Sums over the units of each fold and domain, [F, d, ..]."""
    has_Ud = np.eye(int(domain_U.max()) + 1)[domain_U]
    return np.stack(
        [by_domain(a_UX, has_Ud * (fold_U == f)[:, None]) for f in range(max(fold_U) + 1)]
    )


# --------------------------------------------------------------------------------------------------
# The vocabulary.


def vocabulary_specialisation(table_LFVE: np.ndarray, shuffled_LFVE: np.ndarray) -> Estimate:
    """Vocabulary specialisation (OLMoE, 2409.02060 section 5.4) of each layer, [L + 1]:

        sum_x N_x max_e N_{x,e} / N_x  over  sum_x N_x,

    the share of a token's routes that go to its favourite expert, of the tokens that are counted one by one
    (the last bin, of all others, is left out). Chance: as in `table_information`.
    """

    def fn(n_LVE):
        n_LVE = n_LVE[:, :-1]
        return with_mean(n_LVE.max(axis=2).sum(axis=1) / np.maximum(n_LVE.sum(axis=(1, 2)), 1))

    return estimate(fn, [by_fold(table_LFVE)], shuffled_F=[by_fold(shuffled_LFVE)])


def favourites(token_VE: np.ndarray, expert: int, most: int = 8, least: int = 5) -> list[int]:
    """The tokens that an expert of one layer gets more often than its load explains, most surprising first: by
    the Pearson residual (n - m) / sqrt(m), m = n_x n_e / n; above 3, of at least `least` routes."""
    seen_V, n_V = token_VE.sum(axis=1), token_VE[:, expert]
    expected_V = seen_V * n_V.sum() / max(token_VE.sum(), 1)
    residual_V = (n_V - expected_V) / np.sqrt(np.maximum(expected_V, 1e-9))
    residual_V[n_V < least] = -np.inf
    return [int(i) for i in np.argsort(-residual_V, kind="stable")[:most] if residual_V[i] > 3]
