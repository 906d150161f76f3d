"""Reading and writing the cache of keys: one rule for MHA, GQA, sliding windows, MLA and speculative decoding.

Slot j of a row holds position j of that row. Prompts are left-aligned; what padding wrote is never
attended (a query at position p sees slots <= p) and decoding overwrites it. The same holds for rejected
speculative tokens. Slots are the second last axis: a head's keys lie together, as attention reads them.
"""

import jax
import jax.numpy as jnp

Cache = dict[str, jax.Array]


def take(a_BTX: jax.Array, at: jax.Array) -> jax.Array:
    """Of each row what stands at its places: a [B,T,..] at [B,..] -> [B,..,..]."""
    return jax.vmap(lambda a, index: a[index])(a_BTX, at)


def write(cache: Cache, layer, positions_BS: jax.Array, new: Cache, *, prefill: bool) -> Cache:
    """Write `new` ([B,(M,)S,...] each) at each row's positions of one layer; they must exist.

    The positions of a row follow each other; with `prefill` (static) they are 0, 1, 2, .. in every row.
    """
    new = {name: b.astype(cache[name].dtype) for name, b in new.items()}
    if prefill:
        return {
            name: jax.lax.dynamic_update_slice(a, new[name][None], (layer,) + (0,) * (a.ndim - 1))
            for name, a in cache.items()
        }
    return jax.lax.platform_dependent(
        cache,
        new,
        positions_BS,
        jnp.asarray(layer, positions_BS.dtype),
        cpu=_write_slices,
        default=_scatter,
    )


def _write_slices(cache: Cache, new: Cache, positions_BS, layer) -> Cache:
    """Row by row: XLA:CPU copies the whole cache for a scatter, and not for this."""

    zero = jnp.zeros(
        (), positions_BS.dtype
    )  # all indices have one dtype, also where ints are 64 bits

    def row(b, cache):
        return {
            name: jax.lax.dynamic_update_slice(
                a,
                jax.lax.dynamic_slice_in_dim(new[name], b, 1)[None],
                (layer, b, *(zero,) * (a.ndim - 4), positions_BS[b, 0], zero),
            )
            for name, a in cache.items()
        }

    # No position is negative, but XLA does not know that. It would unroll a loop of one turn, compute the
    # slice a second time where the cache is read, and copy the cache four times to have both.
    end = jnp.where(positions_BS[0, 0] >= 0, positions_BS.shape[0], 0).astype(positions_BS.dtype)
    return jax.lax.fori_loop(0, end, row, cache)


def _scatter(cache: Cache, new: Cache, positions_BS, layer) -> Cache:
    rows = jnp.arange(positions_BS.shape[0])[:, None]

    def one(a, b):
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
