"""The key/value cache: one rule for MHA, GQA, sliding windows, MLA and speculative decoding.

Slot j of a row holds position j of that row. Prompts are left-aligned; what padding wrote is never
attended (a query at position p sees slots <= p) and decoding overwrites it. The same holds for rejected
speculative tokens. All layers live in one array per kind, updated in place under jit; or, where layers
are unrolled, in a list of caches of one layer each, so that no layer is copied out to be read. Slots are
the second last axis: a head's keys lie together, as attention reads them.
"""

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig

Cache = dict[str, jax.Array]


def cache_shapes(cfg: ModelConfig, batch: int, length: int, layers: int | None = None) -> dict:
    """Shapes: k, v [L,B,M,S,H]; or for MLA latent [L,B,S,kv_lora] and rope_key [L,B,S,rope]."""
    a = cfg.attention
    lead = (cfg.num_layers if layers is None else layers, batch, length)
    if a.kind == "mla":
        return {
            "latent": (*lead, a.kv_lora_rank),
            "rope_key": (*lead, a.qk_rope_head_dim),
        }
    return {name: (*lead[:2], a.num_kv_heads, length, a.head_dim) for name in ("k", "v")}


def init_cache(cfg: ModelConfig, batch: int, length: int, layers: int | None = None) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens, in the compute dtype."""
    shapes = cache_shapes(cfg, batch, length, layers)
    return {name: jnp.zeros(shape, cfg.dtype) for name, shape in shapes.items()}


def init_layers(cfg: ModelConfig, batch: int, length: int) -> list[Cache]:
    """The same as a list of caches of one layer."""
    return [init_cache(cfg, batch, length, layers=1) for _ in range(cfg.num_layers)]


def write(cache: Cache, layer, positions_BS: jax.Array, new: Cache, *, prefill: bool) -> Cache:
    """Write `new` ([B,(M,)S,...] each) at each row's positions of one layer.

    With `prefill` (static) the positions are 0, 1, 2, .. in every row, and one slice is written.
    """
    rows = jnp.arange(positions_BS.shape[0])[:, None]

    def one(a, b):
        b = b.astype(a.dtype)
        if prefill:
            return jax.lax.dynamic_update_slice(a, b[None], (layer,) + (0,) * b.ndim)
        if b.ndim == 3:
            return a.at[layer, rows, positions_BS].set(b, mode="drop")
        # Indices on both sides of the heads: B and S come first.
        return a.at[layer, rows, :, positions_BS].set(b.swapaxes(1, 2), mode="drop")

    return {name: one(a, new[name]) for name, a in cache.items()}


def read(cache: Cache, layer) -> Cache:
    """All slots of one layer: [B,(M,)S,...] each."""
    return {
        name: jax.lax.dynamic_index_in_dim(a, layer, axis=0, keepdims=False)
        for name, a in cache.items()
    }
