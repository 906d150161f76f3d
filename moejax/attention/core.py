"""What kinds of attention share: the softmax over keys, and which keys a call sees.

Here: T key positions, G query heads that share a key head (N = M G), Q queries of a key head (G S).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.attention import gpu_kernel, slots
from moejax.attention.block_attention import Sight, attend_in_blocks, block_size
from moejax.attention.contract import Call
from moejax.attention.rope import rotation
from moejax.config import ModelConfig
from moejax.linear import linear


def attend(q_BSNH, k_BMTH, v_BMTH, sight: Sight, scale: float, sinks_N=None, block=0) -> jax.Array:
    """softmax(q k^T scale) v with grouped heads, softmax in float32. Returns [B,S,N,H of v].

    `sinks_N` adds exp(sink) to each head's denominator (gpt-oss, 2508.10925). `block` as in `Call`.
    """
    if sinks_N is None and not block and gpu_kernel.serves(q_BSNH, v_BMTH, sight):
        return gpu_kernel.attend(q_BSNH, k_BMTH, v_BMTH, sight, scale)
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


class Seen(NamedTuple):
    """The keys that a call sees.

    Attributes:
      keys: name -> array of one layer: the new tokens', or all of the cache's.
      cache: with the new tokens, or None.
      sight: which of these keys each query sees.
      cached: the keys are read from a cache that holds earlier tokens.
    """

    keys: dict[str, jax.Array]
    cache: dict[str, jax.Array] | None
    sight: Sight
    cached: bool


def seen(new: dict[str, jax.Array], call: Call) -> Seen:
    """Write the new tokens to the cache, if there is one, and say what their queries see.

    With `prefill` the cache was empty: the new tokens attend among themselves. Otherwise they are written first
    and attend to the cache.
    """
    cache, at_BS = call.cache, call.where.positions_BS
    if cache is not None:
        cache = slots.write(cache, call.slot, at_BS, new, prefill=call.prefill)
    if cache is None or call.prefill:
        document_BS = call.where.segment_ids_BS
        first_BS = _first_seen(at_BS, document_BS, call.window)
        sight = Sight(at_BS, at_BS, document_BS, document_BS, call.window, first_BS=first_BS)
        return Seen(new, cache, sight, False)
    keys = slots.read(cache, call.slot)
    every = jnp.arange(next(iter(keys.values())).shape[-2])[None]
    return Seen(keys, cache, Sight(at_BS, every, window=call.window), True)


def _first_seen(at_BS, document_BS, window):
    """`Sight.first_BS`: the tokens of a document lie next to each other, in order."""
    index_BS = jnp.broadcast_to(jnp.arange(at_BS.shape[1])[None], at_BS.shape)
    first_BS = jnp.zeros_like(index_BS)
    if document_BS is not None:
        before_BS = jnp.pad(document_BS[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
        first_BS = jax.lax.cummax(jnp.where(document_BS != before_BS, index_BS, 0), axis=1)
    if window is not None:
        in_window_BS = jnp.where(jnp.asarray(window) > 0, index_BS - window + 1, 0)
        first_BS = jnp.maximum(first_BS, in_window_BS)
    return first_BS


def rope(cfg: ModelConfig, positions_BS: jax.Array, width: int):
    """cos and sin for the rotated channels, or None without rotary positions."""
    return rotation(positions_BS, cfg.attention.rope, width) if cfg.positions == "rope" else None


def turned(cfg: ModelConfig, call: Call):
    """cos and sin for this layer: without rotation (None, or cos 1, sin 0) if its kind has none."""
    cos_sin = call.where.rotation
    if cos_sin is None or cfg.attention.rope_layers == "all":
        return cos_sin
    if call.window is None:
        return None
    cos, sin = cos_sin
    return jnp.where(call.window > 0, cos, 1.0), jnp.where(call.window > 0, sin, 0.0)


def named_linear(params: dict, x: jax.Array, name: str) -> jax.Array:
    """x w_name + b_name, if there is a bias."""
    return linear(x, params[f"w_{name}"], params.get(f"b_{name}"))
