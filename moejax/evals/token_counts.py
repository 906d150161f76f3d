"""Counts which tokens an expert receives, and measures what its routes say about domains."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from moejax.config import ModelConfig
from moejax.models import transformer
from moejax.moe import stats


def count_tokens(
    params: dict,
    router_state: dict,
    cfg: ModelConfig,
    batches: Iterable[dict],
    layers: Sequence[int],
) -> dict[int, np.ndarray]:
    """MoE layer -> routes of each vocabulary entry to each expert, int64 [E, V], over `batches` (fields as in
    DESIGN.md). Each layer asked for is an array of num_experts x vocab_size."""

    @jax.jit
    def count(batch):
        out = transformer.forward(
            params,
            router_state,
            batch["tokens"],
            cfg,
            positions_BS=batch["positions"],
            segment_ids_BS=batch["segment_ids"],
        )
        tokens_T = batch["tokens"].reshape(-1)
        routing = out.aux["moe_blocks"].routing
        return [
            stats.load_by_label(
                jax.tree.map(lambda a, i=layer: a[i], routing),
                tokens_T,
                cfg.vocab_size,
                cfg.moe.num_experts,
            )
            for layer in layers
        ]

    total = [np.zeros((cfg.vocab_size, cfg.moe.num_experts), np.int64) for _ in layers]
    for batch in batches:
        for sum_VE, count_VE in zip(total, jax.device_get(count(batch))):
            sum_VE += count_VE
    return {layer: sum_VE.T for layer, sum_VE in zip(layers, total)}


def domain_information(load_dE: np.ndarray) -> float:
    """I(domain; expert) / H(domain) of one layer's routes: 0 when all domains use the experts alike,
    1 when one route tells the domain."""
    p_dE = load_dE / max(load_dE.sum(), 1)
    p_d, p_E = p_dE.sum(axis=1), p_dE.sum(axis=0)
    entropy = -sum(p * np.log(p) for p in p_d if p > 0)
    if entropy == 0:
        return 0.0
    ratio = np.divide(p_dE, np.outer(p_d, p_E), out=np.ones_like(p_dE), where=p_dE > 0)
    return float((p_dE * np.log(ratio)).sum() / entropy)


def favourite_tokens(token_EV: np.ndarray, expert: int, count: int, least: int = 5) -> list[int]:
    """The tokens that an expert receives most beyond its share of them: by observed minus expected routes
    over the square root of the expected (a Pearson residual), among those it received `least` times."""
    seen_V = token_EV.sum(axis=0)
    share = token_EV[expert].sum() / max(token_EV.sum(), 1)
    expected_V = seen_V * share
    residual_V = (token_EV[expert] - expected_V) / np.sqrt(np.maximum(expected_V, 1e-9))
    residual_V[(token_EV[expert] < least) | (seen_V == 0)] = -np.inf
    best = np.argsort(-residual_V)[:count]
    return [int(i) for i in best if residual_V[i] > 0]
