"""What teaches an indexer to rank keys as attention does (DeepSeek-V3.2, 2512.02556 section 2.1.1).

    p_t = sum over heads of softmax_s(q_t . k_s scale) / number of heads          (no gradient)
    L   = sum over tokens t of KL(p_t || softmax_s(I_t)) = sum_s p_ts log(p_ts / softmax(I_t)_s)

Both softmaxes run over the keys that the query attends to: all that it sees in the dense stage, the chosen ones
afterwards. A query that sees none counts as 0. Queries are worked on in blocks, and heads one after the other:
floats exist for a block of queries by all keys, and no more.

Here: N query heads, T key positions, J heads of the indexer, I width of each, Q queries of a block.
"""

import jax
import jax.numpy as jnp

from moejax.attention.block_attention import Sight, block_size, cut, split
from moejax.attention.selection import Index

INDEX = "index"  # the name of this loss


def index_loss(
    index: Index, q_BSNH, k_BNTH, scale: float, sight: Sight, mask_BS, block: int = 0
) -> jax.Array:
    """L as above, summed over the tokens of the batch.

    Args:
      index: what the indexer makes of the tokens; gradients reach nothing else.
      q_BSNH, k_BNTH: queries and keys of attention; [B,1,T,H] for keys that all heads share.
      scale: of their products.
      sight: the keys that each query attends to.
      mask_BS: 1 = token, 0 = padding, or None.
      block: as for attention.
    """
    q_BSNH, k_BNTH = jax.lax.stop_gradient((q_BSNH * scale, k_BNTH))
    b, s = index.w_BSJ.shape[:2]
    t = index.k_BTI.shape[1]
    counts_BS = jnp.ones((b, s), bool) if mask_BS is None else mask_BS > 0
    (i, size) = split(s, block_size(s, block) or s)
    parts = [cut(a, i, size) for a in (index.q_BSJI, index.w_BSJ, q_BSNH, sight.q_pos_BS)]
    parts += [cut(sight.q_segment_BS, i, size)]
    parts += [None if sight.chosen is None else cut(sight.chosen.bits_BSb, i, size)]
    parts += [cut(counts_BS, i, size, constant_values=False)]

    @jax.checkpoint
    def of_queries(index_k_BTI, parts):
        index_q, w, q_BQNH, position, segment, bits, counts_BQ = parts
        here = sight._replace(q_pos_BS=position, q_segment_BS=segment)
        if sight.chosen is not None:
            here = here._replace(chosen=sight.chosen._replace(bits_BSb=bits))
        mask_BQT = here.mask_BST()
        target_BQT = _target(q_BQNH, k_BNTH, mask_BQT)
        score_BQT = _scores(Index(index_q, w, index_k_BTI), t)
        log_BQT = jax.nn.log_softmax(_masked(score_BQT, mask_BQT), axis=-1)
        log_target_BQT = jnp.log(jnp.where(target_BQT > 0, target_BQT, 1.0))
        kl_BQT = jnp.where(target_BQT > 0, target_BQT * (log_target_BQT - log_BQT), 0.0)
        return jnp.where(counts_BQ, kl_BQT.sum(axis=-1), 0.0).sum()

    def add(total, parts):
        return total + of_queries(index.k_BTI, parts), None

    return jax.lax.scan(add, jnp.zeros((), index.w_BSJ.dtype), tuple(parts))[0]


def _masked(score, mask):
    return jnp.where(mask, score, jnp.finfo(score.dtype).min)


def _target(q_BQNH, k_BNTH, mask_BQT):
    """p: the mean of attention's softmaxes over its heads."""
    wide, shared = jnp.promote_types(q_BQNH.dtype, jnp.float32), k_BNTH.shape[1] == 1

    def add(total_BQT, head):
        q_BQH, k_BTH = (head, k_BNTH[:, 0]) if shared else head
        logits = jnp.einsum("BQH,BTH->BQT", q_BQH, k_BTH, preferred_element_type=wide)
        return total_BQT + jax.nn.softmax(_masked(logits, mask_BQT), axis=-1), None

    q_NBQH = jnp.moveaxis(q_BQNH, 2, 0)
    heads = q_NBQH if shared else (q_NBQH, jnp.moveaxis(k_BNTH, 1, 0))
    total_BQT, _ = jax.lax.scan(add, jnp.zeros(mask_BQT.shape, wide), heads)
    return jnp.where(mask_BQT, total_BQT / q_BQNH.shape[2], 0.0)


def _scores(index: Index, keys: int):
    """`selection.scores`, head by head; nothing is kept of a head but its inputs."""
    wide = index.w_BSJ.dtype

    @jax.checkpoint
    def of_head(q_BQI, w_BQ, k_BTI):
        score = jnp.einsum("BQI,BTI->BQT", q_BQI.astype(wide), k_BTI.astype(wide))
        return w_BQ[..., None] * jax.nn.relu(score)

    def add(total_BQT, head):
        q_BQI, w_BQ = head
        return total_BQT + of_head(q_BQI, w_BQ, index.k_BTI), None

    heads = jnp.moveaxis(index.q_BSJI, 2, 0), jnp.moveaxis(index.w_BSJ, 2, 0)
    return jax.lax.scan(add, jnp.zeros((*index.w_BSJ.shape[:2], keys), wide), heads)[0]
