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

from moejax import axes
from moejax.options import Problems, choice, divisors_text, number
from moejax.params import ParamSpec
from moejax.routers import balance, parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    score: str = choice(*parts.SCORES)  # 'softmax' (v1, V2), 'sigmoid' (V3), 'sqrt_softplus' (V4)
    normalize_weights: bool = False  # divide the K chosen weights by their norm
    norm_power: float = number(1.0, above=0)  # p of the norm (sum w^p)^(1/p); 1: the sum (DBRX)
    # Divide by the sum of the chosen and the shared experts' scores instead. The shared ones then have logits
    # and weights, too, and a learned factor multiplies all (Inkling).
    normalize_with_shared: bool = False
    routed_scaling: float = number(1.0, above=0)  # multiply the weights (V3: 2.5)
    router_bias: bool = False  # bias on the logits, learned by gradient (gpt-oss)
    # Bias on the scores for selection only, moved by the rule objective.bias_update (V3); kept as it is
    # without one.
    expert_bias: bool = False
    bias_multiplies: bool = False  # it multiplies the scores, from 1 on (2408.15664)
    # What is ranked, and what the selection bias is added to: the scores, or the logits (kolibri1).
    select_by: str = choice("score", "logit")
    # Group-limited selection: equal groups of experts; 1: no limit.
    num_groups: int = number(1, least=1)
    topk_groups: int = 1  # groups that a token may reach
    # What a group is worth: its best member (V2), or its two best biased scores (V3).
    group_score: str = choice("max", "top2_sum")
    jitter: float = number(0.0, least=0, below=1)  # noise on the router's input (Switch 0.01)
    input_norm: bool = False  # RMSNorm with a learned scale on the router's input (Gemma 4)
    expert_scale: bool = False  # a learned factor for the weight of each expert (Gemma 4)
    weigh_inputs: bool = False  # the weights multiply what experts read instead (Llama 4)


def param_specs(cfg: RouterConfig) -> dict:
    o = cfg.options
    shared = cfg.shared_experts if o.normalize_with_shared else 0
    specs = {"kernel": parts.kernel_spec(cfg, cfg.num_experts + shared)}
    if o.router_bias:
        specs["bias"] = ParamSpec((cfg.num_experts + shared,), (None,), init="zeros")
    if o.input_norm:
        specs["input_scale"] = ParamSpec((cfg.d_model,), (axes.EMBED,), init="ones")
    if o.expert_scale:
        specs["expert_scale"] = ParamSpec((cfg.num_experts,), (None,), init="ones")
    if o.normalize_with_shared:
        specs["scale"] = ParamSpec((1,), (None,), init="ones")
    return specs


def init_state(cfg: RouterConfig, layer: int) -> dict:
    del layer
    if not cfg.options.expert_bias:
        return {}
    start = jnp.ones if cfg.options.bias_multiplies else jnp.zeros
    return {"expert_bias": start((cfg.num_experts,), jnp.float32)}


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


def all_logits(params: dict, tokens: Tokens, cfg: RouterConfig) -> jax.Array:
    """Logits of the experts, and of the shared ones after them where those have any: (T, E + S)."""
    x_TD = parts.jitter(tokens.x_TD, tokens.key, cfg.options.jitter)
    if "input_scale" in params:
        x_TD = x_TD.astype(jnp.promote_types(x_TD.dtype, jnp.float32))
        x_TD = x_TD * jax.lax.rsqrt((x_TD**2).mean(axis=-1, keepdims=True) + 1e-6)
        x_TD = x_TD * params["input_scale"].astype(x_TD.dtype)[None] * cfg.d_model**-0.5
    return parts.logits(params, x_TD)


def weigh(params, scores_TE, shared_TS, chosen_TKE, cfg: RouterConfig):
    """weights_TK of the chosen experts and, if the shared ones are normalised with them, weights of those."""
    o = cfg.options
    weights_TK = parts.pick(scores_TE, chosen_TKE)
    if o.normalize_with_shared:
        shared_TS = shared_TS * chosen_TKE.max(axis=(1, 2))[:, None]  # none for padding
        both_T1 = parts.p_norm(jnp.concatenate([weights_TK, shared_TS], axis=-1), 1.0)
        factor = o.routed_scaling * params["scale"].astype(weights_TK.dtype)[0]
        return factor * parts.divided(weights_TK, both_T1), factor * parts.divided(
            shared_TS, both_T1
        )
    if o.normalize_weights:
        weights_TK = parts.divided(weights_TK, parts.p_norm(weights_TK, o.norm_power))
    weights_TK = weights_TK * o.routed_scaling
    if "expert_scale" in params:
        scale_E = params["expert_scale"].astype(weights_TK.dtype)
        weights_TK = weights_TK * parts.pick(scale_E[None], chosen_TKE)
    return weights_TK, None


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """g_i = s_i of the K largest s_i + b_i (2412.19437 eq. 13-16); see `Router.route`."""
    options = cfg.options
    all_TN = all_logits(params, tokens, cfg)
    logits_TE, shared_TS = all_TN[:, : cfg.num_experts], all_TN[:, cfg.num_experts :]
    scores_TE = parts.score(logits_TE, options.score)

    choice_TE = logits_TE if options.select_by == "logit" else scores_TE
    if "expert_bias" in state:
        bias_1E = state["expert_bias"].astype(choice_TE.dtype)[None]
        choice_TE = choice_TE * bias_1E if options.bias_multiplies else choice_TE + bias_1E
    ranked_TE = None if choice_TE is scores_TE else jax.lax.stop_gradient(choice_TE)
    choice_TE = limit_groups(parts.bar(choice_TE, tokens), options)
    index_TK = parts.select(choice_TE, tokens, cfg.experts_per_token)
    chosen_TKE = parts.chosen(index_TK, cfg.num_experts, scores_TE.dtype)
    shared_TS = parts.score(shared_TS, options.score)
    weights_TK, shared_TS = weigh(params, scores_TE, shared_TS, chosen_TKE, cfg)

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
    return Routed(
        Routing(index_TK, weights_TK),
        losses,
        stats,
        scores_TE,
        shared_TS=shared_TS,
        choice_TN=ranked_TE,
        logits_TE=logits_TE,
    )


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
    out.need(
        not o.bias_multiplies or (o.expert_bias and o.select_by == "score"),
        f"{key}bias_multiplies=True needs {key}expert_bias=True and {key}select_by='score'",
    )
    if o.normalize_with_shared:
        out.need(
            cfg.shared_experts >= 1,
            f"{key}normalize_with_shared=True needs {prefix}shared_experts >= 1, not {cfg.shared_experts}",
        )
        out.need(
            o.score != "softmax",
            f"{key}normalize_with_shared=True sums scores of their own: {key}score='sigmoid' or "
            "'sqrt_softplus' would work",
        )
        out.need(
            not o.normalize_weights and not o.expert_scale,
            f"{key}normalize_with_shared=True has its own weights: set {key}normalize_weights=False and "
            f"{key}expert_scale=False",
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
    param_specs=param_specs,
    init_state=init_state,
    update=update,
    linear_losses=linear_losses,
    weighs_inputs=lambda cfg: cfg.options.weigh_inputs,
    balance=tuple(f.name for f in dataclasses.fields(balance.BalanceConfig)),
    problems=problems,
)
