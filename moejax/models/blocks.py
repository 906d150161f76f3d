"""Blocks: one pre-norm block, and stacks of equal blocks, scanned over or unrolled."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import ComputeConfig, ModelConfig, ObjectiveConfig
from moejax.models import attention as attn
from moejax.models import hyper_connections as hc
from moejax.models.norm import norm, norm_specs
from moejax.models.rope import rotation
from moejax.moe import layer as moe_layer
from moejax.moe.experts import ffn, ffn_param_specs, of_dense
from moejax.routers.contract import BatchTotals
from moejax.sharding import Layout


@dataclasses.dataclass(frozen=True)
class Context:
    """What is the same for every block of one call.

    Attributes:
      cfg, compute: the model, and how it is computed.
      objective: what it is trained for, or None.
      where: positions, documents and rotation of the tokens.
      mask_BS: 1 = token, 0 = padding, or None.
      token_ids_BS: vocabulary ids.
      totals: of the global batch without stats, or None: this is the whole batch.
      layout: the mesh and its table, or None.
      key: for routers that draw random numbers, or None.
      prefill: static; the cache is empty and positions are 0, 1, 2, ..
      keep_inputs: static; see `MoEAux.inputs_BSD`.
    """

    cfg: ModelConfig
    compute: ComputeConfig
    where: attn.Where
    objective: ObjectiveConfig | None = None
    mask_BS: jax.Array | None = None
    token_ids_BS: jax.Array | None = None
    totals: BatchTotals | None = None
    layout: Layout | None = None
    key: jax.Array | None = None
    prefill: bool = False
    keep_inputs: bool = False


class LayerInput(NamedTuple):
    """What differs from layer to layer besides the hidden state; scanned over.

    Attributes:
      params: this layer's parameters.
      index: of this layer in the model.
      slot: its position in the cache.
      state: its router's state.
      window: sliding window, or None.
      stats: its router's stats over the global batch, or None.
      forced_TK: expert indices to force, or None.
    """

    params: Any
    index: Any
    slot: Any
    state: Any = None
    window: Any = None
    stats: Any = None
    forced_TK: Any = None


def block_specs(cfg: ModelConfig, is_moe: bool) -> dict:
    specs = {
        "attn_norm": norm_specs(cfg.d_model, cfg.norm, axes.EMBED),
        "attn": attn.param_specs(cfg),
        "ffn_norm": norm_specs(cfg.d_model, cfg.norm, axes.EMBED),
    }
    if cfg.streams.count > 1:
        specs["attn_streams"] = hc.sub_layer_specs(cfg)
        specs["ffn_streams"] = hc.sub_layer_specs(cfg)
    if is_moe:
        specs["moe"] = moe_layer.param_specs(cfg)
    else:
        specs["ffn"] = ffn_param_specs(
            cfg.d_model, cfg.d_ff, cfg.activation, cfg.ffn_bias, cfg.init_std
        )
    return specs


def locate(tokens_BS, cfg: ModelConfig, positions_BS=None, segment_ids_BS=None) -> attn.Where:
    """Positions (counted from 0 if not given), documents and rotation for a batch."""
    if positions_BS is None:
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1])[None], tokens_BS.shape)
    a = cfg.attention
    cos_sin = rotation(positions_BS, a.rope, a.rope_width) if cfg.positions == "rope" else None
    return attn.Where(positions_BS, segment_ids_BS, cos_sin)


def constrain(x: jax.Array, layout: Layout | None, last: str | None = axes.ACT_EMBED):
    """Positions laid out over the mesh; `last` is the logical axis of what each of them holds. Streams
    between stay whole."""
    between = (None,) * (x.ndim - 3)
    return x if layout is None else layout.constrain(x, axes.BATCH, axes.SEQ, *between, last)


def block(
    x: jax.Array,
    layer: LayerInput,
    ctx: Context,
    *,
    carried_BSW: jax.Array | None = None,
    cache=None,
    stack=None,
):
    """One pre-norm block.

    Args:
      x: the state, BSD; [B,S,I,D] with several streams.
      layer, ctx: see there.
      carried_BSW: what the router of the layer before passed on, see `moe.layer.nothing_carried`.
      cache: of this layer, or None.
      stack: the experts of all layers and this layer's index among them, see `routed_ffn`.

    Returns:
      x and carried_BSW for the next block, the cache, and MoEAux or None.
    """
    p, cfg = layer.params, ctx.cfg
    h, write = hc.read(p.get("attn_streams"), x, cfg)
    h = norm(p["attn_norm"], h, cfg.norm_eps)
    y, cache = attn.attention(
        p["attn"],
        h,
        cfg,
        _where(ctx, layer.window),
        window=layer.window,
        cache=cache,
        layer=layer.slot,
        prefill=ctx.prefill,
        block=ctx.compute.attention_block,
    )
    x = constrain(write(y), ctx.layout)
    h, write = hc.read(p.get("ffn_streams"), x, cfg)
    h = norm(p["ffn_norm"], h, cfg.norm_eps)
    if "moe" not in p:
        with jax.named_scope("ffn"):
            y = ffn(p["ffn"], h, of_dense(cfg))
        return constrain(write(y), ctx.layout), carried_BSW, cache, None
    state, forced_TK = dict(layer.state or {}), layer.forced_TK
    if moe_layer.TOLD in state:
        forced_TK = state.pop(moe_layer.TOLD)[ctx.where.positions_BS.reshape(-1)]
    y, aux = moe_layer.moe(
        p["moe"],
        state,
        h,
        cfg,
        objective=ctx.objective,
        compute=ctx.compute,
        mask_BS=ctx.mask_BS,
        token_ids_BS=ctx.token_ids_BS,
        forced_TK=forced_TK,
        totals=None if ctx.totals is None else ctx.totals._replace(stats=layer.stats),
        layout=ctx.layout,
        stack=stack,
        key=None if ctx.key is None else jax.random.fold_in(ctx.key, layer.index),
        carried_BSW=carried_BSW,
    )
    if aux.carry_BSW is not None:
        carried_BSW = constrain(aux.carry_BSW, ctx.layout, None)
    aux = aux._replace(carry_BSW=None, inputs_BSD=h if ctx.keep_inputs else None)
    return constrain(write(y), ctx.layout), carried_BSW, cache, aux


def _where(ctx: Context, window) -> attn.Where:
    """Where the tokens stand for this layer: without rotation (cos 1, sin 0) if its kind has none."""
    if ctx.cfg.attention.rope_layers == "all":
        return ctx.where
    if window is None or ctx.where.cos_sin is None:
        return ctx.where._replace(cos_sin=None)
    cos, sin = ctx.where.cos_sin
    turned = (jnp.where(window > 0, cos, 1.0), jnp.where(window > 0, sin, 0.0))
    return ctx.where._replace(cos_sin=turned)


REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(fn, compute: ComputeConfig, **options):
    """`fn` with what it computes computed again in the backward pass, as the config says."""
    if compute.remat == "none":
        return fn
    return jax.checkpoint(fn, policy=REMAT_POLICIES[compute.remat], **options)


def unstack(stacked) -> list:
    """A stack of layers as a list. Split, not indexed: the gradient is one concatenation instead of a sum
    of stacks, each of them zero but for one layer."""
    leaves, structure = jax.tree.flatten(stacked)
    n = leaves[0].shape[0]
    parts = [jax.lax.split(a, (1,) * n) for a in leaves]
    return [structure.unflatten([part[i][0] for part in parts]) for i in range(n)]


def run_blocks(x: jax.Array, layers: LayerInput, ctx: Context, *, cache=None):
    """A stack (or list) of equal blocks. Returns (x, cache, aux stacked over layers or None)."""

    def body(carry, layer):
        x, carried, kv = carry
        stack = None if experts is None else (experts, layer.index - layers.index[0])
        *carry, aux = block(x, layer, ctx, carried_BSW=carried, cache=kv, stack=stack)
        return tuple(carry), aux

    listed = isinstance(layers.params, list)
    unrolled = listed or not ctx.compute.scan_layers
    if isinstance(cache, list) and not unrolled:
        raise TypeError(
            "a list of caches (init_layers) needs lists of layers (unstack) or scan_layers=False"
        )
    is_moe = "moe" in (layers.params[0] if listed else layers.params)
    experts = layers.params["moe"]["experts"] if is_moe and not listed else None
    carried = moe_layer.nothing_carried(x, ctx.cfg) if is_moe else None
    if carried is not None:
        carried = constrain(carried, ctx.layout, None)
    if cache is None:
        body = rematerialised(body, ctx.compute, prevent_cse=unrolled)
    if not unrolled:
        (x, _, cache), aux = jax.lax.scan(body, (x, carried, cache), layers)
        return x, cache, aux
    auxes, apart = [], list(cache) if isinstance(cache, list) else None
    params = layers.params if listed else unstack(layers.params)
    for i in range(layers.index.shape[0]):
        rest = jax.tree.map(lambda a, i=i: a[i], layers._replace(params=None))
        rest = rest._replace(params=params[i])
        if apart is None:
            (x, carried, cache), aux = body((x, carried, cache), rest)
        else:
            here = x, carried, apart[i]
            (x, carried, apart[i]), aux = body(here, rest._replace(slot=0))
        auxes.append(aux)
    aux = None if auxes[0] is None else jax.tree.map(lambda *a: jnp.stack(a), *auxes)
    return x, cache if apart is None else apart, aux
