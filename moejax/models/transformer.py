"""The decoder: embedding, blocks (dense, then MoE), final norm, head. A pure function of its parameters.

    params = {"embed": .., "dense_blocks": .., "moe_blocks": .., "streams_head": .., "final_norm": ..,
              "head": .., "mtp": ..}

and for each layer kind of the attention with parameters of its own "<layer kind>_attn", a stack of these.
Blocks of one kind are stacked on a leading layer axis and scanned over (`compute.scan_layers`) or unrolled.
A *list* of per-layer trees (`unstack`) is unrolled too: decoding uses it, so that no layer's weights are
copied out of a stack for every token. The experts may stay one stack, `params["experts"]`, of which each layer
reads its own.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax import axes
from moejax.attention import kind_of
from moejax.config import ComputeConfig, ConfigError, ModelConfig, ObjectiveConfig
from moejax.models import blocks, embedding
from moejax.models import hyper_connections as hc
from moejax.models.blocks import Context, LayerInput, constrain, locate, nothing_carried
from moejax.models.cache import layers_of_kinds, of_layers, with_layers
from moejax.models.embedding import logits as logits  # the other half of a forward pass
from moejax.models.mtp import mtp_specs
from moejax.moe.layer import MoEAux
from moejax.norm import norm_specs
from moejax.params import init_params, stack
from moejax.routers.contract import BatchTotals


class Output(NamedTuple):
    """Attributes:
    hidden_BSD: after the final norm, as the head reads it.
    trunk: what multi-token prediction goes on from: hidden_BSD, or several streams before their head.
    aux: `{"moe_blocks": MoEAux stacked over layers}`, empty for a dense model.
    cache: the cache, or None.
    losses: those of attention by name, sums over tokens and layers.
    """

    hidden_BSD: jax.Array
    trunk: jax.Array
    aux: dict[str, MoEAux]
    cache: Any
    losses: dict[str, jax.Array]


def param_specs(cfg: ModelConfig) -> dict:
    """Specs of every parameter of the model."""
    specs = embedding.param_specs(cfg)
    dense = cfg.num_layers - cfg.num_moe_layers
    if dense:
        specs["dense_blocks"] = stack(blocks.block_specs(cfg, False), dense)
    if cfg.num_moe_layers:
        specs["moe_blocks"] = stack(blocks.block_specs(cfg, True), cfg.num_moe_layers)
    specs |= {name: stack(own, len(layers)) for name, (own, layers) in _own(cfg).items()}
    if cfg.streams.count > 1:
        specs["streams_head"] = hc.head_specs(cfg)
    specs["final_norm"] = norm_specs(cfg.d_model, cfg.norm, axes.EMBED)
    if cfg.mtp_depth:
        specs["mtp"] = stack(mtp_specs(cfg), cfg.mtp_depth)
    return specs


def _own(cfg: ModelConfig) -> dict[str, tuple[dict, list[int]]]:
    """Name of the stack -> (specs of a layer, its layers), of layer kinds with parameters of their own."""
    own_specs = kind_of(cfg.attention).own_specs
    every = {name: (own_specs(cfg, name), at) for name, at in layers_of_kinds(cfg).items()}
    return {own_stack(name): of for name, of in every.items() if of[0]}


def own_stack(layer_kind: str) -> str:
    """Name of the stack of what only layers of this kind have in their attention."""
    return f"{layer_kind}_attn"


def stacks(cfg: ModelConfig) -> dict[str, Sequence[int]]:
    """The layers of each stack of parameters, in order; those past the last are the depths of MTP."""
    depths = range(cfg.num_layers, cfg.num_layers + cfg.mtp_depth)
    return {**cfg.layers, **{name: at for name, (_, at) in _own(cfg).items()}, "mtp": depths}


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


def unstack(params: dict, *, but_experts: bool = False) -> dict:
    """The same parameters with every stack of blocks as a list of layers; `but_experts` leaves the experts a
    stack, of which no copy is made."""
    params = dict(params)
    if but_experts and "moe_blocks" in params:
        block = params["moe_blocks"]
        rest = {k: v for k, v in block["moe"].items() if k != "experts"}
        params["moe_blocks"] = {**block, "moe": rest}
        params["experts"] = block["moe"]["experts"]
    stacked = lambda name: name.endswith(("_blocks", own_stack("")))  # noqa: E731
    return {k: blocks.unstack(v) if stacked(k) else v for k, v in params.items()}


class _Run(NamedTuple):
    """Layers of one kind that follow each other.

    Attributes:
      stack: their stack of blocks.
      layer_kind: of their attention.
      start, count: the first one's number in the model, and how many there are.
      slot: the first one's place among the layers of this layer kind.
    """

    stack: str
    layer_kind: str
    start: int
    count: int
    slot: int


def _runs(cfg: ModelConfig) -> list[_Run]:
    stack_of = {i: name for name, every in cfg.layers.items() for i in every}
    kinds = layers_of_kinds(cfg)
    kind_and_slot = {i: (k, n) for k, every in kinds.items() for n, i in enumerate(every)}
    runs = []
    for (name, kind), group in itertools.groupby(
        range(cfg.num_layers), lambda i: (stack_of[i], kind_and_slot[i][0])
    ):
        layers = list(group)
        runs.append(_Run(name, kind, layers[0], len(layers), kind_and_slot[layers[0]][1]))
    return runs


def _pieces(stack, counts: list[int]) -> Iterator:
    """A stack (or list) of layers cut into runs. Split, not indexed, see `blocks.unstack`."""
    if isinstance(stack, list):
        ends = list(itertools.accumulate(counts))
        return iter([stack[end - n : end] for n, end in zip(counts, ends)])
    if len(counts) < 2:
        return iter([stack])
    leaves, structure = jax.tree.flatten(stack)
    parts = [jax.lax.split(jnp.asarray(a), counts) for a in leaves]
    return iter([structure.unflatten([part[i] for part in parts]) for i in range(len(counts))])


def _with_own(blocks, own):
    """Blocks (stacked, or a list) with what only their layer kind has in its attention."""
    if isinstance(blocks, list):
        return [_with_own(*of) for of in zip(blocks, own)]
    return {**blocks, "attn": {**blocks["attn"], **own}}


def _with_experts(layers, experts: dict, at: int) -> list[dict]:
    """The layers with their experts out of the stack. What is not read out of these slices is not made."""
    return [
        {**p, "moe": {**p["moe"], "experts": jax.tree.map(lambda a, i=i: a[at + i], experts)}}
        for i, p in enumerate(layers)
    ]


def _check_padding(mask_BS) -> None:
    """What is in front would be seen by the tokens behind it, and take their positions."""
    if isinstance(mask_BS, jax.core.Tracer) or not getattr(mask_BS, "is_fully_addressable", True):
        return
    mask_BS = np.asarray(mask_BS) > 0
    if wrong := np.flatnonzero((mask_BS[:, 1:] & ~mask_BS[:, :-1]).any(axis=1)).tolist():
        raise ValueError(
            f"mask_BS has padding in front of a token in row {wrong[0]}: pad on the right, or give "
            "positions_BS and segment_ids_BS (0 = padding)"
        )


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
    cache: Any = None,
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
      positions_BS: within each document, whose tokens lie next to each other, in order; 0, 1, 2, .. if None.
      segment_ids_BS: document of each token (0 = padding); None: one document per row.
      mask_BS: 1 = token, 0 = padding; None: from segment_ids_BS, else all ones. Without segment_ids_BS, and in
        a prefill, padding stands behind the tokens: ValueError if not, unless the values are traced.
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
    if mask_BS is not None and (segment_ids_BS is None or prefill):
        _check_padding(mask_BS)
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
    runs, auxes, first = _runs(cfg), [], None
    if cache is not None and not prefill:
        first = cache[0] if isinstance(cache, list) else cache[runs[0].layer_kind]
    carried = nothing_carried(x, ctx, first)
    counts = lambda key: [r.count for r in runs if key in (r.stack, own_stack(r.layer_kind))]  # noqa: E731
    pieces = {name: _pieces(params[name], counts(name)) for name in stacks(cfg) if name in params}
    of_moe = dict(
        state=router_state.get("moe_blocks", {}),
        stats=None if totals is None else totals.stats,
        forced_TK=forced_LTK,
    )
    routers = _pieces(of_moe, counts("moe_blocks"))
    for run in runs:
        end = run.start + run.count
        index_L = jnp.arange(run.start, end)
        window_L = None
        if cfg.attention.windows:
            window_L = jnp.array([cfg.attention.window(i) for i in range(run.start, end)])
        of_run = next(pieces[run.stack])
        if own_stack(run.layer_kind) in pieces:
            of_run = _with_own(of_run, next(pieces[own_stack(run.layer_kind)]))
        is_moe, stack = run.stack == "moe_blocks", None
        if is_moe and "experts" in params:
            stack = params["experts"], list(cfg.layers["moe_blocks"]).index(run.start)
            of_run = _with_experts(of_run, *stack)
        slot_L = jnp.arange(run.slot, run.slot + run.count)
        layers = LayerInput(of_run, index_L, slot_L, window=window_L)
        if is_moe:
            layers = layers._replace(**next(routers))
        here = run.layer_kind, run.start, end
        x, carried, new, layer_aux = blocks.run_blocks(
            x,
            layers,
            ctx,
            layer_kind=run.layer_kind,
            carried=carried,
            cache=of_layers(cache, *here),
            stack=stack,
        )
        cache = with_layers(cache, *here, new)
        if is_moe:
            auxes.append(layer_aux)
    aux = dict(moe_blocks=auxes[0]) if auxes else {}
    if len(auxes) > 1:
        aux["moe_blocks"] = jax.tree.map(lambda *a: jnp.concatenate(a), *auxes)
    hidden_BSD = hc.head(params.get("streams_head"), x, cfg)
    hidden_BSD = embedding.last_norm(params["final_norm"], hidden_BSD, cfg)
    trunk = hidden_BSD if cfg.streams.count == 1 else x
    return Output(hidden_BSD, trunk, aux, cache, carried.losses or {})
