"""DynMoE (2405.14297): an expert takes a token whose cosine with it passes the expert's own, learned
threshold.

    s_te = cos(x_t, w_e);  e is open where sigmoid(s_te) > sigmoid(theta_e)
    y_t = mean of FFN_e(x_t) over the token's open experts
    loss = diversity ||W^T W - 1||_F (unit columns) + simplicity mean_e ||w_e||

Every open expert weighs the same; the gradient passes the step as if it were sigmoid(s) - sigmoid(theta)
(straight through). Formulas as in the authors' code. A token that no expert takes goes to the one with the
largest cosine: the paper does so at test time, and in training leaves it out and adds an expert when there
are many of them. The number of experts is fixed here, so training falls back, too. Causal: a token is
compared with experts, not with tokens. No state. The paper claims the quality of the best fixed K without a
search for it.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.params import ParamSpec
from moejax.routers import parts, picks
from moejax.routers.contract import Routed, Router, RouterConfig, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(picks.VariableOptions):
    diversity_loss: float = number(0.01, least=0)  # keeps the experts' directions apart
    simplicity_loss: float = number(0.01, least=0)  # keeps their vectors short


def param_specs(cfg: RouterConfig) -> dict:
    return {
        "kernel": parts.kernel_spec(cfg),
        "threshold": ParamSpec((cfg.num_experts,), (None,), init="zeros"),
    }


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`. Of too many open experts those with the largest margin are computed."""
    del state
    dtype = jnp.promote_types(tokens.x_TD.dtype, jnp.float32)
    kernel_DE, theta_E = (params[k].astype(dtype) for k in ("kernel", "threshold"))
    unit_DE = parts.unit(kernel_DE, 0)
    cosine_TE = parts.logits({"kernel": unit_DE}, parts.unit(tokens.x_TD.astype(dtype), 1))
    scores_TE = jax.nn.sigmoid(cosine_TE)
    margin_TE = scores_TE - jax.nn.sigmoid(theta_E)[None]
    nearest_TE = jax.nn.one_hot(
        parts.bar(cosine_TE, tokens).argmax(axis=1), cfg.num_experts, dtype=jnp.bool_
    )
    open_TE = parts.bar(margin_TE, tokens) > 0
    open_TE = jnp.where(open_TE.any(axis=1, keepdims=True), open_TE, nearest_TE)
    index_TK = parts.select(margin_TE, tokens, picks.most_experts(cfg), open_TE)
    # 1 in value, the margin in gradient.
    one_TE = 1.0 + margin_TE - jax.lax.stop_gradient(margin_TE)
    weights_TK, routes_TE = parts.weigh(index_TK, one_TE)
    weights_TK = weights_TK / jnp.maximum(routes_TE.sum(axis=1, keepdims=True), 1.0)

    losses, options = {}, cfg.options
    # The losses are about parameters alone: each token brings its share of them.
    share = tokens.mask_T.sum() / jnp.maximum(tokens.totals.num_tokens, 1.0)
    if options.diversity_loss:
        alike_EE = jnp.dot(unit_DE.T, unit_DE, precision=jax.lax.Precision.HIGHEST)
        square = ((alike_EE - jnp.eye(cfg.num_experts, dtype=dtype)) ** 2).sum()
        losses["diversity"] = options.diversity_loss * share * jnp.sqrt(square + 1e-12)
    if options.simplicity_loss:
        norm_E = jnp.sqrt((kernel_DE**2).sum(axis=0) + 1e-12)
        losses["simplicity"] = options.simplicity_loss * share * norm_E.mean()
    stats = parts.plain_stats(routes_TE, scores_TE, tokens)
    return Routed(Routing(index_TK, weights_TK), losses, stats, scores_TE, logits_TE=cosine_TE)


ROUTER = Router(
    options=Options(),
    source="DynMoE, 2405.14297",
    about=__doc__ or "",
    route=route,
    form="token",
    causal=True,
    param_specs=param_specs,
    linear_losses=lambda cfg: True,
    routes_per_token=picks.most_experts,
    problems=picks.most_experts_problems,
)
