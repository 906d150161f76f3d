"""The decoder: embedding, blocks (dense, then MoE), final norm, head. A pure function of its parameters.

    params = {"embed": .., "dense_blocks": .., "moe_blocks": .., "streams_head": .., "final_norm": ..,
              "head": .., "mtp": ..}

Blocks of one kind are stacked on a leading layer axis and scanned over (`compute.scan_layers`) or unrolled.
A *list* of per-layer trees (`unstack`) is unrolled too: decoding uses it, so that no layer's weights are
copied out of a stack for every token.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import ComputeConfig, ConfigError, ModelConfig, ObjectiveConfig
from moejax.models import blocks, embedding
from moejax.models import hyper_connections as hc
from moejax.models.blocks import Context, LayerInput, constrain, locate
from moejax.models.embedding import logits as logits  # the other half of a forward pass
from moejax.models.mtp import mtp_specs
from moejax.models.norm import norm_specs
from moejax.moe.layer import MoEAux
from moejax.params import init_params, stack
from moejax.routers.contract import BatchTotals


class Output(NamedTuple):
    """Attributes:
    hidden_BSD: after the final norm, as the head reads it.
    trunk: what multi-token prediction goes on from: hidden_BSD, or several streams before their head.
    aux: `{"moe_blocks": MoEAux stacked over layers}`, empty for a dense model.
    cache: the cache, or None.
    """

    hidden_BSD: jax.Array
    trunk: jax.Array
    aux: dict[str, MoEAux]
    cache: Any


def param_specs(cfg: ModelConfig) -> dict:
    """Specs of every parameter of the model."""
    specs = embedding.param_specs(cfg)
    dense = cfg.num_layers - cfg.num_moe_layers
    if dense:
        specs["dense_blocks"] = stack(blocks.block_specs(cfg, False), dense)
    if cfg.num_moe_layers:
        specs["moe_blocks"] = stack(blocks.block_specs(cfg, True), cfg.num_moe_layers)
    if cfg.streams.count > 1:
        specs["streams_head"] = hc.head_specs(cfg)
    specs["final_norm"] = norm_specs(cfg.d_model, cfg.norm, axes.EMBED)
    if cfg.mtp_depth:
        specs["mtp"] = stack(mtp_specs(cfg), cfg.mtp_depth)
    return specs


def _router_layers(cfg: ModelConfig) -> dict[str, int]:
    """Layers with a router, by stack of blocks; MTP's count on after the trunk's."""
    layers = {"moe_blocks": cfg.num_moe_layers, "mtp": cfg.mtp_depth}
    return {name: n for name, n in layers.items() if n}


def init_router_state(cfg: ModelConfig) -> dict:
    """State that rules update, stacked over layers; `{}` where there is none."""
    if cfg.router is None:
        return {}
    state, start, static = {}, 0, cfg.router_config()
    for name, layers in _router_layers(cfg).items():
        every = [cfg.router.init_state(static, start + i) for i in range(layers)]
        state[name] = jax.tree.map(lambda *a: jnp.stack(a), *every)
        start += layers
    return state


def abstract_router_state(cfg: ModelConfig) -> dict:
    """Its shapes and dtypes, from those of one layer: as quick for a million layers."""
    if cfg.router is None:
        return {}
    init_state, static = cfg.router.init_state, cfg.router_config()
    one = jax.eval_shape(lambda: init_state(static, 0))
    return {
        name: jax.tree.map(lambda a, n=n: jax.ShapeDtypeStruct((n, *a.shape), a.dtype), one)
        for name, n in _router_layers(cfg).items()
    }


def init_model(cfg: ModelConfig, key: jax.Array) -> tuple[dict, dict]:
    """Fresh float32 parameters and router state of a model. Large ones are made sharded by
    `moejax.train.state.create_state`. ConfigError if the size of the vocabulary is still the tokenizer's."""
    if not cfg.vocab_size:
        raise ConfigError(
            "model.vocab_size=0 is a tokenizer's, and there is none here: give a number"
        )
    return init_params(param_specs(cfg), key), init_router_state(cfg)


def update_router_state(
    state: dict, stats: dict, cfg: ModelConfig, objective: ObjectiveConfig
) -> dict:
    """Every layer's state after one optimiser step, from the stats of the step's global batch (name -> stats
    stacked over layers)."""
    if cfg.router is None:
        return state
    update, static = cfg.router.update, cfg.router_config(objective)
    pooled = {
        key: sum(stats[name][key].sum(axis=0) for name in _router_layers(cfg))
        for key in cfg.router.pooled
    }
    return {
        name: jax.vmap(lambda s, seen: update(s, {**seen, **pooled}, static))(s, stats[name])
        if s
        else s
        for name, s in state.items()
    }


def unstack(params: dict) -> dict:
    """The same parameters with every stack of blocks as a list of layers."""
    return {k: blocks.unstack(v) if k.endswith("_blocks") else v for k, v in params.items()}


def _runs(cfg: ModelConfig) -> Iterator[tuple[str, int, int, int]]:
    """Layers of one kind that follow each other: (stack of blocks, first layer, its place in the stack, how
    many)."""
    place = dict.fromkeys(cfg.layers, 0)
    kinds = {i: name for name, every in cfg.layers.items() for i in every}
    for name, group in itertools.groupby(range(cfg.num_layers), kinds.__getitem__):
        layers = list(group)
        yield name, layers[0], place[name], len(layers)
        place[name] += len(layers)


def _part(start: int, count: int, whole: int):
    """A function that takes these layers out of a stack, or of a list of layers."""
    here = slice(start, start + count)

    def part(stack):
        if count == whole:
            return stack
        return stack[here] if isinstance(stack, list) else jax.tree.map(lambda a: a[here], stack)

    return part


def forward(
    params: dict,
    router_state: dict,
    tokens_BS: jax.Array,
    cfg: ModelConfig,
    *,
    compute: ComputeConfig | None = None,
    objective: ObjectiveConfig | None = None,
    positions_BS: jax.Array | None = None,
    segment_ids_BS: jax.Array | None = None,
    mask_BS: jax.Array | None = None,
    totals: BatchTotals | None = None,
    forced_LTK: jax.Array | None = None,
    cache=None,
    prefill: bool = False,
    layout=None,
    key: jax.Array | None = None,
    keep_inputs: bool = False,
) -> Output:
    """Hidden states of every position.

    Args:
      params: values of `param_specs(cfg)`; stacks of blocks may be lists of layers.
      router_state: from `init_router_state`.
      tokens_BS: int32.
      cfg: the model (static).
      compute: how it is computed (static); None: in float32, scanned.
      objective: what it is trained for (static); None: it is not, so no losses, and no route is dropped.
      positions_BS: within each document; 0, 1, 2, .. if None.
      segment_ids_BS: document of each token (0 = padding); None: one document per row.
      mask_BS: 1 = token, 0 = padding; None: from segment_ids_BS, else all ones.
      totals: of the global batch, stats stacked over layers, when this is one micro-batch of it.
      forced_LTK: expert indices to force in each MoE layer.
      cache: from `init_cache`, or with lists of layers from `init_layers`; see `prefill`.
      prefill: static; True if the cache is empty and positions are 0, 1, 2, ..
      layout: `moejax.sharding.Layout`, None on one device.
      key: for routers that draw random numbers.
      keep_inputs: static; also return what each MoE layer read, `MoEAux.inputs_BSD`.
    """
    if mask_BS is None and segment_ids_BS is not None:
        mask_BS = segment_ids_BS > 0
    ctx = Context(
        cfg=cfg,
        compute=compute or ComputeConfig(),
        objective=objective,
        where=locate(tokens_BS, cfg, positions_BS, segment_ids_BS),
        mask_BS=mask_BS,
        token_ids_BS=tokens_BS,
        totals=totals,
        layout=layout,
        key=key,
        prefill=prefill,
        keep_inputs=keep_inputs,
    )
    x_BSD = embedding.embed(params, tokens_BS, ctx.where.positions_BS, cfg, ctx.compute.dtype)
    x = constrain(hc.spread(x_BSD, cfg), layout)
    auxes = []
    for name, start, at, count in _runs(cfg):
        is_moe = name == "moe_blocks"
        part = _part(at, count, len(cfg.layers[name]))
        index_L = jnp.arange(start, start + count)
        window_L = None
        if cfg.attention.windows:
            window_L = jnp.array([cfg.attention.window(i) for i in range(start, start + count)])
        layers = LayerInput(part(params[name]), index_L, index_L, window=window_L)
        if is_moe:
            layers = layers._replace(
                state=part(router_state.get(name, {})),
                stats=None if totals is None else part(totals.stats),
                forced_TK=part(forced_LTK),
            )
        here = cache[start : start + count] if isinstance(cache, list) else cache
        x, here, layer_aux = blocks.run_blocks(x, layers, ctx, cache=here)
        if isinstance(cache, list) and isinstance(here, list):
            cache = [*cache[:start], *here, *cache[start + count :]]
        else:
            cache = here
        if is_moe:
            auxes.append(layer_aux)
    aux = dict(moe_blocks=auxes[0]) if auxes else {}
    if len(auxes) > 1:
        aux["moe_blocks"] = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
    hidden_BSD = hc.head(params.get("streams_head"), x, cfg)
    hidden_BSD = embedding.last_norm(params["final_norm"], hidden_BSD, cfg)
    return Output(hidden_BSD, hidden_BSD if cfg.streams.count == 1 else x, aux, cache)
