"""Computes the loss over held-out batches, and counts which domain goes to which expert."""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ExperimentConfig
from moejax.models.loss import loss_fn
from moejax.moe import stats
from moejax.sharding import Layout, place_whole
from moejax.text import count_text


def domain_sums(nll_BS, batch: dict, num_domains: int) -> dict[str, jax.Array]:
    """For each domain, the sum of nll and the number of targets that count."""
    hot = jax.nn.one_hot(batch["domain"], num_domains, dtype=nll_BS.dtype)
    mask = (batch["loss_mask"] > 0).astype(nll_BS.dtype)
    return {
        "domain_nll": jnp.einsum("BS,BSd->d", nll_BS, hot),
        "domain_targets": jnp.einsum("BS,BSd->d", mask, hot),
    }


def eval_step(params, router_state, batch, cfg: ExperimentConfig, *, num_domains=1, layout=None):
    """Sums over a validation batch: nll and targets of each domain, and of models with MoE layers `load_dLE`,
    the routes of each domain to each expert of each layer, and `logits_LN`, how many router logits of each
    layer lie in each bin of `stats.LOGIT_EDGES`, if the router has any."""
    _, parts = loss_fn(params, router_state, batch, cfg.model, compute=cfg.compute, layout=layout)
    sums = domain_sums(parts.nll_BS, batch, num_domains)
    if "moe_blocks" in parts.aux:
        domain_T = batch["domain"].reshape(-1)
        load = functools.partial(
            stats.load_by_label,
            label_T=domain_T,
            num_labels=num_domains,
            num_experts=cfg.model.moe.num_experts,
        )
        routed = parts.aux["moe_blocks"]
        sums["load_dLE"] = jax.vmap(load, out_axes=1)(routed.routing)
        if routed.logits_TE is not None:
            count = functools.partial(
                stats.logit_counts, mask_T=batch["segment_ids"].reshape(-1) > 0
            )
            sums["logits_LN"] = jax.vmap(count)(routed.logits_TE)
    return sums


def compile_eval(cfg: ExperimentConfig, *, num_domains: int, layout: Layout | None = None):
    """Jit `eval_step`: (params, router_state, batch) -> sums, replicated on every device."""
    return jax.jit(
        lambda params, router_state, batch: eval_step(
            params, router_state, batch, cfg, num_domains=num_domains, layout=layout
        ),
        out_shardings=None if layout is None else layout.replicated,
    )


def evaluate(
    eval_fn: Callable,
    params: dict,
    router_state: dict,
    batches: Iterable[dict[str, np.ndarray]],
    domains: Sequence[str],
    layout: Layout | None = None,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Evaluate held-out batches (`moejax.data.validation_batches`). Every process holds every batch.

    Returns:
      Loss (nats per token), perplexity, bits per byte of text, `loss/<domain>` and `bits_per_byte/<domain>`,
      and how much text that was: `batches`, `tokens` (targets), `bytes` and `tokens/<domain>`. Then what the
      routers did, of `eval_step`: `load_dLE` and `logits_LN`; empty without MoE layers.
    """
    sums, bytes_d, num_batches = None, np.zeros(len(domains)), 0
    for batch in batches:
        num_bytes = batch["num_bytes"]
        fields = {name: a for name, a in batch.items() if name != "num_bytes"}
        out = jax.device_get(eval_fn(params, router_state, place_whole(fields, layout)))
        # In 64 bits: a float32 sum stops growing at 2^24, an int32 one overflows.
        out = {k: a.astype(np.int64 if a.dtype.kind == "i" else np.float64) for k, a in out.items()}
        sums = out if sums is None else jax.tree.map(np.add, sums, out)
        np.add.at(bytes_d, batch["domain"], num_bytes)
        num_batches += 1
    assert sums is not None, "no batch to evaluate"
    nll, targets = sums["domain_nll"], sums["domain_targets"]
    loss = float(nll.sum() / targets.sum())
    bits_d = nll / np.log(2) / np.maximum(bytes_d, 1)
    seen = [(i, d) for i, d in enumerate(domains) if targets[i]]
    results = {
        "loss": loss,
        "perplexity": float(np.exp(loss)),
        "bits_per_byte": float(nll.sum() / np.log(2) / max(bytes_d.sum(), 1)),
        "batches": num_batches,
        "tokens": int(targets.sum()),
        "bytes": int(bytes_d.sum()),
        **{f"loss/{d}": float(nll[i] / targets[i]) for i, d in seen},
        **{f"bits_per_byte/{d}": float(bits_d[i]) for i, d in seen},
        **{f"tokens/{d}": int(targets[i]) for i, d in seen},
    }
    return results, {name: sums[name] for name in ("load_dLE", "logits_LN") if name in sums}


def size_text(results: Mapping[str, float]) -> str:
    """How much text a loss was measured on: '8 batches, 33k tokens'; '' if the run did not record it."""
    if "tokens" not in results:
        return ""
    batches = int(results["batches"])
    return f"{batches:,} batch{'es' * (batches != 1)}, {count_text(results['tokens'])} tokens"
