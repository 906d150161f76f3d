"""The expert FFN on CPU: all of its products for a set of windows at once, forward and backward.

Against three grouped matmuls it reads every row and matrix once per pass, multiplies gate and up as
one matrix (a product twice as large, which XLA:CPU spreads over cores), casts parameters slice by
slice, and keeps only the inputs of the activation for the backward pass.
"""

import jax
import jax.numpy as jnp

from moejax.moe.grouped_matmul import windows as win
from moejax.moe.varying import vary, varying_axes


def forward(params: dict, x_RD, group_sizes_E, act, limit: float):
    """y_RD and the activation's inputs: (gate_RF, up_RF), or (up_RF,) where not gated."""
    num_rows, d_model = x_RD.shape
    axes = varying_axes(x_RD, group_sizes_E, *params.values())
    width = params["w_up"].shape[2]

    def zeros(width):
        return vary(jnp.zeros((num_rows, width), x_RD.dtype), axes)

    carry = zeros(d_model), tuple(zeros(width) for _ in range(1 + act.gated))

    def body(carry, windows):
        y_RD, inputs = carry
        params_S = {k: win.read_experts(w, windows, x_RD.dtype) for k, w in params.items()}
        inputs_S = _project(params_S, win.read_rows(x_RD, windows))
        y_SCD = _finish(params_S, inputs_S, act, limit)
        inputs = tuple(win.write_rows(a, b, windows) for a, b in zip(inputs, inputs_S))
        return win.write_rows(y_RD, y_SCD, windows), inputs

    return _run(params, group_sizes_E, num_rows, carry, body)


def backward(params: dict, x_RD, group_sizes_E, inputs, dy_RD, act, limit: float):
    """Gradients of params (in their dtype) and of x_RD."""
    num_rows = x_RD.shape[0]
    axes = varying_axes(x_RD, group_sizes_E, dy_RD, *params.values())

    def accumulator(w):
        return vary(jnp.zeros(w.shape, jnp.promote_types(w.dtype, jnp.float32)), axes)

    carry = {k: accumulator(w) for k, w in params.items()}, vary(jnp.zeros_like(x_RD), axes)

    def body(carry, windows):
        dparams, dx_RD = carry
        params_S = {k: win.read_experts(w, windows, x_RD.dtype) for k, w in params.items()}
        x_SCD = win.read_rows(x_RD, windows, mask=True)
        # Rows that are not the window's get a zero gradient here, and so add nothing to anything.
        dy_SCD = win.read_rows(dy_RD, windows, mask=True)
        inputs_S = tuple(win.read_rows(a, windows) for a in inputs)
        # Both halves are differentiated where they were evaluated. Their values (all but the
        # activation's) are not used, and XLA drops the products that would compute them.
        _, finish_pullback = jax.vjp(
            lambda params, inputs: _finish(params, inputs, act, limit), params_S, inputs_S
        )
        dparams_down, dinputs_S = finish_pullback(dy_SCD)
        _, project_pullback = jax.vjp(_project, params_S, x_SCD)
        dparams_up, dx_SCD = project_pullback(dinputs_S)
        dparams = {
            k: win.add_experts(w, (dparams_down if k.endswith("_down") else dparams_up)[k], windows)
            for k, w in dparams.items()
        }
        return dparams, win.write_rows(dx_RD, dx_SCD, windows)

    dparams, dx_RD = _run(params, group_sizes_E, num_rows, carry, body)
    return {k: g.astype(params[k].dtype) for k, g in dparams.items()}, dx_RD


def _run(params, group_sizes_E, num_rows, carry, body):
    num_experts, d_model, width = params["w_up"].shape
    if num_rows == 0:
        return carry
    at_once = win.windows_at_once(num_experts, d_model * width)
    return win.for_each_set(group_sizes_E, num_rows, at_once, carry, body)


def _project(params_S, x_SCD):
    """The activation's inputs, gate and up by one product."""
    names = [n for n in ("gate", "up") if f"w_{n}" in params_S]
    w_SDF = jnp.concatenate([params_S[f"w_{n}"] for n in names], axis=2)
    both = _batched_rows(x_SCD, w_SDF)
    if "b_up" in params_S:
        b_SF = jnp.concatenate([params_S[f"b_{n}"] for n in names], axis=1)
        both = both + b_SF[:, None]
    return tuple(jnp.split(both, len(names), axis=2))


def _finish(params_S, inputs, act, limit):
    """From the activation's inputs to the result."""
    gate = inputs[0] if act.gated else None
    y_SCD = _batched_rows(act.apply(gate, inputs[-1], limit), params_S["w_down"])
    return y_SCD + params_S["b_down"][:, None] if "b_down" in params_S else y_SCD


def _batched_rows(x_SCD, w_SDF):
    return jnp.einsum("scd,sdf->scf", x_SCD, w_SDF)
