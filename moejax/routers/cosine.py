"""X-MoE: cosine scores in a space of few dimensions.

    s_i = cos(W x, e_i) / tau                                                          (section 3.2)
    g = softmax(s) of the K largest

W maps to E/2 dimensions, each expert has a unit vector e_i there, and tau is learned. Lengths then play no
part, so hidden states need not gather around experts' embeddings, which the paper calls representation
collapse. Each token is routed by itself: causal. No state. The paper claims better transfer and steadier routes
than with dot products. Where tau starts, and its least value, are those of the authors' library (Tutel).
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.options import choice, number
from moejax.params import ParamSpec
from moejax.routers import parts, token_choice
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    dim: int = number(0, least=0)  # dimensions that are compared; 0: half the number of experts
    temperature: float = number(0.5, above=0)  # tau at first
    least_temperature: float = number(0.01, above=0)  # tau stays above this
    score: str = choice("softmax", "sigmoid")  # of the weights, from s


def param_specs(cfg: RouterConfig) -> dict:
    dim = cfg.options.dim or max(cfg.num_experts // 2, 2)
    return {
        "kernel": parts.kernel_spec(cfg, dim),
        "embedding": ParamSpec((dim, cfg.num_experts), (None, None), std=1.0, role="router"),
        # The factor on 1 / tau, as a logarithm.
        "log_scale": ParamSpec((1,), (None,), init="zeros"),
    }


def logits(params: dict, x_TD: jax.Array, options: Options) -> jax.Array:
    small_TC = parts.unit(parts.logits({"kernel": params["kernel"]}, x_TD), axis=1)
    embedding_CE = parts.unit(params["embedding"].astype(small_TC.dtype), axis=0)
    cosine_TE = jnp.dot(small_TC, embedding_CE, precision=jax.lax.Precision.HIGHEST)
    log_scale = params["log_scale"].astype(small_TC.dtype)[0] - math.log(options.temperature)
    return cosine_TE * jnp.exp(jnp.minimum(log_scale, -math.log(options.least_temperature)))


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state
    logits_TE = logits(params, tokens.x_TD, cfg.options)
    scores_TE = parts.score(logits_TE, cfg.options.score)
    index_TK = parts.select(logits_TE, tokens, cfg.experts_per_token)
    weights_TK, routes_TE = parts.weigh(index_TK, scores_TE)
    stats = parts.token_stats(routes_TE, scores_TE, tokens, cfg)
    losses = parts.token_losses(
        logits_TE,
        scores_TE,
        routes_TE,
        stats,
        tokens,
        cfg,
        normalized=cfg.options.score == "softmax",
    )
    return Routed(Routing(index_TK, weights_TK), losses, stats, scores_TE, logits_TE=logits_TE)


ROUTER = Router(
    options=Options(),
    source="X-MoE, 2204.09179",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 1), ("objective.expert_loss", 0.01)),
    route=route,
    form="token",
    causal=True,
    param_specs=param_specs,
    linear_losses=token_choice.linear_losses,
    balance=(*parts.TOKEN_LOSSES, "balance_groups"),
)
