"""Multi-token prediction (DeepSeek-V3, 2412.19437 section 2.2): depth k predicts the token k+1 ahead.

Eq. 21-23: h^k_i = Block_k(M_k [RMSNorm(Emb(t_{i+k})); RMSNorm(h^{k-1}_i)]), with the trunk's embedding and
head. The paper writes the hidden state first; the released weights expect the embedding first, and so
do we. h^0 is the trunk after its final norm, as the released checkpoints are served.

With several streams (DeepSeek-V4) h is the streams, h^0 those before their head. The embedding is projected
once and every stream by itself, the block reads their sum, and each depth has a head for its streams.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.attention import kind_of
from moejax.config import ModelConfig
from moejax.linear import linear
from moejax.models import hyper_connections as hc
from moejax.models.blocks import (
    Context,
    LayerInput,
    block,
    block_specs,
    nothing_carried,
    rematerialised,
)
from moejax.models.embedding import embed, last_norm
from moejax.norm import norm, norm_specs
from moejax.params import ParamSpec
from moejax.routers.contract import BatchTotals


def mtp_specs(cfg: ModelConfig) -> dict:
    """One depth's parameters; a block like the trunk's last."""
    d, kind = cfg.d_model, kind_of(cfg.attention)

    def matrix(rows):
        return ParamSpec((rows, d), (None, axes.EMBED), std=cfg.init_std)

    if cfg.streams.count == 1:
        own = {"proj": matrix(2 * d)}
    else:
        own = {
            "embed_proj": matrix(d),
            "hidden_proj": matrix(d),
            "streams_head": hc.head_specs(cfg),
        }
    like_last = block_specs(cfg, cfg.num_moe_layers > 0)
    like_last["attn"] |= kind.own_specs(cfg, kind.layer_kind(cfg, cfg.num_layers))
    return {
        **own,
        "embed_norm": norm_specs(d, cfg.norm, axes.EMBED),
        "hidden_norm": norm_specs(d, cfg.norm, axes.EMBED),
        "block": like_last,
        "norm": norm_specs(d, cfg.norm, axes.EMBED),
    }


def shift(a_BS: jax.Array, by: int, fill: int = 0) -> jax.Array:
    """a[:, i] = a[:, i + by], `fill` past the end."""
    return jnp.pad(a_BS[:, by:], ((0, 0), (0, by)), constant_values=fill) if by else a_BS


def mtp_step(
    params: dict,
    depth_params: dict,
    depth: int,
    state: dict,
    hidden: jax.Array,
    next_tokens_BS: jax.Array,
    ctx: Context,
    *,
    stats: dict | None = None,
    forced_TK: jax.Array | None = None,
    cache=None,
):
    """One depth: (h^k, normed hidden for the head, cache, aux, losses of attention as sums over tokens).

    Args:
      params: the model's parameters (embedding).
      depth_params: this depth's parameters.
      depth: of this step, from 0.
      state: router state of this depth.
      hidden: h^{k-1}, BSD; [B,S,I,D] with several streams.
      next_tokens_BS: t_{i+k}.
      ctx: of the trunk's tokens.
      stats: this depth's router stats over the global batch, or None.
      forced_TK: expert indices to force, or None.
      cache: of this depth, or None.
    """
    cfg = ctx.cfg
    e_BSD = embed(params, next_tokens_BS, ctx.where.positions_BS, cfg, ctx.compute.dtype)
    e_BSD = norm(depth_params["embed_norm"], e_BSD, cfg.norm_eps)
    h = norm(depth_params["hidden_norm"], hidden, cfg.norm_eps)
    if cfg.streams.count == 1:
        both = jnp.concatenate([e_BSD, h], axis=-1)
        x = jnp.dot(both, depth_params["proj"].astype(both.dtype))
    else:
        e_BSD = linear(e_BSD, depth_params["embed_proj"])
        x = e_BSD[:, :, None] + linear(h, depth_params["hidden_proj"])
    index = cfg.num_layers + depth
    layer = LayerInput(depth_params["block"], index, depth, state, stats=stats, forced_TK=forced_TK)
    x, carried, cache, aux = block(
        x,
        layer,
        ctx,
        layer_kind=kind_of(cfg.attention).layer_kind(cfg, index),
        carried=nothing_carried(x, ctx, None if ctx.prefill else cache),
        cache=cache,
    )
    hidden_BSD = hc.head(depth_params.get("streams_head"), x, cfg)
    normed_BSD = last_norm(depth_params["norm"], hidden_BSD, cfg)
    return x, normed_BSD, cache, aux, carried.losses or {}


class Targets(NamedTuple):
    """What depth k (1-based) reads and predicts, all BS; never across documents.

    Attributes:
      tokens_BS: t_{i+k}, its input.
      targets_BS: t_{i+k+1}.
      real_BS: 1 where there is such a target; only these positions are routed and balanced.
      mask_BS: of these, where the target counts in the loss.
    """

    tokens_BS: jax.Array
    targets_BS: jax.Array
    real_BS: jax.Array
    mask_BS: jax.Array


def mtp_targets(batch: dict, depth: int) -> Targets:
    """`Targets` of depth k = `depth`."""
    ids = batch["segment_ids"]
    real = ((shift(ids, depth) == ids) & (ids > 0)).astype(ids.dtype)
    return Targets(
        shift(batch["targets"], depth - 1),
        shift(batch["targets"], depth),
        real,
        shift(batch["loss_mask"], depth) * real,
    )


def mtp_forward(
    params: dict,
    router_state: dict,
    hidden: jax.Array,
    batch: dict,
    ctx: Context,
    totals: tuple[BatchTotals, ...],
    stats: dict | None,
    forced_LTK: jax.Array | None = None,
):
    """All depths in training. `hidden`: h^0; `totals`: of each depth over the global batch; `stats`: of their
    routers, stacked, or None; `forced_LTK`: routes to force in each depth. Yields (hidden for the head,
    Targets, aux, losses) for each depth."""

    def step(depth_params, depth, state, hidden, tokens, real_BS, totals, rest):
        here = dataclasses.replace(ctx, mask_BS=real_BS, totals=totals)
        return mtp_step(params, depth_params, depth, state, hidden, tokens, here, **rest)

    step = rematerialised(step, ctx.compute, static_argnums=(1,))
    for k in range(ctx.cfg.mtp_depth):
        pick = lambda tree, k=k: jax.tree.map(lambda a: a[k], tree)  # noqa: E731
        of = mtp_targets(batch, k + 1)
        here = (pick(params["mtp"]), k, pick(router_state.get("mtp", {})), hidden)
        rest = pick(dict(stats=stats, forced_TK=forced_LTK))
        hidden, normed, _, aux, losses = step(*here, of.tokens_BS, of.real_BS, totals[k], rest)
        yield normed, of, aux, losses
