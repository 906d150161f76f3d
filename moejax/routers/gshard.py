"""GShard: two experts for each token, the second one by chance.

    g1, g2 = the two largest of softmax(W x), divided by their sum                     (algorithm 1)
    y = g1 E_1(x) + g2 E_2(x), the second with probability min(1, 2 g2) in training

Where the second expert is left out, its weight is: g1 stays what it is. Each token is routed by itself: causal
but for the places under the recipe's capacity, 2 T / E tokens for an expert. No state. The loss counts first
choices alone: E sum_e (c_e / T) m_e with c_e first choices and m_e mean scores, which is E^2 times the paper's
and 1 with perfect balance; the coefficient is that of the authors' code. The paper claims that very large
translation models train in days.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import Problems
from moejax.routers import balance, parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    random_second: bool = True  # keep the second expert by chance in training; False: always
    router_bias: bool = False  # bias on the logits, learned by gradient


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state
    b, num_tokens = cfg.balance, tokens.totals.num_tokens
    logits_TE = parts.logits(params, tokens.x_TD)
    scores_TE = jax.nn.softmax(logits_TE, axis=-1)
    index_TK = parts.select(scores_TE, tokens, cfg.experts_per_token)
    weights_TK = parts.normalized(parts.weigh(index_TK, scores_TE)[0])
    first_TE = parts.chosen(index_TK[:, :1], cfg.num_experts, scores_TE.dtype)[:, 0]

    if cfg.options.random_second and tokens.key is not None and tokens.forced_TK is None:
        chance_T = jax.random.uniform(tokens.key, weights_TK.shape[:1], weights_TK.dtype)
        kept_TK = jnp.stack([chance_T >= 0, chance_T < 2 * weights_TK[:, 1]], axis=1)
        index_TK = jnp.where(kept_TK, index_TK, -1)
        weights_TK = jnp.where(kept_TK, weights_TK, 0)

    routes_TE = parts.chosen(index_TK, cfg.num_experts, scores_TE.dtype).sum(axis=1)
    stats = {**parts.plain_stats(routes_TE, scores_TE, tokens), "first_load": first_TE.sum(0)}
    losses = {}
    if b.expert_loss:
        score_sum_E = (scores_TE * tokens.mask_T[:, None]).sum(axis=0)
        first_E = tokens.total(stats, "first_load")
        losses["expert"] = b.expert_loss * balance.expert_level(score_sum_E, first_E, num_tokens, 1)
    losses |= parts.z_loss(logits_TE, tokens, cfg)
    return Routed(Routing(index_TK, weights_TK), losses, stats, scores_TE, logits_TE=logits_TE)


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    out = Problems()
    out.need(
        cfg.experts_per_token == 2,
        f"{prefix}experts_per_token={cfg.experts_per_token}: this router takes 2",
    )
    return out


ROUTER = Router(
    options=Options(),
    source="GShard, 2006.16668",
    about=__doc__ or "",
    recipe=(
        ("model.moe.experts_per_token", 2),
        ("objective.expert_loss", 0.01),
        ("objective.capacity_factor", 1.0),
    ),
    route=route,
    form="token",
    causal=True,
    param_specs=parts.linear_specs,
    linear_losses=lambda cfg: not cfg.balance.expert_loss,
    balance=("expert_loss", "z_loss"),
    problems=problems,
)
