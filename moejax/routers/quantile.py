"""Quantile balancing: each expert's bar is set where its fair share of the tokens clears it.

    i in the K largest s_i - b_i,   g_i = s_i / sum of the chosen s,   s = sigmoid(W x)
    a_t = the (K+1)th largest of s_t - b                               what a choice of token t has to beat
    q_i = the (T K / E + 1)th largest of s_ti - a_t over tokens,   b_i = d b_i + (1 - d) q_i

q solves one side of the balanced assignment exactly, so no rate is to be tuned. It is counted in a histogram,
which adds up over devices and micro-batches: between -1 and 2 with `bins` equal bins, and linear inside a bin,
so q is exact to 3 / bins. b is kept at a mean of zero, which moves no choice. Each token is routed by itself:
causal. State: b. The author claims balance within few steps at any batch size. (Formulas as in the author's
posts, kexue.fm 11619 and 11626; the moving average as in Megatron.)
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import Problems, choice, number
from moejax.routers import parts, token_choice
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens

LEAST, MOST = -1.0, 2.0


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    score: str = choice("sigmoid", "softmax")  # s, from the logits
    normalize_weights: bool = True  # divide the K chosen weights by their sum
    routed_scaling: float = number(1.0, above=0)  # multiply the weights
    decay: float = number(0.9, least=0, below=1)  # d, of the moving average; 0: none
    bins: int = number(1024, least=2)  # of the histogram of what an expert's tokens have to spare


def margins(choice_TE: jax.Array, scores_TE: jax.Array, experts_per_token: int) -> jax.Array:
    """s_ti - a_t."""
    next_T1 = jax.lax.top_k(choice_TE, experts_per_token + 1)[0][:, -1:]
    return scores_TE - next_T1


def histogram(margins_TE: jax.Array, mask_T: jax.Array, bins: int) -> jax.Array:
    """Tokens of each expert in each bin, [E, bins]."""
    num_experts = margins_TE.shape[1]
    at_TE = jnp.floor((margins_TE - LEAST) * (bins / (MOST - LEAST))).astype(jnp.int32)
    at_TE = jnp.clip(at_TE, 0, bins - 1) + bins * jnp.arange(num_experts, dtype=jnp.int32)[None]
    ones_TE = jnp.broadcast_to(mask_T[:, None], margins_TE.shape)
    flat = jnp.zeros((num_experts * bins,), mask_T.dtype).at[at_TE].add(ones_TE)
    return flat.reshape(num_experts, bins)


def quantiles(counts_Eb: jax.Array, above: jax.Array) -> jax.Array:
    """For each expert the value that `above` of its tokens exceed, linear inside a bin."""
    bins = counts_Eb.shape[1]
    more_Eb = jnp.pad(jnp.cumsum(counts_Eb[:, ::-1], axis=1), ((0, 0), (1, 0)))
    edges_b = jnp.linspace(MOST, LEAST, bins + 1, dtype=counts_Eb.dtype)
    return jax.vmap(lambda more_b: jnp.interp(above, more_b, edges_b))(more_Eb)


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    o = cfg.options
    logits_TE = parts.logits(params, tokens.x_TD)
    scores_TE = parts.score(logits_TE, o.score)
    choice_TE = scores_TE - state["bar"].astype(scores_TE.dtype)[None]
    index_TK = parts.select(choice_TE, tokens, cfg.experts_per_token)
    weights_TK, routes_TE = parts.weigh(index_TK, scores_TE)
    if o.normalize_weights:
        weights_TK = parts.normalized(weights_TK)
    stats = parts.token_stats(routes_TE, scores_TE, tokens, cfg)
    spare_TE = jax.lax.stop_gradient(margins(choice_TE, scores_TE, cfg.experts_per_token))
    stats["margins"] = histogram(spare_TE, tokens.mask_T, o.bins)
    losses = parts.token_losses(
        logits_TE,
        scores_TE,
        routes_TE,
        stats,
        tokens,
        cfg,
        normalized=o.score == "softmax",
    )
    return Routed(
        Routing(index_TK, weights_TK * o.routed_scaling),
        losses,
        stats,
        scores_TE,
        choice_TN=jax.lax.stop_gradient(choice_TE),
        logits_TE=logits_TE,
    )


def update(state: dict, stats: dict, cfg: RouterConfig) -> dict:
    counts_Eb = stats["margins"]
    num_tokens = counts_Eb[0].sum()
    share = num_tokens * cfg.experts_per_token / cfg.num_experts
    new_E = cfg.options.decay * state["bar"]
    new_E = new_E + (1 - cfg.options.decay) * quantiles(counts_Eb, share)
    return {"bar": jnp.where(num_tokens > 0, new_E - new_E.mean(), state["bar"])}


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    out = Problems()
    out.need(
        cfg.experts_per_token < cfg.num_experts,
        f"{prefix}experts_per_token={cfg.experts_per_token} must be below {prefix}num_experts="
        f"{cfg.num_experts}: the next best expert sets the bar",
    )
    return out


ROUTER = Router(
    options=Options(),
    source="Quantile balancing, kexue.fm 11619",
    about=__doc__ or "",
    route=route,
    form="token",
    causal=True,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    init_state=lambda cfg, layer: {"bar": jnp.zeros((cfg.num_experts,), jnp.float32)},
    update=update,
    linear_losses=token_choice.linear_losses,
    balance=(*parts.TOKEN_LOSSES, "balance_groups"),
    problems=problems,
)
