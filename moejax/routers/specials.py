"""Special experts: indices past E whose output is known without an FFN (MoE++, 2410.07348 section 3.1).

    zero      0                              the token may skip the layer
    copy      x                              the token passes as it is
    constant  a_1 x + a_2 v                  [a_1, a_2] = softmax(W x), v learned

A router declares its special experts as a tuple of kinds, numbered from E; they are computed here and nowhere
else. Here: N special experts.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.params import ParamSpec
from moejax.routers.contract import Routing


class Special(NamedTuple):
    """Attributes:
    specs: (d_model, std) -> parameters of one such expert.
    apply: (params, x_TD) -> its output, in x's dtype.
    """

    specs: Callable[[int, float], dict]
    apply: Callable[[dict, jax.Array], jax.Array]


def _constant_specs(d_model: int, std: float) -> dict:
    return {
        "w": ParamSpec((d_model, 2), (axes.EMBED, None), std=std, role="router"),
        "v": ParamSpec((d_model,), (axes.EMBED,), std=std),
    }


def _constant(params, x_TD):
    a_T2 = jax.nn.softmax(jnp.dot(x_TD, params["w"].astype(x_TD.dtype)), axis=-1)
    return a_T2[:, :1] * x_TD + a_T2[:, 1:] * params["v"].astype(x_TD.dtype)[None]


SPECIALS: Mapping[str, Special] = MappingProxyType(
    {
        "zero": Special(lambda d_model, std: {}, lambda params, x_TD: jnp.zeros_like(x_TD)),
        "copy": Special(lambda d_model, std: {}, lambda params, x_TD: x_TD),
        "constant": Special(_constant_specs, _constant),
    }
)


def param_specs(kinds: tuple[str, ...], d_model: int, std: float) -> dict:
    """number -> parameters, of the special experts that have any."""
    every = {str(i): SPECIALS[kind].specs(d_model, std) for i, kind in enumerate(kinds)}
    return {i: specs for i, specs in every.items() if specs}


def split(routing: Routing, num_experts: int, kinds: tuple[str, ...]):
    """Routes of experts proper apart from the rest.

    Returns:
      The routing with -1 for every route that is no expert's; the weight of each special expert for each token
      [T, len(kinds)]; and the number of routes that are nobody's: out of range.

    Raises ValueError if there is such a route and the arrays are concrete: outside jit.
    """
    index_TK, weights_TK = routing
    last = num_experts + len(kinds)
    stray = (index_TK < -1) | (index_TK >= last)
    num_stray = stray.sum().astype(jnp.float32)
    if not isinstance(num_stray, jax.core.Tracer) and num_stray > 0:
        raise ValueError(
            f"a router named expert {int(index_TK[stray][0])}; there are 0 to {last - 1}, and -1 for an "
            "empty slot"
        )
    hot_TKN = jax.nn.one_hot(index_TK - num_experts, len(kinds), dtype=weights_TK.dtype)
    special_TN = (hot_TKN * weights_TK[..., None]).sum(axis=1)
    real = (index_TK >= 0) & (index_TK < num_experts)
    routing = Routing(jnp.where(real, index_TK, -1), jnp.where(real, weights_TK, 0))
    return routing, special_TN, num_stray


def combine(
    params: dict, x_TD: jax.Array, weights_TN: jax.Array, kinds: tuple[str, ...]
) -> jax.Array:
    """y_t = sum_n weights_tn special_n(x_t), in x's dtype."""
    y_TD = jnp.zeros(x_TD.shape, weights_TN.dtype)
    for i, kind in enumerate(kinds):
        out_TD = SPECIALS[kind].apply(params.get(str(i), {}), x_TD)
        y_TD = y_TD + weights_TN[:, i : i + 1] * out_TD.astype(weights_TN.dtype)
    return y_TD.astype(x_TD.dtype)
