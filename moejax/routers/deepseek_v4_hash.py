"""DeepSeek-V4 (2606.19348): early layers choose by a table of vocabulary ids, the others by their scores.

    s = sqrt(softplus(x W));  e in table[id of t] in the first layers, else the K largest s_e + b_e
    y = scale * sum of s_e / (sum of the chosen s) FFN_e(x)

The first `hash_layers` MoE layers have the table; their weights are learned, too. Early layers would choose
by the token's identity anyway, and a table does so without a router to balance. The table is drawn at
random for the model's vocabulary, a released model brings its own. Causal: a route is the token's own id,
or its own scores. State: the table (of every layer, so that layers stack), and b, which the rule of
`objective.bias_update` moves (V3's, 2408.15664). The formulas are those of the released code.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import balance, parts, token_choice
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens
from moejax.routers.hashed import draw_table, look_up


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    hash_layers: int = number(3, least=0)  # leading MoE layers that choose by the table
    routed_scaling: float = number(1.5, above=0)  # multiply the weights
    seed: int = number(0, least=0)  # of the tables


def init_state(cfg: RouterConfig, layer: int) -> dict:
    return {
        "table": draw_table(cfg, layer),
        "hashed": jnp.asarray(layer < cfg.options.hash_layers, jnp.float32),
        "expert_bias": jnp.zeros((cfg.num_experts,), jnp.float32),
    }


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    k = cfg.experts_per_token
    logits_TE = parts.logits(params, tokens.x_TD)
    scores_TE = parts.score(logits_TE, "sqrt_softplus")
    choice_TE = scores_TE + state["expert_bias"].astype(scores_TE.dtype)[None]
    index_TK = parts.select(choice_TE, tokens, k)
    if tokens.forced_TK is None:
        by_id = (state["hashed"] > 0) & (tokens.mask_T[:, None] > 0)
        table_TK = look_up(state["table"], tokens)
        if tokens.barred_TE is not None:  # the table knows no other
            barred_TE = jnp.broadcast_to(tokens.barred_TE, scores_TE.shape)
            barred_TK = jnp.take_along_axis(barred_TE, table_TK, axis=1)
            table_TK = jnp.where(barred_TK, -1, table_TK)
        index_TK = jnp.where(by_id, table_TK, index_TK)
    weights_TK, routes_TE = parts.weigh(index_TK, scores_TE)
    weights_TK = parts.normalized(weights_TK) * cfg.options.routed_scaling
    stats = parts.token_stats(routes_TE, scores_TE, tokens, cfg)
    losses = parts.token_losses(
        logits_TE,
        scores_TE,
        routes_TE,
        stats,
        tokens,
        cfg,
        normalized=False,
    )
    ranked_TE = jax.lax.stop_gradient(choice_TE)
    return Routed(
        Routing(index_TK, weights_TK),
        losses,
        stats,
        scores_TE,
        choice_TN=ranked_TE,
        logits_TE=logits_TE,
    )


def update(state: dict, stats: dict, cfg: RouterConfig) -> dict:
    rule, rate = cfg.balance.bias_update, cfg.balance.bias_rate
    bias_E = balance.update_bias(state["expert_bias"], stats["load"], rule, rate)
    return {**state, "expert_bias": bias_E}


ROUTER = Router(
    options=Options(),
    source="DeepSeek-V4, 2606.19348",
    about=__doc__ or "",
    recipe=(
        ("model.moe.experts_per_token", 6),
        ("objective.bias_update", "sign"),
        ("objective.sequence_loss", 1e-4),
    ),
    route=route,
    form="token",
    causal=True,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    init_state=init_state,
    update=update,
    linear_losses=token_choice.linear_losses,
    balance=(*parts.TOKEN_LOSSES, "bias_update", "bias_rate", "balance_groups"),
)
