"""DeepSeek's sparse attention (DeepSeek-V3.2, 2512.02556 section 2.1): latent attention among chosen keys.

An indexer scores every key for a query, and the query attends to the `index_topk` best. Layers may share a
choice: those of `index_shared_at` have no indexer and take what the layer before chose (2603.12201). Where
there are no more keys than `index_topk`, this is 'mla'.

The choice has no gradient. With `objective.index_loss` the indexer learns to rank keys as attention does, from
inputs without gradient: nothing but its own parameters learns from that loss, and they from nothing else.

Here: J heads of the indexer, I width of each.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.attention import mla
from moejax.attention.contract import Attended, Attention, AttentionKind, Call, Slots
from moejax.attention.core import named_linear, seen, turned
from moejax.attention.index_loss import INDEX, index_loss
from moejax.attention.rope import rotate
from moejax.attention.selection import Index, choose, chosen, gathered, num_bytes
from moejax.config import AttentionConfig, ModelConfig
from moejax.norm import norm, norm_specs
from moejax.options import Problems
from moejax.params import ParamSpec

INDEXED, SHARED = "indexed", "shared"
INDEX_NORM_EPS = 1e-6  # whatever config.json's rms_norm_eps says


def layer_kind(cfg: ModelConfig, layer: int) -> str:
    return SHARED if layer in cfg.attention.index_shared_at else INDEXED


def own_specs(cfg: ModelConfig, layer_kind: str) -> dict:
    """The indexer. Its weights of heads are computed in float32, as a router's scores are."""
    a, d, std = cfg.attention, cfg.d_model, cfg.init_std
    if layer_kind == SHARED:
        return {}
    width = a.index_heads * a.index_head_dim
    heads = ParamSpec((d, a.index_heads), (axes.EMBED, axes.HEADS), std=std, role="router")
    return {
        "indexer": {
            "w_q": ParamSpec((a.q_lora_rank, width), (axes.LATENT, axes.HEADS), std=std),
            "w_k": ParamSpec((d, a.index_head_dim), (axes.EMBED, None), std=std),
            "k_norm": norm_specs(a.index_head_dim, "layernorm"),
            "w_heads": heads,
        }
    }


def _key(indexer: dict, x_BSD, cfg: ModelConfig, cos_sin) -> jax.Array:
    key = norm(indexer["k_norm"], named_linear(indexer, x_BSD, "k"), INDEX_NORM_EPS)
    return rotate(key[:, :, None], cos_sin, cfg.attention.index_interleaved)[:, :, 0]


def _index(indexer: dict, x_BSD, latent_BSC, k_BTI, cfg: ModelConfig, cos_sin) -> Index:
    """Queries, their weights with the scales J^-1/2 I^-1/2, and these keys."""
    a = cfg.attention
    q = named_linear(indexer, latent_BSC, "q").reshape(*x_BSD.shape[:2], a.index_heads, -1)
    q = rotate(q, cos_sin, a.index_interleaved)
    wide = jnp.promote_types(x_BSD.dtype, jnp.float32)
    w_BSJ = named_linear(indexer, x_BSD.astype(wide), "heads")
    return Index(q, w_BSJ * (a.index_heads * a.index_head_dim) ** -0.5, k_BTI)


@jax.named_scope("attention")
def _attend(params: dict, x_BSD: jax.Array, cfg: ModelConfig, call: Call) -> Attended:
    a, cos_sin, indexer = cfg.attention, turned(cfg, call), params.get("indexer")
    q, bits, index = mla.project(params, x_BSD, cfg, cos_sin), call.carried, None
    new, losses = q.keys, {}
    still_BSD, latent_BSC = jax.lax.stop_gradient((x_BSD, q.latent_BSC))
    if indexer is not None:
        new = {**new, "index_key": _key(indexer, still_BSD, cfg, cos_sin)}
    keys, cache, sight, cached = seen(new, call)
    if indexer is not None:
        index = _index(indexer, still_BSD, latent_BSC, keys["index_key"], cfg, cos_sin)
    length = keys["latent"].shape[1]
    if length > a.index_topk:
        if index is not None:
            bits = choose(index, sight, a.index_topk, call.block)
        if cached and x_BSD.shape[1] == 1:
            latents = {name: keys[name] for name in ("latent", "rope_key")}
            keys, sight = gathered(latents, bits, sight, a.index_topk)
        elif call.objective is None or not call.objective.index_dense:
            sight = sight._replace(chosen=chosen(bits, length))
    if index is not None and call.objective is not None and call.objective.index_loss:
        query, key = mla.of_heads(params, q, keys, a)
        loss = index_loss(index, query, key, mla.scale(a), sight, call.mask_BS, call.block)
        losses = {INDEX: call.objective.index_loss / _indexers(cfg) * loss}
    out_BSNH = mla.among(params, q, keys, sight, a, call.block, absorbed=cached)
    y_BSD = named_linear(params, out_BSNH.reshape(*x_BSD.shape[:2], -1), "o")
    return Attended(y_BSD, cache, bits if a.index_shared_at else None, losses)


def _indexers(cfg: ModelConfig) -> int:
    """Layers with an indexer, depths of multi-token prediction included."""
    return cfg.num_layers - len(cfg.attention.index_shared_at) + cfg.mtp_depth


def _carries(cfg: ModelConfig, rows: int, queries: int, cache: dict | None):
    keys = queries if cache is None else cache["latent"].shape[-2]
    if keys <= cfg.attention.index_topk or not cfg.attention.index_shared_at:
        return None
    return jax.ShapeDtypeStruct((rows, queries, num_bytes(keys)), jnp.uint8)


def _cache(cfg: ModelConfig, layer_kind: str, rows: int, tokens: int) -> dict[str, Slots]:
    out = mla.cache(cfg, layer_kind, rows, tokens)
    if layer_kind == INDEXED:
        shape = (rows, tokens, cfg.attention.index_head_dim)
        out["index_key"] = Slots(shape, (axes.BATCH, None, None))
    return out


def _cost(cfg: ModelConfig, layer_kind: str) -> Attention:
    """Chosen latents are attended absorbed, in training too, as published kernels do."""
    a, latent = cfg.attention, mla.cost(cfg, layer_kind)
    out = dataclasses.replace(latent, macs=latent.decode_macs, topk=a.index_topk)
    if layer_kind == SHARED:
        return out
    return dataclasses.replace(
        out, index_macs=a.index_heads * a.index_head_dim, index_cache=a.index_head_dim
    )


def _saved(cfg: ModelConfig, number: float, tensor: float) -> float:
    """The indexer's loss computes again what it needs, and the choice is bits."""
    return mla.saved(cfg, number, tensor)


def _sizes(a: AttentionConfig) -> list[tuple[str, str, int]]:
    return [*mla.sizes(a), (axes.HEADS, "model.attention.index_heads", a.index_heads)]


def _problems(cfg: ModelConfig, p: str) -> list[str]:
    out, a = Problems(mla.problems(cfg, p)), cfg.attention
    for key in ("q_lora_rank", "index_heads", "index_head_dim", "index_topk"):
        out.need(
            getattr(a, key) > 0,
            f"{p}attention.{key}={getattr(a, key)} must be positive for {a.kind!r}",
        )
    out.need(
        a.index_head_dim >= a.qk_rope_head_dim,
        f"{p}attention.index_head_dim={a.index_head_dim} must be at least {p}attention.qk_rope_head_dim="
        f"{a.qk_rope_head_dim}: so many channels of the indexer are rotated",
    )
    at = a.index_shared_at
    out.need(
        at == tuple(i for i in range(1, cfg.num_layers) if i in at),
        f"{p}attention.index_shared_at={at} must be numbers of layers, in order, between 1 (the first layer "
        f"has nothing to share) and {p}num_layers - 1 = {cfg.num_layers - 1}",
    )
    return out


KIND = AttentionKind(
    specs=mla.specs,
    attend=_attend,
    cache=_cache,
    rotation=mla.rotation,
    widths=mla.widths,
    cost=_cost,
    saved=_saved,
    sizes=_sizes,
    problems=_problems,
    reads=mla.READS
    | {"index_heads", "index_head_dim", "index_topk", "index_interleaved", "index_shared_at"},
    layer_kind=layer_kind,
    own_specs=own_specs,
    carries=_carries,
    losses=lambda cfg, objective: (INDEX,) if objective.index_loss else (),
    objectives=frozenset({"index_loss", "index_dense"}),
)
