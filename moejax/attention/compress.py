"""One key for every m tokens: the compressors of DeepSeek-V4 (2606.19348 section 2.3.1 and 2.3.2, equations 9
to 12 and 20 to 23), over whole rows and token by token.

With C = x W_kv and Z = x W_gate, entry w of a document is

    HCA:  norm(sum_j softmax_j(Z_j + B_j) C_j)                 over the m tokens j of window w
    CSA:  the same over 2m slots: the first half of the channels of window w-1, the second half of window w

where the softmax is one for each channel, in float32. The first window of a document has no window before it.
A rest of fewer than m tokens has no entry. Entry w is rotated as its first token, and seen by tokens from its
last one on.

Here: T tokens, E entries, R slots of a ring, M tokens of a window, C channels, H of which make an entry.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.attention.block_attention import NOWHERE
from moejax.attention.contract import Where
from moejax.attention.slots import take
from moejax.linear import linear
from moejax.norm import norm, norm_specs
from moejax.params import ParamSpec


def specs(d_model: int, width: int, m: int, overlap: bool, std: float) -> dict:
    """A compressor from tokens of `d_model` channels to entries of `width`. `overlap`: CSA's."""
    channels = width * (1 + overlap)
    matrix = ParamSpec((d_model, channels), (axes.EMBED, None), std=std)
    return {
        "w_kv": matrix,
        "w_gate": matrix,
        "position_bias": ParamSpec((m, channels), (None, None), init="zeros", role="vector"),
        "norm": norm_specs(width),
    }


class Windows(NamedTuple):
    """The complete windows of a row, document by document.

    Attributes:
      end_BE: index of the last token of each.
      at_BE: its position, NOWHERE past the last window.
      document_BE: its document, or None for one document per row.
      alone_BE: the window before it is not there.
    """

    end_BE: jax.Array
    at_BE: jax.Array
    document_BE: jax.Array | None
    alone_BE: jax.Array


def windows(where: Where, m: int) -> Windows:
    """The windows of `m` tokens of every document; at most S / m in a row."""
    at_BS, document_BS = where.positions_BS, where.segment_ids_BS
    length = at_BS.shape[1]
    index_S = jnp.arange(length)[None]

    def whole(n):
        """The `n` tokens up to each one follow each other in one document."""
        first = jnp.clip(index_S - (n - 1), 0)
        same = (index_S >= n - 1) & (at_BS[:, first[0]] == at_BS - (n - 1))
        return same if document_BS is None else same & (document_BS[:, first[0]] == document_BS)

    ends = whole(m) & (at_BS % m == m - 1)
    order_BE = jnp.sort(jnp.where(ends, index_S, length), axis=1)[:, : length // m]
    end_BE = jnp.minimum(order_BE, length - 1)
    of = lambda a: take(a, end_BE)  # noqa: E731
    return Windows(
        end_BE,
        jnp.where(order_BE < length, of(at_BS), NOWHERE),
        None if document_BS is None else of(document_BS),
        ~of(whole(2 * m)),
    )


def projected(params: dict, x_BTD: jax.Array) -> jax.Array:
    """C and Z of every token, side by side: all that an entry needs of it."""
    return jnp.concatenate(
        [linear(x_BTD, params["w_kv"]), linear(x_BTD, params["w_gate"])], axis=-1
    )


def pooled(params: dict, raw_BTC, end_BE, alone_BE, eps: float) -> jax.Array:
    """The entries BEH, not rotated, of the windows that end at `end_BE`, from `projected` tokens."""
    bias_MC, h = params["position_bias"], params["norm"]["scale"].shape[0]
    m, channels = bias_MC.shape
    wide = jnp.promote_types(raw_BTC.dtype, jnp.float32)
    kv_BTC, gate_BTC = jnp.split(raw_BTC, 2, axis=-1)
    own_BEM = end_BE[:, :, None] + jnp.arange(m)[None, None] - (m - 1)

    def part(at_BEM, here: slice):
        at_BEM = jnp.clip(at_BEM, 0)
        gate = take(gate_BTC[..., here], at_BEM).astype(wide) + bias_MC[None, None, :, here].astype(
            wide
        )
        return take(kv_BTC[..., here], at_BEM).astype(wide), gate

    kv, gate = part(own_BEM, slice(channels - h, channels))
    if channels > h:  # two series
        kv_before, gate_before = part(own_BEM - m, slice(0, h))
        gate_before = jnp.where(alone_BE[:, :, None, None], -jnp.inf, gate_before)
        kv = jnp.concatenate([kv_before, kv], axis=2)
        gate = jnp.concatenate([gate_before, gate], axis=2)
    entries = (jax.nn.softmax(gate, axis=2) * kv).sum(axis=2)
    return norm(params["norm"], entries, eps).astype(raw_BTC.dtype)


# --------------------------------------------------------------------------------------------------
# Rings: the last R tokens of each row, token p in slot p mod R.


def ring_positions(first_B: jax.Array, size: int) -> jax.Array:
    """[B,R]: which position each slot holds once all before `first_B` were written; negative: none yet."""
    last = first_B[:, None] - 1
    return last - (last - jnp.arange(size)[None]) % size


def ring_of(a_BTX: jax.Array, lengths_B: jax.Array, size: int) -> jax.Array:
    """The ring [B,R,X] after the first `lengths_B` tokens of each row."""
    at_BR = jnp.clip(ring_positions(lengths_B, size), 0)
    return take(a_BTX, at_BR)


def in_order(ring_BRX: jax.Array, first_B: jax.Array) -> jax.Array:
    """The R tokens before `first_B`, oldest first."""
    size = ring_BRX.shape[1]
    slot_BR = (first_B[:, None] + jnp.arange(size)[None]) % size
    return take(ring_BRX, slot_BR)
