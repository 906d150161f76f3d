"""Blocks: one pre-norm block, and stacks of equal blocks, scanned over or unrolled."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.attention import kind_of
from moejax.attention.contract import ALL, Call, Where
from moejax.config import ComputeConfig, ModelConfig, ObjectiveConfig
from moejax.models import hyper_connections as hc
from moejax.moe import layer as moe_layer
from moejax.moe.experts import ffn, ffn_param_specs, of_dense
from moejax.norm import norm, norm_specs
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
    where: Where
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
      slot: its position in the cache of its layer kind.
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
        "attn": kind_of(cfg.attention).specs(cfg),
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


def locate(tokens_BS, cfg: ModelConfig, positions_BS=None, segment_ids_BS=None) -> Where:
    """Positions (counted from 0 if not given), documents and rotation for a batch."""
    if positions_BS is None:
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1])[None], tokens_BS.shape)
    rotation = kind_of(cfg.attention).rotation(cfg, positions_BS)
    return Where(positions_BS, segment_ids_BS, rotation)


class Carried(NamedTuple):
    """What one block passes on to the next besides the hidden state; each is None where nothing is.

    Attributes:
      router: what the MoE layer before passed on, see `moe.layer.nothing_carried`.
      attention: what the layer before passed on, see `AttentionKind.carries`.
      losses: those of the layers before, see `AttentionKind.losses`.
    """

    router: Any = None
    attention: Any = None
    losses: dict[str, jax.Array] | None = None


def nothing_carried(x, ctx: Context, cache=None) -> Carried:
    """What the first block receives: zeros, of the right shape. `cache`: as for `AttentionKind.carries`."""
    cfg, layout = ctx.cfg, ctx.layout
    router = moe_layer.nothing_carried(x, cfg) if cfg.num_moe_layers else None
    if router is not None:
        router = constrain(router, layout, None)
    rows, queries = x.shape[:2]
    shape = kind_of(cfg.attention).carries(cfg, rows, queries, cache)
    attention = None
    if shape is not None:
        attention = constrain(jnp.zeros(shape.shape, shape.dtype), layout, None)
    return Carried(router, attention, no_losses(x, ctx))


def no_losses(x, ctx: Context) -> dict[str, jax.Array]:
    """A zero for each loss of attention."""
    kind, wide = kind_of(ctx.cfg.attention), jnp.promote_types(x.dtype, jnp.float32)
    names = kind.losses(ctx.cfg, ctx.objective) if ctx.objective else ()
    return {name: jnp.zeros((), wide) for name in names}


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
    layer_kind: str = ALL,
    carried: Carried = Carried(),  # noqa: B008 (immutable)
    cache=None,
    stack=None,
):
    """One pre-norm block.

    Args:
      x: the state, BSD; [B,S,I,D] with several streams.
      layer, ctx: see there.
      layer_kind: static, of its attention.
      carried: what the block before passed on.
      cache: of the layers of this kind, or None.
      stack: the experts of all layers and this layer's index among them, see `routed_ffn`.

    Returns:
      x, what the next block receives, the cache, and MoEAux or None.
    """
    p, cfg = layer.params, ctx.cfg
    h, write = hc.read(p.get("attn_streams"), x, cfg)
    h = norm(p["attn_norm"], h, cfg.norm_eps)
    call = Call(
        ctx.where,
        layer_kind=layer_kind,
        window=layer.window,
        cache=cache,
        slot=layer.slot,
        prefill=ctx.prefill,
        block=ctx.compute.attention_block,
        carried=carried.attention,
        mask_BS=ctx.mask_BS,
        objective=ctx.objective,
    )
    attended = kind_of(cfg.attention).attend(p["attn"], h, cfg, call)
    losses, new = carried.losses or {}, attended.losses or {}
    losses = {name: total + new.get(name, 0.0) for name, total in losses.items()}
    cache, carried = attended.cache, Carried(carried.router, attended.carried, losses)
    x = constrain(write(attended.y_BSD), ctx.layout)
    h, write = hc.read(p.get("ffn_streams"), x, cfg)
    h = norm(p["ffn_norm"], h, cfg.norm_eps)
    if "moe" not in p:
        with jax.named_scope("ffn"):
            y = ffn(p["ffn"], h, of_dense(cfg))
        return constrain(write(y), ctx.layout), carried, cache, None
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
        carried_BSW=carried.router,
    )
    if aux.carry_BSW is not None:
        carried = carried._replace(router=constrain(aux.carry_BSW, ctx.layout, None))
    aux = aux._replace(carry_BSW=None, inputs_BSD=h if ctx.keep_inputs else None)
    return constrain(write(y), ctx.layout), carried, cache, aux


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


def run_blocks(
    x: jax.Array,
    layers: LayerInput,
    ctx: Context,
    *,
    layer_kind: str,
    carried: Carried,
    cache=None,
    stack=None,
):
    """A stack (or list) of blocks of one layer kind.

    Returns x, what the next block receives, the cache, and aux stacked over layers or None.

    `stack`: the stack that the experts of a list of layers lie in, and the place of the first one.
    """

    def body(carry, layer):
        x, carried, kv = carry
        here = None if stack is None else (stack[0], stack[1] + layer.index - layers.index[0])
        x, carried, kv, aux = block(
            x, layer, ctx, layer_kind=layer_kind, carried=carried, cache=kv, stack=here
        )
        return (x, carried, kv), aux

    listed = isinstance(layers.params, list)
    unrolled = listed or not ctx.compute.scan_layers
    if isinstance(cache, list) and not unrolled:
        raise TypeError(
            "a list of caches (init_layers) needs lists of layers (unstack) or scan_layers=False"
        )
    is_moe = "moe" in (layers.params[0] if listed else layers.params)
    if is_moe and not listed:
        stack = layers.params["moe"]["experts"], 0
    if cache is None:
        body = rematerialised(body, ctx.compute, prevent_cse=unrolled)
    if not unrolled:
        (x, carried, cache), aux = jax.lax.scan(body, (x, carried, cache), layers)
        return x, carried, cache, aux
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
    return x, carried, cache if apart is None else apart, aux
