"""A window beside compressed keys (DeepSeek-V4, 2606.19348 section 2.3): three layer kinds.

    sliding   a query sees the last W tokens
    hca       besides (heavily compressed attention), all entries: one for every `hca_rate` tokens
    csa       besides (compressed sparse attention), of those for every `csa_rate` tokens the `index_topk` that
              an indexer picks

There is one head of keys, and keys are the values too. So what a query sees of them is turned back by its own
angle. Every head has a sink, and groups of heads have a low-rank output each. Sliding layers turn by
`rope.theta` alone, the others by `compress_theta` with YaRN, its magnitude left out.

The indexer has entries of its own, I_ts = sum_j w_tj relu(q_tj k_s) over its heads j, and learns nothing from
the model's loss. With `objective.index_loss` it learns to rank entries as attention does (`index_loss`, over
entries alone), and nothing else learns from that.

A cache keeps the last W tokens in a ring, the entries, and of the last 2m (HCA: m) tokens what an entry needs
of them, in a ring. As everywhere, what padding or a rejected guess wrote is overwritten before it is seen:
with each token the entry of its window is written anew, and only the last one's can be seen.

Here: T keys, E entries, J heads of the indexer, G groups of heads, O outputs of a group.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.attention import compress, slots
from moejax.attention.block_attention import NOWHERE, Sight
from moejax.attention.compressed_keys import Keys, see, turn
from moejax.attention.contract import Attended, Attention, AttentionKind, Call, Slots, Widths
from moejax.attention.index_loss import INDEX, index_loss
from moejax.attention.rope import rotation
from moejax.attention.selection import Index, choose, chosen
from moejax.config import AttentionConfig, ModelConfig
from moejax.linear import linear
from moejax.norm import norm, norm_specs
from moejax.options import Problems, divisors_text
from moejax.params import ParamSpec

SLIDING, CSA, HCA = "sliding", "csa", "hca"
LAYER_KINDS = (SLIDING, CSA, HCA)
READS = frozenset({
    *("head_dim", "q_lora_rank", "qk_rope_head_dim", "layer_kinds", "sliding_window", "csa_rate", "hca_rate"),
    *("compress_theta", "o_groups", "o_lora_rank", "index_heads", "index_head_dim", "index_topk"),
})  # fmt: skip


def layer_kind(cfg: ModelConfig, layer: int) -> str:
    """Of layer number `layer`; depths of multi-token prediction have a window alone."""
    return cfg.attention.layer_kinds[layer] if layer < cfg.num_layers else SLIDING


def _rate(a: AttentionConfig, kind: str) -> int:
    return a.csa_rate if kind == CSA else a.hca_rate


# --------------------------------------------------------------------------------------------------
# Parameters.


def specs(cfg: ModelConfig) -> dict:
    a, d = cfg.attention, cfg.d_model

    def matrix(rows, cols, row_axis, col_axis):
        return ParamSpec((rows, cols), (row_axis, col_axis), std=cfg.init_std)

    wide, out = a.num_heads * a.head_dim, a.o_groups * a.o_lora_rank
    return {
        "w_q_a": matrix(d, a.q_lora_rank, axes.EMBED, axes.LATENT),
        "q_norm": norm_specs(a.q_lora_rank),
        "w_q_b": matrix(a.q_lora_rank, wide, axes.LATENT, axes.HEADS),
        "w_kv": matrix(d, a.head_dim, axes.EMBED, None),
        "kv_norm": norm_specs(a.head_dim),
        "sinks": ParamSpec((a.num_heads,), (axes.HEADS,), init="zeros"),
        # Rows are the heads of a group, split like a model width; columns the groups, split like heads.
        "w_o_a": matrix(wide // a.o_groups, out, axes.EMBED, axes.HEADS),
        "w_o_b": matrix(out, d, axes.HEADS, axes.EMBED),
    }


def own_specs(cfg: ModelConfig, layer_kind: str) -> dict:
    a, d, std = cfg.attention, cfg.d_model, cfg.init_std
    if layer_kind == SLIDING:
        return {}
    m, overlap = _rate(a, layer_kind), layer_kind == CSA
    own: dict = {"compressor": compress.specs(d, a.head_dim, m, overlap, std)}
    if layer_kind == CSA:
        heads = a.index_heads * a.index_head_dim
        own["indexer"] = {
            "w_q": ParamSpec((a.q_lora_rank, heads), (axes.LATENT, axes.HEADS), std=std),
            "w_heads": ParamSpec(
                (d, a.index_heads), (axes.EMBED, axes.HEADS), std=std, role="router"
            ),
            "compressor": compress.specs(d, a.index_head_dim, m, overlap, std),
        }
    return own


# --------------------------------------------------------------------------------------------------
# Rotation.


def _ropes(a: AttentionConfig):
    """RoPE of sliding layers, and of the others."""
    plain = dataclasses.replace(a.rope, yarn_factor=1.0)
    slowed = dataclasses.replace(
        a.rope, theta=a.compress_theta, yarn_mscale=0.0, yarn_mscale_all_dim=0.0
    )
    return {False: plain, True: slowed}


def _rotations(cfg: ModelConfig, positions_BS: jax.Array) -> dict:
    """cos and sin by whether a layer compresses."""
    a = cfg.attention
    return {c: rotation(positions_BS, rope, a.qk_rope_head_dim) for c, rope in _ropes(a).items()}


# --------------------------------------------------------------------------------------------------
# New tokens, and those of the cache.

CacheOf = dict[str, jax.Array] | None


def _put(cache: dict, name: str, new, call: Call, at_BS=None) -> dict:
    """Write one array of the cache: whole (at the start), or one slot after the other."""
    one = {name: cache[name]}
    if at_BS is None:
        return {**cache, **slots.write(one, call.slot, at_BS, {name: new}, prefill=True)}
    for i in range(new.shape[1]):
        one = slots.write(
            one, call.slot, at_BS[:, i : i + 1], {name: new[:, i : i + 1]}, prefill=False
        )
    return {**cache, **one}


def _get(cache: dict, name: str, call: Call) -> jax.Array:
    return slots.read({name: cache[name]}, call.slot)[name]


def _lengths(call: Call):
    """Tokens of each row in a prefill; what stands behind them is padding."""
    b, s = call.where.positions_BS.shape
    return jnp.full(b, s) if call.mask_BS is None else call.mask_BS.sum(axis=1)


def _tokens(kv_BSH, call: Call, cache: CacheOf) -> tuple[Keys, CacheOf]:
    """The single tokens that may be in reach, and the cache with the new ones."""
    at_BS = call.where.positions_BS
    new = Keys(kv_BSH, at_BS, call.where.segment_ids_BS)
    if cache is None:
        return new, None
    size = cache["window"].shape[2]
    if call.prefill:
        return new, _put(cache, "window", compress.ring_of(kv_BSH, _lengths(call), size), call)
    ring_BRH = _get(cache, "window", call).astype(kv_BSH.dtype)
    ring_at = compress.ring_positions(at_BS[:, 0], size)
    ring_at = jnp.where(ring_at < 0, NOWHERE, ring_at)
    both = lambda a, b: jnp.concatenate([a, b], axis=1)  # noqa: E731
    seen = Keys(both(ring_BRH, kv_BSH), both(ring_at, at_BS), None)
    return seen, _put(cache, "window", kv_BSH, call, at_BS % size)


def _entries(
    params: dict, x_BSD, cfg: ModelConfig, call: Call, cache: CacheOf, prefix: str = ""
) -> tuple[Keys, CacheOf]:
    """The entries of one compressor, and the cache with the new ones. `prefix`: of their names there."""
    where, m = call.where, _rate(cfg.attention, call.layer_kind)
    raw_BSC = compress.projected(params, x_BSD)
    rope, width = _ropes(cfg.attention)[True], cfg.attention.qk_rope_head_dim

    def made(raw, end_BE, alone_BE, at_BE):
        entries = compress.pooled(params, raw, end_BE, alone_BE, cfg.norm_eps)
        return turn(entries[:, :, None], rotation(at_BE - (m - 1), rope, width))[:, :, 0]

    entries, recent = prefix + "entries", prefix + "recent"
    if cache is None or call.prefill:
        of = compress.windows(where, m)
        new = Keys(made(raw_BSC, of.end_BE, of.alone_BE, of.at_BE), of.at_BE, of.document_BE)
        if cache is None:
            return new, None
        ring = compress.ring_of(raw_BSC, _lengths(call), cache[recent].shape[2])
        cache = _put(cache, recent, ring, call)
        return new, _put(cache, entries, new.kv_BTH, call) if new.kv_BTH.shape[1] else cache
    at_BS = where.positions_BS
    size, count = cache[recent].shape[2], cache[entries].shape[2]
    before = compress.in_order(_get(cache, recent, call), at_BS[:, 0]).astype(raw_BSC.dtype)
    # Each new token ends a window, as far as is known: only a whole one will be seen.
    end_BS = jnp.broadcast_to(size + jnp.arange(at_BS.shape[1])[None], at_BS.shape)
    raw = jnp.concatenate([before, raw_BSC], axis=1)
    new_BSH = made(raw, end_BS, at_BS < 2 * m - 1, at_BS)
    cache = _put(cache, entries, new_BSH, call, at_BS // m)
    cache = _put(cache, recent, raw_BSC, call, at_BS % size)
    every = _get(cache, entries, call).astype(new_BSH.dtype)
    return Keys(every, (jnp.arange(count)[None] + 1) * m - 1, None), cache


def _index(
    params: dict, x_BSD, latent_BSC, cfg: ModelConfig, call: Call, cache: CacheOf
) -> tuple[Index, CacheOf]:
    """The indexer's side of CSA, from inputs without gradient."""
    a, (b, s) = cfg.attention, x_BSD.shape[:2]
    x_BSD, latent_BSC = jax.lax.stop_gradient((x_BSD, latent_BSC))
    wide = jnp.promote_types(x_BSD.dtype, jnp.float32)
    q = linear(latent_BSC, params["w_q"]).reshape(b, s, a.index_heads, a.index_head_dim)
    q = turn(q, call.where.rotation[True])
    w_BSJ = (
        linear(x_BSD.astype(wide), params["w_heads"]) * (a.index_heads * a.index_head_dim) ** -0.5
    )
    keys, cache = _entries(params["compressor"], x_BSD, cfg, call, cache, "index_")
    return Index(q, w_BSJ, keys.kv_BTH), cache


def _index_losses(index: Index, q_BSNH, entries: Keys, cfg: ModelConfig, call: Call) -> dict:
    """What teaches the indexer, if it is taught: attention to the entries that a query sees, or picks."""
    a, objective = cfg.attention, call.objective
    if objective is None or not objective.index_loss:
        return {}
    at_BS, document_BS = call.where.positions_BS, call.where.segment_ids_BS
    sight = Sight(at_BS, entries.at_BT, document_BS, entries.document_BT)
    count = index.k_BTI.shape[1]
    if count > a.index_topk and not objective.index_dense:
        bits = choose(index, sight, a.index_topk, call.block)
        sight = sight._replace(chosen=chosen(bits, count))
    of_head, scale = entries.kv_BTH[:, None], a.head_dim**-0.5
    loss = index_loss(index, q_BSNH, of_head, scale, sight, call.mask_BS, call.block)
    return {INDEX: objective.index_loss / a.layer_kinds.count(CSA) * loss}


# --------------------------------------------------------------------------------------------------
# The sub-layer.


@jax.named_scope("attention")
def _attend(params: dict, x_BSD: jax.Array, cfg: ModelConfig, call: Call) -> Attended:
    a, eps, cache = cfg.attention, cfg.norm_eps, call.cache
    b, s = x_BSD.shape[:2]
    cos_sin = call.where.rotation[call.layer_kind != SLIDING]
    latent_BSC = norm(params["q_norm"], linear(x_BSD, params["w_q_a"]), eps)
    q = linear(latent_BSC, params["w_q_b"]).reshape(b, s, a.num_heads, a.head_dim)
    q = turn(norm({"scale": jnp.ones(a.head_dim)}, q, eps), cos_sin)
    kv = norm(params["kv_norm"], linear(x_BSD, params["w_kv"]), eps)
    tokens, cache = _tokens(turn(kv[:, :, None], cos_sin)[:, :, 0], call, cache)
    entries, index, losses = None, None, {}
    if call.layer_kind != SLIDING:
        entries, cache = _entries(params["compressor"], x_BSD, cfg, call, cache)
        if call.layer_kind == CSA:
            index, cache = _index(params["indexer"], x_BSD, latent_BSC, cfg, call, cache)
            losses = _index_losses(index, q, entries, cfg, call)
            dense = call.objective is not None and call.objective.index_dense
            if dense or index.k_BTI.shape[1] <= a.index_topk:
                index = None  # all are picked
    block = s if cache is not None and not call.prefill else call.block
    out_BSNH = see(q, call.where, tokens, entries, index, params["sinks"], a, block)
    y_BSD = _output(params, turn(out_BSNH, cos_sin, back=True), a)
    return Attended(y_BSD, cache, None, losses)


def _output(params: dict, out_BSNH, a: AttentionConfig) -> jax.Array:
    """Every group of heads to its own outputs, and these to the model's width."""
    b, s = out_BSNH.shape[:2]
    grouped = out_BSNH.reshape(b, s, a.o_groups, -1)
    w = params["w_o_a"].astype(out_BSNH.dtype).reshape(-1, a.o_groups, a.o_lora_rank)
    out_BSGO = jnp.einsum("BSGI,IGO->BSGO", grouped, w)
    return linear(out_BSGO.reshape(b, s, -1), params["w_o_b"])


# --------------------------------------------------------------------------------------------------
# What the rest of moejax asks.


def cache(cfg: ModelConfig, layer_kind: str, rows: int, tokens: int) -> dict[str, Slots]:
    a, where = cfg.attention, (axes.BATCH, None, None)
    shapes = {"window": (a.sliding_window, a.head_dim)}
    if layer_kind != SLIDING:
        m, twice = _rate(a, layer_kind), 1 + (layer_kind == CSA)
        names = {"": a.head_dim} | ({"index_": a.index_head_dim} if layer_kind == CSA else {})
        for prefix, width in names.items():
            shapes[prefix + "entries"] = (-(-tokens // m), width)
            shapes[prefix + "recent"] = (twice * m, 2 * twice * width)
    return {name: Slots((rows, *shape), where) for name, shape in shapes.items()}


def widths(a: AttentionConfig) -> Widths:
    return Widths(a.head_dim, a.head_dim, a.qk_rope_head_dim, 1)


def cost(cfg: ModelConfig, layer_kind: str) -> Attention:
    a = cfg.attention
    macs = a.num_heads * 2 * a.head_dim
    if layer_kind == SLIDING:
        return Attention(1, macs, macs, a.head_dim, window=a.sliding_window)
    m, local = _rate(a, layer_kind), a.sliding_window
    if layer_kind == HCA:
        return Attention(1, macs, macs, a.head_dim, stride=m, local=local)
    return Attention(
        1,
        macs,
        macs,
        a.head_dim,
        stride=m,
        local=local,
        topk=a.index_topk,
        index_macs=a.index_heads * a.index_head_dim,
        index_cache=a.index_head_dim,
    )


def saved(cfg: ModelConfig, number: float, tensor: float) -> float:
    a, wide = cfg.attention, 4.0  # norms and entries work in float32
    heads, out = a.num_heads / tensor * a.head_dim, a.o_groups / tensor * a.o_lora_rank
    kept = number * (3 * heads + out + a.q_lora_rank + 6 * a.head_dim + 2 * cfg.d_model)
    # Slots of an entry with their weights: two for each token of CSA, one for each of HCA. Counted: 16 and 10.
    slots_of = 16 * a.layer_kinds.count(CSA) + 10 * a.layer_kinds.count(HCA)
    kept += wide * slots_of / cfg.num_layers * a.head_dim
    return kept + wide * (heads + 3 * a.q_lora_rank + 8 * a.head_dim)


def sizes(a: AttentionConfig) -> list[tuple[str, str, int]]:
    p = "model.attention."
    return [
        (axes.LATENT, f"{p}q_lora_rank", a.q_lora_rank),
        (axes.HEADS, f"{p}o_groups", a.o_groups),
        (axes.HEADS, f"{p}index_heads", a.index_heads if CSA in a.layer_kinds else 0),
        (axes.EMBED, f"{p}num_heads * head_dim / o_groups", a.num_heads * a.head_dim // a.o_groups),
    ]


def problems(cfg: ModelConfig, p: str) -> list[str]:
    out, a = Problems(), cfg.attention
    p += "attention."
    named = ", ".join(repr(k) for k in LAYER_KINDS)
    out.need(
        len(a.layer_kinds) == cfg.num_layers and set(a.layer_kinds) <= set(LAYER_KINDS),
        f"{p}layer_kinds={a.layer_kinds} must name one of {named} for each of the "
        f"num_layers={cfg.num_layers} layers",
    )
    needed = ["head_dim", "q_lora_rank", "sliding_window", "o_groups", "o_lora_rank"]
    needed += ["index_heads", "index_head_dim", "index_topk"] * (CSA in a.layer_kinds)
    for key in needed:
        out.need(getattr(a, key) > 0, f"{p}{key}={getattr(a, key)} must be positive for {a.kind!r}")
    out.need(
        a.o_groups < 1 or a.num_heads % a.o_groups == 0,
        f"{p}num_heads={a.num_heads} must be a multiple of {p}o_groups={a.o_groups}; "
        f"{divisors_text(a.num_heads)} would work",
    )
    widest = min([a.head_dim] + [a.index_head_dim] * (CSA in a.layer_kinds))
    r = a.qk_rope_head_dim
    out.need(
        0 < r <= widest and r % 2 == 0,
        f"{p}qk_rope_head_dim={r} must be even, positive and at most {widest}, the width of the "
        "narrowest head",
    )
    out.need(cfg.positions == "rope", f"positions={cfg.positions!r}: {a.kind!r} needs 'rope'")
    out.need(
        not any(a.windows), f"{p}windows={a.windows} is not read by {a.kind!r}: use sliding_window"
    )
    out.need(not a.sinks, f"{p}sinks: {a.kind!r} has them always, leave it at False")
    out.need(a.rope.interleaved, f"{p}rope.interleaved=False: {a.kind!r} turns adjacent pairs")
    return out


KIND = AttentionKind(
    specs=specs,
    own_specs=own_specs,
    layer_kind=layer_kind,
    attend=_attend,
    cache=cache,
    rotation=_rotations,
    widths=widths,
    cost=cost,
    saved=saved,
    sizes=sizes,
    problems=problems,
    reads=READS,
    losses=lambda cfg, objective: (
        (INDEX,) if objective.index_loss and CSA in cfg.attention.layer_kinds else ()
    ),
    objectives=frozenset({"index_loss", "index_dense"}),
)
