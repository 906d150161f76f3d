"""The keys that each query attends to, chosen by an indexer's scores (DeepSeek-V3.2, 2512.02556 section 2.1).

    I_{t,s} = sum_j w_{t,j} relu(q_{t,j} . k_s)

A query attends to the keys with the `topk` highest scores among those that it sees. A choice is one bit for
each query and key: long rows are scored block by block, and no float is kept for each pair.

Here: T key positions, J heads of the indexer, I width of each, b bytes of 8 keys each.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.attention.block_attention import Chosen, Sight, block_size, cut, split
from moejax.attention.slots import take


class Index(NamedTuple):
    """What an indexer makes of tokens, with gradients.

    Attributes:
      q_BSJI: its queries.
      w_BSJ: the weight of each, all scales included.
      k_BTI: its keys.
    """

    q_BSJI: jax.Array
    w_BSJ: jax.Array
    k_BTI: jax.Array


def num_bytes(keys: int) -> int:
    return -(-keys // 8)


def scores(index: Index) -> jax.Array:
    """I of every query and key, [B,S,T] in float32 or wider."""
    wide = index.w_BSJ.dtype
    q, k = index.q_BSJI.astype(wide), index.k_BTI.astype(wide)
    of_heads = jax.nn.relu(jnp.einsum("BSJI,BTI->BSJT", q, k))
    return jnp.einsum("BSJ,BSJT->BST", index.w_BSJ, of_heads)


def choose(index: Index, sight: Sight, topk: int, block: int = 0) -> jax.Array:
    """One bit for each query and key, uint8 [B,S,b]; there must be more than `topk` keys. No gradient.

    `sight`: which keys each query sees; at most `topk` of them are chosen. `block`: as for attention.
    """
    index = jax.lax.stop_gradient(index)
    b, s = index.w_BSJ.shape[:2]
    t = index.k_BTI.shape[1]
    size = block_size(s, block)
    if not size:
        return _best(scores(index), sight.mask_BST(), topk)
    (i, q_size), (j, k_size) = split(s, size), split(t, size)
    k_JBKI = cut(index.k_BTI, j, k_size)

    def of_queries(of):
        q_BQJI, w_BQJ, q_pos_BQ, q_segment_BQ = of
        part = lambda k_BKI: scores(Index(q_BQJI, w_BQJ, k_BKI))  # noqa: E731
        score_JBQK = jax.lax.map(part, k_JBKI)
        score_BQT = jnp.moveaxis(score_JBQK, 0, 2).reshape(b, q_size, j * k_size)[..., :t]
        here = sight._replace(q_pos_BS=q_pos_BQ, q_segment_BS=q_segment_BQ)
        return _best(score_BQT, here.mask_BST(), topk)

    parts = index.q_BSJI, index.w_BSJ, sight.q_pos_BS, sight.q_segment_BS
    bits = jax.lax.map(of_queries, tuple(cut(a, i, q_size) for a in parts))
    return bits.swapaxes(0, 1).reshape(b, i * q_size, -1)[:, :s]


def _best(score_BST, mask_BST, topk: int):
    """Of equal scores the earlier keys are chosen: a head's relu makes many of them 0."""
    score = jnp.where(mask_BST, score_BST, -jnp.inf)
    score = jnp.where(score == 0, 0.0, score)  # top_k puts -0 below 0
    value, at = jax.lax.top_k(score, topk)
    last, last_at = value[..., -1:], at[..., -1:]
    equal = (score == last) & (jnp.arange(score.shape[-1])[None, None] <= last_at)
    return jnp.packbits((score > last) | equal, axis=-1, bitorder="little")


def chosen(bits_BSb: jax.Array, keys: int) -> Chosen:
    """A choice as `Sight` takes it."""
    return Chosen(bits_BSb, jnp.arange(keys))


def gathered(
    keys: dict[str, jax.Array], bits_B1b: jax.Array, sight: Sight, topk: int
) -> tuple[dict[str, jax.Array], Sight]:
    """The chosen ones of `keys` (name -> [B,T,..]) for a single query, [B,topk,..], and its sight of them.

    As in decoding, where the rest need not be read. `choose` chooses `topk`; of those that a query does not
    see, it sees none here either.
    """
    length = next(iter(keys.values())).shape[1]
    on_BT = jnp.unpackbits(bits_B1b[:, 0], axis=-1, count=length, bitorder="little")
    at_BK = jax.lax.top_k(on_BT.astype(jnp.int32), topk)[1]
    k_pos_BT = jnp.broadcast_to(sight.k_pos_BT, (len(at_BK), length))
    seen = sight._replace(k_pos_BT=take(k_pos_BT, at_BK), chosen=None)
    return {name: take(a, at_BK) for name, a in keys.items()}, seen
