"""Slots within each sequence: an expert takes its best tokens of those that score above its threshold.

A rule moves every threshold until its expert takes its share of the tokens, K / E. Sequences do not compete.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import balance, parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, SlotRouting, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    capacity_factor: float = number(2.0, above=0)  # slots, as a multiple of S K / E
    rate: float = number(0.01, least=0)  # of the thresholds


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    if tokens.forced_TK is not None:
        raise ValueError("threshold fills slots: it cannot be forced to the routes of tokens")
    parts.refuse_barred(tokens, "threshold fills slots")
    logits_TE = parts.logits(params, tokens.x_TD)
    scores_TE = jax.nn.sigmoid(logits_TE)
    above_TE = (scores_TE > state["threshold"][None]) & (tokens.mask_T[:, None] > 0)
    length, experts = tokens.seq_len, cfg.num_experts
    wanted = cfg.options.capacity_factor * length * cfg.experts_per_token / experts
    by_sequence = jnp.where(above_TE, scores_TE, 0.0).reshape(-1, length, experts)
    best = jax.lax.top_k(by_sequence.transpose(2, 0, 1), min(length, math.ceil(wanted)))
    weights_EBC, place_EBC = best
    first_B = length * jnp.arange(place_EBC.shape[1])
    index_EBC = jnp.where(weights_EBC > 0, place_EBC + first_B[None, :, None], -1)
    routing = SlotRouting(
        index_EBC.reshape(experts, -1).astype(jnp.int32), weights_EBC.reshape(experts, -1)
    )
    load_E = (index_EBC >= 0).astype(scores_TE.dtype).sum(axis=(1, 2))
    losses = {}
    if cfg.balance.z_loss:
        z = balance.router_z(logits_TE, tokens.mask_T, tokens.totals.num_tokens)
        losses["z"] = cfg.balance.z_loss * z
    return Routed(routing, losses, {"load": load_E, "tokens": tokens.mask_T.sum()}, scores_TE)


def update(state: dict, stats: dict, cfg: RouterConfig) -> dict:
    taken_E = stats["load"] / jnp.maximum(stats["tokens"], 1.0)
    move_E = jnp.sign(taken_E - cfg.experts_per_token / cfg.num_experts)
    return {"threshold": jnp.clip(state["threshold"] + cfg.options.rate * move_E, 0.0, 1.0)}


ROUTER = Router(
    options=Options(),
    route=route,
    form="slot",
    causal=False,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    init_state=lambda cfg, layer: {"threshold": jnp.zeros((cfg.num_experts,), jnp.float32)},
    update=update,
    balance=("z_loss",),
)
