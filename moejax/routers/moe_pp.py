"""MoE++ (2410.07348): zero, copy and constant experts beside the FFNs; scores know the layer before.

    z_j = x W_j + z_{j-1} V_j,  z_0 = 0 (gating residual);  s = softmax(z_j) over all N experts
    y = sum of s_i E_i(x) over the K best;  E_i(x) = FFN_i(x), 0, x, or a_1 x + a_2 v
    loss = expert_loss * N/K sum_i eta_i f_i mean_t s_ti,  eta = 1 for an FFN, tau for any other expert

A token may skip the layer, pass as it is, or be replaced, which costs nothing. tau < 1 lets the cheap
experts have 1/tau times the tokens of an FFN. The loss is 1 at balance for tau = 1, as all of moejax's; the
paper's has no factor N/K. Nothing is dropped unless `objective.capacity_factor` says so (for all FFNs
alike). Causal: z is the token's own, in all layers. No state. The paper claims a lower loss than a plain
MoE of the same size, at a higher throughput.

Here: N experts of all kinds, which is also the width W of what is carried.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import Problems, number
from moejax.params import ParamSpec
from moejax.routers import balance, parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    zero_experts: int = number(1, least=0)  # a route to one adds nothing
    copy_experts: int = number(1, least=0)  # adds the token itself
    constant_experts: int = number(2, least=0)  # adds a mix of the token and a learned vector
    tau: float = number(0.75, above=0, most=1)  # weight in the loss of experts that cost nothing
    gating_residual: bool = True  # scores start from the layer before


def specials(cfg: RouterConfig) -> tuple[str, ...]:
    o = cfg.options
    kinds = ("zero",) * o.zero_experts + ("copy",) * o.copy_experts
    return kinds + ("constant",) * o.constant_experts


def count(cfg: RouterConfig) -> int:
    return cfg.num_experts + len(specials(cfg))


def carries(cfg: RouterConfig) -> int:
    return count(cfg) if cfg.options.gating_residual else 0


def param_specs(cfg: RouterConfig) -> dict:
    n = count(cfg)
    specs = {"kernel": parts.kernel_spec(cfg, n)}
    if cfg.options.gating_residual:
        specs["residual"] = ParamSpec((n, n), (None, None), std=cfg.init_std)
    return specs


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state
    experts, k, n = cfg.num_experts, cfg.experts_per_token, tokens.totals.num_tokens
    logits_TN = parts.logits(params, tokens.x_TD)
    if cfg.options.gating_residual:
        assert tokens.carried_TW is not None, "moe_pp carries its scores from layer to layer"
        logits_TN = logits_TN + parts.logits({"kernel": params["residual"]}, tokens.carried_TW)
    scores_TN = jax.nn.softmax(logits_TN, axis=-1)
    index_TK = parts.select(scores_TN, tokens, k)
    weights_TK, routes_TN = parts.weigh(index_TK, scores_TN)
    stats = parts.plain_stats(routes_TN, scores_TN, tokens)
    losses = {}
    if cfg.balance.expert_loss:
        eta_N = jnp.where(jnp.arange(count(cfg)) < experts, 1.0, cfg.options.tau)
        score_sum_N = (scores_TN * tokens.mask_T[:, None]).sum(axis=0)
        loss = balance.expert_level(eta_N * score_sum_N, tokens.total(stats, "load"), n, k)
        losses["expert"] = cfg.balance.expert_loss * loss
    losses |= parts.z_loss(logits_TN, tokens, cfg)
    return Routed(
        Routing(index_TK, weights_TK),
        losses,
        stats,
        scores_TN[:, :experts],
        logits_TN if cfg.options.gating_residual else None,
        logits_TE=logits_TN[:, :experts],
    )


def experts_used(cfg: RouterConfig) -> float:
    """Of K routes, those to FFNs when every expert has its share by the loss."""
    ffn = cfg.options.tau * cfg.num_experts
    return cfg.experts_per_token * ffn / (ffn + len(specials(cfg)))


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    out = Problems()
    key = f"{prefix}router."
    out.need(
        len(specials(cfg)) > 0 or cfg.options.tau == MoEPP.tau,
        f"{key}tau={cfg.options.tau} weighs experts that cost nothing, and there are none: set "
        f"{key}zero_experts, {key}copy_experts or {key}constant_experts, or leave it at {MoEPP.tau}",
    )
    return out


MoEPP = Options()
ROUTER = Router(
    options=MoEPP,
    source="MoE++, 2410.07348",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 2), ("objective.expert_loss", 0.01)),
    route=route,
    form="token",
    causal=True,
    param_specs=param_specs,
    linear_losses=lambda cfg: not cfg.balance.expert_loss,
    specials=specials,
    experts_used=experts_used,
    carries=carries,
    balance=("expert_loss", "z_loss"),
    problems=problems,
)
