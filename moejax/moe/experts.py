"""Activations, FFN parameters, the dense FFN, and expert FFNs over fixed slots. For routed tokens see
`routed_ffn`.

Gated:      y = down(weight act(gate x, up x))      SwiGLU (2002.05202) and its clamped variants
Not gated:  y = down(weight act(up x))              GPT-2's tanh GELU

This equation stands once, in `Activation`; what differs is the product by which rows meet their matrices. An
activation is a line of ACTIVATIONS, not an `if`.
"""

import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import ModelConfig, MoEConfig
from moejax.linear import linear
from moejax.params import ParamSpec

Params = Mapping[str, Any]


class Activation(NamedTuple):
    """Attributes:
    gated: whether there is a gate projection beside the up projection.
    apply: (gate, up) -> hidden, elementwise; `gate` is None where not gated. In ACTIVATIONS it takes
      the `limit` of the clamped ones, too.
    """

    gated: bool
    apply: Callable[..., jax.Array]

    @property
    def inputs(self) -> tuple[str, ...]:
        """The projections that it reads."""
        return ("gate", "up") if self.gated else ("up",)

    def hidden(self, inputs: Sequence[jax.Array], weight: jax.Array | None = None) -> jax.Array:
        """What the down projection reads, of the values of `inputs`, in their dtype. The weight meets the
        hidden values, which are fewer than the result's, in its own precision."""
        h = self.apply(inputs[0] if self.gated else None, inputs[-1])
        return h if weight is None else (h * weight).astype(h.dtype)

    def ffn(self, product: Callable[[str, jax.Array], jax.Array], x: jax.Array, weight=None):
        """The FFN of x by `product(name, x)`, the projection of that name."""
        return product("down", self.hidden([product(n, x) for n in self.inputs], weight))


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


def activation(name: str, limit: float) -> Activation:
    """A line of ACTIVATIONS with its limit."""
    gated, apply = ACTIVATIONS[name]
    return Activation(gated, functools.partial(apply, limit=limit))


def of_experts(moe: MoEConfig) -> Activation:
    """The activation of routed and shared experts."""
    return activation(moe.activation, moe.activation_limit)


def of_dense(cfg: ModelConfig) -> Activation:
    """The activation of dense FFNs."""
    return activation(cfg.activation, cfg.moe.activation_limit)


# --------------------------------------------------------------------------------------------------
# One FFN: dense layers and shared experts.


def ffn_param_specs(
    d_model: int, width: int, activation: str, bias: bool, std: float
) -> dict[str, ParamSpec]:
    """w_gate (D, F) where gated, w_up (D, F), w_down (F, D), and with `bias` b_gate, b_up (F,),
    b_down (D,)."""
    return _specs((), (axes.EMBED, axes.MLP), d_model, width, activation, bias, std)


def ffn(
    params: Params, x: jax.Array, act: Activation, weights: jax.Array | None = None
) -> jax.Array:
    """The FFN of x (..., D) -> (..., D), computed in x's dtype.

    `weights` (..., S): the FFN is S equal ones side by side, and this is the weight of each one's output.
    b_down, which is of all of them, is added as it is. S divides the width.
    """
    if weights is not None:
        width = params["w_down"].shape[0]
        weights = jnp.repeat(weights.astype(x.dtype), width // weights.shape[-1], axis=-1)
    product = lambda name, x: linear(x, params[f"w_{name}"], params.get(f"b_{name}"))  # noqa: E731
    return act.ffn(product, x, weights)


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
    into = {name: width for name in ACTIVATIONS[activation].inputs}
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


def expert_ffn_slots(params: Params, x_ECD: jax.Array, act: Activation) -> jax.Array:
    """Expert e's FFN over its C slots: (E, C, D) -> (E, C, D) in x's dtype."""

    def product(name, x):
        y = jnp.einsum("ecd,edf->ecf", x, params[f"w_{name}"].astype(x.dtype))
        if f"b_{name}" in params:
            y = y + params[f"b_{name}"].astype(x.dtype)[:, None]
        return y

    return act.ffn(product, x_ECD)
