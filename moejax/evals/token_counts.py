"""Counts which tokens each expert receives, and measures how much routes reveal about the domain."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from moejax.config import ExperimentConfig
from moejax.models import transformer
from moejax.moe import stats


def count_tokens(
    params: dict,
    router_state: dict,
    cfg: ExperimentConfig,
    batches: Iterable[dict],
    layers: Sequence[int],
) -> dict[int, np.ndarray]:
    """Count the routes of each vocabulary entry to each expert, over `batches` (their fields: DESIGN.md).

    Returns an array [E, V] for each MoE layer in `layers`.
    """
    sizes = cfg.model.vocab_size, cfg.model.moe.num_experts

    @jax.jit
    def count(params, router_state, batch):
        out = transformer.forward(
            params,
            router_state,
            batch["tokens"],
            cfg.model,
            compute=cfg.compute,
            positions_BS=batch["positions"],
            segment_ids_BS=batch["segment_ids"],
        )
        tokens_T = batch["tokens"].reshape(-1)
        of = lambda i: jax.tree.map(lambda a: a[i], out.aux["moe_blocks"].routing)  # noqa: E731
        return [stats.load_by_label(of(layer), tokens_T, *sizes) for layer in layers]

    total = [np.zeros(sizes) for _ in layers]
    for batch in batches:
        counts = jax.device_get(count(params, router_state, batch))
        for sum_VE, count_VE in zip(total, counts):
            sum_VE += count_VE
    return {layer: sum_VE.T for layer, sum_VE in zip(layers, total)}


def domain_information(load_dE: np.ndarray) -> float:
    """I(domain; expert) / H(domain) of one layer's routes: 0 if all domains use the experts
    alike, 1 if a single route gives the domain away."""
    p_dE = load_dE / max(load_dE.sum(), 1)
    p_d, p_E = p_dE.sum(axis=1), p_dE.sum(axis=0)
    entropy = -sum(p * np.log(p) for p in p_d if p > 0)
    if entropy == 0:
        return 0.0
    ratio = np.divide(p_dE, np.outer(p_d, p_E), out=np.ones_like(p_dE), where=p_dE > 0)
    return float((p_dE * np.log(ratio)).sum() / entropy)


def favourite_tokens(token_EV: np.ndarray, expert: int, count: int, least: int = 5) -> list[int]:
    """The tokens that an expert receives more often than its load explains, most surprising first.

    Ranked by Pearson residual: (observed - expected routes) / sqrt(expected). Tokens that it received fewer
    than `least` times are left out.
    """
    seen_V = token_EV.sum(axis=0)
    share = token_EV[expert].sum() / max(token_EV.sum(), 1)
    expected_V = seen_V * share
    residual_V = (token_EV[expert] - expected_V) / np.sqrt(np.maximum(expected_V, 1e-9))
    residual_V[(token_EV[expert] < least) | (seen_V == 0)] = -np.inf
    best = np.argsort(-residual_V)[:count]
    return [int(i) for i in best if residual_V[i] > 0]
