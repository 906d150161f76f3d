"""Counts which tokens each expert receives."""

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
