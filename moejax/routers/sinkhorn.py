"""S-BASE (2202.01169): in training experts are chosen by a balanced transport plan instead of by the scores.

The plan is exp(z_te) u_t v_e with rows that sum to 1 and columns that sum to T / E, found by Sinkhorn's
iteration; a token takes the K largest entries of its row. Weights come from the plain logits: sigmoid(z_te)
for K = 1, softmax over all experts, not normalised again, for more. Evaluation and generation take the K
largest logits. (Weights and stopping as in Megatron-LM's code.)

Rows need no scaling, since they are only ranked: what training adds is one number log v_e to each expert's
logits. The plan is balanced; what is rounded from it is so nearly.

Not causal in training, where v depends on every token of the micro-batch; causal in evaluation. No state and
no loss. The paper claims that S-BASE scales as well as routing by reinforcement learning or hashing, or
better.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    tolerance: float = number(1e-3, above=0)  # of an expert's mass in the plan, relative to T / E
    iterations: int = number(100, least=1)  # at most


def balance_logits(
    logits_TE: jax.Array, mask_T: jax.Array, tolerance: float, iterations: int
) -> jax.Array:
    """log v_E: exp(logits + log v), its rows normalised, gives every expert the same mass of tokens, within
    `tolerance` or after `iterations`."""
    num_experts = logits_TE.shape[1]
    logits_TE = jnp.nan_to_num(jax.lax.stop_gradient(logits_TE))
    mean_T = mask_T / jnp.maximum(mask_T.sum(), 1.0)

    def scale(carry):
        log_v_E, _, n = carry
        plan_TE = jax.nn.softmax(logits_TE + log_v_E[None], axis=1)
        share_E = num_experts * (mean_T[:, None] * plan_TE).sum(axis=0)
        error = jnp.abs(share_E - 1).max()
        return log_v_E - jnp.log(share_E + 1e-20), error, n + 1

    start = jnp.zeros_like(logits_TE[0]), jnp.full((), jnp.inf, logits_TE.dtype), 0
    going = lambda carry: (carry[1] > tolerance) & (carry[2] < iterations)  # noqa: E731
    return jax.lax.while_loop(going, scale, start)[0]


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del state
    o, k = cfg.options, cfg.experts_per_token
    logits_TE = parts.logits(params, tokens.x_TD)
    choice_TE = logits_TE
    if cfg.training and tokens.forced_TK is None:
        log_v_E = balance_logits(logits_TE, tokens.mask_T, o.tolerance, o.iterations)
        choice_TE = choice_TE + log_v_E[None]
    index_TK = parts.select(choice_TE, tokens, cfg.experts_per_token)
    scores_TE = parts.score(logits_TE, "sigmoid" if k == 1 else "softmax")
    weights_TK, routes_TE = parts.weigh(index_TK, scores_TE)
    stats = parts.plain_stats(routes_TE, scores_TE, tokens)
    losses = parts.z_loss(logits_TE, tokens, cfg)
    return Routed(Routing(index_TK, weights_TK), losses, stats, scores_TE, logits_TE=logits_TE)


ROUTER = Router(
    options=Options(),
    source="S-BASE, 2202.01169",
    about=__doc__ or "",
    route=route,
    form="token",
    causal=True,
    causal_in_training=False,
    param_specs=lambda cfg: {"kernel": parts.kernel_spec(cfg)},
    linear_losses=lambda cfg: True,
    balance=("z_loss",),
)
