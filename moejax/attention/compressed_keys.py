"""What a query of compressed attention sees: the tokens in its window, and entries, all or some picked.

Rows longer than a block go in blocks of queries, which the backward pass computes again. A block holds its
scores with the tokens in its reach and with all entries; there are m times fewer of these than tokens. Which
entries are picked is a mask. Only those of a single query, as in decoding, are gathered, and no others read.

Here: T keys, E entries, J heads of the indexer, I blocks of queries.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.attention.block_attention import NOWHERE, Sight, block_size
from moejax.attention.contract import Where
from moejax.attention.core import attend
from moejax.attention.selection import Index, scores
from moejax.attention.slots import take
from moejax.config import AttentionConfig


def turn(x_BSNH: jax.Array, cos_sin, back: bool = False) -> jax.Array:
    """The last channels turned by their angles, or `back`; the others as they are."""
    cos, sin = (a[:, :, None].astype(x_BSNH.dtype) for a in cos_sin)
    rest, x = jnp.split(x_BSNH, [x_BSNH.shape[-1] - 2 * cos.shape[-1]], axis=-1)
    a, b = x[..., 0::2], x[..., 1::2]
    sin = -sin if back else sin
    turned = jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)
    return jnp.concatenate([rest, turned], axis=-1)


class Keys(NamedTuple):
    """Keys, which are values.

    Attributes:
      kv_BTH: normed and turned.
      at_BT: their positions; of entries, those of their last tokens.
      document_BT: or None for one document per row.
    """

    kv_BTH: jax.Array
    at_BT: jax.Array
    document_BT: jax.Array | None


def _best(index: Index, seen_BSE: jax.Array, topk: int) -> jax.Array:
    """The `topk` best entries for each query, BS by topk: 2606.19348 equations 13 to 17. Where a query sees
    fewer, the rest are entries that it does not see."""
    return jax.lax.top_k(jnp.where(seen_BSE, scores(index), -jnp.inf), topk)[1]


def picked(index: Index, seen_BSE: jax.Array, topk: int) -> jax.Array:
    """The entries that each query sees among its `topk` best, as a mask BSE."""
    best = _best(index, seen_BSE, topk)
    return seen_BSE & jnp.put_along_axis(
        jnp.zeros(seen_BSE.shape, bool), best, True, axis=-1, inplace=False
    )


def gathered(entries: Keys, best_BK: jax.Array) -> Keys:
    """These entries of each row."""
    at_BT = jnp.broadcast_to(entries.at_BT, entries.kv_BTH.shape[:2])
    document = entries.document_BT
    return Keys(
        take(entries.kv_BTH, best_BK),
        take(at_BT, best_BK),
        None if document is None else take(document, best_BK),
    )


class _Mask(NamedTuple):
    """A `Sight` that is worked out already."""

    seen_BST: jax.Array

    def mask_BST(self) -> jax.Array:
        return self.seen_BST


def see(
    q_BSNH: jax.Array,
    where: Where,
    tokens: Keys,
    entries: Keys | None,
    index: Index | None,
    sinks_N: jax.Array,
    a: AttentionConfig,
    block: int = 0,
) -> jax.Array:
    """What queries see, BSNH.

    Args:
      q_BSNH: the queries, turned.
      where: their positions and documents.
      tokens: seen inside the window; with more than a block of queries, one for each of them, in order.
      entries: seen once they are complete, or None.
      index: picks some of them, without gradient, or None: all.
      sinks_N: a logit for each head.
      a: the options.
      block: as in `Call`.
    """
    of = (q_BSNH, where, tokens, entries, jax.lax.stop_gradient(index), sinks_N, a)
    size = block_size(q_BSNH.shape[1], block)
    return _in_blocks(*of, size) if size else _at_once(*of)


def _at_once(q_BSNH, where: Where, tokens: Keys, entries, index: Index | None, sinks_N, a):
    at_BS, document_BS = where.positions_BS, where.segment_ids_BS

    def seen(keys: Keys, window):
        return Sight(at_BS, keys.at_BT, document_BS, keys.document_BT, window).mask_BST()

    mask, kv = seen(tokens, a.sliding_window), tokens.kv_BTH
    if entries is not None:
        of_entries = seen(entries, None)
        if index is not None and q_BSNH.shape[1] == 1:
            entries = gathered(entries, _best(index, of_entries, a.index_topk)[:, 0])
            of_entries = seen(entries, None)
        elif index is not None:
            of_entries = picked(index, of_entries, a.index_topk)
        mask = jnp.concatenate([mask, of_entries], axis=-1)
        kv = jnp.concatenate([kv, entries.kv_BTH], axis=1)
    kv_BMTH = kv[:, None]
    sight: Any = _Mask(mask)
    # One block: `attend` would cut keys that lie apart.
    return attend(q_BSNH, kv_BMTH, kv_BMTH, sight, a.head_dim**-0.5, sinks_N, block=q_BSNH.shape[1])


def _in_blocks(
    q_BSNH, where: Where, tokens: Keys, entries, index: Index | None, sinks_N, a, size: int
):
    b, s = q_BSNH.shape[:2]
    number = -(-s // size)
    size = -(-s // number)
    back = a.sliding_window - 1

    def cut(x, **how):
        """[B,S,..] as blocks [I,B,size,..]; what fills up the last one is cut off again."""
        widths = [(0, 0), (0, number * size - s)] + [(0, 0)] * (x.ndim - 2)
        x = jnp.pad(x, widths, **how)
        return jnp.moveaxis(x.reshape(b, number, size, *x.shape[2:]), 1, 0)

    def padded(x, fill):
        widths = [(0, 0), (back, number * size - s)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=fill)

    kv = padded(tokens.kv_BTH, 0)
    at = padded(tokens.at_BT, NOWHERE)
    document = None if tokens.document_BT is None else padded(tokens.document_BT, 0)
    blocks = dict(
        i=jnp.arange(number),
        q=cut(q_BSNH),
        at=cut(where.positions_BS, mode="edge"),
        document=None if where.segment_ids_BS is None else cut(where.segment_ids_BS, mode="edge"),
        index=None if index is None else (cut(index.q_BSJI), cut(index.w_BSJ)),
    )

    @jax.checkpoint
    def one(block):
        reached = lambda x: jax.lax.dynamic_slice_in_dim(x, block["i"] * size, size + back, axis=1)  # noqa: E731
        near = Keys(reached(kv), reached(at), None if document is None else reached(document))
        here = Where(block["at"], block["document"], None)
        pick = None
        if index is not None:
            q, w = block["index"]
            pick = Index(q, w, index.k_BTI)
        return _at_once(block["q"], here, near, entries, pick, sinks_N, a)

    out = jnp.moveaxis(jax.lax.map(one, blocks), 0, 1)
    return out.reshape(b, number * size, *out.shape[3:])[:, :s]
