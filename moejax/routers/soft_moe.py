"""Soft MoE (2308.00951): experts compute mixtures of tokens, tokens receive mixtures of results.

With logits X Phi, one column for each slot: D = softmax over the tokens of a sequence, C = softmax over all
slots of all experts; the slots hold D^T X, go through their experts, and Y = C times the results (eq. 1-3).
Nothing is chosen, dropped or balanced. Normalised (the paper's section 2.3): rows of X and columns of Phi have
norm 1, and a learned scale multiplies their products.

Not causal: every slot mixes the whole sequence. Padding is left out of D, and receives nothing. No state and
no loss. The cost is that of the slots, whatever the length of a sequence: `slots_per_expert` times E of them.
The paper claims better images classifiers than token and expert choice at equal cost, and many experts at no
cost.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.options import number
from moejax.params import ParamSpec
from moejax.routers import parts
from moejax.routers.contract import (
    Routed,
    Router,
    RouterConfig,
    RouterOptions,
    SoftRouting,
    Tokens,
)


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    slots_per_expert: int = number(1, least=1)  # in each sequence
    normalize: bool = True  # unit norms and a learned scale


def param_specs(cfg: RouterConfig) -> dict:
    slots = cfg.num_experts * cfg.options.slots_per_expert
    specs = {"phi": ParamSpec((cfg.d_model, slots), (axes.EMBED, None), std=cfg.init_std)}
    if cfg.options.normalize:
        specs["scale"] = ParamSpec((), (), init="ones")
    return specs


def _unit(x: jax.Array, axis: int) -> jax.Array:
    return x * jax.lax.rsqrt((x**2).sum(axis=axis, keepdims=True) + 1e-6)


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`. The load of an expert is the weight that tokens give to its results."""
    del state
    if tokens.forced_TK is not None:
        raise ValueError("soft_moe mixes tokens: it cannot be forced to the routes of tokens")
    parts.refuse_barred(tokens, "soft_moe mixes tokens")
    dtype = jnp.promote_types(tokens.x_TD.dtype, jnp.float32)
    x_TD, phi = tokens.x_TD.astype(dtype), params["phi"].astype(dtype)
    if cfg.options.normalize:
        x_TD, phi = _unit(x_TD, 1), _unit(phi, 0) * params["scale"].astype(dtype)
    logits = jnp.dot(x_TD, phi, precision=jax.lax.Precision.HIGHEST)
    logits_BSN = logits.reshape(*tokens.mask_BS.shape, -1)  # N: all slots
    seen_BS1 = tokens.mask_BS[..., None] > 0
    dispatch_BSN = jax.nn.softmax(jnp.where(seen_BS1, logits_BSN, -1e30), axis=1)
    mixes = dispatch_BSN, jax.nn.softmax(logits_BSN, axis=2)
    shape = (*tokens.mask_BS.shape, cfg.num_experts, -1)
    routing = SoftRouting(*(jnp.where(seen_BS1, m, 0).reshape(shape) for m in mixes))
    load_E = jax.lax.stop_gradient(routing.combine_BSEC.sum(axis=(0, 1, 3)))
    return Routed(routing, {}, {"load": load_E})


def experts_used(cfg: RouterConfig) -> float:
    """Slots for one token of the longest sequence: a shorter one has as many, for fewer tokens."""
    slots = cfg.options.slots_per_expert * cfg.num_experts
    return min(slots / cfg.max_seq_len, float(cfg.num_experts))


ROUTER = Router(
    options=Options(),
    source="Soft MoE, 2308.00951",
    about=__doc__ or "",
    route=route,
    form="soft",
    causal=False,
    param_specs=param_specs,
    linear_losses=lambda cfg: True,
    experts_used=experts_used,
)
