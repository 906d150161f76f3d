"""The expert FFN on one CPU with compiled products (`cpu_kernels`): gathers and stacks are read where they lie.

Forward and backward have the contract of `windowed_ffn`. A bias is a matrix of one input.
"""

import jax
import jax.numpy as jnp

from moejax.cpu_kernels import grouped, grouped_transposed, outer
from moejax.weights import is_quantized


def forward(stack: dict, first, x_TD, weight_R, token_R, group_sizes_E, act):
    """y_RD and the activation's inputs, as `windowed_ffn.forward`."""
    names = act.inputs
    weights = [stack[f"w_{n}"] for n in names]
    inputs = grouped(x_TD, token_R, group_sizes_E, first, *weights)
    if "b_up" in stack:
        one_R1 = jnp.ones((token_R.shape[0], 1), x_TD.dtype)
        biases = [stack[f"b_{n}"][:, None] for n in names]
        added = grouped(one_R1, None, group_sizes_E, first, *biases)
        inputs = [a + b for a, b in zip(inputs, added)]
    hidden_RF = act.hidden(inputs, weight_R[:, None])
    y_RD = grouped(hidden_RF, None, group_sizes_E, first, stack["w_down"])[0]
    if "b_down" in stack:
        weight_R1 = weight_R[:, None].astype(x_TD.dtype)
        y_RD = y_RD + grouped(weight_R1, None, group_sizes_E, first, stack["b_down"][:, None])[0]
    return y_RD, tuple(inputs)


def backward(stack: dict, first, x_TD, weight_R, token_R, group_sizes_E, inputs, dy_TD, act):
    """Gradients of parameters, rows' tokens and weights, as `windowed_ffn.backward`."""
    names, sizes_E = act.inputs, group_sizes_E
    dhidden_RF = grouped_transposed(token_R, sizes_E, first, (dy_TD, stack["w_down"]))
    hidden_RF, pullback = jax.vjp(
        lambda inputs, weight_R: act.hidden(inputs, weight_R[:, None]), inputs, weight_R
    )
    dinputs, dweight_R = pullback(dhidden_RF)
    pairs = [(d, stack[f"w_{n}"]) for n, d in zip(names, dinputs)]
    dx_RD = grouped_transposed(None, sizes_E, first, *pairs)
    dparams = {"w_down": (hidden_RF, None, dy_TD, token_R)}
    dparams |= {f"w_{n}": (x_TD, token_R, d, None) for n, d in zip(names, dinputs)}
    if "b_down" in stack:
        one_R1 = jnp.ones((token_R.shape[0], 1), x_TD.dtype)
        weight_R1 = weight_R[:, None].astype(x_TD.dtype)
        dparams |= {f"b_{n}": (one_R1, None, d, None) for n, d in zip(names, dinputs)}
        dparams["b_down"] = (weight_R1, None, dy_TD, token_R)
        bias = stack["b_down"][:, None]
        of_bias_R1 = grouped_transposed(token_R, sizes_E, first, (dy_TD, bias))
        dweight_R = dweight_R + of_bias_R1[:, 0].astype(dweight_R.dtype)

    def of(name, w):
        if is_quantized(w):
            return None
        g = outer(*dparams[name], sizes_E)
        return g.reshape(-1, *w.shape[1:]).astype(w.dtype)

    return {k: of(k, w) for k, w in stack.items()}, dx_RD, dweight_R
