"""Token choice: each token takes its K best experts. All of DeepSeek's routers are values of its options.

| model                       | score        | normalise | scale | groups       | bias rule     |
|-----------------------------|--------------|-----------|-------|--------------|---------------|
| DeepSeekMoE (2401.06066)    | softmax      | no        | 1     | -            | -             |
| DeepSeek-V2 (2405.04434)    | softmax      | no        | 16    | 3 of 8, max  | -             |
| DeepSeek-V3 (2412.19437)    | sigmoid      | yes       | 2.5   | 4 of 8, top2 | sign          |
| Moonlight (2502.16982)      | sigmoid      | yes       | 2.446 | -            | sign_centered |
| DeepSeek-V4 (2606.19348)    | sqrt_softplus| yes       | 1.5*  | -            | sign          |
| Mixtral, Qwen3-MoE, gpt-oss | softmax      | yes       | 1     | -            | -             |

*V4-Pro: 2.5. Softmax over the selected logits equals softmax over all, renormalised over the selected.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import Problems, choice, divisors_text, number
from moejax.routers import balance, parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    score: str = choice(*parts.SCORES)  # 'softmax' (v1, V2), 'sigmoid' (V3), 'sqrt_softplus' (V4)
    normalize_weights: bool = False  # divide the K chosen weights by their sum
    routed_scaling: float = number(1.0, above=0)  # multiply the weights (V3: 2.5)
    router_bias: bool = False  # bias on the logits, learned by gradient (gpt-oss)
    # Bias on the scores for selection only, moved by the rule objective.bias_update (V3); kept as it is
    # without one.
    expert_bias: bool = False
    # Group-limited selection: equal groups of experts; 1: no limit.
    num_groups: int = number(1, least=1)
    topk_groups: int = 1  # groups that a token may reach
    # What a group is worth: its best member (V2), or its two best biased scores (V3).
    group_score: str = choice("max", "top2_sum")


def init_state(cfg: RouterConfig, layer: int) -> dict:
    del layer
    if not cfg.options.expert_bias:
        return {}
    return {"expert_bias": jnp.zeros((cfg.num_experts,), jnp.float32)}


def limit_groups(choice_TE: jax.Array, options: Options) -> jax.Array:
    """Choice scores with the experts outside each token's best `topk_groups` groups at -inf.

    A group is worth its best member (V2, 2405.04434 section 2.2.2) or the sum of its two best biased
    scores (V3, 2412.19437 section 2.1.2).
    """
    if options.num_groups == 1:
        return choice_TE
    t = choice_TE.shape[0]
    groups_TGe = choice_TE.reshape(t, options.num_groups, -1)
    if options.group_score == "max":
        value_TG = groups_TGe.max(axis=-1)
    else:
        value_TG = jax.lax.top_k(groups_TGe, 2)[0].sum(axis=-1)
    _, kept = jax.lax.top_k(value_TG, options.topk_groups)
    keep_TG = jax.nn.one_hot(kept, options.num_groups, dtype=jnp.bool_).any(axis=1)
    return jnp.where(keep_TG[:, :, None], groups_TGe, -jnp.inf).reshape(t, -1)


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """g_i = s_i of the K largest s_i + b_i (2412.19437 eq. 13-16); see `Router.route`."""
    options = cfg.options
    logits_TE = parts.logits(params, tokens.x_TD)
    scores_TE = parts.score(logits_TE, options.score)

    if tokens.forced_TK is None:
        choice_TE = jax.lax.stop_gradient(scores_TE)
        if "expert_bias" in state:
            choice_TE = choice_TE + state["expert_bias"].astype(choice_TE.dtype)[None]
        _, index_TK = jax.lax.top_k(limit_groups(choice_TE, options), cfg.experts_per_token)
    else:
        index_TK = tokens.forced_TK
    index_TK = jnp.where(tokens.mask_T[:, None] > 0, index_TK, -1).astype(jnp.int32)

    # A product with the one-hot, not a gather: its gradient is not a scatter.
    chosen_TKE = parts.chosen(index_TK, cfg.num_experts, scores_TE.dtype)
    weights_TK = (chosen_TKE * scores_TE[:, None, :]).sum(axis=-1)
    if options.normalize_weights:
        total_T1 = weights_TK.sum(axis=-1, keepdims=True)
        # Padding has no weights at all: dividing by 1 keeps its gradient 0 where 0/1e-20 would be NaN.
        weights_TK = weights_TK / jnp.where(total_T1 > 0, total_T1 + 1e-20, 1.0)
    weights_TK = weights_TK * options.routed_scaling

    routes_TE = jax.lax.stop_gradient(chosen_TKE.sum(axis=1))
    stats = parts.token_stats(routes_TE, scores_TE, tokens, cfg)
    groups = cfg.balance.balance_groups
    losses = parts.token_losses(
        logits_TE,
        scores_TE,
        routes_TE,
        stats,
        tokens,
        cfg,
        groups_per_token=(
            options.topk_groups if options.num_groups > 1 else min(cfg.experts_per_token, groups)
        ),
        normalized=options.score == "softmax",
    )
    return Routed(Routing(index_TK, weights_TK), losses, stats, scores_TE)


def update(state: dict, stats: dict, cfg: RouterConfig) -> dict:
    if not state:
        return state
    rule, rate = cfg.balance.bias_update, cfg.balance.bias_rate
    return {"expert_bias": balance.update_bias(state["expert_bias"], stats["load"], rule, rate)}


def linear_losses(cfg: RouterConfig) -> bool:
    """z and sequence-wise are sums over tokens and sequences; the others count over the whole batch."""
    b = cfg.balance
    return not (b.expert_loss or b.device_loss or b.communication_loss)


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    o, e, k, b, out = cfg.options, cfg.num_experts, cfg.experts_per_token, cfg.balance, Problems()
    key = f"{prefix}router."
    out.need(
        b.bias_update == "none" or o.expert_bias,
        f"objective.bias_update={b.bias_update!r} moves a selection bias that the router does not have: "
        f"set {key}expert_bias=True, or objective.bias_update='none'",
    )
    out.need(
        b.communication_loss == 0 or o.num_groups in (1, b.balance_groups),
        f"objective.communication_loss={b.communication_loss} counts devices as groups: "
        f"objective.balance_groups={b.balance_groups} must equal {key}num_groups={o.num_groups}",
    )
    if o.num_groups <= 1:
        return out
    size = e // o.num_groups
    out.need(
        e % o.num_groups == 0,
        f"{prefix}num_experts={e} must be a multiple of {key}num_groups={o.num_groups}; "
        f"{divisors_text(e)} would work",
    )
    out.need(
        1 <= o.topk_groups <= o.num_groups,
        f"{key}topk_groups={o.topk_groups} must be between 1 and {key}num_groups={o.num_groups}",
    )
    out.need(
        o.topk_groups < 1 or o.topk_groups * size >= k,
        f"{key}topk_groups={o.topk_groups} groups of {size} experts hold fewer than "
        f"{prefix}experts_per_token={k}; topk_groups >= {-(-k // max(size, 1))} would work",
    )
    out.need(
        o.group_score != "top2_sum" or size >= 2,
        f"{key}group_score='top2_sum' needs groups of at least 2 experts, not {size}",
    )
    return out


ROUTER = Router(
    options=Options(),
    source="DeepSeekMoE, 2401.06066",
    about=__doc__ or "",
    route=route,
    form="token",
    causal=True,
    param_specs=parts.linear_specs,
    init_state=init_state,
    update=update,
    linear_losses=linear_losses,
    balance=tuple(f.name for f in dataclasses.fields(balance.BalanceConfig)),
    problems=problems,
)
