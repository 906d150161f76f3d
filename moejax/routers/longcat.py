"""LongCat-Flash (2509.01322): FFNs and identity experts; a rule steers the mean number of FFNs.

    s = softmax(x W) over E + Z;  the K largest s_i + b_i are chosen
    y = scale * sum of s_i E_i(x) over the chosen;  E_i(x) = x for i >= E
    b_i += mu (K_e / (K E) - T_i / (K T)) for i < E;  b_i = 0 for the identity experts

An FFN whose share of routes is below its part of K_e has its bias raised, in proportion: so FFNs are
balanced, and a token has K_e of them on average, more where it is hard. Weights are not normalised. Causal:
the scores are the token's own. State: b. mu is `objective.bias_rate`, 0 keeps b as it is. The paper's loss
over devices is left out. It claims a lower loss than a fixed number of FFNs at the same mean.

Here: N experts and identity experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import Problems, number
from moejax.routers import parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    identity_experts: int = number(0, least=0)  # Z; 0: half of E (LongCat-Flash: 256 beside 512)
    # K_e, FFNs of a token on average; 0: K E / (E + Z), when all experts have the same share.
    expected_experts: float = number(0.0, least=0)
    routed_scaling: float = number(6.0, above=0)  # multiply the weights


def count_identity(cfg: RouterConfig) -> int:
    return cfg.options.identity_experts or max(1, cfg.num_experts // 2)


def count(cfg: RouterConfig) -> int:
    return cfg.num_experts + count_identity(cfg)


def expected_experts(cfg: RouterConfig) -> float:
    """K_e."""
    even = cfg.experts_per_token * cfg.num_experts / count(cfg)
    return cfg.options.expected_experts or even


def init_state(cfg: RouterConfig, layer: int) -> dict:
    del layer
    return {"expert_bias": jnp.zeros((count(cfg),), jnp.float32)}


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    logits_TN = parts.logits(params, tokens.x_TD)
    scores_TN = jax.nn.softmax(logits_TN, axis=-1)
    choice_TN = scores_TN + state["expert_bias"].astype(scores_TN.dtype)[None]
    index_TK = parts.select(choice_TN, tokens, cfg.experts_per_token)
    weights_TK, routes_TN = parts.weigh(index_TK, scores_TN)
    stats = parts.plain_stats(routes_TN, scores_TN, tokens)
    stats["tokens"] = tokens.mask_T.sum()
    routing = Routing(index_TK, weights_TK * cfg.options.routed_scaling)
    ranked_TN = jax.lax.stop_gradient(choice_TN)
    scores_TE, logits_TE = (a[:, : cfg.num_experts] for a in (scores_TN, logits_TN))
    return Routed(routing, {}, stats, scores_TE, choice_TN=ranked_TN, logits_TE=logits_TE)


def update(state: dict, stats: dict, cfg: RouterConfig) -> dict:
    e, k = cfg.num_experts, cfg.experts_per_token
    share_N = stats["load"] / (k * jnp.maximum(stats["tokens"], 1.0))
    move_N = jnp.where(jnp.arange(count(cfg)) < e, expected_experts(cfg) / (k * e) - share_N, 0.0)
    move_N = jnp.where(stats["tokens"] > 0, move_N, 0.0)
    return {"expert_bias": state["expert_bias"] + cfg.balance.bias_rate * move_N}


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    wanted, k, out = cfg.options.expected_experts, cfg.experts_per_token, Problems()
    out.need(
        wanted <= k,
        f"{prefix}router.expected_experts={wanted} is more than {prefix}experts_per_token={k}, which counts "
        "identity experts too",
    )
    return out


ROUTER = Router(
    options=Options(),
    source="LongCat-Flash, 2509.01322",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 12),),
    route=route,
    form="token",
    causal=True,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg, count(cfg))},
    init_state=init_state,
    update=update,
    linear_losses=lambda cfg: True,
    specials=lambda cfg: ("copy",) * count_identity(cfg),
    experts_used=expected_experts,
    balance=("bias_rate",),
    problems=problems,
)
