"""The expert FFN on CPU: all of its products for a set of windows at once, forward and backward.

Against three grouped matmuls it gathers every row where it is used and reads every matrix once per pass,
multiplies gate and up as one matrix (a product twice as large, which XLA:CPU spreads over cores), casts
parameters slice by slice, and keeps only the inputs of the activation for the backward pass.

Rows of a window that are not its own repeat a row that exists and weigh nothing: so they need no mask
on anything of the model's width, and a token that holds NaN but has no expert is never read.

Where there are as many experts as rows, each row is a window of its own, and all are computed side by side,
without a loop (thousands of narrow experts, as in PEER).

Here: S windows side by side, C rows of a window.
"""

import jax
import jax.numpy as jnp

from moejax.moe.grouped_matmul import windows as win
from moejax.moe.varying import vary, varying_axes
from moejax.weights import is_quantized


def forward(stack: dict, first, x_TD, weight_R, token_R, group_sizes_E, act):
    """y_r = weight_r FFN_{e(r)}(x_{token_r}).

    Args:
      stack: expert parameters (N, ...), of which those from `first` on are meant: a layer's experts are
        read where they lie, in the stack of all layers.
      first: index of expert 0.
      x_TD: tokens.
      weight_R, token_R: of every row; rows are sorted by expert.
      group_sizes_E: rows of each expert.
      act: the activation.

    Returns:
      y_RD, and the activation's inputs: (gate_RF, up_RF), or (up_RF,) where not gated.
    """
    if _row_by_row(stack, group_sizes_E, token_R):
        expert_R, mine_R1 = _experts_of_rows(group_sizes_E, token_R.shape[0])
        params_R, weight_R1 = _of_rows(stack, first + expert_R, weight_R, mine_R1, x_TD.dtype)
        inputs_R = _project(params_R, _tokens(x_TD, token_R, mine_R1), act)
        y_RD = _finish(params_R, inputs_R, weight_R1, act)[:, 0]
        return y_RD, tuple(a[:, 0] for a in inputs_R)
    axes = varying_axes(x_TD, group_sizes_E, *jax.tree.leaves(stack))
    width, num_rows = stack["w_up"].shape[2], token_R.shape[0]
    zeros = _Zeros(group_sizes_E, axes)
    y_RD = zeros((num_rows, x_TD.shape[1]), x_TD.dtype)
    inputs = tuple(zeros((num_rows, width), x_TD.dtype) for _ in act.inputs)

    def body(carry, windows):
        y_RD, inputs = carry
        params_S = {k: win.read_experts(w, windows, x_TD.dtype, first) for k, w in stack.items()}
        x_SCD, weight_SC = _read(windows, x_TD, weight_R, token_R)
        inputs_S = _project(params_S, x_SCD, act)
        y_SCD = _finish(params_S, inputs_S, weight_SC, act)
        inputs = tuple(win.write_rows(a, b, windows) for a, b in zip(inputs, inputs_S))
        return win.write_rows(y_RD, y_SCD, windows), inputs

    return _run(stack, group_sizes_E, num_rows, (y_RD, inputs), body)


def backward(stack: dict, first, x_TD, weight_R, token_R, group_sizes_E, inputs, dy_TD, act):
    """Gradients, given that of sum_rows y: of the E experts (in their dtype; None of quantised weights), of the
    token in every row (dx_RD) and of weight_R."""
    axes = varying_axes(x_TD, group_sizes_E, dy_TD, *jax.tree.leaves(stack))
    num_experts, num_rows = group_sizes_E.shape[0], token_R.shape[0]
    zeros = _Zeros(group_sizes_E, axes)
    dparams = {
        k: zeros((num_experts, *w.shape[1:]), jnp.promote_types(w.dtype, jnp.float32))
        for k, w in stack.items()
        if not is_quantized(w)
    }
    if _row_by_row(stack, group_sizes_E, token_R):
        expert_R, mine_R1 = _experts_of_rows(group_sizes_E, num_rows)
        params_R, weight_R1 = _of_rows(stack, first + expert_R, weight_R, mine_R1, x_TD.dtype)
        x_R1D, dy_R1D = (_tokens(a_TD, token_R, mine_R1) for a_TD in (x_TD, dy_TD))
        inputs_R = tuple(a[:, None] for a in inputs)
        dparams_R, dx_R1D, dweight_R1 = _gradients(
            params_R, x_R1D, weight_R1, inputs_R, dy_R1D, act
        )
        dparams = {k: w.at[expert_R].add(dparams_R[k].astype(w.dtype)) for k, w in dparams.items()}
        dparams = {k: g.astype(stack[k].dtype) for k, g in dparams.items()}
        return {k: dparams.get(k) for k in stack}, dx_R1D[:, 0], dweight_R1[:, 0]
    dx_RD = zeros((num_rows, x_TD.shape[1]), x_TD.dtype)
    dweight_R1 = zeros((num_rows, 1), weight_R.dtype)

    def body(carry, windows):
        dparams, dx_RD, dweight_R1 = carry
        params_S = {k: win.read_experts(w, windows, x_TD.dtype, first) for k, w in stack.items()}
        x_SCD, weight_SC = _read(windows, x_TD, weight_R, token_R)
        dy_SCD, _ = _read(windows, dy_TD, weight_R, token_R)
        inputs_S = tuple(win.read_rows(a, windows) for a in inputs)
        dparams_S, dx_SCD, dweight_SC = _gradients(
            params_S, x_SCD, weight_SC, inputs_S, dy_SCD, act
        )
        dparams = {k: win.add_experts(w, dparams_S[k], windows) for k, w in dparams.items()}
        dx_RD = win.write_rows(dx_RD, dx_SCD, windows)
        return dparams, dx_RD, win.write_rows(dweight_R1, dweight_SC[..., None], windows)

    carry = _run(stack, group_sizes_E, num_rows, (dparams, dx_RD, dweight_R1), body)
    dparams, dx_RD, dweight_R1 = carry
    dparams = {k: g.astype(stack[k].dtype) for k, g in dparams.items()}
    return {k: dparams.get(k) for k in stack}, dx_RD, dweight_R1[:, 0]


def _gradients(params_S, x_SCD, weight_SC, inputs_S, dy_SCD, act):
    """Those of every window: of its parameters, tokens and weights."""
    # Both halves are differentiated where they were evaluated. Their values (all but the
    # activation's) are not used, and XLA drops the products that would compute them.
    _, finish_pullback = jax.vjp(
        lambda params, inputs, weight: _finish(params, inputs, weight, act),
        params_S,
        inputs_S,
        weight_SC,
    )
    dparams_down, dinputs_S, dweight_SC = finish_pullback(dy_SCD)
    _, project_pullback = jax.vjp(lambda p, x: _project(p, x, act), params_S, x_SCD)
    dparams_up, dx_SCD = project_pullback(dinputs_S)
    dparams = {k: (dparams_down if k.endswith("_down") else dparams_up)[k] for k in params_S}
    return dparams, dx_SCD, dweight_SC


# Multiply-adds of all rows with a matrix, so the size of its copies, up to which every row may have its own.
ROW_BY_ROW = 2**25


def _row_by_row(stack, group_sizes_E, token_R) -> bool:
    rows, matrix = token_R.shape[0], stack["w_up"].shape[1] * stack["w_up"].shape[2]
    return 0 < rows <= group_sizes_E.shape[0] and rows * matrix <= ROW_BY_ROW


def _experts_of_rows(group_sizes_E, num_rows: int) -> tuple[jax.Array, jax.Array]:
    """The expert of every row, and (R, 1) whether it has one: rows past all groups do not."""
    end_E = jnp.cumsum(group_sizes_E.astype(jnp.int32))
    row_R = jnp.arange(num_rows, dtype=jnp.int32)
    expert_R = jnp.searchsorted(end_E, row_R, side="right").astype(jnp.int32)
    return jnp.minimum(expert_R, group_sizes_E.shape[0] - 1), (row_R < end_E[-1])[:, None]


def _of_rows(stack, index_R, weight_R, mine_R1, dtype):
    """Every row as a window: its expert's parameters, and its weight (R, 1). Both are 0 where there is no
    expert, and so are result and gradients, whatever the expert holds that stands in."""
    params_R = jax.tree.map(lambda a: a[index_R], stack)
    mine = lambda a: jnp.where(mine_R1.reshape(-1, *[1] * (a.ndim - 1)), a, 0)  # noqa: E731
    params_R = {k: mine(w.astype(dtype)) for k, w in params_R.items()}
    return params_R, mine(weight_R)[:, None]


def _tokens(x_TD, token_R, mine_R1):
    """(R, 1, D); 0 where there is no expert, whatever the token holds."""
    x_RD = x_TD.at[jnp.where(mine_R1[:, 0], token_R, 0)].get(mode="promise_in_bounds")
    return jnp.where(mine_R1, x_RD, 0)[:, None]


class _Zeros:
    """Arrays of zeros for loops to write into, each of its own: of a constant, XLA would make one array for
    all layers and copy it into every loop. So the zero is one that it does not know to be zero."""

    def __init__(self, group_sizes_E, axes):
        self._zero_E, self._axes, self._count = jnp.minimum(group_sizes_E, 0), axes, 0

    def __call__(self, shape, dtype):
        zero = self._zero_E[self._count % self._zero_E.shape[0]]
        self._count += 1
        return vary(jnp.broadcast_to(zero.astype(dtype), shape), self._axes)


def _read(windows, x_TD, weight_R, token_R):
    """(S, C, D) tokens of the windows' rows and (S, C) weights; rows that are not theirs repeat a token
    that has an expert, with weight 0."""
    some = token_R[windows[0].start]  # of the longest window of the set: not empty

    def read(a_R, window, other):
        a_C = jax.lax.dynamic_slice_in_dim(a_R, window.at, window.mine.shape[0])
        return jnp.where(window.mine[:, 0], a_C, other)

    token_SC = jnp.stack([read(token_R, w, some) for w in windows])
    weight_SC = jnp.stack([read(weight_R, w, 0) for w in windows])
    return x_TD.at[token_SC].get(mode="promise_in_bounds"), weight_SC


def _run(stack, group_sizes_E, num_rows, carry, body):
    _, d_model, width = stack["w_up"].shape
    if num_rows == 0:
        return carry
    num_experts = group_sizes_E.shape[0]
    lengths = win.static_lengths(num_rows, num_experts, d_model * width)
    at_once = win.windows_at_once(num_experts, d_model * width)
    return win.for_each_set(group_sizes_E, num_rows, lengths, at_once, carry, body)


def _project(params_S, x_SCD, act):
    """The activation's inputs, gate and up by one product."""
    names = act.inputs
    w_SDF = jnp.concatenate([params_S[f"w_{n}"] for n in names], axis=2)
    both = _batched_rows(x_SCD, w_SDF)
    if "b_up" in params_S:
        b_SF = jnp.concatenate([params_S[f"b_{n}"] for n in names], axis=1)
        both = both + b_SF[:, None]
    return tuple(jnp.split(both, len(names), axis=2))


def _finish(params_S, inputs, weight_SC, act):
    """From the activation's inputs to the weighted result."""
    hidden_SCF = act.hidden(inputs, weight_SC[..., None])
    y_SCD = _batched_rows(hidden_SCF, params_S["w_down"])
    if "b_down" not in params_S:
        return y_SCD
    bias_SCD = params_S["b_down"][:, None] * weight_SC[..., None]
    return y_SCD + bias_SCD.astype(y_SCD.dtype)


def _batched_rows(x_SCD, w_SDF):
    return jnp.einsum("scd,sdf->scf", x_SCD, w_SDF)
