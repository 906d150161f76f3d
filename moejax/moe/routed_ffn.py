"""The expert FFNs of routed tokens: y_t = sum_k weight_tk FFN_{e(t,k)}(x_t), over sorted rows.

On one CPU compiled products do it where there are any (`compiled_ffn`), else one loop (`windowed_ffn`);
elsewhere three grouped matmuls. The choice falls at lowering.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from moejax import cpu_kernels
from moejax.moe import compiled_ffn, few_rows_ffn, windowed_ffn
from moejax.moe.experts import Activation, Params
from moejax.moe.grouped_matmul import grouped_matmul, here
from moejax.moe.rows import SortedRoutes, take, to_rows, to_tokens
from moejax.moe.varying import vary_together
from moejax.weights import is_quantized


@jax.named_scope("experts")
def routed_ffn(
    params: Params,
    x_TD: jax.Array,
    weights_TK: jax.Array,
    routes: SortedRoutes,
    act: Activation,
    implementation: str = "auto",
    stack: tuple[Params, Any] | None = None,
) -> jax.Array:
    """Every token through its experts.

    Args:
      params: as `experts.expert_param_specs`; E is read from the arrays, so a slice of the experts works
        too. Quantised weights get no gradient.
      x_TD: tokens.
      weights_TK: combine weights.
      routes: the rows; routes without a row (empty slots, dropped ones) contribute nothing and get no
        gradient.
      act: the activation.
      implementation: 'auto' (by platform), or a key of `grouped_matmul.IMPLEMENTATIONS`.
      stack: the parameters of all layers (L, E, ...) and this layer's index, of which `params` is a slice.
        A path that reads expert by expert reads there, and `params` is never copied out of the stack; it
        still receives the gradient.

    Returns:
      y_TD in x's dtype.
    """
    params, x_TD, weights_TK, routes = vary_together(dict(params), x_TD, weights_TK, routes)
    if implementation != "auto":
        x_RD, weight_R = to_rows(x_TD, routes), _weight_of_rows(weights_TK, routes)
        inputs = _project(params, x_RD, routes.group_sizes_E, act, implementation)
        y_RD = _finish(params, inputs, weight_R, routes.group_sizes_E, act, implementation)
        return to_tokens(y_RD, routes)
    if stack is not None:
        stack = jax.lax.stop_gradient(stack[0]), stack[1]
    return _by_platform(params, stack, x_TD, weights_TK, routes, act)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _by_platform(params, stack, x_TD, weights_TK, routes, act):
    """One stated gradient around the choice, so that both sides keep the same arrays for the backward
    pass (the inputs of the activation) and nothing is kept for the side that does not run. Without a
    gradient, a few rows (decoding) take a path of their own on CPU.
    """
    many = routes.route_R.size > few_rows_ffn.ROWS_PER_EXPERT * routes.group_sizes_E.shape[0]
    if many or cpu_kernels.serve(
        x_TD, params
    ):  # compiled products read few rows' matrices once, too
        return _by_platform_forward(params, stack, x_TD, weights_TK, routes, act)[0]

    def few(params, stack, x_TD, weights_TK, routes):
        rows = _rows(params, stack, x_TD, weights_TK, routes)
        return few_rows_ffn.forward(*rows, act)

    def grouped(*args):
        return _grouped_forward(act, *args)[0]

    return _choose(few, grouped, params, stack, x_TD, weights_TK, routes)


def _by_platform_forward(params, stack, x_TD, weights_TK, routes, act):
    def windowed(params, stack, x_TD, weights_TK, routes):
        rows = _rows(params, stack, x_TD, weights_TK, routes)
        y_RD, inputs = _on_cpu(x_TD, params).forward(*rows, act)
        return to_tokens(y_RD, routes), inputs

    grouped = functools.partial(_grouped_forward, act)
    args = (params, stack, x_TD, weights_TK, routes)
    y_TD, inputs = _choose(windowed, grouped, *args)
    return y_TD, (*args, inputs)


def _by_platform_backward(act, residuals, dy_TD):
    def windowed(params, stack, x_TD, weights_TK, routes, inputs, dy_TD):
        rows = _rows(params, stack, x_TD, weights_TK, routes)
        return _on_cpu(x_TD, params).backward(*rows, inputs, dy_TD, act)

    grouped = functools.partial(_grouped_backward, act)
    dparams, dx_RD, dweight_R = _choose(windowed, grouped, *residuals, dy_TD)
    routes = residuals[4]
    return dparams, None, to_tokens(dx_RD, routes), take(dweight_R, routes.row_TK, routes), None


_by_platform.defvjp(_by_platform_forward, _by_platform_backward)


def _on_cpu(x_TD, params):
    return compiled_ffn if cpu_kernels.serve(x_TD, params) else windowed_ffn


def _choose(windowed, grouped, *args):
    return jax.lax.platform_dependent(*args, cpu=windowed, default=grouped)


def _rows(params, stack, x_TD, weights_TK, routes):
    """The first arguments of the CPU paths."""
    first, stacked = jnp.zeros((), jnp.int32), params
    if stack is not None:
        first = jnp.asarray(stack[1] * routes.group_sizes_E.shape[0], jnp.int32)
        stacked = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), stack[0])
    weight_R = _weight_of_rows(weights_TK, routes)
    return stacked, first, x_TD, weight_R, routes.token_R, routes.group_sizes_E


def _weight_of_rows(weights_TK, routes):
    return to_rows(weights_TK.reshape(-1, 1), routes.one_by_one())[:, 0]


# --------------------------------------------------------------------------------------------------
# Three grouped matmuls.


def _grouped_forward(act, params, stack, x_TD, weights_TK, routes):
    del stack
    weight_R = _weight_of_rows(weights_TK, routes)
    inputs = _project(params, to_rows(x_TD, routes), routes.group_sizes_E, act, here())
    y_RD = _finish(params, inputs, weight_R, routes.group_sizes_E, act, here())
    return to_tokens(y_RD, routes), inputs


def _grouped_backward(act, params, stack, x_TD, weights_TK, routes, inputs, dy_TD):
    del stack
    sizes_E, weight_R = routes.group_sizes_E, _weight_of_rows(weights_TK, routes)
    # The values of both halves are not used, and XLA drops the products that compute them.
    learned = {k: w for k, w in params.items() if not is_quantized(w)}
    _, finish_pullback = jax.vjp(
        lambda p, inputs, weight: _finish({**params, **p}, inputs, weight, sizes_E, act, here()),
        learned,
        inputs,
        weight_R,
    )
    dparams_down, dinputs, dweight_R = finish_pullback(to_rows(dy_TD, routes))
    _, project_pullback = jax.vjp(
        lambda p, x_RD: _project({**params, **p}, x_RD, sizes_E, act, here()),
        learned,
        to_rows(x_TD, routes),
    )
    dparams_up, dx_RD = project_pullback(dinputs)
    # Each half has zeros for the other's parameters.
    dparams = jax.tree.map(jnp.add, dparams_down, dparams_up)
    return {k: dparams.get(k) for k in params}, dx_RD, dweight_R


def _project(params, x_RD, group_sizes_E, act: Activation, implementation):
    """The inputs of the activation: (gate_RF, up_RF), or (up_RF,) where not gated."""
    return tuple(
        _grouped_linear(params, n, x_RD, group_sizes_E, implementation) for n in act.inputs
    )


def _finish(params, inputs, weight_R, group_sizes_E, act: Activation, implementation):
    """From the inputs of the activation to the weighted result."""
    hidden_RF = act.hidden(inputs, weight_R[:, None])
    return _grouped_linear(params, "down", hidden_RF, group_sizes_E, implementation, weight_R)


def _grouped_linear(params, name, x, group_sizes_E, implementation, weight_R=None):
    """x w + weight b."""
    w = params[f"w_{name}"].astype(x.dtype)
    y = grouped_matmul(x, w, group_sizes_E, implementation=implementation)
    if f"b_{name}" not in params:
        return y
    # A product with one-hot rows, so that the gradient is a product too and not a scatter.
    expert_RE = _one_hot_rows(group_sizes_E, x.shape[0], x.dtype)
    if weight_R is not None:
        expert_RE = (expert_RE * weight_R[:, None]).astype(x.dtype)
    return y + expert_RE @ params[f"b_{name}"].astype(x.dtype)


def _one_hot_rows(group_sizes_E, num_rows, dtype):
    """(R, E): 1 where the row belongs to the expert; rows past the sum are all zero."""
    end_E = jnp.cumsum(group_sizes_E)
    row_R1 = jnp.arange(num_rows)[:, None]
    return ((row_R1 >= (end_E - group_sizes_E)[None]) & (row_R1 < end_E[None])).astype(dtype)
