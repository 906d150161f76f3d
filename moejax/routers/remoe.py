"""ReLU gates (ReMoE, 2412.14711): a token uses every expert whose gate is open; the gates are the weights.

    y_t = sum_e ReLU(x_t W)_e FFN_e(x_t)
    loss = lambda_i sum_e f_e mean_t ReLU(x_t W)_e,  f_e = E / (K T) #{t: gate e is open}
    lambda_{i+1} = lambda_i alpha^sign((1 - K/E) - S_i),  S_i = share of closed gates

S_i is taken over all layers, so layers may differ in how many experts they open; K (`experts_per_token`) is
the mean that the rule steers to. Formulas as in the authors' code. Causal: a gate sees its own token.
State: lambda, the same in every layer. Training begins with about half of all gates open, so the first
hundreds of steps cost more. The paper claims a lower loss than top-K routing at the same mean, because
nothing in the router jumps.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import parts, picks
from moejax.routers.contract import Routed, Router, RouterConfig, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(picks.VariableOptions):
    coefficient: float = number(1e-8, above=0)  # lambda at the start
    growth: float = number(1.2, above=1)  # alpha, by which a step multiplies or divides lambda


def init_state(cfg: RouterConfig, layer: int) -> dict:
    del layer
    return {"coefficient": jnp.full((), cfg.options.coefficient, jnp.float32)}


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`. Of more than `max_experts` open gates the widest are computed."""
    logits_TE = parts.logits(params, tokens.x_TD)
    gates_TE = jax.nn.relu(logits_TE) * tokens.mask_T[:, None]
    index_TK = parts.select(gates_TE, tokens, picks.most_experts(cfg), gates_TE > 0)
    weights_TK, routes_TE = parts.weigh(index_TK, gates_TE)
    stats = {
        "load": routes_TE.sum(axis=0),
        "open": (gates_TE > 0).astype(gates_TE.dtype).sum(axis=0),
        "tokens": tokens.mask_T.sum(),
    }
    num_tokens = jnp.maximum(tokens.totals.num_tokens, 1.0)
    f_E = cfg.num_experts / (cfg.experts_per_token * num_tokens) * tokens.total(stats, "open")
    loss = state["coefficient"] * (f_E * gates_TE.sum(axis=0) / num_tokens).sum()
    losses = {"gates": loss}
    return Routed(Routing(index_TK, weights_TK), losses, stats, gates_TE, logits_TE=logits_TE)


def update(state: dict, stats: dict, cfg: RouterConfig) -> dict:
    too_many = jnp.sign(stats["open"].sum() - cfg.experts_per_token * stats["tokens"])
    return {"coefficient": state["coefficient"] * cfg.options.growth**too_many}


ROUTER = Router(
    options=Options(),
    source="ReMoE, 2412.14711",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 1),),
    route=route,
    form="token",
    causal=True,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    init_state=init_state,
    update=update,
    pooled=("open", "tokens"),
    routes_per_token=picks.most_experts,
    problems=picks.most_experts_problems,
)
