"""Expert choice (2202.09368): each expert takes its C best tokens. Balanced by construction, not causal.

S = softmax over experts; expert e takes the C = ceil(capacity_factor * T * K / E) tokens with the
largest S[:, e]; weights are those scores (eq. 1-2). Which token an expert takes depends on later tokens
of the batch, so a language model trained this way cannot generate; `Router.causal` says so.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import parts
from moejax.routers.contract import (
    Routed,
    Router,
    RouterConfig,
    RouterOptions,
    SlotRouting,
    Tokens,
)


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    capacity_factor: float = number(1.25, above=0)  # tokens of an expert, as a multiple of T K / E
    routed_scaling: float = number(1.0, above=0)  # multiply the weights
    router_bias: bool = False  # bias on the logits, learned by gradient


def capacity(num_tokens: int, cfg: RouterConfig) -> int:
    """C, at most T."""
    wanted = cfg.options.capacity_factor * num_tokens * cfg.experts_per_token / cfg.num_experts
    return min(num_tokens, math.ceil(wanted))


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`. Padding tokens are taken last and weigh nothing."""
    del state
    if tokens.forced_TK is not None:
        raise ValueError("expert_choice fills slots: it cannot be forced to the routes of tokens")
    parts.refuse_barred(tokens, "expert_choice fills slots")
    logits_TE = parts.logits(params, tokens.x_TD)
    dtype, num_tokens = logits_TE.dtype, tokens.x_TD.shape[0]
    scores_TE = jax.nn.softmax(logits_TE, axis=-1)
    mask_T = tokens.mask_T
    best = jax.lax.top_k((scores_TE * mask_T[:, None]).T, capacity(num_tokens, cfg))
    weights_EC, index_EC = best
    taken_EC = mask_T[index_EC] > 0
    index_EC = jnp.where(taken_EC, index_EC, -1).astype(jnp.int32)
    weights_EC = jnp.where(taken_EC, weights_EC, 0) * cfg.options.routed_scaling
    stats = {
        "load": taken_EC.astype(dtype).sum(axis=1),
        "score_entropy": parts.entropy_sum(scores_TE, mask_T),
    }
    losses = parts.z_loss(logits_TE, tokens, cfg)
    return Routed(SlotRouting(index_EC, weights_EC), losses, stats, scores_TE, logits_TE=logits_TE)


ROUTER = Router(
    options=Options(),
    source="Expert Choice, 2202.09368",
    about=__doc__ or "",
    route=route,
    form="slot",
    causal=False,
    param_specs=parts.linear_specs,
    linear_losses=lambda cfg: True,
    experts_used=lambda cfg: cfg.options.capacity_factor * cfg.experts_per_token,
    balance=("z_loss",),
)
