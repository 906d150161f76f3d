"""SparseMixer (GRIN, Phi-3.5-MoE): experts are sampled in training, with Heun's estimate of the gradient.

K times, among the experts not yet chosen, with logits z = W x:

    masked_i: (max z - z_i) / max(|z_i|, max z) > 2 r;   p = softmax of the logits that are not masked
    i ~ p in training, else the largest;   y = sum over K of p_i E_i(x)                (2409.12136 section 2)

In training a sampled expert that is not the largest weighs p_i / 3, in one case of four p_i (Heun's third-order
method, 2310.00811 eq. 8); the gradient is that of p_i in each case, so that on average it also holds for the
choice. Each token is routed by itself: causal. No state. The paper claims better models than with gradients
that leave out the choice. For more than two experts the same step is repeated; the papers have K = 2.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import parts, token_choice
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    jitter: float = number(0.01, least=0)  # r: logits nearer than 2 r to the largest can be chosen


def choose(logits_TE, taken_TE, forced_T, key, jitter: float) -> tuple[jax.Array, jax.Array]:
    """One expert for each token, and its weight, among those not `taken_TE`: index_T, weights_T; -1 and 0 where
    all are.

    `key`: None takes the largest; `forced_T`: None, or the experts to take.
    """
    num_experts = logits_TE.shape[1]
    free_TE = jnp.where(taken_TE, -jnp.inf, jax.lax.stop_gradient(logits_TE))
    best_T1 = free_TE.max(axis=1, keepdims=True)
    scale_TE = jnp.maximum(jnp.abs(jax.lax.stop_gradient(logits_TE)), best_T1)
    masked_TE = taken_TE | (best_T1 - jax.lax.stop_gradient(logits_TE) > 2 * jitter * scale_TE)
    largest_T = free_TE.argmax(axis=1)
    index_T, draw = largest_T, None
    if forced_T is not None:
        index_T = forced_T
    elif key is not None:
        draw, heun = jax.random.split(key)
        noise_TE = jax.random.gumbel(draw, logits_TE.shape, logits_TE.dtype)
        index_T = jnp.where(masked_TE, -jnp.inf, free_TE + noise_TE).argmax(axis=1)
    if forced_T is None:
        index_T = jnp.where(best_T1[:, 0] > -jnp.inf, index_T, -1)
    chosen_TE = jax.nn.one_hot(index_T, num_experts, dtype=logits_TE.dtype)
    among_TE = (
        ~masked_TE | (chosen_TE > 0) | (best_T1 == -jnp.inf)
    )  # a sum over none has no gradient
    p_TE = jax.nn.softmax(logits_TE, axis=1, where=among_TE)
    weights_T = jnp.where(chosen_TE > 0, p_TE, 0).sum(axis=1)
    if draw is not None:
        whole_T = (index_T == largest_T) | (jax.random.uniform(heun, index_T.shape) > 0.75)
        less_T = jnp.where(whole_T, 0.0, -2 / 3).astype(weights_T.dtype)
        weights_T = weights_T + jax.lax.stop_gradient(less_T * weights_T)
    return index_T, weights_T


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state
    k, forced_TK = cfg.experts_per_token, tokens.forced_TK
    logits_TE = parts.logits(params, tokens.x_TD)
    scores_TE = jax.nn.softmax(logits_TE, axis=-1)
    keys = [None] * k if tokens.key is None else list(jax.random.split(tokens.key, k))
    taken_TE, index, weights = jnp.zeros(logits_TE.shape, bool), [], []
    if forced_TK is None and tokens.barred_TE is not None:
        taken_TE = taken_TE | tokens.barred_TE
    for i, key in enumerate(keys):
        forced_T = None if forced_TK is None else forced_TK[:, i]
        index_T, weights_T = choose(logits_TE, taken_TE, forced_T, key, cfg.options.jitter)
        taken_TE = taken_TE | (jax.nn.one_hot(index_T, cfg.num_experts) > 0)
        index, weights = [*index, index_T], [*weights, weights_T]
    index_TK = jnp.where(tokens.mask_T[:, None] > 0, jnp.stack(index, axis=1), -1).astype(jnp.int32)
    weights_TK = jnp.where(index_TK >= 0, jnp.stack(weights, axis=1), 0)
    routes_TE = parts.chosen(index_TK, cfg.num_experts, scores_TE.dtype).sum(axis=1)
    stats = parts.token_stats(routes_TE, scores_TE, tokens, cfg)
    losses = parts.token_losses(
        logits_TE,
        scores_TE,
        routes_TE,
        stats,
        tokens,
        cfg,
        normalized=True,
    )
    return Routed(Routing(index_TK, weights_TK), losses, stats, scores_TE, logits_TE=logits_TE)


ROUTER = Router(
    options=Options(),
    source="GRIN, 2409.12136",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 2), ("objective.expert_loss", 0.001)),
    route=route,
    form="token",
    causal=True,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    linear_losses=token_choice.linear_losses,
    balance=(*parts.TOKEN_LOSSES, "balance_groups"),
)
