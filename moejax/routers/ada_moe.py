"""AdaMoE (2406.13233): a token takes its K best of E experts and M null experts, which compute nothing.

    s = softmax(x W) over E + M;  y = sum_{e chosen, e < E} s_e / (sum of those) FFN_e(x)
    loss = expert_loss * (E + M)/K sum_i f_i mean_t s_ti;  a null expert's f_i is the mean over the null experts

A token with m null experts among its K has K - m real ones, so K is larger than in a router without them;
the loss fixes how many there are on average, E K / (E + M), and as null experts are all alike, it does not
balance them against each other. Formulas as in the authors' text; the loss is 1 at balance times its
coefficient, as all of moejax's. Causal: the scores are the token's own. No state. The paper claims better
fine-tuned models with fewer FLOPs.

Here: N experts and null experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import balance, parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    null_experts: int = number(0, least=0)  # M; 0: as many as there are experts


def count_null(cfg: RouterConfig) -> int:
    return cfg.options.null_experts or cfg.num_experts


def count(cfg: RouterConfig) -> int:
    return cfg.num_experts + count_null(cfg)


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state
    experts, k, n = cfg.num_experts, cfg.experts_per_token, tokens.totals.num_tokens
    logits_TN = parts.logits(params, tokens.x_TD)
    scores_TN = jax.nn.softmax(logits_TN, axis=-1)
    index_TK = parts.select(scores_TN, tokens, k)
    weights_TK, routes_TN = parts.weigh(index_TK, scores_TN)
    weights_TK = parts.normalized(jnp.where(index_TK < experts, weights_TK, 0.0))
    stats = parts.plain_stats(routes_TN, scores_TN, tokens)
    losses = {}
    if cfg.balance.expert_loss:
        score_sum_N = (scores_TN * tokens.mask_T[:, None]).sum(axis=0)
        load_N = tokens.total(stats, "load")
        null = jnp.full((count_null(cfg),), load_N[experts:].mean())
        load_N = jnp.concatenate([load_N[:experts], null])
        losses["expert"] = cfg.balance.expert_loss * balance.expert_level(score_sum_N, load_N, n, k)
    losses |= parts.z_loss(logits_TN, tokens, cfg)
    return Routed(
        Routing(index_TK, weights_TK),
        losses,
        stats,
        scores_TN[:, :experts],
        choice_TN=jax.lax.stop_gradient(scores_TN),
        logits_TE=logits_TN[:, :experts],
    )


ROUTER = Router(
    options=Options(),
    source="AdaMoE, 2406.13233",
    about=__doc__ or "",
    recipe=(("objective.expert_loss", 0.01),),
    route=route,
    form="token",
    causal=True,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg, count(cfg))},
    linear_losses=lambda cfg: not cfg.balance.expert_loss,
    specials=lambda cfg: ("zero",) * count_null(cfg),
    experts_used=lambda cfg: cfg.experts_per_token * cfg.num_experts / count(cfg),
    balance=("expert_loss", "z_loss"),
)
