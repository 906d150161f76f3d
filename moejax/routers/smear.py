"""SMEAR (2306.03745): each sequence has one FFN, the experts' parameters averaged by its gate.

The gate of a sequence is softmax(R mean_t(h_t)) over the experts, the mean over its tokens; theta = sum_e g_e
theta_e, and every token of the sequence goes through FFN(.; theta) (section 3). A token costs one expert, and
a sequence besides E multiply-adds for each parameter of one, which `plan` does not count.

Not causal: the gate reads the whole sequence. Nothing is chosen, so nothing needs to be balanced. No state and
no loss. The paper claims to beat routers with estimated gradients, and to specialise.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.routers import parts
from moejax.routers.contract import (
    MergeRouting,
    Routed,
    Router,
    RouterConfig,
    RouterOptions,
    Tokens,
)


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    """It has none."""


def mean_states(tokens: Tokens, size: int) -> tuple[jax.Array, jax.Array]:
    """The mean hidden state (float32) of the tokens of each group of `size`, 0 if there are none, and their
    number."""
    if tokens.forced_TK is not None:
        raise ValueError("merged experts cannot be forced to the routes of tokens")
    parts.refuse_barred(tokens, "merged experts are weighed by all gates")
    dtype = jnp.promote_types(tokens.x_TD.dtype, jnp.float32)
    mask_Gt = tokens.mask_T.reshape(-1, size)
    x_GtD = tokens.x_TD.astype(dtype).reshape(*mask_Gt.shape, -1)
    count_G = mask_Gt.sum(axis=1)
    sum_GD = jnp.where(mask_Gt[..., None] > 0, x_GtD, 0).sum(axis=1)
    return sum_GD / jnp.maximum(count_G, 1.0)[:, None], count_G


def merged(params: dict, states_GD: jax.Array, count_G: jax.Array) -> Routed:
    """Groups of `count_G` tokens, merged by the gates of these states. The load sums gates over tokens."""
    gates_GE = jax.nn.softmax(parts.logits(params, states_GD), axis=1)
    weights_GE = jnp.where(count_G[:, None] > 0, gates_GE, 0)
    load_E = jax.lax.stop_gradient((count_G[:, None] * weights_GE).sum(axis=0))
    return Routed(MergeRouting(weights_GE), {}, {"load": load_E})


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state, cfg
    return merged(params, *mean_states(tokens, tokens.seq_len))


ROUTER = Router(
    options=Options(),
    source="SMEAR, 2306.03745",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 1),),  # which nothing reads: a token costs one expert
    route=route,
    form="merge",
    causal=False,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    linear_losses=lambda cfg: True,
    experts_used=lambda cfg: 1.0,
)
