"""Expert threshold (2603.11535): an expert takes every token that scores above the expert's threshold.

    r_te = sigmoid(x_t W)_e;  y_t = sum_{e: r_te > c_e} r_te FFN_e(x_t)
    c_e = moving average over steps of the score that a share K/E of the step's tokens exceeds

So an expert has its share of tokens on average, as in expert choice, but a token's route depends on no
other token: causal. State: the thresholds, moved after each step by what the step counted; no loss. Each
expert counts its scores in `bins` equal bins of (0, 1), which micro-batches and devices add up; within a
bin the quantile is interpolated, so a threshold is exact to 1/bins. The paper starts with thousands of
steps of expert choice. Here the average is corrected for its start and so holds from the second step on;
before the first one each token takes its K best. The paper's limits on the load of an expert in training
are left out: nothing is dropped. It claims a lower loss than token choice at the same mean number of
experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import parts, picks
from moejax.routers.contract import Routed, Router, RouterConfig, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(picks.VariableOptions):
    decay: float = number(0.99, least=0, below=1)  # of the moving average, per step
    bins: int = number(1024, least=2)  # resolution of the scores that are counted


def init_state(cfg: RouterConfig, layer: int) -> dict:
    """The average before it is divided by its `weight`, which tells how much of it has been seen."""
    del layer
    return {"average": jnp.zeros((cfg.num_experts,), jnp.float32), "weight": jnp.zeros(())}


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`. Of more than `max_experts` experts a token takes those it scores highest with."""
    experts, bins = cfg.num_experts, cfg.options.bins
    logits_TE = parts.logits(params, tokens.x_TD)
    scores_TE = jax.nn.sigmoid(logits_TE)
    threshold_E = state["average"] / jnp.maximum(state["weight"], 1e-6)
    kth_T1 = jax.lax.top_k(parts.bar(scores_TE, tokens), cfg.experts_per_token)[0][:, -1:]
    open_TE = jnp.where(state["weight"] > 0, scores_TE > threshold_E[None], scores_TE >= kth_T1)
    index_TK = parts.select(scores_TE, tokens, picks.most_experts(cfg), open_TE)
    weights_TK, routes_TE = parts.weigh(index_TK, scores_TE)
    bin_TE = jnp.clip((jax.lax.stop_gradient(scores_TE) * bins).astype(jnp.int32), 0, bins - 1)
    counts = jnp.broadcast_to(tokens.mask_T[:, None], bin_TE.shape)
    stats = parts.plain_stats(routes_TE, scores_TE, tokens)
    stats["score_counts"] = (
        jnp.zeros((experts, bins), counts.dtype).at[jnp.arange(experts)[None], bin_TE].add(counts)
    )
    losses = parts.z_loss(logits_TE, tokens, cfg)
    return Routed(Routing(index_TK, weights_TK), losses, stats, scores_TE, logits_TE=logits_TE)


def upper_quantile(counts_EB: jax.Array, share: float) -> jax.Array:
    """The score in (0, 1) that a share of each expert's counted scores exceeds; B equal bins of it."""
    bins = counts_EB.shape[1]
    # above_EB[b]: scores in bin b and higher; the quantile lies in the last bin where they are enough.
    above_EB = jnp.flip(jnp.cumsum(jnp.flip(counts_EB, axis=1), axis=1), axis=1)
    wanted_E = share * above_EB[:, 0]
    bin_E = jnp.maximum((above_EB >= wanted_E[:, None]).sum(axis=1) - 1, 0)
    pick = lambda a_EB: jnp.take_along_axis(a_EB, bin_E[:, None], axis=1)[:, 0]  # noqa: E731
    within_E = (pick(above_EB) - wanted_E) / jnp.maximum(pick(counts_EB), 1.0)
    return (bin_E + within_E) / bins


def update(state: dict, stats: dict, cfg: RouterConfig) -> dict:
    counts_EB, decay = stats["score_counts"], cfg.options.decay
    quantile_E = upper_quantile(counts_EB, cfg.experts_per_token / cfg.num_experts)
    new = {
        "average": decay * state["average"] + (1 - decay) * quantile_E,
        "weight": decay * state["weight"] + (1 - decay),
    }
    return jax.tree.map(lambda a, b: jnp.where(counts_EB.sum() > 0, a, b), new, state)


ROUTER = Router(
    options=Options(),
    source="Expert Threshold, 2603.11535",
    about=__doc__ or "",
    route=route,
    form="token",
    causal=True,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    init_state=init_state,
    update=update,
    linear_losses=lambda cfg: True,
    routes_per_token=picks.most_experts,
    balance=("z_loss",),
    problems=picks.most_experts_problems,
)
