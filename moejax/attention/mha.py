"""Multi-head and grouped-query attention: windows, sinks, norms of queries and keys, biases."""

import jax

from moejax import axes
from moejax.attention.contract import Attended, Attention, AttentionKind, Call, Slots, Widths
from moejax.attention.core import attend, named_linear, rope, seen, turned
from moejax.attention.rope import rotate, softmax_scale
from moejax.config import AttentionConfig, ModelConfig
from moejax.norm import norm, norm_specs
from moejax.options import Problems, divisors_text
from moejax.params import ParamSpec


def specs(cfg: ModelConfig) -> dict:
    a, d = cfg.attention, cfg.d_model
    n, heads, kv_heads = a.num_heads, axes.HEADS, axes.KV_HEADS
    q_width, kv_width = n * a.head_dim, a.num_kv_heads * a.head_dim
    out: dict = {
        "w_q": ParamSpec((d, q_width), (axes.EMBED, heads), std=cfg.init_std),
        "w_k": ParamSpec((d, kv_width), (axes.EMBED, kv_heads), std=cfg.init_std),
        "w_v": ParamSpec((d, kv_width), (axes.EMBED, kv_heads), std=cfg.init_std),
        "w_o": ParamSpec((q_width, d), (heads, axes.EMBED), std=cfg.init_std),
    }
    if a.qkv_bias:
        out["b_q"] = ParamSpec((q_width,), (heads,), init="zeros")
        out["b_k"] = ParamSpec((kv_width,), (kv_heads,), init="zeros")
        out["b_v"] = ParamSpec((kv_width,), (kv_heads,), init="zeros")
    if a.qk_norm != "none":
        full = a.qk_norm == "full"
        out["q_norm"] = norm_specs(q_width if full else a.head_dim)
        out["k_norm"] = norm_specs(kv_width if full else a.head_dim)
    if a.sinks:
        out["sinks"] = ParamSpec((n,), (heads,), init="zeros")
    if a.out_bias:
        out["b_o"] = ParamSpec((d,), (axes.EMBED,), init="zeros")
    return out


@jax.named_scope("attention")
def _attend(params: dict, x_BSD: jax.Array, cfg: ModelConfig, call: Call) -> Attended:
    a = cfg.attention
    q, new = _project(params, x_BSD, cfg, turned(cfg, call))
    keys, cache, sight, _ = seen(new, call)
    k, v = keys["k"].astype(q.dtype), keys["v"].astype(q.dtype)
    scale = softmax_scale(a, a.head_dim)
    out_BSNH = attend(q, k, v, sight, scale, sinks_N=params.get("sinks"), block=call.block)
    return Attended(named_linear(params, out_BSNH.reshape(*x_BSD.shape[:2], -1), "o"), cache)


def _project(params, x_BSD, cfg: ModelConfig, cos_sin):
    a = cfg.attention
    b, s = x_BSD.shape[:2]
    q, k, v = (named_linear(params, x_BSD, name) for name in "qkv")
    if a.qk_norm == "full":
        q, k = norm(params["q_norm"], q, cfg.norm_eps), norm(params["k_norm"], k, cfg.norm_eps)
    q, k, v = (t.reshape(b, s, -1, a.head_dim) for t in (q, k, v))
    if a.qk_norm == "head":
        q, k = norm(params["q_norm"], q, cfg.norm_eps), norm(params["k_norm"], k, cfg.norm_eps)
    if cos_sin is not None:
        q = rotate(q, cos_sin, a.rope.interleaved)
        k = rotate(k, cos_sin, a.rope.interleaved)
    if a.qk_norm == "head_rotated":
        q, k = norm(params["q_norm"], q, cfg.norm_eps), norm(params["k_norm"], k, cfg.norm_eps)
    return q, {"k": k.transpose(0, 2, 1, 3), "v": v.transpose(0, 2, 1, 3)}


def _cache(cfg: ModelConfig, layer_kind: str, rows: int, tokens: int) -> dict[str, Slots]:
    del layer_kind
    a = cfg.attention
    shape = (rows, a.num_kv_heads, tokens, a.head_dim)
    return {name: Slots(shape, (axes.BATCH, axes.KV_HEADS, None, None)) for name in ("k", "v")}


def _widths(a: AttentionConfig) -> Widths:
    return Widths(a.head_dim, a.head_dim, a.rope.width or a.head_dim, a.num_kv_heads)


def _cost(cfg: ModelConfig, layer_kind: str) -> Attention:
    del layer_kind
    a = cfg.attention
    macs = a.num_heads * 2 * a.head_dim
    return Attention(1, macs, macs, 2 * a.num_kv_heads * a.head_dim)


def _saved(cfg: ModelConfig, number: float, tensor: float) -> float:
    a, wide = cfg.attention, 4.0  # norms work in float32
    n, kv_heads = a.num_heads / tensor, a.num_kv_heads / tensor
    out = number * (2 * n * a.head_dim + 2 * kv_heads * a.head_dim + 3 * cfg.d_model)
    return out + (3 * wide * (n + kv_heads) * a.head_dim if a.qk_norm != "none" else 0.0)


def _sizes(a: AttentionConfig) -> list[tuple[str, str, int]]:
    return [(axes.KV_HEADS, "model.attention.num_kv_heads", a.num_kv_heads)]


def head_problems(a: AttentionConfig, p: str, *keys: str) -> list[str]:
    """What is wrong with these numbers of key heads."""
    out = Problems()
    for key in keys:
        heads = getattr(a, key)
        out.need(
            heads > 0 and a.num_heads % heads == 0,
            f"{p}attention.num_heads={a.num_heads} must be a multiple of {p}attention.{key}={heads}; "
            f"{divisors_text(a.num_heads)} would work",
        )
    return out


def width_problems(cfg: ModelConfig, p: str) -> list[str]:
    """What is wrong with the width of heads, and with how much of it is rotated."""
    out, a = Problems(), cfg.attention
    out.need(
        a.rope.width % 2 == 0 and a.rope.width <= a.head_dim,
        f"{p}attention.rope.width={a.rope.width} must be even and at most "
        f"{p}attention.head_dim={a.head_dim}",
    )
    out.need(
        a.head_dim > 0 and ((a.rope.width or a.head_dim) % 2 == 0 or cfg.positions != "rope"),
        f"{p}attention.head_dim={a.head_dim} must be positive, and even for rotary positions",
    )
    return out


def _problems(cfg: ModelConfig, p: str) -> list[str]:
    return head_problems(cfg.attention, p, "num_kv_heads") + width_problems(cfg, p)


KIND = AttentionKind(
    specs=specs,
    attend=_attend,
    cache=_cache,
    rotation=lambda cfg, positions_BS: rope(cfg, positions_BS, _widths(cfg.attention).rotated),
    widths=_widths,
    cost=_cost,
    saved=_saved,
    sizes=_sizes,
    problems=_problems,
    reads=frozenset({"num_kv_heads", "head_dim", "rope.width"}),
)
