"""The CPU path: a loop over the blocks of rows that exist, each multiplied by its one expert.

A group of n rows is cut into ceil(n / block) blocks, so no expert is ever multiplied by a row that
did not choose it, except for the padding of each group's last block. The loop runs over real blocks
only (a dynamic number), and dw accumulates in place. XLA:CPU's own `ragged_dot` multiplies every
row by every expert.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.moe.grouped_matmul.products import Products
from moejax.moe.varying import vary, varying_axes

# Rows of a block: large enough to run a product at full speed, small against R / E.
BLOCK = 128


class Blocks(NamedTuple):
    """Where each block lies. Only the first `num_blocks` of the NB entries exist."""

    num_blocks: jax.Array
    expert_NB: jax.Array
    slice_NB: jax.Array  # first row of the slice of BLOCK rows to read; within [0, R - block]
    start_NB: jax.Array  # first row of that slice that belongs to the block
    end_NB: jax.Array  # one past its last row


def make_blocks(group_sizes_E: jax.Array, num_rows: int, block: int) -> Blocks:
    num_experts = group_sizes_E.shape[0]
    blocks_E = (group_sizes_E + block - 1) // block
    last_block_E = jnp.cumsum(blocks_E)
    # sum of ceil(n / block) over groups is at most (R + E (block - 1)) / block.
    most_blocks = (num_rows + num_experts * (block - 1)) // block
    index_NB = jnp.arange(most_blocks)
    # Blocks past the last one get expert E - 1 here; the loop never reaches them.
    expert_NB = jnp.minimum(jnp.searchsorted(last_block_E, index_NB, side="right"), num_experts - 1)
    end_E = jnp.cumsum(group_sizes_E)
    nth_NB = index_NB - (last_block_E - blocks_E)[expert_NB]
    start_NB = (end_E - group_sizes_E)[expert_NB] + nth_NB * block
    return Blocks(
        num_blocks=last_block_E[-1],
        expert_NB=expert_NB,
        # The slice of the last rows may not reach past R: shift it up and mask what is not ours.
        slice_NB=jnp.minimum(start_NB, num_rows - block),
        start_NB=start_NB,
        end_NB=jnp.minimum(start_NB + block, end_E[expert_NB]),
    )


def _loop(group_sizes_E, num_rows, block, out, body):
    """out = body(out, expert, first row, mine_B1) for every block in order."""
    blocks = make_blocks(group_sizes_E, num_rows, block)

    def step(i, out):
        start = blocks.slice_NB[i]
        row_B = start + jnp.arange(block)
        mine_B1 = ((row_B >= blocks.start_NB[i]) & (row_B < blocks.end_NB[i]))[:, None]
        return body(out, blocks.expert_NB[i], start, mine_B1)

    return jax.lax.fori_loop(0, blocks.num_blocks, step, out)


def _rows_product(x_RD, w, group_sizes_E, contract, width):
    """Rows times their expert's matrix, contracting dimension `contract` of it."""
    num_rows = x_RD.shape[0]
    block = min(BLOCK, num_rows)
    out = vary(jnp.zeros((num_rows, width), x_RD.dtype), varying_axes(x_RD, w, group_sizes_E))
    if num_rows == 0:
        return out

    def body(y_RF, e, start, mine_B1):
        x_BD = jax.lax.dynamic_slice_in_dim(x_RD, start, block)
        w_e = jax.lax.dynamic_index_in_dim(w, e, keepdims=False)
        y_BF = jax.lax.dot_general(
            x_BD,
            w_e,
            (((1,), (contract,)), ((), ())),
            preferred_element_type=jnp.promote_types(x_RD.dtype, jnp.float32),
        )
        old_BF = jax.lax.dynamic_slice_in_dim(y_RF, start, block)
        y_BF = jnp.where(mine_B1, y_BF.astype(y_RF.dtype), old_BF)
        return jax.lax.dynamic_update_slice_in_dim(y_RF, y_BF, start, 0)

    return _loop(group_sizes_E, num_rows, block, out, body)


def matmul(x_RD, w_EDF, group_sizes_E):
    return _rows_product(x_RD, w_EDF, group_sizes_E, 0, w_EDF.shape[2])


def matmul_transposed(y_RF, w_EDF, group_sizes_E):
    return _rows_product(y_RF, w_EDF, group_sizes_E, 1, w_EDF.shape[1])


def outer(x_RD, y_RF, group_sizes_E):
    num_rows = x_RD.shape[0]
    block = min(BLOCK, num_rows)
    shape = (group_sizes_E.shape[0], x_RD.shape[1], y_RF.shape[1])
    dtype = jnp.promote_types(x_RD.dtype, jnp.float32)
    out = vary(jnp.zeros(shape, dtype), varying_axes(x_RD, y_RF, group_sizes_E))
    if num_rows == 0:
        return out.astype(x_RD.dtype)

    def body(w_EDF, e, start, mine_B1):
        x_BD = jnp.where(mine_B1, jax.lax.dynamic_slice_in_dim(x_RD, start, block), 0)
        y_BF = jnp.where(mine_B1, jax.lax.dynamic_slice_in_dim(y_RF, start, block), 0)
        w_DF = jax.lax.dot_general(
            x_BD, y_BF, (((0,), (0,)), ((), ())), preferred_element_type=dtype
        )
        w_DF += jax.lax.dynamic_index_in_dim(w_EDF, e, keepdims=False)
        return jax.lax.dynamic_update_index_in_dim(w_EDF, w_DF, e, 0)

    return _loop(group_sizes_E, num_rows, block, out, body).astype(x_RD.dtype)


PRODUCTS = Products(matmul, matmul_transposed, outer)
