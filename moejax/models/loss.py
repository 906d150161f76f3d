"""The training loss of a batch, or of one micro-batch as its exact share of the batch.

loss = cross-entropy + lambda * mean over depths of the MTP cross-entropy + mean over MoE layers of the
balance losses + losses of attention. Every mean is over the *global* batch: `StepTotals` carries the
denominators, so that the shares of the micro-batches add up to the whole, whatever their number.

Here: R positions of a chunk, over all rows.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import ComputeConfig, ModelConfig, ObjectiveConfig
from moejax.models import transformer
from moejax.models.blocks import Context, locate
from moejax.models.embedding import head_weights
from moejax.models.mtp import mtp_forward, mtp_targets
from moejax.models.replay import forced_routes
from moejax.moe.layer import MoEAux
from moejax.routers.contract import BatchTotals, count_totals


class StepTotals(NamedTuple):
    """Denominators over the global batch.

    Attributes:
      targets: positions that count in the cross-entropy.
      mtp_targets: the same for each MTP depth.
      tokens: `BatchTotals` without stats.
      mtp_tokens: the same of the positions that each MTP depth routes.
      stats: name of a stack of MoE layers -> its routers' stats stacked over layers, or None to sum here.
    """

    targets: jax.Array
    mtp_targets: tuple[jax.Array, ...]
    tokens: BatchTotals
    mtp_tokens: tuple[BatchTotals, ...] = ()
    stats: dict | None = None

    def of(self, name: str) -> BatchTotals:
        return self.tokens._replace(stats=None if self.stats is None else self.stats[name])


class LossParts(NamedTuple):
    """What a loss is made of, and what was counted on the way.

    Attributes:
      cross_entropy: share of the mean, in nats per target.
      mtp: the same of the MTP depths (mean over depths), 0 without.
      balance: balance losses by name, mean over layers, coefficients applied.
      attention: losses of attention by name, mean over tokens and layers, coefficients applied.
      nll_BS: each position's negative log-likelihood, 0 where it does not count; no gradient.
      aux: name -> MoEAux stacked over layers.
    """

    cross_entropy: jax.Array
    mtp: jax.Array
    balance: dict[str, jax.Array]
    attention: dict[str, jax.Array]
    nll_BS: jax.Array
    aux: dict[str, MoEAux]


def batch_totals(batch: dict, cfg: ModelConfig) -> StepTotals:
    count = lambda mask: (mask > 0).astype(jnp.float32).sum()  # noqa: E731
    mtp = [mtp_targets(batch, k + 1) for k in range(cfg.mtp_depth)]
    return StepTotals(
        count(batch["loss_mask"]),
        tuple(count(of.mask_BS) for of in mtp),
        count_totals(batch["segment_ids"]),
        tuple(count_totals(of.real_BS) for of in mtp),
    )


def loss_fn(
    params: dict,
    router_state: dict,
    batch: dict,
    cfg: ModelConfig,
    *,
    objective: ObjectiveConfig | None = None,
    compute: ComputeConfig | None = None,
    totals: StepTotals | None = None,
    layout=None,
    key: jax.Array | None = None,
) -> tuple[jax.Array, LossParts]:
    """Loss of a batch (see DESIGN.md for its fields) and its parts.

    Args:
      params, router_state, batch: whole, or one micro-batch of it; with a field `routes` these are taken, see
        `moejax.models.replay`.
      cfg: the model.
      objective: balance losses, capacity and MTP weight; None: cross-entropy alone, as evaluated.
      compute: how it is computed.
      totals: of the global batch; None if this is it.
      layout: the mesh and its table, or None.
      key: for routers that draw random numbers.
    """
    compute = compute or ComputeConfig()
    totals = batch_totals(batch, cfg) if totals is None else totals
    with_mtp = cfg.mtp_depth > 0 and objective is not None
    forced_LTK, mtp_forced_LTK = forced_routes(batch, cfg, mtp=with_mtp)
    out = transformer.forward(
        params,
        router_state,
        batch["tokens"],
        cfg,
        compute=compute,
        objective=objective,
        positions_BS=batch["positions"],
        segment_ids_BS=batch["segment_ids"],
        totals=totals.of("moe_blocks") if cfg.num_moe_layers else None,
        forced_LTK=forced_LTK,
        layout=layout,
        key=key,
    )
    w_DV = head_weights(params)
    mask = batch["loss_mask"]
    total, nll_BS = cross_entropy(out.hidden_BSD, w_DV, batch["targets"], mask, compute)
    ce = total / jnp.maximum(totals.targets, 1.0)

    mtp, aux = jnp.zeros_like(ce), dict(out.aux)
    per_token = lambda total, n: total / jnp.maximum(n.num_tokens, 1.0)  # noqa: E731
    attention = {name: per_token(total, totals.tokens) for name, total in out.losses.items()}
    if with_mtp:
        ctx = Context(
            cfg=cfg,
            compute=compute,
            objective=objective,
            where=locate(batch["tokens"], cfg, batch["positions"], batch["segment_ids"]),
            token_ids_BS=batch["tokens"],
            layout=layout,
            key=key,
        )
        depths = []
        stats = totals.of("mtp").stats if cfg.num_moe_layers else None
        args = (params, router_state, out.trunk, batch, ctx, totals.mtp_tokens)
        every = mtp_forward(*args, stats, mtp_forced_LTK)
        for i, (hidden, of, depth_aux, losses) in enumerate(every):
            total, _ = cross_entropy(hidden, w_DV, of.targets_BS, of.mask_BS, compute)
            mtp = mtp + total / jnp.maximum(totals.mtp_targets[i], 1.0) / cfg.mtp_depth
            depths.append(depth_aux)
            for name, total in losses.items():
                attention[name] += per_token(total, totals.mtp_tokens[i])
        if cfg.num_moe_layers:
            aux["mtp"] = jax.tree.map(lambda *a: jnp.stack(a), *depths)

    balance = mean_over_layers(aux)
    weight = objective.mtp_loss_weight if objective else 0.0
    loss = ce + weight * mtp
    loss += sum((*balance.values(), *attention.values()), jnp.zeros_like(ce))
    return loss, LossParts(ce, mtp, balance, attention, nll_BS, aux)


def mean_over_layers(aux: dict[str, MoEAux]) -> dict[str, jax.Array]:
    """Each balance loss, computed per layer, averaged over all MoE layers."""
    names = {n for a in aux.values() for n in a.losses}
    return {
        n: jnp.concatenate([a.losses[n].reshape(-1) for a in aux.values()]).mean()
        for n in sorted(names)
    }


# ---------------------------------------------------------------------------------------------------
# Cross-entropy that never holds all logits.


def chunk_length(batch: int, seq_len: int, tokens: int) -> int:
    """Positions per row at a time, at most about `tokens` over all rows: a divisor of the sequence length."""
    per_row = max(1, tokens // batch)
    return max(c for c in range(1, seq_len + 1) if seq_len % c == 0 and (c <= per_row or c == 1))


@jax.named_scope("head")
def cross_entropy(hidden_BSD, w_DV, targets_BS, mask_BS, compute: ComputeConfig):
    """Sum over counted positions of -log p(target), and nll_BS (without gradient).

    The sequence is cut into chunks; each chunk's logits exist only while the chunk is worked on. Since
    the result is a sum, the gradients are computed with it in the same pass: no logits are kept and
    none are computed twice.
    """
    chunk = chunk_length(
        targets_BS.shape[0], targets_BS.shape[1], compute.tokens_of_logits(w_DV.shape[1])
    )
    mask_BS = (mask_BS > 0).astype(jnp.promote_types(hidden_BSD.dtype, jnp.float32))
    total, nll_BS = _cross_entropy(hidden_BSD, w_DV, targets_BS, mask_BS, chunk)
    return total, jax.lax.stop_gradient(nll_BS)


def _chunks(a, chunk):
    """[B, S, ..] -> [S/chunk, B*chunk, ..]: flat rows, see `moejax.linear`."""
    b, s = a.shape[:2]
    chunks = jnp.moveaxis(a.reshape(b, s // chunk, chunk, *a.shape[2:]), 1, 0)
    return chunks.reshape(s // chunk, b * chunk, *a.shape[2:])


def _unchunk(a, batch):
    n, rows = a.shape[:2]
    a = jnp.moveaxis(a.reshape(n, batch, rows // batch, *a.shape[2:]), 0, 1)
    return a.reshape(batch, n * rows // batch, *a.shape[3:])


def _chunk_nll(h_RD, w_DV, targets_R, mask_R):
    """(nll_R, logits - logsumexp in float32 or wider) of one chunk."""
    logits_RV = jnp.dot(h_RD, w_DV, preferred_element_type=mask_R.dtype)
    log_p_RV = logits_RV - jax.nn.logsumexp(logits_RV, axis=-1, keepdims=True)
    nll_R = -jnp.take_along_axis(log_p_RV, targets_R[:, None], axis=-1)[:, 0] * mask_R
    return nll_R, log_p_RV


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _cross_entropy(hidden_BSD, w_DV, targets_BS, mask_BS, chunk):
    w = w_DV.astype(hidden_BSD.dtype)
    nll_BS = _unchunk(
        jax.lax.map(
            lambda a: _chunk_nll(a[0], w, a[1], a[2])[0],
            tuple(_chunks(a, chunk) for a in (hidden_BSD, targets_BS, mask_BS)),
        ),
        hidden_BSD.shape[0],
    )
    return nll_BS.sum(), nll_BS


def _cross_entropy_fwd(hidden_BSD, w_DV, targets_BS, mask_BS, chunk):
    w = w_DV.astype(hidden_BSD.dtype)

    def one(dw_DV, inputs):
        h_RD, targets_R, mask_R = inputs
        nll_R, log_p_RV = _chunk_nll(h_RD, w, targets_R, mask_R)
        one_hot_RV = jax.nn.one_hot(targets_R, w.shape[1], dtype=log_p_RV.dtype)
        d_logits_RV = ((jnp.exp(log_p_RV) - one_hot_RV) * mask_R[:, None]).astype(h_RD.dtype)
        dh_RD = jnp.dot(d_logits_RV, w.T)
        dw = jnp.einsum("RD,RV->DV", h_RD, d_logits_RV, preferred_element_type=dw_DV.dtype)
        return dw_DV + dw, (nll_R, dh_RD)

    xs = tuple(_chunks(a, chunk) for a in (hidden_BSD, targets_BS, mask_BS))
    if xs[0].shape[0] == 1:
        zero = jnp.zeros((1, 1), mask_BS.dtype)
        dw_DV, out = one(zero, jax.tree.map(lambda a: a[0], xs))
        out = jax.tree.map(lambda a: a[None], out)
    else:
        dw_DV, out = jax.lax.scan(one, jnp.zeros(w.shape, mask_BS.dtype), xs)
    nll_BS, dh_BSD = (_unchunk(a, hidden_BSD.shape[0]) for a in out)
    return (nll_BS.sum(), nll_BS), (dh_BSD, dw_DV.astype(w_DV.dtype))


def _cross_entropy_bwd(chunk, residuals, cotangents):
    del chunk
    dh_BSD, dw_DV = residuals
    g = cotangents[0]  # nll_BS carries no gradient
    return dh_BSD * g.astype(dh_BSD.dtype), dw_DV * g.astype(dw_DV.dtype), None, None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)
