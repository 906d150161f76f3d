"""Windows of rows: how the CPU path cuts groups of any size into products of few sizes.

XLA:CPU runs a matrix product on several cores only when it is large, or when a batch of products
is, and it needs static shapes. So the rows of every expert are cut into windows of at most
`sizes[-1]` rows; windows of like length, of any experts, are put side by side, S at a time; and
each such set is computed as one batched product of the least static length in `sizes` that holds
it. Windows are sorted by length, so the sets of each static length are a range, and one loop with a
dynamic number of steps runs over that range: no expert is multiplied by rows that did not choose
it, apart from the padding of a window to its static length (8% at 192 rows per expert).

Here: W windows, S windows side by side, G sets of S windows, C rows of a window. (Sliding windows of attention
are another thing.)
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.weights import Weight


class Window(NamedTuple):
    """Rows of one expert, as scalars inside the loop.

    Attributes:
      expert: the expert.
      start: its first row.
      at: first row to read or write, `mine.shape[0]` rows from there. Not always `start`: near the end
        of the array it is moved up, so that the rows exist.
      mine: (C, 1) boolean, the rows among those that belong to the window.
    """

    expert: jax.Array
    start: jax.Array
    at: jax.Array
    mine: jax.Array


# Up to so many multiply-adds of all rows with a matrix, padding costs next to nothing, while compiling many
# lengths takes as long as ever.
TINY = 2**22


def static_lengths(num_rows: int, num_experts: int, matrix_size: int) -> tuple[int, ...]:
    """Static lengths of windows: multiples of a unit, up to a third above the mean group.

    The unit is a sixth of the mean group (little padding, at most 8 lengths to compile), but at
    least 16 rows and at most 64, where the padding no longer matters and the working set would.
    Where there is next to nothing to compute, there is the longest alone.
    """
    mean = num_rows / num_experts
    unit = min(max(8 * math.ceil(mean / 48), 16), 64)
    count = min(max(math.ceil(mean * 4 / 3 / unit), 1), 8)
    lengths = tuple(sorted({min(unit * (i + 1), num_rows) for i in range(count)}))
    return lengths[-1:] if num_rows * matrix_size <= TINY else lengths


def windows_at_once(num_experts: int, matrix_size: int) -> int:
    """S: enough small products for a batch that XLA:CPU runs on several cores, while the S matrices
    stay in cache (measured at 256 x 128: 4, at 512 x 256: 2)."""
    return min(max(2**18 // max(matrix_size, 1), 1), 4, num_experts)


def for_each_set(
    group_sizes_E: jax.Array,
    num_rows: int,
    lengths: tuple[int, ...],
    at_once: int,
    init: Any,
    body: Callable[[Any, Sequence[Window]], Any],
) -> Any:
    """carry = body(carry, windows) over all sets of `at_once` windows, in a fixed order.

    Args:
      group_sizes_E: rows of each expert.
      num_rows: R > 0, of the arrays that the body reads and writes.
      lengths: see `static_lengths`.
      at_once: windows per set; some may be empty (no row is `mine`).
      init: the carry; it must have the varying type (`moejax.moe.varying`) of the body's result.
      body: called once for each static length; the first window of a set is its longest, and not empty.
    """
    expert_GS, start_GS, rows_GS = _cut(group_sizes_E, num_rows, lengths[-1], at_once)
    longest_G = rows_GS[:, 0]
    # Sets before longer[i] have a window of more than lengths[i - 1] rows; the last ones are empty.
    longer = [jnp.sum(longest_G > length) for length in (0, *lengths)]
    carry = init
    for i in reversed(range(len(lengths))):

        def step(g, carry, length=lengths[i]):
            windows = []
            for s in range(at_once):
                at = jnp.minimum(start_GS[g, s], num_rows - length)
                row_C = at + jnp.arange(length, dtype=jnp.int32)
                mine_C = (row_C >= start_GS[g, s]) & (row_C < start_GS[g, s] + rows_GS[g, s])
                windows.append(Window(expert_GS[g, s], start_GS[g, s], at, mine_C[:, None]))
            return body(carry, windows)

        carry = jax.lax.fori_loop(longer[i + 1], longer[i], step, carry)
    return carry


def _cut(group_sizes_E, num_rows, most, at_once):
    """Expert, first row and number of rows of every window, sorted by number of rows (descending),
    S in a row. A group of n rows is cut into ceil(n / most) windows of equal length, up to
    rounding."""
    num_experts = group_sizes_E.shape[0]
    sizes_E = group_sizes_E.astype(jnp.int32)
    count_E = -(-sizes_E // most)
    length_E = -(-sizes_E // jnp.maximum(count_E, 1))
    last_E, end_E = jnp.cumsum(count_E), jnp.cumsum(sizes_E)
    # sum of ceil(n / most) over groups is at most E + R / most.
    num_windows = -(-(num_experts + num_rows // most) // at_once) * at_once
    index_W = jnp.arange(num_windows, dtype=jnp.int32)
    # Windows past the last one are given to expert E - 1 and get no rows.
    expert_W = jnp.sum(index_W[:, None] >= last_E[None], axis=1, dtype=jnp.int32)
    exists_W = expert_W < num_experts
    expert_W = jnp.minimum(expert_W, num_experts - 1)
    offset_W = (index_W - (last_E - count_E)[expert_W]) * length_E[expert_W]
    start_W = (end_E - sizes_E)[expert_W] + offset_W
    rows_W = jnp.clip(sizes_E[expert_W] - offset_W, 0, length_E[expert_W]) * exists_W
    order_W = jnp.argsort(-rows_W, stable=True)
    return (a[order_W].reshape(-1, at_once) for a in (expert_W, start_W, rows_W))


# --------------------------------------------------------------------------------------------------
# Reading and writing a set of S windows.


def read_rows(x_RD: jax.Array, windows: Sequence[Window]) -> jax.Array:
    """(S, C, D) rows of the windows; in rows that are not theirs is whatever lies there."""
    return jnp.stack([jax.lax.dynamic_slice_in_dim(x_RD, w.at, w.mine.shape[0]) for w in windows])


def write_rows(y_RD: jax.Array, y_SCD: jax.Array, windows: Sequence[Window]) -> jax.Array:
    """y_RD with the windows' own rows replaced, in place inside a loop."""
    for s, window in enumerate(windows):
        old_CD = jax.lax.dynamic_slice_in_dim(y_RD, window.at, window.mine.shape[0])
        new_CD = jnp.where(window.mine, y_SCD[s].astype(y_RD.dtype), old_CD)
        y_RD = jax.lax.dynamic_update_slice_in_dim(y_RD, new_CD, window.at, 0)
    return y_RD


def read_experts(
    w_E: Weight, windows: Sequence[Window], dtype: Any, first: jax.Array | int = 0
) -> jax.Array:
    """(S, ...) the parameter of each window's expert, as `dtype`; `first` is the index of expert 0."""
    read = lambda a, w: jax.lax.dynamic_index_in_dim(a, first + w.expert, keepdims=False)  # noqa: E731
    w_S = jax.tree.map(lambda a: jnp.stack([read(a, w) for w in windows]), w_E)
    return w_S.astype(dtype)


def add_experts(w_E: jax.Array, w_S: jax.Array, windows: Sequence[Window]) -> jax.Array:
    """w_E with w_S added, one window after the other: two windows may be of one expert."""
    for s, window in enumerate(windows):
        old = jax.lax.dynamic_index_in_dim(w_E, window.expert, keepdims=False)
        new = old + w_S[s].astype(w_E.dtype)
        w_E = jax.lax.dynamic_update_index_in_dim(w_E, new, window.expert, 0)
    return w_E
