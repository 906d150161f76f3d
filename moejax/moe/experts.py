"""FFNs: one dense FFN, and E expert FFNs over rows sorted by expert or over slots.

Gated:      y = down(act(gate x, up x))      SwiGLU (2002.05202) and its clamped variants
Not gated:  y = down(act(up x))              GPT-2's tanh GELU

An activation is a line of ACTIVATIONS, not an `if`.
"""

import functools
import types
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import MoEConfig
from moejax.linear import linear
from moejax.moe import few_rows_ffn, windowed_ffn
from moejax.moe.grouped_matmul import grouped_matmul
from moejax.moe.varying import vary_together
from moejax.params import ParamSpec

Params = Mapping[str, Any]


class Activation(NamedTuple):
    """Attributes:
    gated: whether there is a gate projection beside the up projection.
    apply: (gate, up, limit) -> hidden, elementwise; `gate` is None where not gated. `limit` is the
      clamp of
      the clamped activations.
    """

    gated: bool
    apply: Callable[[Any, jax.Array, float], jax.Array]


def _swiglu(gate, up, limit):
    del limit
    return jax.nn.silu(gate) * up


def _swiglu_clamped(gate, up, limit):
    """DeepSeek V4: the gate is clamped from above before SiLU, the up projection on both sides."""
    return jax.nn.silu(jnp.minimum(gate, limit)) * jnp.clip(up, -limit, limit)


def _swiglu_oai(gate, up, limit):
    """gpt-oss (2508.10925): clamps as above, SiLU with slope 1.702, and 1 added to the up
    projection."""
    gate, up = jnp.minimum(gate, limit), jnp.clip(up, -limit, limit)
    return (up + 1) * gate * jax.nn.sigmoid(1.702 * gate)


def _gelu_tanh(gate, up, limit):
    del gate, limit
    return jax.nn.gelu(up, approximate=True)


ACTIVATIONS: Mapping[str, Activation] = types.MappingProxyType(
    {
        "swiglu": Activation(True, _swiglu),
        "swiglu_clamped": Activation(True, _swiglu_clamped),
        "swiglu_oai": Activation(True, _swiglu_oai),
        "gelu_tanh": Activation(False, _gelu_tanh),
    }
)


# --------------------------------------------------------------------------------------------------
# One FFN: dense layers and shared experts.


def ffn_param_specs(
    d_model: int, width: int, activation: str, bias: bool, std: float
) -> dict[str, ParamSpec]:
    """w_gate (D, F) where gated, w_up (D, F), w_down (F, D), and with `bias` b_gate, b_up (F,),
    b_down (D,)."""
    return _specs((), (axes.EMBED, axes.MLP), d_model, width, activation, bias, std)


def ffn(params: Params, x: jax.Array, activation: str, limit: float = 0.0) -> jax.Array:
    """The FFN of x (..., D) -> (..., D), computed in x's dtype."""
    act = ACTIVATIONS[activation]
    gate = _linear(params, "gate", x) if act.gated else None
    return _linear(params, "down", act.apply(gate, _linear(params, "up", x), limit))


def _linear(params, name, x):
    return linear(x, params[f"w_{name}"], params.get(f"b_{name}"))


# --------------------------------------------------------------------------------------------------
# E expert FFNs.


def expert_param_specs(moe: MoEConfig, d_model: int, std: float) -> dict[str, ParamSpec]:
    """As `ffn_param_specs` with a leading expert axis: w_gate, w_up (E, D, F), w_down (E, F, D),
    and with moe.ffn_bias b_gate, b_up (E, F), b_down (E, D)."""
    return _specs(
        (moe.num_experts,),
        (axes.EXPERT_EMBED, axes.EXPERT_MLP),
        d_model,
        moe.d_expert,
        moe.activation,
        moe.ffn_bias,
        std,
    )


def _specs(leading, names, d_model, width, activation, bias, std):
    expert = (axes.EXPERT,) * len(leading)
    embed, mlp = names
    into = {"gate": width, "up": width} if ACTIVATIONS[activation].gated else {"up": width}
    specs = {
        f"w_{n}": ParamSpec((*leading, d_model, f), (*expert, embed, mlp), std=std)
        for n, f in into.items()
    }
    specs["w_down"] = ParamSpec((*leading, width, d_model), (*expert, mlp, embed), std=std)
    if bias:
        for n, f in into.items():
            specs[f"b_{n}"] = ParamSpec((*leading, f), (*expert, mlp), init="zeros")
        specs["b_down"] = ParamSpec((*leading, d_model), (*expert, embed), init="zeros")
    return specs


def expert_ffn(
    params: Params, x_RD: jax.Array, group_sizes_E: jax.Array, moe: MoEConfig
) -> jax.Array:
    """Each row through its expert's FFN.

    Args:
      params: as `expert_param_specs`; E is read from the arrays, so a slice of the experts works
        too.
      x_RD: rows sorted by expert.
      group_sizes_E: rows of each expert; rows past their sum give zero and get no gradient.
      moe: the activation, its limit and the grouped matmul implementation.

    Returns:
      y_RD in x's dtype.
    """
    if moe.grouped_matmul not in ("auto", "blocked"):
        inputs = _project(params, x_RD, group_sizes_E, moe.grouped_matmul)
        return _finish(params, inputs, group_sizes_E, moe, moe.grouped_matmul)
    x_RD, group_sizes_E, *values = vary_together(x_RD, group_sizes_E, *params.values())
    return _by_platform(dict(zip(params, values)), x_RD, group_sizes_E, moe)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _by_platform(params, x_RD, group_sizes_E, moe):
    """'auto' and 'blocked': on CPU `windowed_ffn`, elsewhere grouped matmuls; chosen at lowering.

    One stated gradient around the choice, so that both sides keep the same arrays for the backward
    pass (the inputs of the activation) and nothing is kept for the side that does not run. Without a
    gradient, a few rows (decoding) take a path of their own on CPU.
    """
    if x_RD.shape[0] > few_rows_ffn.ROWS_PER_EXPERT * group_sizes_E.shape[0]:
        return _by_platform_forward(params, x_RD, group_sizes_E, moe)[0]
    act, limit = ACTIVATIONS[moe.activation], moe.activation_limit

    def few(params, x_RD, group_sizes_E):
        return few_rows_ffn.forward(params, x_RD, group_sizes_E, act, limit)

    def grouped(params, x_RD, group_sizes_E):
        inputs = _project(params, x_RD, group_sizes_E, "ragged")
        return _finish(params, inputs, group_sizes_E, moe, "ragged")

    return _choose(moe, few, grouped, params, x_RD, group_sizes_E)


def _by_platform_forward(params, x_RD, group_sizes_E, moe):
    act, limit = ACTIVATIONS[moe.activation], moe.activation_limit

    def windowed(params, x_RD, group_sizes_E):
        return windowed_ffn.forward(params, x_RD, group_sizes_E, act, limit)

    def grouped(params, x_RD, group_sizes_E):
        inputs = _project(params, x_RD, group_sizes_E, "ragged")
        return _finish(params, inputs, group_sizes_E, moe, "ragged"), inputs

    y_RD, inputs = _choose(moe, windowed, grouped, params, x_RD, group_sizes_E)
    return y_RD, (params, x_RD, group_sizes_E, inputs)


def _by_platform_backward(moe, residuals, dy_RD):
    act, limit = ACTIVATIONS[moe.activation], moe.activation_limit

    def windowed(params, x_RD, group_sizes_E, inputs, dy_RD):
        return windowed_ffn.backward(params, x_RD, group_sizes_E, inputs, dy_RD, act, limit)

    def grouped(params, x_RD, group_sizes_E, inputs, dy_RD):
        # The values of both halves are not used, and XLA drops the products that compute them.
        _, finish_pullback = jax.vjp(
            lambda p, inputs: _finish(p, inputs, group_sizes_E, moe, "ragged"), params, inputs
        )
        dparams_down, dinputs = finish_pullback(dy_RD)
        _, project_pullback = jax.vjp(
            lambda p, x_RD: _project(p, x_RD, group_sizes_E, "ragged"), params, x_RD
        )
        dparams_up, dx_RD = project_pullback(dinputs)
        # Each half has zeros for the other's parameters.
        return jax.tree.map(jnp.add, dparams_down, dparams_up), dx_RD

    dparams, dx_RD = _choose(moe, windowed, grouped, *residuals, dy_RD)
    return dparams, dx_RD, None


_by_platform.defvjp(_by_platform_forward, _by_platform_backward)


def _choose(moe, windowed, grouped, *args):
    if moe.grouped_matmul == "blocked":
        return windowed(*args)
    return jax.lax.platform_dependent(*args, cpu=windowed, default=grouped)


def _project(params, x_RD, group_sizes_E, implementation):
    """The inputs of the activation: (gate_RF, up_RF), or (up_RF,) where not gated."""
    names = [n for n in ("gate", "up") if f"w_{n}" in params]
    return tuple(_grouped_linear(params, n, x_RD, group_sizes_E, implementation) for n in names)


def _finish(params, inputs, group_sizes_E, moe, implementation):
    """From the inputs of the activation to the result."""
    act = ACTIVATIONS[moe.activation]
    gate_RF = inputs[0] if act.gated else None
    hidden_RF = act.apply(gate_RF, inputs[-1], moe.activation_limit)
    return _grouped_linear(params, "down", hidden_RF, group_sizes_E, implementation)


def _grouped_linear(params, name, x, group_sizes_E, implementation):
    w = params[f"w_{name}"].astype(x.dtype)
    y = grouped_matmul(x, w, group_sizes_E, implementation=implementation)
    if f"b_{name}" not in params:
        return y
    # A product with one-hot rows, so that the gradient is a product too and not a scatter.
    expert_RE = _one_hot_rows(group_sizes_E, x.shape[0], x.dtype)
    return y + expert_RE @ params[f"b_{name}"].astype(x.dtype)


def _one_hot_rows(group_sizes_E, num_rows, dtype):
    """(R, E): 1 where the row belongs to the expert; rows past the sum are all zero."""
    end_E = jnp.cumsum(group_sizes_E)
    row_R1 = jnp.arange(num_rows)[:, None]
    return ((row_R1 >= (end_E - group_sizes_E)[None]) & (row_R1 < end_E[None])).astype(dtype)


def expert_ffn_slots(params: Params, x_ECD: jax.Array, moe: MoEConfig) -> jax.Array:
    """Expert e's FFN over its C slots: (E, C, D) -> (E, C, D) in x's dtype, for the dense and
    capacity dispatchers."""

    def linear(name, x):
        y = jnp.einsum("ecd,edf->ecf", x, params[f"w_{name}"].astype(x.dtype))
        if f"b_{name}" in params:
            y = y + params[f"b_{name}"].astype(x.dtype)[:, None]
        return y

    act = ACTIVATIONS[moe.activation]
    gate_ECF = linear("gate", x_ECD) if act.gated else None
    hidden_ECF = act.apply(gate_ECF, linear("up", x_ECD), moe.activation_limit)
    return linear("down", hidden_ECF)
