"""Multi-head latent attention (DeepSeek-V2, 2405.04434 section 2.1): keys and values come from one latent.

It decodes with absorbed projections, so its cache per token is only kv_lora + rope numbers.

Here: T key positions, C width of the latent.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.attention.block_attention import Sight
from moejax.attention.contract import Attended, Attention, AttentionKind, Call, Slots, Widths
from moejax.attention.core import attend, named_linear, rope, seen, turned
from moejax.attention.rope import rotate, softmax_scale
from moejax.config import AttentionConfig, ModelConfig
from moejax.norm import norm, norm_specs
from moejax.options import Problems
from moejax.params import ParamSpec

# The norms of the latents keep RMSNorm's default in DeepSeek's code and in transformers, whatever
# config.json's rms_norm_eps says (Moonlight: 1e-5).
LATENT_NORM_EPS = 1e-6
READS = frozenset(
    {"q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"}
)


def specs(cfg: ModelConfig) -> dict:
    a, d, heads = cfg.attention, cfg.d_model, axes.HEADS

    def matrix(rows, cols, row_axis, col_axis):
        return ParamSpec((rows, cols), (row_axis, col_axis), std=cfg.init_std)

    n = a.num_heads
    out: dict = {}
    if a.q_lora_rank:
        out["w_q_a"] = matrix(d, a.q_lora_rank, axes.EMBED, axes.LATENT)
        out["q_norm"] = norm_specs(a.q_lora_rank)
        out["w_q_b"] = matrix(a.q_lora_rank, n * widths(a).query, axes.LATENT, heads)
    else:
        out["w_q"] = matrix(d, n * widths(a).query, axes.EMBED, heads)
    out["w_kv_a"] = matrix(d, a.kv_lora_rank + a.qk_rope_head_dim, axes.EMBED, axes.LATENT)
    out["kv_norm"] = norm_specs(a.kv_lora_rank)
    width = n * (a.qk_nope_head_dim + a.v_head_dim)
    out["w_kv_b"] = matrix(a.kv_lora_rank, width, axes.LATENT, heads)
    out["w_o"] = matrix(n * a.v_head_dim, d, heads, axes.EMBED)
    if a.out_bias:
        out["b_o"] = ParamSpec((d,), (axes.EMBED,), init="zeros")
    return out


class Projected(NamedTuple):
    """Attributes:
    q_nope_BSNH, q_rope_BSNH: the two parts of each query, the second one rotated.
    keys: what is cached of each token: its latent, and the rotated part of all heads' keys.
    latent_BSC: the latent of the queries, or None.
    """

    q_nope_BSNH: jax.Array
    q_rope_BSNH: jax.Array
    keys: dict[str, jax.Array]
    latent_BSC: jax.Array | None


def project(params, x_BSD, cfg: ModelConfig, cos_sin) -> Projected:
    """Queries (nope, rope) and the compressed key/value: 2405.04434 eq. 9-15, 37-47."""
    a, q_latent = cfg.attention, None
    b, s = x_BSD.shape[:2]
    if a.q_lora_rank:
        q_latent = norm(params["q_norm"], named_linear(params, x_BSD, "q_a"), LATENT_NORM_EPS)
        q = named_linear(params, q_latent, "q_b")
    else:
        q = named_linear(params, x_BSD, "q")
    q = q.reshape(b, s, a.num_heads, widths(a).query)
    q_nope, q_rope = jnp.split(q, [a.qk_nope_head_dim], axis=-1)
    latent, rope_key = jnp.split(named_linear(params, x_BSD, "kv_a"), [a.kv_lora_rank], axis=-1)
    latent = norm(params["kv_norm"], latent, LATENT_NORM_EPS)
    q_rope = rotate(q_rope, cos_sin, a.rope.interleaved)
    rope_key = rotate(rope_key[:, :, None], cos_sin, a.rope.interleaved)[:, :, 0]
    return Projected(q_nope, q_rope, {"latent": latent, "rope_key": rope_key}, q_latent)


def _latents(params, q: Projected, keys, a: AttentionConfig):
    """Latents, rotated keys, and the two parts of w_kv_b, [C,N,H] each."""
    latent, rope_key = (keys[name].astype(q.q_nope_BSNH.dtype) for name in ("latent", "rope_key"))
    w_kv_b = params["w_kv_b"].astype(latent.dtype)
    w = w_kv_b.reshape(a.kv_lora_rank, a.num_heads, a.qk_nope_head_dim + a.v_head_dim)
    return latent, rope_key, w[..., : a.qk_nope_head_dim], w[..., a.qk_nope_head_dim :]


def of_heads(params, q: Projected, keys, a: AttentionConfig):
    """Queries [B,S,N,H], and keys [B,N,T,H] of every head."""
    latent, rope_key, w_k, _ = _latents(params, q, keys, a)
    k_nope = jnp.einsum("BTC,CNH->BNTH", latent, w_k)
    rope_key = jnp.broadcast_to(rope_key[:, None], (*k_nope.shape[:3], a.qk_rope_head_dim))
    query = jnp.concatenate([q.q_nope_BSNH, q.q_rope_BSNH], axis=-1)
    return query, jnp.concatenate([k_nope, rope_key], axis=-1)


def scale(a: AttentionConfig) -> float:
    """Of the products of queries and keys."""
    return softmax_scale(a, widths(a).query)


def among(params, q: Projected, keys, sight: Sight, a: AttentionConfig, block: int, absorbed: bool):
    """What the queries see of these keys, [B,S,N,H of v]. `absorbed`: in the latent space."""
    latent, rope_key, w_k, w_v = _latents(params, q, keys, a)
    if absorbed:
        # q^T (W_k c) = (W_k^T q)^T c: attend in the latent space, one key "head" for all queries.
        nope = jnp.einsum("BSNH,CNH->BSNC", q.q_nope_BSNH, w_k)
        query = jnp.concatenate([nope, q.q_rope_BSNH], axis=-1)
        key = jnp.concatenate([latent, rope_key], axis=-1)[:, None]
        out = attend(query, key, latent[:, None], sight, scale(a), block=block)
        return jnp.einsum("BSNC,CNH->BSNH", out, w_v)
    v = jnp.einsum("BTC,CNH->BNTH", latent, w_v)
    return attend(*of_heads(params, q, keys, a), v, sight, scale(a), block=block)


@jax.named_scope("attention")
def _attend(params: dict, x_BSD: jax.Array, cfg: ModelConfig, call: Call) -> Attended:
    q = project(params, x_BSD, cfg, turned(cfg, call))
    keys, cache, sight, cached = seen(q.keys, call)
    out_BSNH = among(params, q, keys, sight, cfg.attention, call.block, absorbed=cached)
    return Attended(named_linear(params, out_BSNH.reshape(*x_BSD.shape[:2], -1), "o"), cache)


def cache(cfg: ModelConfig, layer_kind: str, rows: int, tokens: int) -> dict[str, Slots]:
    del layer_kind
    a, where = cfg.attention, (axes.BATCH, None, None)
    return {
        "latent": Slots((rows, tokens, a.kv_lora_rank), where),
        "rope_key": Slots((rows, tokens, a.qk_rope_head_dim), where),
    }


def rotation(cfg: ModelConfig, positions_BS: jax.Array):
    return rope(cfg, positions_BS, cfg.attention.qk_rope_head_dim)


def widths(a: AttentionConfig) -> Widths:
    query = a.qk_nope_head_dim + a.qk_rope_head_dim
    return Widths(query, a.v_head_dim, a.qk_rope_head_dim, a.num_heads)


def cost(cfg: ModelConfig, layer_kind: str) -> Attention:
    del layer_kind
    a = cfg.attention
    n, latent = a.num_heads, a.kv_lora_rank + a.qk_rope_head_dim
    macs = n * (widths(a).query + a.v_head_dim)
    return Attention(1, macs, n * (latent + a.kv_lora_rank), latent)


def saved(cfg: ModelConfig, number: float, tensor: float) -> float:
    a, wide = cfg.attention, 4.0  # norms work in float32
    heads = a.num_heads / tensor * (2 * widths(a).query + 2 * a.v_head_dim)
    latents = a.q_lora_rank + a.kv_lora_rank
    return number * (heads + latents + 2 * cfg.d_model) + 3 * wide * latents


def sizes(a: AttentionConfig) -> list[tuple[str, str, int]]:
    latent = a.kv_lora_rank + a.qk_rope_head_dim
    return [
        (axes.LATENT, "model.attention.q_lora_rank", a.q_lora_rank),
        (axes.LATENT, "model.attention.kv_lora_rank", a.kv_lora_rank),
        (axes.LATENT, "model.attention.kv_lora_rank + qk_rope_head_dim", latent),
    ]


def problems(cfg: ModelConfig, p: str) -> list[str]:
    out, a = Problems(), cfg.attention
    for key in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
        out.need(
            getattr(a, key) > 0,
            f"{p}attention.{key}={getattr(a, key)} must be positive for {a.kind!r}",
        )
    out.need(
        a.qk_rope_head_dim % 2 == 0,
        f"{p}attention.qk_rope_head_dim={a.qk_rope_head_dim} must be even",
    )
    out.need(cfg.positions == "rope", f"{p}positions={cfg.positions!r}: {a.kind!r} needs 'rope'")
    out.need(not a.sinks, f"{p}attention.sinks is not available with {a.kind!r}")
    return out


KIND = AttentionKind(
    specs=specs,
    attend=_attend,
    cache=cache,
    rotation=rotation,
    widths=widths,
    cost=cost,
    saved=saved,
    sizes=sizes,
    problems=problems,
    reads=READS,
)
