"""ReLU gates (ReMoE, 2412.14711): a token uses the experts whose gate is open, none or several, at most K.

The gates ReLU(x W) are the weights. How many are open is governed by an L1 loss on them, each expert's weighed
by its load, times a coefficient that a rule moves until `target` are open on average.
Deviations: each layer has a coefficient of its own, and only the K widest of a token's open gates are computed.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import Problems, number
from moejax.routers import parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    target: float = number(1.5, above=0)  # open gates of a token, on average
    coefficient: float = number(1e-8, above=0)  # lambda at the start
    growth: float = number(1.2, above=1)  # alpha, by which a step multiplies or divides lambda


def init_state(cfg: RouterConfig, layer: int) -> dict:
    del layer
    return {"coefficient": jnp.full((), cfg.options.coefficient, jnp.float32)}


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    gates_TE = jax.nn.relu(parts.logits(params, tokens.x_TD)) * tokens.mask_T[:, None]
    index_TK = parts.select(gates_TE, tokens, cfg.experts_per_token, gates_TE > 0)
    chosen_TKE = parts.chosen(index_TK, cfg.num_experts, gates_TE.dtype)
    weights_TK = (chosen_TKE * gates_TE[:, None]).sum(axis=-1)
    stats = {
        "load": chosen_TKE.sum(axis=(0, 1)),
        "open": (gates_TE > 0).astype(gates_TE.dtype).sum(axis=0),
        "tokens": tokens.mask_T.sum(),
    }
    # sum_e f_e mean_t(gate_te), with f_e the load relative to a balanced one: a count times a mean.
    num_tokens = jnp.maximum(tokens.totals.num_tokens, 1.0)
    share_E = cfg.num_experts / (cfg.options.target * num_tokens) * tokens.total(stats, "open")
    loss = (share_E * gates_TE.sum(axis=0) / num_tokens).sum()
    return Routed(
        Routing(index_TK, weights_TK), {"gates": state["coefficient"] * loss}, stats, gates_TE
    )


def update(state: dict, stats: dict, cfg: RouterConfig) -> dict:
    open_per_token = stats["open"].sum() / jnp.maximum(stats["tokens"], 1.0)
    step = cfg.options.growth ** jnp.sign(open_per_token - cfg.options.target)
    return {"coefficient": state["coefficient"] * step}


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    target, k, out = cfg.options.target, cfg.experts_per_token, Problems()
    out.need(
        target <= k, f"{prefix}router.target={target} is more than {prefix}experts_per_token={k}"
    )
    return out


ROUTER = Router(
    options=Options(),
    route=route,
    form="token",
    causal=True,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    init_state=init_state,
    update=update,
    experts_used=lambda cfg: cfg.options.target,
    problems=problems,
)
