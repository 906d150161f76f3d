"""The key/value cache: one rule for MHA, GQA, sliding windows, MLA and speculative decoding.

Slot j of a row holds position j of that row. Prompts are left-aligned; what padding wrote is never
attended (a query at position p sees slots <= p) and decoding overwrites it. The same holds for rejected
speculative tokens. All layers live in one array per kind, updated in place under jit.
"""

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig

Cache = dict[str, jax.Array]


def cache_shapes(cfg: ModelConfig, batch: int, length: int, layers: int | None = None) -> dict:
    """Shapes: k, v [L,B,S,M,H]; or for MLA latent [L,B,S,kv_lora] and rope_key [L,B,S,rope]."""
    a = cfg.attention
    lead = (cfg.num_layers if layers is None else layers, batch, length)
    if a.kind == "mla":
        return {
            "latent": (*lead, a.kv_lora_rank),
            "rope_key": (*lead, a.qk_rope_head_dim),
        }
    return {name: (*lead, a.num_kv_heads, a.head_dim) for name in ("k", "v")}


def init_cache(cfg: ModelConfig, batch: int, length: int, layers: int | None = None) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens, in the compute dtype."""
    shapes = cache_shapes(cfg, batch, length, layers)
    return {name: jnp.zeros(shape, cfg.dtype) for name, shape in shapes.items()}


def write(cache: Cache, layer, positions_BS: jax.Array, new: Cache) -> Cache:
    """Write `new` ([B,S,...] each) at each row's positions of one layer."""
    rows = jnp.arange(positions_BS.shape[0])[:, None]
    return {
        name: a.at[layer, rows, positions_BS].set(new[name].astype(a.dtype), mode="drop")
        for name, a in cache.items()
    }


def read(cache: Cache, layer) -> Cache:
    """All slots of one layer: [B,S,...] each."""
    return {
        name: jax.lax.dynamic_index_in_dim(a, layer, axis=0, keepdims=False)
        for name, a in cache.items()
    }
