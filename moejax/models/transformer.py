"""The decoder: embedding, blocks (dense, then MoE), final norm, head. A pure function of its parameters.

    params = {"embed": .., "dense_blocks": .., "moe_blocks": .., "final_norm": .., "head": .., "mtp": ..}

Blocks of one kind are stacked on a leading layer axis and scanned over (`cfg.scan_layers`) or unrolled.
A *list* of per-layer trees (`unstack`) is unrolled too: decoding uses it, so that no layer's weights are
copied out of a stack for every token.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import ModelConfig
from moejax.models import attention as attn
from moejax.models.norm import norm, norm_specs
from moejax.models.rope import rotation
from moejax.moe import layer as moe_layer
from moejax.moe.experts import ffn, ffn_param_specs
from moejax.moe.routers import ROUTERS
from moejax.moe.routing import BatchTotals
from moejax.params import ParamSpec, stack


class Output(NamedTuple):
    """Attributes:
    hidden_BSD: after the final norm.
    aux: `{"moe_blocks": MoEAux stacked over layers}`, empty for a dense model.
    cache: the cache, or None.
    """

    hidden_BSD: jax.Array
    aux: dict[str, moe_layer.MoEAux]
    cache: Any


def block_specs(cfg: ModelConfig, is_moe: bool) -> dict:
    specs = {
        "attn_norm": norm_specs(cfg.d_model, cfg.norm, axes.EMBED),
        "attn": attn.param_specs(cfg),
        "ffn_norm": norm_specs(cfg.d_model, cfg.norm, axes.EMBED),
    }
    if is_moe:
        specs["moe"] = moe_layer.param_specs(cfg)
    else:
        specs["ffn"] = ffn_param_specs(
            cfg.d_model, cfg.d_ff, cfg.activation, cfg.ffn_bias, cfg.init_std
        )
    return specs


def param_specs(cfg: ModelConfig) -> dict:
    """Specs of every parameter of the model."""
    v, d, std = cfg.vocab_size, cfg.d_model, cfg.init_std
    specs: dict = {"embed": {"tokens": ParamSpec((v, d), (axes.VOCAB, axes.EMBED), std=std)}}
    if cfg.positions == "learned":
        specs["embed"]["positions"] = ParamSpec(
            (cfg.max_seq_len, d), (None, axes.EMBED), std=std, role="embedding"
        )
    dense = cfg.num_layers - cfg.num_moe_layers
    if dense:
        specs["dense_blocks"] = stack(block_specs(cfg, False), dense)
    if cfg.num_moe_layers:
        specs["moe_blocks"] = stack(block_specs(cfg, True), cfg.num_moe_layers)
    specs["final_norm"] = norm_specs(d, cfg.norm, axes.EMBED)
    if not cfg.tie_embeddings:
        specs["head"] = ParamSpec((d, v), (axes.EMBED, axes.VOCAB), std=std)
    if cfg.mtp_depth:
        from moejax.models.mtp import mtp_specs

        specs["mtp"] = stack(mtp_specs(cfg), cfg.mtp_depth)
    return specs


def init_router_state(cfg: ModelConfig) -> dict:
    """State that rules update, stacked over layers; `{}` where there is none."""
    state = {}
    for name, layers in (("moe_blocks", cfg.num_moe_layers), ("mtp", cfg.mtp_depth)):
        if layers and cfg.moe.num_experts:
            one = ROUTERS[cfg.moe.router].init_state(cfg.moe)
            state[name] = jax.tree.map(lambda a, n=layers: jnp.stack([a] * n), one)
    return state


def update_router_state(state: dict, loads: dict, cfg: ModelConfig) -> dict:
    """Every layer's state after one optimiser step, from the step's global loads (name -> load_LE)."""
    if not cfg.moe.num_experts:
        return state
    update = ROUTERS[cfg.moe.router].update_state
    return {
        name: jax.vmap(lambda s, load_E: update(s, load_E, cfg.moe))(s, loads[name]) if s else s
        for name, s in state.items()
    }


def unstack(params: dict) -> dict:
    """The same parameters with every stack of blocks as a list of layers."""
    return {k: _layers(v) if k.endswith("_blocks") else v for k, v in params.items()}


def _layers(stacked) -> list:
    """A stack of layers as a list. Split, not indexed: the gradient is one concatenation instead of a sum
    of stacks, each of them zero but for one layer."""
    leaves, structure = jax.tree.flatten(stacked)
    n = leaves[0].shape[0]
    parts = [jax.lax.split(a, (1,) * n) for a in leaves]
    return [structure.unflatten([part[i][0] for part in parts]) for i in range(n)]


def embed(params: dict, tokens_BS, positions_BS, cfg: ModelConfig) -> jax.Array:
    x_BSD = params["embed"]["tokens"][tokens_BS].astype(cfg.dtype)
    if cfg.positions == "learned":
        x_BSD = x_BSD + params["embed"]["positions"][positions_BS].astype(cfg.dtype)
    return x_BSD


def head_weights(params: dict) -> jax.Array:
    """The head as [D, V], tied or not."""
    return params["head"] if "head" in params else params["embed"]["tokens"].T


def logits(params: dict, hidden_BSD: jax.Array) -> jax.Array:
    """float32 logits over the vocabulary; for a few positions, not for training (see `loss`)."""
    w = head_weights(params).astype(hidden_BSD.dtype)
    dtype = jnp.promote_types(hidden_BSD.dtype, jnp.float32)
    return jnp.dot(hidden_BSD, w, preferred_element_type=dtype)


class LayerInput(NamedTuple):
    """What differs from layer to layer besides the hidden state; scanned over.

    Attributes:
      params: this layer's parameters.
      state: this layer's router state.
      index: of this layer in the model.
      slot: its position in the cache.
      window: sliding window, or None.
      load: (load_E, group_load_G) of the global batch, or (None, None).
      replay_TK: expert indices to force, or None.
    """

    params: dict
    state: dict
    index: Any
    slot: Any
    window: Any
    load: tuple
    replay_TK: Any


def block(
    x_BSD, layer: LayerInput, cfg: ModelConfig, where, *, cache=None, prefill=False, **moe_args
):
    """One pre-norm block. Returns (x_BSD, cache, MoEAux or None)."""
    p, layout = layer.params, moe_args.pop("layout", None)
    h = norm(p["attn_norm"], x_BSD, cfg.norm_eps)
    y, cache = attn.attention(
        p["attn"],
        h,
        cfg,
        where,
        window=layer.window,
        cache=cache,
        layer=layer.slot,
        prefill=prefill,
    )
    x_BSD = _constrain(x_BSD + y, layout)
    h = norm(p["ffn_norm"], x_BSD, cfg.norm_eps)
    if "moe" not in p:
        y = ffn(p["ffn"], h, cfg.activation, cfg.moe.activation_limit)
        return _constrain(x_BSD + y, layout), cache, None
    totals, key = moe_args.pop("totals", None), moe_args.pop("key", None)
    if totals is not None:
        totals = BatchTotals(totals.num_tokens, totals.num_sequences, *layer.load)
    y, aux = moe_layer.moe(
        p["moe"],
        layer.state,
        h,
        cfg,
        totals=totals,
        key=None if key is None else jax.random.fold_in(key, layer.index),
        replay_TK=layer.replay_TK,
        layout=layout,
        **moe_args,
    )
    return _constrain(x_BSD + y, layout), cache, aux


def _constrain(x_BSD, layout):
    return (
        x_BSD if layout is None else layout.constrain(x_BSD, axes.BATCH, axes.SEQ, axes.ACT_EMBED)
    )


REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def run_blocks(x_BSD, layers: LayerInput, cfg: ModelConfig, where, *, cache=None, **args):
    """A stack (or list) of equal blocks. Returns (x_BSD, cache, aux stacked over layers or None)."""

    def body(carry, layer):
        x, kv = carry
        stack = None if experts is None else (experts, layer.index - layers.index[0])
        x, kv, aux = block(x, layer, cfg, where, cache=kv, stack=stack, **args)
        return (x, kv), aux

    listed = isinstance(layers.params, list)
    unrolled = listed or not cfg.scan_layers
    if isinstance(cache, list) and not unrolled:
        raise TypeError(
            "a list of caches (init_layers) needs lists of layers (unstack) or scan_layers=False"
        )
    experts = None if listed or "moe" not in layers.params else layers.params["moe"]["experts"]
    if cfg.remat != "none" and cache is None:
        body = jax.checkpoint(body, policy=REMAT_POLICIES[cfg.remat], prevent_cse=unrolled)
    if not unrolled:
        (x_BSD, cache), aux = jax.lax.scan(body, (x_BSD, cache), layers)
        return x_BSD, cache, aux
    auxes, apart = [], list(cache) if isinstance(cache, list) else None
    params = layers.params if listed else _layers(layers.params)
    for i in range(layers.index.shape[0]):
        rest = jax.tree.map(lambda a, i=i: a[i], layers._replace(params=None))
        rest = rest._replace(params=params[i])
        if apart is None:
            (x_BSD, cache), aux = body((x_BSD, cache), rest)
        else:
            (x_BSD, apart[i]), aux = body((x_BSD, apart[i]), rest._replace(slot=0))
        auxes.append(aux)
    aux = None if auxes[0] is None else jax.tree.map(lambda *a: jnp.stack(a), *auxes)
    return x_BSD, cache if apart is None else apart, aux


def locate(tokens_BS, cfg: ModelConfig, positions_BS=None, segment_ids_BS=None) -> attn.Where:
    """Positions (counted from 0 if not given), documents and rotation for a batch."""
    if positions_BS is None:
        positions_BS = jnp.broadcast_to(jnp.arange(tokens_BS.shape[1])[None], tokens_BS.shape)
    a = cfg.attention
    width = a.qk_rope_head_dim if a.kind == "mla" else a.head_dim
    cos_sin = rotation(positions_BS, a.rope, width) if cfg.positions == "rope" else None
    return attn.Where(positions_BS, segment_ids_BS, cos_sin)


def forward(
    params: dict,
    router_state: dict,
    tokens_BS: jax.Array,
    cfg: ModelConfig,
    *,
    positions_BS: jax.Array | None = None,
    segment_ids_BS: jax.Array | None = None,
    mask_BS: jax.Array | None = None,
    totals: BatchTotals | None = None,
    replay_LTK: jax.Array | None = None,
    cache=None,
    prefill: bool = False,
    layout=None,
    key: jax.Array | None = None,
) -> Output:
    """Hidden states of every position.

    Args:
      params: values of `param_specs(cfg)`; stacks of blocks may be lists of layers.
      router_state: from `init_router_state`.
      tokens_BS: int32.
      cfg: the model's config (static).
      positions_BS: within each document; 0, 1, 2, .. if None.
      segment_ids_BS: document of each token (0 = padding); None: one document per row.
      mask_BS: 1 = token, 0 = padding; None: from segment_ids_BS, else all ones.
      totals: of the global batch, loads stacked over layers, when this is one micro-batch of it.
      replay_LTK: expert indices to force in each MoE layer.
      cache: from `init_cache`, or with lists of layers from `init_layers`; see `prefill`.
      prefill: static; True if the cache is empty and positions are 0, 1, 2, ..
      layout: `moejax.sharding.Layout`, None on one device.
      key: for routers that draw random numbers.
    """
    if mask_BS is None and segment_ids_BS is not None:
        mask_BS = segment_ids_BS > 0
    where = locate(tokens_BS, cfg, positions_BS, segment_ids_BS)
    x_BSD = _constrain(embed(params, tokens_BS, where.positions_BS, cfg), layout)
    args = dict(prefill=prefill, layout=layout, mask_BS=mask_BS, token_ids_BS=tokens_BS, key=key)
    first_moe = cfg.num_layers - cfg.num_moe_layers
    aux = {}
    for name, start, count in (
        ("dense_blocks", 0, first_moe),
        ("moe_blocks", first_moe, cfg.num_moe_layers),
    ):
        if not count:
            continue
        is_moe = name == "moe_blocks"
        index_L = jnp.arange(start, start + count)
        window_L = None
        if cfg.attention.windows:
            window_L = jnp.array([cfg.attention.window(i) for i in range(start, start + count)])
        loads = (totals.load_E, totals.group_load_G) if is_moe and totals else (None, None)
        state = router_state.get(name, {}) if is_moe else {}
        replay = replay_LTK if is_moe else None
        layers = LayerInput(params[name], state, index_L, index_L, window_L, loads, replay)
        extra = dict(totals=totals) if is_moe else {}
        here = cache[start : start + count] if isinstance(cache, list) else cache
        x_BSD, here, layer_aux = run_blocks(x_BSD, layers, cfg, where, cache=here, **args, **extra)
        if isinstance(cache, list) and isinstance(here, list):
            cache = [*cache[:start], *here, *cache[start + count :]]
        else:
            cache = here
        if is_moe:
            aux[name] = layer_aux
    return Output(norm(params["final_norm"], x_BSD, cfg.norm_eps), aux, cache)
