"""Expert choice (2202.09368): each expert takes its C best tokens. Balanced by construction, not causal.

S = softmax over experts; expert e takes the C = ceil(capacity_factor * T * K / E) tokens with the
largest S[:, e]; weights are those scores (eq. 1-2). Which token an expert takes depends on later tokens
of the batch, so a language model trained this way cannot generate; `Router.causal` says so.
"""

import math

import jax
import jax.numpy as jnp

from moejax.config import MoEConfig
from moejax.moe import balance
from moejax.moe.routers import token_choice
from moejax.moe.routing import Router, RouterOutput, SlotRouting


def route(
    params,
    state,
    x_TD,
    cfg: MoEConfig,
    *,
    seq_len,
    key=None,
    mask_T=None,
    token_ids_T=None,
    replay_TK=None,
    totals=None,
) -> RouterOutput:
    """See `moejax.moe.routing.Router.route`. Padding tokens are taken last and weigh nothing."""
    del state, key, token_ids_T
    if replay_TK is not None:
        raise ValueError(
            "expert_choice cannot replay token-choice routes: use router='token_choice'"
        )
    logits_TE = token_choice.logits(params, x_TD)
    dtype = logits_TE.dtype
    scores_TE = jax.nn.softmax(logits_TE, axis=-1)
    num_tokens = x_TD.shape[0]
    if mask_T is None:
        mask_T = jnp.ones((num_tokens,), dtype)
    mask_T = (mask_T > 0).astype(dtype)
    wanted = cfg.capacity_factor * num_tokens * cfg.experts_per_token / cfg.num_experts
    capacity = min(num_tokens, math.ceil(wanted))
    weights_EC, index_EC = jax.lax.top_k((scores_TE * mask_T[:, None]).T, capacity)
    taken_EC = mask_T[index_EC] > 0
    index_EC = jnp.where(taken_EC, index_EC, -1).astype(jnp.int32)
    weights_EC = jnp.where(taken_EC, weights_EC, 0) * cfg.routed_scaling
    load_E = taken_EC.astype(dtype).sum(axis=1)
    losses = {}
    if cfg.z_loss:
        n = mask_T.sum() if totals is None else totals.num_tokens
        losses["z"] = cfg.z_loss * balance.router_z(logits_TE, mask_T, n)
    token_EC = jnp.where(taken_EC, index_EC, num_tokens)
    taken_TE = jnp.zeros((num_tokens, cfg.num_experts), dtype)
    taken_TE = taken_TE.at[token_EC, jnp.arange(cfg.num_experts)[:, None]].set(1, mode="drop")
    reached_TG = taken_TE.reshape(num_tokens, cfg.balance_groups, -1).max(axis=-1)
    group_load_G = reached_TG.sum(axis=0)
    return RouterOutput(SlotRouting(index_EC, weights_EC), scores_TE, losses, load_E, group_load_G)


ROUTER = Router(
    token_choice.param_specs,
    lambda cfg: {},
    route,
    lambda state, load_E, cfg: state,
    causal=False,
    form="slot",
    linear_losses=lambda cfg: True,
)
