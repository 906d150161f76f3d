"""Top-P (2403.07652): a token takes its most probable experts until their probabilities add up to P.

    p = softmax(x W);  S = the fewest experts with sum_{e in S} p_e >= P
    y = sum_{e in S} p_e FFN_e(x)
    loss = expert_loss * E sum_e f_e mean_t p_te + entropy_loss * mean_t H(p_t),  f_e = share of tokens with e

A token about which the router is sure takes one expert, another takes more. Without the entropy loss the
probabilities flatten, and every token takes many. `experts_per_token` chooses nothing here: it says what
mean the plan of costs assumes. Causal: the probabilities are the token's own. No state. The paper claims a
better mean over tasks than top-2 with fewer active parameters.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import parts, picks, token_choice
from moejax.routers.contract import Routed, Router, RouterConfig, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(picks.VariableOptions):
    threshold: float = number(0.4, above=0, most=1)  # P
    entropy_loss: float = number(1e-4, least=0)  # coefficient of the mean entropy, in nats


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state
    most, groups = picks.most_experts(cfg), cfg.balance.balance_groups
    logits_TE = parts.logits(params, tokens.x_TD)
    scores_TE = jax.nn.softmax(logits_TE, axis=-1)
    index_TK = parts.select(scores_TE, tokens, most)
    if tokens.forced_TK is None:
        # The experts before a token's k-th do not reach P yet.
        p_TK, _ = parts.weigh(index_TK, scores_TE)
        before_TK = jnp.cumsum(p_TK, axis=1) - p_TK
        index_TK = jnp.where(before_TK < cfg.options.threshold, index_TK, -1)
    weights_TK, routes_TE = parts.weigh(index_TK, scores_TE)
    stats = parts.token_stats(routes_TE, scores_TE, tokens, cfg)
    losses = parts.token_losses(
        logits_TE,
        scores_TE,
        routes_TE,
        stats,
        tokens,
        dataclasses.replace(cfg, experts_per_token=1),  # the paper's f_e is not divided by K
        groups_per_token=min(most, groups),
        normalized=True,
    )
    if cfg.options.entropy_loss:
        entropy_T = -(scores_TE * jax.nn.log_softmax(logits_TE, axis=-1)).sum(axis=-1)
        mean = (entropy_T * tokens.mask_T).sum() / jnp.maximum(tokens.totals.num_tokens, 1.0)
        losses["entropy"] = cfg.options.entropy_loss * mean
    return Routed(Routing(index_TK, weights_TK), losses, stats, scores_TE, logits_TE=logits_TE)


ROUTER = Router(
    options=Options(),
    source="Harder Tasks Need More Experts, 2403.07652",
    about=__doc__ or "",
    recipe=(("objective.expert_loss", 0.01),),
    route=route,
    form="token",
    causal=True,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    linear_losses=token_choice.linear_losses,
    routes_per_token=picks.most_experts,
    balance=(*parts.TOKEN_LOSSES, "balance_groups"),
    problems=picks.most_experts_problems,
)
