"""Attention in blocks of queries and keys: no array grows with the square of the length.

FlashAttention-2 (2307.08691) in plain JAX. The forward pass (Algorithm 1) goes through the keys with a running
maximum and sum of each softmax. It keeps the output and the logarithm of the sum, from which the backward pass
(Algorithm 2) computes the scores of each block again. Which keys a query sees is worked out block by block from
positions and documents. A block whose keys no query of it can see (in the future, before the window, of another
document) is not computed.

`block_size` alone decides what is computed in blocks, where no kernel of an accelerator (`gpu_kernel`) does it
all. Ring attention would go round the loop over blocks of keys; it is not here.

Here: T key positions, G query heads that share a key head (N = M G), I blocks of queries, J of keys, Q rows of
a block of queries (those of all G heads), K keys of a block.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

BLOCK = 256  # queries, and keys, of a block at most
GPU_BLOCK = 1024  # there
SHORT = 512  # up to so many queries, all scores at once are fast and small enough

NOWHERE = jnp.iinfo(jnp.int32).max  # the position of a key that no query sees


def block_size(queries: int, asked: int = 0) -> int:
    """Queries (and keys) of a block at most, 0: all scores at once. `asked`: ComputeConfig.attention_block."""
    own = GPU_BLOCK if jax.default_backend() == "gpu" else BLOCK
    size = asked or (own if queries > SHORT else queries)
    return size if size < queries else 0


class Chosen(NamedTuple):
    """The keys that each query attends to, of those that it sees.

    Attributes:
      bits_BSb: bit s % 8 of byte s // 8 stands for key s.
      at_T: the numbers of the keys.
    """

    bits_BSb: jax.Array
    at_T: jax.Array

    def mask_BST(self) -> jax.Array:
        byte_BST = jnp.take(self.bits_BSb, self.at_T // 8, axis=-1, mode="clip")
        return (byte_BST >> (self.at_T % 8).astype(jnp.uint8)[None, None]) & 1 == 1


class Sight(NamedTuple):
    """What decides which keys a query sees.

    Attributes:
      q_pos_BS, k_pos_BT: position of each query and key within its document; B of keys may be 1.
      q_segment_BS, k_segment_BT: documents, 0 = padding; or None, one document per row.
      window: keys that a query sees at most; None or 0 = all.
      chosen: of these, the ones that it attends to; None = all.
      first_BS: says the same once more where keys and queries are the same tokens, and each sees a run of them:
        the index of the first key that it sees, the last being its own. None: not known.
    """

    q_pos_BS: jax.Array
    k_pos_BT: jax.Array
    q_segment_BS: jax.Array | None = None
    k_segment_BT: jax.Array | None = None
    window: jax.Array | int | None = None
    chosen: Chosen | None = None
    first_BS: jax.Array | None = None

    def mask_BST(self) -> jax.Array:
        """True: same document, not in the future, inside the window, chosen."""
        distance = self.q_pos_BS[:, :, None] - self.k_pos_BT[:, None, :]
        ok = distance >= 0
        if self.q_segment_BS is not None and self.k_segment_BT is not None:
            ok &= self.q_segment_BS[:, :, None] == self.k_segment_BT[:, None, :]
        if self.window is not None:
            ok &= (self.window == 0) | (distance < self.window)
        return ok if self.chosen is None else ok & self.chosen.mask_BST()


def attend_in_blocks(
    q_BSNH, k_BMTH, v_BMTH, sight: Sight, scale: float, sinks_N=None, block: int = BLOCK
):
    """`core.attend`, in blocks of at most `block` queries and keys. Every query must see a key.

    Returns [B,S,N,H of v]; gradients reach q, k, v and the sinks.
    """
    b, s, n, h = q_BSNH.shape
    m, t = k_BMTH.shape[1:3]
    (i, q_size), (j, k_size) = split(s, block), split(t, block)
    q = pad(q_BSNH * scale, 1, i * q_size).reshape(b, i, q_size, m, n // m, h)
    q_IBMQH = q.transpose(1, 0, 3, 4, 2, 5).reshape(i, b, m, n // m * q_size, h)
    k, v = (pad(a, 2, j * k_size).reshape(b, m, j, k_size, -1) for a in (k_BMTH, v_BMTH))
    sinks_MQ = None if sinks_N is None else jnp.repeat(sinks_N.reshape(m, n // m), q_size, axis=1)
    # Queries that fill up the last block stand where its last one stands, keys after all queries.
    in_blocks = Sight(
        cut(sight.q_pos_BS, i, q_size),
        cut(sight.k_pos_BT, j, k_size, constant_values=NOWHERE),
        cut(sight.q_segment_BS, i, q_size),
        cut(sight.k_segment_BT, j, k_size),
        None if sight.window is None else jnp.asarray(sight.window),
        sight.chosen and _cut_chosen(sight.chosen, i, q_size, j, k_size),
    )
    out_IBMQH = _attend(
        q_IBMQH, k.transpose(2, 0, 1, 3, 4), v.transpose(2, 0, 1, 3, 4), sinks_MQ, in_blocks
    )
    out = out_IBMQH.reshape(i, b, m, n // m, q_size, -1).transpose(1, 0, 4, 2, 3, 5)
    return out.reshape(b, i * q_size, n, -1)[:, :s]


def split(length: int, block: int) -> tuple[int, int]:
    """Number and size of the blocks: as even as they can be."""
    number = -(-length // block)
    return number, -(-length // number)


def pad(a, axis: int, length: int, **how):
    widths = [(0, length - a.shape[axis] if d == axis else 0) for d in range(a.ndim)]
    return a if a.shape[axis] == length else jnp.pad(a, widths, **how)


def cut(a_BS, number: int, size: int, **fill):
    """[B,S,..] in blocks, [I,B,S/I,..]."""
    if a_BS is None:
        return None
    a_BS = pad(a_BS, 1, number * size, **(fill or {"mode": "edge"}))
    return a_BS.reshape(a_BS.shape[0], number, size, *a_BS.shape[2:]).swapaxes(0, 1)


def _cut_chosen(chosen: Chosen, i: int, q_size: int, j: int, k_size: int) -> Chosen:
    at_JK = pad(chosen.at_T, 0, j * k_size).reshape(j, k_size)
    return Chosen(cut(chosen.bits_BSb, i, q_size), at_JK)


# --------------------------------------------------------------------------------------------------
# Which blocks are computed.


def _ends(position, segment):
    """Of every block and row: the first document and the first position in it, the last and the last in it."""
    if segment is None:
        segment = jnp.zeros_like(position)
    segment = jnp.where(segment == 0, NOWHERE, segment)  # padding ends a row
    low, high = segment.min(axis=-1), segment.max(axis=-1)
    first = jnp.where(segment == low[..., None], position, NOWHERE).min(axis=-1)
    last = jnp.where(segment == high[..., None], position, -1).max(axis=-1)
    return low, first, high, last


def _needed(sight: Sight):
    """[I,J]: some query of block i may see a key of block j, in some row. Where it is False none does, whatever
    the positions and documents are."""
    blocks_of_q = _ends(sight.q_pos_BS, sight.q_segment_BS)
    blocks_of_k = _ends(sight.k_pos_BT, sight.k_segment_BT)
    q_low, q_first, q_high, q_last = (a[:, None] for a in blocks_of_q)
    k_low, k_first, k_high, k_last = (a[None] for a in blocks_of_k)
    after = (k_low > q_high) | ((k_low == q_high) & (k_first > q_last))
    before = k_high < q_low
    if sight.window is not None:
        far = (k_high == q_low) & (q_first - k_last >= sight.window)
        before |= (sight.window > 0) & far
    return ~(after | before).all(axis=-1)


def _range(needed):
    """Of each row of `needed`: the first column that is needed, and the one after the last."""
    column = jnp.arange(needed.shape[1])
    first = jnp.where(needed, column, needed.shape[1]).min(axis=1)
    return first, jnp.where(needed, column + 1, 0).max(axis=1)


# --------------------------------------------------------------------------------------------------
# Forward and backward.


@jax.custom_vjp
def _attend(q_IBMQH, k_JBMKH, v_JBMKH, sinks_MQ, sight: Sight):
    """softmax(q k^T) v of every block of queries, [I,B,M,Q,H of v]. `sight`: with a leading axis of blocks."""
    return _forward(q_IBMQH, k_JBMKH, v_JBMKH, sinks_MQ, sight)[0]


def _scores(q_BMQH, k_BMKH, sight: Sight):
    wide = jnp.promote_types(q_BMQH.dtype, jnp.float32)
    s = jnp.einsum("BMQH,BMKH->BMQK", q_BMQH, k_BMKH, preferred_element_type=wide)
    mask = sight.mask_BST()
    shape = s.shape
    s = s.reshape(*shape[:2], -1, *mask.shape[1:])
    return jnp.where(mask[:, None, None], s, jnp.finfo(wide).min).reshape(shape)


def _at(sight: Sight, i, j) -> Sight:
    of = lambda a, n: None if a is None else a[n]  # noqa: E731
    return Sight(
        sight.q_pos_BS[i],
        sight.k_pos_BT[j],
        of(sight.q_segment_BS, i),
        of(sight.k_segment_BT, j),
        sight.window,
        sight.chosen and Chosen(sight.chosen.bits_BSb[i], sight.chosen.at_T[j]),
    )


def _forward(q_IBMQH, k_JBMKH, v_JBMKH, sinks_MQ, sight: Sight):
    """Algorithm 1: the outputs and L, the logarithms of the sums of exponentials [I,B,M,Q]."""
    wide = jnp.promote_types(q_IBMQH.dtype, jnp.float32)
    rows, width = q_IBMQH.shape[1:4], v_JBMKH.shape[-1]

    def block_of_queries(_, of):
        i, q_BMQH, first, end = of

        def block_of_keys(j, carry):
            top, total, out = carry
            s = _scores(q_BMQH, k_JBMKH[j], _at(sight, i, j))
            new = jnp.maximum(top, s.max(axis=-1))
            p, fade = jnp.exp(s - new[..., None]), jnp.exp(top - new)
            more = jnp.einsum(
                "BMQK,BMKH->BMQH",
                p.astype(v_JBMKH.dtype),
                v_JBMKH[j],
                preferred_element_type=wide,
            )
            return new, fade * total + p.sum(axis=-1), fade[..., None] * out + more

        if sinks_MQ is None:
            top, total = jnp.full(rows, jnp.finfo(wide).min, wide), jnp.zeros(rows, wide)
        else:  # a sink is a key that was seen already, with a value of zero
            top, total = jnp.broadcast_to(sinks_MQ.astype(wide), rows), jnp.ones(rows, wide)
        start = top, total, jnp.zeros((*rows, width), wide)
        top, total, out = jax.lax.fori_loop(first, end, block_of_keys, start)
        return None, ((out / total[..., None]).astype(v_JBMKH.dtype), top + jnp.log(total))

    blocks = jnp.arange(q_IBMQH.shape[0]), q_IBMQH, *_range(_needed(sight))
    return jax.lax.scan(block_of_queries, None, blocks)[1]


def _keep(q, k, v, sinks_MQ, sight):
    out, sums = _forward(q, k, v, sinks_MQ, sight)
    return out, (q, k, v, sinks_MQ, sight, out, sums)


def _backward(kept, d_out_IBMQH):
    """Algorithm 2. With P = exp(S - L) and D = sum of dO O: dS = P (dP - D); a sink's is -P D."""
    q_IBMQH, k_JBMKH, v_JBMKH, sinks_MQ, sight, out_IBMQH, sums_IBMQ = kept
    wide = sums_IBMQ.dtype
    product = jnp.einsum("IBMQH,IBMQH->IBMQ", d_out_IBMQH.astype(wide), out_IBMQH.astype(wide))

    def block_of_keys(dq_IBMQH, of):
        j, k_BMKH, v_BMKH, first, end = of

        def block_of_queries(i, carry):
            dq_IBMQH, dk, dv = carry
            q_BMQH, d_out = q_IBMQH[i], d_out_IBMQH[i]
            p = jnp.exp(_scores(q_BMQH, k_BMKH, _at(sight, i, j)) - sums_IBMQ[i][..., None])
            dp = jnp.einsum("BMQH,BMKH->BMQK", d_out, v_BMKH, preferred_element_type=wide)
            ds = (p * (dp - product[i][..., None])).astype(q_BMQH.dtype)
            p = p.astype(q_BMQH.dtype)
            dv += jnp.einsum("BMQK,BMQH->BMKH", p, d_out, preferred_element_type=wide)
            dk += jnp.einsum("BMQK,BMQH->BMKH", ds, q_BMQH, preferred_element_type=wide)
            dq = jnp.einsum("BMQK,BMKH->BMQH", ds, k_BMKH, preferred_element_type=wide)
            return dq_IBMQH.at[i].add(dq), dk, dv

        start = dq_IBMQH, jnp.zeros(k_BMKH.shape, wide), jnp.zeros(v_BMKH.shape, wide)
        dq_IBMQH, dk, dv = jax.lax.fori_loop(first, end, block_of_queries, start)
        return dq_IBMQH, (dk.astype(k_BMKH.dtype), dv.astype(v_BMKH.dtype))

    blocks = jnp.arange(k_JBMKH.shape[0]), k_JBMKH, v_JBMKH, *_range(_needed(sight).T)
    dq, (dk, dv) = jax.lax.scan(block_of_keys, jnp.zeros(q_IBMQH.shape, wide), blocks)
    d_sinks = None
    if sinks_MQ is not None:
        share = jnp.exp(sinks_MQ.astype(wide)[None, None] - sums_IBMQ)
        d_sinks = -(share * product).sum(axis=(0, 1)).astype(sinks_MQ.dtype)
    return dq.astype(q_IBMQH.dtype), dk, dv, d_sinks, jax.tree.map(lambda _: None, sight)


_attend.defvjp(_keep, _backward)
