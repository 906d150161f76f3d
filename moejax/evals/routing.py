"""What experts read: routes counted by vocabulary entry, and what routes say about domains."""

from collections.abc import Iterable, Sequence

import jax
import numpy as np

from moejax.config import ModelConfig
from moejax.models import transformer
from moejax.moe.routing import SlotRouting


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
    def routes(batch):
        out = transformer.forward(
            params,
            router_state,
            batch["tokens"],
            cfg,
            positions_BS=batch["positions"],
            segment_ids_BS=batch["segment_ids"],
        )
        return out.aux["moe_blocks"].routing

    counts = {layer: np.zeros((cfg.moe.num_experts, cfg.vocab_size), np.int64) for layer in layers}
    for batch in batches:
        routing = jax.device_get(routes(batch))
        tokens_T = np.asarray(batch["tokens"]).reshape(-1)
        for layer, count_EV in counts.items():
            token_N, expert_N = pairs(jax.tree.map(lambda a, i=layer: a[i], routing))
            np.add.at(count_EV, (expert_N, tokens_T[token_N]), 1)
    return counts


def pairs(routing) -> tuple[np.ndarray, np.ndarray]:
    """(token, expert) of every route of one layer; empty slots left out."""
    if isinstance(routing, SlotRouting):
        token_EC = routing.token_index_EC
        expert_EC = np.broadcast_to(np.arange(token_EC.shape[0])[:, None], token_EC.shape)
        return token_EC[token_EC >= 0], expert_EC[token_EC >= 0]
    expert_TK = routing.expert_index_TK
    token_TK = np.broadcast_to(np.arange(expert_TK.shape[0])[:, None], expert_TK.shape)
    return token_TK[expert_TK >= 0], expert_TK[expert_TK >= 0]


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
