"""Grouped-query attention whose layers with a window have key heads, a rotation and sinks of their own.

MiMo-V2-Flash: five layers with a window for one that sees everything, values narrower than keys and scaled. The
same equations as `mha`; what differs between the two kinds of layers are sizes, so keys and values are
parameters of each kind, and only layers with a window have sinks (2508.10925).
"""

import dataclasses

import jax

from moejax import axes
from moejax.attention import mha
from moejax.attention.contract import Attended, Attention, AttentionKind, Call, Slots, Widths
from moejax.attention.core import attend, named_linear, seen
from moejax.attention.rope import rotate, rotation, softmax_scale
from moejax.config import AttentionConfig, ModelConfig
from moejax.options import Problems
from moejax.params import ParamSpec

FULL, WINDOW = "full", "window"  # the layer kinds


def layer_kind(cfg: ModelConfig, layer: int) -> str:
    """Depths of multi-token prediction have no window."""
    return WINDOW if layer < cfg.num_layers and cfg.attention.window(layer) else FULL


def key_heads(a: AttentionConfig, kind: str) -> int:
    return a.window_kv_heads if kind == WINDOW else a.num_kv_heads


def specs(cfg: ModelConfig) -> dict:
    a, d = cfg.attention, cfg.d_model
    q_width, out_width = a.num_heads * a.head_dim, a.num_heads * a.v_head_dim
    out: dict = {
        "w_q": ParamSpec((d, q_width), (axes.EMBED, axes.HEADS), std=cfg.init_std),
        "w_o": ParamSpec((out_width, d), (axes.HEADS, axes.EMBED), std=cfg.init_std),
    }
    if a.qkv_bias:
        out["b_q"] = ParamSpec((q_width,), (axes.HEADS,), init="zeros")
    return out


def own_specs(cfg: ModelConfig, kind: str) -> dict:
    a, d, heads = cfg.attention, cfg.d_model, key_heads(cfg.attention, kind)
    out: dict = {}
    for name, width in (("k", heads * a.head_dim), ("v", heads * a.v_head_dim)):
        out[f"w_{name}"] = ParamSpec((d, width), (axes.EMBED, axes.KV_HEADS), std=cfg.init_std)
        if a.qkv_bias:
            out[f"b_{name}"] = ParamSpec((width,), (axes.KV_HEADS,), init="zeros")
    if kind == WINDOW and a.sinks:
        out["sinks"] = ParamSpec((a.num_heads,), (axes.HEADS,), init="zeros")
    return out


@jax.named_scope("attention")
def _attend(params: dict, x_BSD: jax.Array, cfg: ModelConfig, call: Call) -> Attended:
    a = cfg.attention
    b, s = x_BSD.shape[:2]
    q, k, v = (named_linear(params, x_BSD, name) for name in "qkv")
    q, k, v = (
        t.reshape(b, s, -1, w) for t, w in ((q, a.head_dim), (k, a.head_dim), (v, a.v_head_dim))
    )
    if call.where.rotation is not None:
        cos_sin = call.where.rotation[call.layer_kind]
        q, k = (rotate(t, cos_sin, a.rope.interleaved) for t in (q, k))
    new = {"k": k.transpose(0, 2, 1, 3), "v": v.transpose(0, 2, 1, 3) * a.value_scale}
    keys, cache, sight, _ = seen(new, call)
    keys = {name: t.astype(q.dtype) for name, t in keys.items()}
    scale = softmax_scale(a, a.head_dim)
    out_BSNH = attend(
        q, keys["k"], keys["v"], sight, scale, sinks_N=params.get("sinks"), block=call.block
    )
    return Attended(named_linear(params, out_BSNH.reshape(b, s, -1), "o"), cache)


def _rotation(cfg: ModelConfig, positions_BS: jax.Array):
    if cfg.positions != "rope":
        return None
    a = cfg.attention
    ropes = {
        FULL: a.rope,
        WINDOW: dataclasses.replace(a.rope, theta=a.window_theta or a.rope.theta),
    }
    width = _widths(a).rotated
    return {kind: rotation(positions_BS, rope, width) for kind, rope in ropes.items()}


def _cache(cfg: ModelConfig, kind: str, rows: int, tokens: int) -> dict[str, Slots]:
    a, where = cfg.attention, (axes.BATCH, axes.KV_HEADS, None, None)
    shape = (rows, key_heads(a, kind), tokens)
    return {"k": Slots((*shape, a.head_dim), where), "v": Slots((*shape, a.v_head_dim), where)}


def _widths(a: AttentionConfig) -> Widths:
    most = max(key_heads(a, kind) for kind in (FULL, WINDOW))
    return Widths(a.head_dim, a.v_head_dim, a.rope.width or a.head_dim, most)


def _cost(cfg: ModelConfig, kind: str) -> Attention:
    a = cfg.attention
    both = a.head_dim + a.v_head_dim
    return Attention(1, a.num_heads * both, a.num_heads * both, key_heads(a, kind) * both)


def _saved(cfg: ModelConfig, number: float, tensor: float) -> float:
    a = cfg.attention
    both = a.head_dim + a.v_head_dim
    return number * ((a.num_heads + _widths(a).key_heads) / tensor * both + 3 * cfg.d_model)


def _sizes(a: AttentionConfig) -> list[tuple[str, str, int]]:
    return [
        (axes.KV_HEADS, "model.attention.num_kv_heads", a.num_kv_heads),
        (axes.KV_HEADS, "model.attention.window_kv_heads", a.window_kv_heads),
    ]


def _problems(cfg: ModelConfig, p: str) -> list[str]:
    out, a = Problems(), cfg.attention
    out += mha.head_problems(a, p, "num_kv_heads", "window_kv_heads")
    out += mha.width_problems(cfg, p)
    out.need(a.v_head_dim > 0, f"{p}attention.v_head_dim={a.v_head_dim} must be positive")
    out.need(
        any(a.windows),
        f"{p}attention.kind='hybrid' needs {p}attention.windows, such as (128, 0): without one it is 'mha'",
    )
    out.need(
        a.qk_norm == "none", f"{p}attention.qk_norm={a.qk_norm!r} is not available with 'hybrid'"
    )
    out.need(not a.out_bias, f"{p}attention.out_bias is not available with 'hybrid'")
    out.need(
        a.rope_layers == "all",
        f"{p}attention.rope_layers={a.rope_layers!r} is not available with 'hybrid': every layer rotates",
    )
    return out


KIND = AttentionKind(
    specs=specs,
    attend=_attend,
    cache=_cache,
    rotation=_rotation,
    widths=_widths,
    cost=_cost,
    saved=_saved,
    sizes=_sizes,
    problems=_problems,
    reads=frozenset(
        {
            "num_kv_heads",
            "head_dim",
            "rope.width",
            "v_head_dim",
            "window_kv_heads",
            "window_theta",
            "value_scale",
        }
    ),
    layer_kind=layer_kind,
    own_specs=own_specs,
)
