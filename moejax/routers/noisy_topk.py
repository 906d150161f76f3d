"""Noisy top-k gating: noise of a learned size on the logits, and losses on the spread of importance and load.

    H_i = (W_g x)_i + N(0, 1) softplus((W_n x)_i)                                      (eq. 4)
    g = softmax(the K largest of H)                                                    (eq. 3, 5)
    importance_i = sum over tokens of g_i                                              (eq. 6)
    load_i = sum over tokens of Phi(((W_g x)_i - m_i) / softplus((W_n x)_i))            (eq. 8-10)
    m_i = the Kth largest H of the other experts

Losses: w CV(importance)^2 and w CV(load)^2 (eq. 7, 11), CV the standard deviation over experts divided by the
mean; load is a smooth count of tokens, so that gradients can move it. Noise is drawn in training only. Each
token is routed by itself: causal. No state. W_n starts at zero as in the paper (W_g, too, there). The paper
claims that the noise helps load balancing, and that either loss alone does almost as well as both.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.scipy.stats import norm

from moejax import axes
from moejax.options import Problems, number
from moejax.params import ParamSpec
from moejax.routers import balance, parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    importance_loss: float = number(0.1, least=0)  # coefficient of CV(importance)^2; 0: off
    load_loss: float = number(0.1, least=0)  # coefficient of CV(load)^2; 0: off


def param_specs(cfg: RouterConfig) -> dict:
    noise = ParamSpec((cfg.d_model, cfg.num_experts), (axes.EMBED, None), init="zeros")
    return {"kernel": parts.kernel_spec(cfg), "noise": noise}


def smooth_load(clean_TE, noisy_TE, deviation_TE, experts_per_token: int) -> jax.Array:
    """P_TE: the chance that an expert is among the K largest if its noise alone is drawn again (eq. 8-9)."""
    best_TK = jax.lax.top_k(noisy_TE, experts_per_token + 1)[0]
    last_T1, next_T1 = best_TK[:, -2:-1], best_TK[:, -1:]
    others_TE = jnp.where(noisy_TE >= last_T1, next_T1, last_T1)
    return norm.cdf((clean_TE - others_TE) / deviation_TE)


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state
    o, num_tokens = cfg.options, tokens.totals.num_tokens
    clean_TE = parts.logits(params, tokens.x_TD)
    deviation_TE = jax.nn.softplus(parts.logits({"kernel": params["noise"]}, tokens.x_TD))
    noisy_TE = clean_TE
    if tokens.key is not None:
        noise_TE = jax.random.normal(tokens.key, clean_TE.shape, clean_TE.dtype)
        noisy_TE = clean_TE + noise_TE * deviation_TE
    index_TK = parts.select(noisy_TE, tokens, cfg.experts_per_token)
    chosen_TKE = parts.chosen(index_TK, cfg.num_experts, clean_TE.dtype)
    filled_TK = chosen_TKE.max(axis=-1)  # none for padding
    picked_TK = jnp.where(filled_TK > 0, parts.pick(noisy_TE, chosen_TKE), -1e30)
    weights_TK = jax.nn.softmax(picked_TK, axis=-1) * filled_TK
    scores_TE = jax.nn.softmax(clean_TE, axis=-1)
    stats = parts.plain_stats(chosen_TKE.sum(axis=1), scores_TE, tokens)
    spreads = {"importance": (o.importance_loss, (chosen_TKE * weights_TK[..., None]).sum((0, 1)))}
    if o.load_loss:
        chance_TE = smooth_load(clean_TE, noisy_TE, deviation_TE, cfg.experts_per_token)
        spreads["smooth_load"] = o.load_loss, (chance_TE * tokens.mask_T[:, None]).sum(axis=0)
    stats |= {name: jax.lax.stop_gradient(sum_E) for name, (_, sum_E) in spreads.items()}
    share = tokens.mask_T.sum() / jnp.maximum(num_tokens, 1.0)
    losses = {
        name: coefficient
        * balance.share(balance.squared_cv, sum_E, tokens.total(stats, name), share)
        for name, (coefficient, sum_E) in spreads.items()
        if coefficient
    }
    losses |= parts.z_loss(clean_TE, tokens, cfg)
    return Routed(Routing(index_TK, weights_TK), losses, stats, scores_TE, logits_TE=clean_TE)


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    out = Problems()
    out.need(
        not cfg.options.load_loss or cfg.experts_per_token < cfg.num_experts,
        f"{prefix}router.load_loss needs {prefix}experts_per_token < {prefix}num_experts={cfg.num_experts}",
    )
    return out


ROUTER = Router(
    options=Options(),
    source="Sparsely-Gated Mixture-of-Experts, 1701.06538",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 4),),
    route=route,
    form="token",
    causal=True,
    param_specs=param_specs,
    linear_losses=lambda cfg: not (cfg.options.importance_loss or cfg.options.load_loss),
    balance=("z_loss",),
    problems=problems,
)
