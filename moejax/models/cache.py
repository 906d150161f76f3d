"""The cache of a model: layer kind -> name -> one array over all layers of that kind.

It is updated in place under jit. Where layers are unrolled, it is a list of caches of one layer each, so that
no layer is copied out to be read. What a layer keeps is up to its attention, see `AttentionKind.cache`.
"""

import jax
import jax.numpy as jnp

from moejax.attention import kind_of
from moejax.attention.contract import Slots
from moejax.config import ModelConfig
from moejax.sharding import Layout

LayerCache = dict[str, jax.Array]  # of all layers of a kind, or of one: their number first
Cache = dict[str, LayerCache]


def slots_of(cfg: ModelConfig, layer: int, batch: int, length: int) -> dict[str, Slots]:
    """What layer number `layer` keeps of `batch` rows of up to `length` tokens."""
    kind = kind_of(cfg.attention)
    return kind.cache(cfg, kind.layer_kind(cfg, layer), batch, length)


def layers_of_kinds(cfg: ModelConfig) -> dict[str, list[int]]:
    """Layer kind -> the layers of that kind, in order."""
    layer_kind, out = kind_of(cfg.attention).layer_kind, {}
    for layer in range(cfg.num_layers):
        out.setdefault(layer_kind(cfg, layer), []).append(layer)
    return out


def init_cache(cfg: ModelConfig, batch: int, length: int, *, dtype=jnp.float32) -> Cache:
    """An empty cache for `batch` rows of up to `length` tokens; `dtype` is that of the computation."""
    return {
        name: _empty(slots_of(cfg, layers[0], batch, length), len(layers), dtype)
        for name, layers in layers_of_kinds(cfg).items()
    }


def init_layer(cfg: ModelConfig, layer: int, batch: int, length: int, *, dtype=jnp.float32):
    """The empty cache of one layer; those past the last are the depths of multi-token prediction."""
    return _empty(slots_of(cfg, layer, batch, length), 1, dtype)


def init_layers(
    cfg: ModelConfig, batch: int, length: int, *, dtype=jnp.float32
) -> list[LayerCache]:
    """The cache of the model as a list of caches of one layer."""
    return [init_layer(cfg, i, batch, length, dtype=dtype) for i in range(cfg.num_layers)]


def _empty(slots: dict[str, Slots], layers: int, dtype) -> LayerCache:
    return {n: jnp.zeros((layers, *s.shape), s.dtype or dtype) for n, s in slots.items()}


def place_layers(cache: LayerCache, cfg: ModelConfig, layer: int, layout: Layout | None):
    """Lay the cache of layers like `layer` out on the mesh: rows like the batch, heads over their mesh axes."""
    if layout is None:
        return cache
    where = {n: s.axes for n, s in slots_of(cfg, layer, 1, 1).items()}
    return {n: layout.constrain(a, None, *where[n]) for n, a in cache.items()}


def place(cache: Cache | list[LayerCache], cfg: ModelConfig, layout: Layout | None):
    """The same of the cache of a model; a list of caches is for one device."""
    if layout is None or isinstance(cache, list):
        return cache
    first = {name: layers[0] for name, layers in layers_of_kinds(cfg).items()}
    return {name: place_layers(arrays, cfg, first[name], layout) for name, arrays in cache.items()}


def of_layers(cache, layer_kind: str, start: int, end: int):
    """The cache of these layers, all of one kind: of all layers of that kind, or a list of theirs."""
    if cache is None:
        return None
    return cache[start:end] if isinstance(cache, list) else cache[layer_kind]


def with_layers(cache, layer_kind: str, start: int, end: int, new):
    """The cache with `new` in the place of `of_layers`."""
    if cache is None:
        return None
    if isinstance(cache, list):
        return [*cache[:start], *new, *cache[end:]]
    return {**cache, layer_kind: new}


def cache_bytes(cfg: ModelConfig, batch: int, length: int, dtype: str = "float32") -> int:
    """Bytes of a cache; per token 2 M H numbers a layer, for MLA kv_lora + rope."""
    empty = jax.eval_shape(lambda: init_cache(cfg, batch, length, dtype=jnp.dtype(dtype)))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(empty))
