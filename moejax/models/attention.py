"""Attention: multi-head, grouped-query, sliding windows, sinks, and multi-head latent attention.

Every variant is projections around one `attend`. With a cache, `prefill=True` (static) says that the
cache was empty: the new tokens attend among themselves and are written; otherwise they are written first
and attend to the cache. MLA decodes with absorbed projections, so its cache per token is only
kv_lora + rope numbers (DeepSeek-V2, 2405.04434 section 2.1).

Here: T key positions, G query heads that share a key head (N = M G), Q queries of a key head (G S), C width of
the latent.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import AttentionConfig, ModelConfig
from moejax.linear import linear
from moejax.models import cache as kv_cache
from moejax.models.block_attention import Sight, attend_in_blocks, block_size
from moejax.models.norm import norm, norm_specs
from moejax.models.rope import rotate, softmax_scale
from moejax.params import ParamSpec

# The norms of the latents keep RMSNorm's default in DeepSeek's code and in transformers, whatever
# config.json's rms_norm_eps says (Moonlight: 1e-5).
LATENT_NORM_EPS = 1e-6


class Where(NamedTuple):
    """Where the tokens stand.

    Attributes:
      positions_BS: position of each token within its document.
      segment_ids_BS: document number within the row, or None for one document per row.
      cos_sin: rotation for these positions, or None without rotary positions.
    """

    positions_BS: jax.Array
    segment_ids_BS: jax.Array | None
    cos_sin: tuple[jax.Array, jax.Array] | None


def param_specs(cfg: ModelConfig) -> dict:
    a, d, std = cfg.attention, cfg.d_model, cfg.init_std

    def matrix(rows, cols, row_axis, col_axis):
        return ParamSpec((rows, cols), (row_axis, col_axis), std=std)

    n, heads, kv_heads = a.num_heads, axes.HEADS, axes.KV_HEADS
    specs: dict = {}
    if a.kind == "mla":
        if a.q_lora_rank:
            specs["w_q_a"] = matrix(d, a.q_lora_rank, axes.EMBED, axes.LATENT)
            specs["q_norm"] = norm_specs(a.q_lora_rank)
            specs["w_q_b"] = matrix(a.q_lora_rank, n * a.qk_head_dim, axes.LATENT, heads)
        else:
            specs["w_q"] = matrix(d, n * a.qk_head_dim, axes.EMBED, heads)
        specs["w_kv_a"] = matrix(d, a.kv_lora_rank + a.qk_rope_head_dim, axes.EMBED, axes.LATENT)
        specs["kv_norm"] = norm_specs(a.kv_lora_rank)
        width = n * (a.qk_nope_head_dim + a.v_head_dim)
        specs["w_kv_b"] = matrix(a.kv_lora_rank, width, axes.LATENT, heads)
        specs["w_o"] = matrix(n * a.v_head_dim, d, heads, axes.EMBED)
    else:
        q_width, kv_width = n * a.head_dim, a.num_kv_heads * a.head_dim
        specs["w_q"] = matrix(d, q_width, axes.EMBED, heads)
        specs["w_k"] = matrix(d, kv_width, axes.EMBED, kv_heads)
        specs["w_v"] = matrix(d, kv_width, axes.EMBED, kv_heads)
        specs["w_o"] = matrix(q_width, d, heads, axes.EMBED)
        if a.qkv_bias:
            specs["b_q"] = ParamSpec((q_width,), (heads,), init="zeros")
            specs["b_k"] = ParamSpec((kv_width,), (kv_heads,), init="zeros")
            specs["b_v"] = ParamSpec((kv_width,), (kv_heads,), init="zeros")
        if a.qk_norm != "none":
            full = a.qk_norm == "full"
            specs["q_norm"] = norm_specs(q_width if full else a.head_dim)
            specs["k_norm"] = norm_specs(kv_width if full else a.head_dim)
        if a.sinks:
            specs["sinks"] = ParamSpec((n,), (heads,), init="zeros")
    if a.out_bias:
        specs["b_o"] = ParamSpec((d,), (axes.EMBED,), init="zeros")
    return specs


def attend(q_BSNH, k_BMTH, v_BMTH, sight: Sight, scale: float, sinks_N=None, block=0) -> jax.Array:
    """softmax(q k^T scale) v with grouped heads, softmax in float32. Returns [B,S,N,H of v].

    `sinks_N` adds exp(sink) to each head's denominator (gpt-oss, 2508.10925). `block` as in `attention`.
    """
    b, s, n, h = q_BSNH.shape
    if size := block_size(s, block):
        return attend_in_blocks(q_BSNH, k_BMTH, v_BMTH, sight, scale, sinks_N, size)
    m, t = k_BMTH.shape[1:3]
    # Heads first: then every product, of the backward pass too, is a batch of matrices as they lie in
    # memory, which XLA:CPU runs faster. The queries of one key head are the rows of one matrix.
    q_BMGSH = (q_BSNH * scale).reshape(b, s, m, n // m, h).transpose(0, 2, 3, 1, 4)
    q_BMQH = q_BMGSH.reshape(b, m, n // m * s, h)
    logits_BMQT = jnp.einsum(
        "BMQH,BMTH->BMQT",
        q_BMQH,
        k_BMTH,
        preferred_element_type=jnp.promote_types(q_BMQH.dtype, jnp.float32),
    )
    logits_BMGST = logits_BMQT.reshape(b, m, n // m, s, t)
    p = _softmax(logits_BMGST, sight.mask_BST(), sinks_N).astype(v_BMTH.dtype)
    out_BMQH = jnp.einsum("BMQT,BMTH->BMQH", p.reshape(b, m, -1, t), v_BMTH)
    out_BSMGH = out_BMQH.reshape(b, m, n // m, s, -1).transpose(0, 3, 1, 2, 4)
    return out_BSMGH.reshape(b, s, n, -1)


def _softmax(logits_BMGST, mask_BST, sinks_N):
    logits = jnp.where(mask_BST[:, None, None], logits_BMGST, jnp.finfo(logits_BMGST.dtype).min)
    if sinks_N is None:
        return jax.nn.softmax(logits, axis=-1)
    m, g = logits.shape[1:3]
    sink = sinks_N.reshape(1, m, g, 1, 1).astype(logits.dtype)
    top = jax.lax.stop_gradient(jnp.maximum(logits.max(axis=-1, keepdims=True), sink))
    weight = jnp.exp(logits - top)
    return weight / (weight.sum(axis=-1, keepdims=True) + jnp.exp(sink - top))


@jax.named_scope("attention")
def attention(
    params: dict,
    x_BSD: jax.Array,
    cfg: ModelConfig,
    where: Where,
    *,
    window=None,
    cache=None,
    layer=0,
    prefill: bool = False,
    block: int = 0,
):
    """One attention sub-layer.

    Args:
      params: values of `param_specs(cfg)`.
      x_BSD: normalised hidden states.
      cfg: the model's config.
      where: positions, documents, rotation.
      window: sliding window of this layer; None or 0 = full.
      cache: the model's cache (all layers), or None.
      layer: index of this layer in the cache.
      prefill: static; the cache is empty and the positions are 0, 1, 2, ..: attend among the new tokens.
      block: static; queries and keys of a block of attention, 0: by the number of queries, see `block_size`.

    Returns:
      y_BSD and the cache.
    """
    project = _project_mla if cfg.attention.kind == "mla" else _project_mha
    core = _core_mla if cfg.attention.kind == "mla" else _core_mha
    q, new = project(params, x_BSD, cfg, where)
    if cache is not None:
        cache = kv_cache.write(cache, layer, where.positions_BS, new, prefill=prefill)
    if cache is None or prefill:
        keys = new
        at_BS, document_BS = where.positions_BS, where.segment_ids_BS
        sight = Sight(at_BS, at_BS, document_BS, document_BS, window)
    else:
        keys = kv_cache.read(cache, layer)
        slots = jnp.arange(next(iter(keys.values())).shape[-2])[None]
        sight = Sight(where.positions_BS, slots, window=window)
    absorbed = cache is not None and not prefill
    among = functools.partial(attend, sight=sight, scale=softmax_scale(cfg.attention), block=block)
    out_BSNH = core(params, q, keys, among, cfg.attention, absorbed)
    return _linear(params, out_BSNH.reshape(*x_BSD.shape[:2], -1), "o"), cache


def _linear(params, x, name):
    return linear(x, params[f"w_{name}"], params.get(f"b_{name}"))


def _project_mha(params, x_BSD, cfg: ModelConfig, where: Where):
    a = cfg.attention
    b, s = x_BSD.shape[:2]
    q, k, v = (_linear(params, x_BSD, name) for name in "qkv")
    if a.qk_norm == "full":
        q, k = norm(params["q_norm"], q, cfg.norm_eps), norm(params["k_norm"], k, cfg.norm_eps)
    q, k, v = (t.reshape(b, s, -1, a.head_dim) for t in (q, k, v))
    if a.qk_norm == "head":
        q, k = norm(params["q_norm"], q, cfg.norm_eps), norm(params["k_norm"], k, cfg.norm_eps)
    if where.cos_sin is not None:
        q = rotate(q, where.cos_sin, a.rope.interleaved)
        k = rotate(k, where.cos_sin, a.rope.interleaved)
    if a.qk_norm == "head_rotated":
        q, k = norm(params["q_norm"], q, cfg.norm_eps), norm(params["k_norm"], k, cfg.norm_eps)
    return q, {"k": k.transpose(0, 2, 1, 3), "v": v.transpose(0, 2, 1, 3)}


def _core_mha(params, q, keys, among, a: AttentionConfig, absorbed):
    del a, absorbed
    k, v = keys["k"].astype(q.dtype), keys["v"].astype(q.dtype)
    return among(q, k, v, sinks_N=params.get("sinks"))


def _project_mla(params, x_BSD, cfg: ModelConfig, where: Where):
    """Queries (nope, rope) and the compressed key/value: 2405.04434 eq. 9-15, 37-47."""
    a = cfg.attention
    b, s = x_BSD.shape[:2]
    if a.q_lora_rank:
        latent = norm(params["q_norm"], _linear(params, x_BSD, "q_a"), LATENT_NORM_EPS)
        q = _linear(params, latent, "q_b")
    else:
        q = _linear(params, x_BSD, "q")
    q = q.reshape(b, s, a.num_heads, a.qk_head_dim)
    q_nope, q_rope = jnp.split(q, [a.qk_nope_head_dim], axis=-1)
    latent, rope_key = jnp.split(_linear(params, x_BSD, "kv_a"), [a.kv_lora_rank], axis=-1)
    latent = norm(params["kv_norm"], latent, LATENT_NORM_EPS)
    q_rope = rotate(q_rope, where.cos_sin, a.rope.interleaved)
    rope_key = rotate(rope_key[:, :, None], where.cos_sin, a.rope.interleaved)[:, :, 0]
    return (q_nope, q_rope), {"latent": latent, "rope_key": rope_key}


def _core_mla(params, q, keys, among, a: AttentionConfig, absorbed):
    q_nope, q_rope = q
    latent, rope_key = keys["latent"].astype(q_nope.dtype), keys["rope_key"].astype(q_nope.dtype)
    w_kv_b = params["w_kv_b"].astype(q_nope.dtype)
    w = w_kv_b.reshape(a.kv_lora_rank, a.num_heads, a.qk_nope_head_dim + a.v_head_dim)
    w_k, w_v = w[..., : a.qk_nope_head_dim], w[..., a.qk_nope_head_dim :]
    if absorbed:
        # q^T (W_k c) = (W_k^T q)^T c: attend in the latent space, one key "head" for all queries.
        query = jnp.concatenate([jnp.einsum("BSNH,CNH->BSNC", q_nope, w_k), q_rope], axis=-1)
        key = jnp.concatenate([latent, rope_key], axis=-1)[:, None]
        out = among(query, key, latent[:, None])
        return jnp.einsum("BSNC,CNH->BSNH", out, w_v)
    k_nope = jnp.einsum("BTC,CNH->BNTH", latent, w_k)
    v = jnp.einsum("BTC,CNH->BNTH", latent, w_v)
    rope_key = jnp.broadcast_to(rope_key[:, None], (*k_nope.shape[:3], a.qk_rope_head_dim))
    query = jnp.concatenate([q_nope, q_rope], axis=-1)
    key = jnp.concatenate([k_nope, rope_key], axis=-1)
    return among(query, key, v)
