"""Balance: its options, its losses (one function per paper equation), and the rules that move the selection
bias.

Notation: E experts, K per token, T tokens without padding. `f` comes from counts and carries no
gradient; `P` is a mean of scores and does. Every function takes sums over the tokens at hand together
with totals of the global batch, so that micro-batches of one step add up exactly (`BatchTotals`).
With perfect balance each product-form loss is exactly 1 (times its coefficient).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.options import choice, number


@dataclasses.dataclass(frozen=True)
class BalanceConfig:
    """What balances the experts in training. A coefficient of 0 is off; the equations are below."""

    expert_loss: float = number(0.0, least=0)  # v1 expert-level, f pooled over the global batch
    sequence_loss: float = number(0.0, least=0)  # V3 sequence-wise (with normalised scores)
    device_loss: float = number(0.0, least=0)  # v1/V2 device-level over balance_groups groups
    communication_loss: float = number(0.0, least=0)  # V2, over balance_groups groups
    z_loss: float = number(0.0, least=0)  # router z-loss (ST-MoE)
    balance_groups: int = number(1, least=1)  # D, devices the device-level losses think of
    # The rule that moves the selection bias of a router that has one (2408.15664), and its rate u.
    bias_update: str = choice("none", "sign", "sign_centered", "proportional")
    bias_rate: float = number(0.001, least=0)


def expert_level(score_sum_E, load_E, num_tokens, experts_per_token: int) -> jax.Array:
    """Expert-level balance loss, DeepSeekMoE (2401.06066) eq. 12-14: sum_i f_i P_i.

    f_i = E/(K T) * routes to i, P_i = mean score of i. With `load_E` of the global batch it is the
    global-batch loss of 2501.11873; with K = 1 it is Switch's (2101.03961 eq. 4) and, up to a factor of
    E^2, GShard's (2006.16668 section 2.2), which counts first choices only.

    Args:
      score_sum_E: sum over tokens of the normalised scores (rows that sum to 1).
      load_E: routes per expert over the global batch.
      num_tokens: T over the global batch.
      experts_per_token: K.
    """
    num_experts = load_E.shape[-1]
    t = jnp.maximum(num_tokens, 1.0)
    f_E = num_experts / (experts_per_token * t) * jax.lax.stop_gradient(load_E)
    return jnp.sum(f_E * score_sum_E / t)


def device_level(score_sum_E, load_E, num_tokens, experts_per_token: int, num_groups: int):
    """Device-level balance loss, DeepSeekMoE (2401.06066) eq. 15-17: sum_d f'_d P'_d.

    f'_d is the mean of f_j over the experts of device d, P'_d the sum of their P_j. Experts are
    spread over `num_groups` devices in order.
    """
    num_experts = load_E.shape[-1]
    t = jnp.maximum(num_tokens, 1.0)
    f_E = num_experts / (experts_per_token * t) * jax.lax.stop_gradient(load_E)
    f_G = f_E.reshape(num_groups, -1).mean(axis=1)
    p_G = (score_sum_E / t).reshape(num_groups, -1).sum(axis=1)
    return jnp.sum(f_G * p_G)


def communication(score_sum_E, group_load_G, num_tokens, groups_per_token: int) -> jax.Array:
    """Communication balance loss, DeepSeek-V2 (2405.04434) eq. 29-31: sum_i f''_i P''_i.

    f''_i = D/(M T) * tokens sent to device i, P''_i = sum of P_j over its experts; M is the number of
    devices a token may be sent to.
    """
    num_groups = group_load_G.shape[-1]
    t = jnp.maximum(num_tokens, 1.0)
    f_G = num_groups / (groups_per_token * t) * jax.lax.stop_gradient(group_load_G)
    p_G = (score_sum_E / t).reshape(num_groups, -1).sum(axis=1)
    return jnp.sum(f_G * p_G)


def sequence_wise(scores_BSE, routes_BSE, mask_BS, num_sequences, experts_per_token: int):
    """Sequence-wise balance loss, DeepSeek-V3 (2412.19437) eq. 17-20, averaged over sequences.

    Within each sequence: f_i = E/(K T) * tokens that selected i, P_i = mean of the normalised scores.
    A sequence that is all padding contributes nothing.

    Args:
      scores_BSE: normalised scores s_i / sum_j s_j.
      routes_BSE: 1 where the token selected the expert.
      mask_BS: 1 = token, 0 = padding.
      num_sequences: sequences with a token in the global batch.
      experts_per_token: K.
    """
    num_experts = scores_BSE.shape[-1]
    t_B = jnp.maximum(mask_BS.sum(axis=1), 1.0)[:, None]
    f_BE = num_experts / (experts_per_token * t_B) * (routes_BSE * mask_BS[..., None]).sum(axis=1)
    p_BE = (scores_BSE * mask_BS[..., None]).sum(axis=1) / t_B
    return jnp.sum(jax.lax.stop_gradient(f_BE) * p_BE) / jnp.maximum(num_sequences, 1.0)


def router_z(logits_TE, mask_T, num_tokens) -> jax.Array:
    """Router z-loss, ST-MoE (2202.08906) eq. 5: mean over tokens of logsumexp(logits)^2."""
    lse_T = jax.nn.logsumexp(logits_TE, axis=-1)
    return jnp.sum(mask_T * lse_T**2) / jnp.maximum(num_tokens, 1.0)


def squared_cv(sum_E: jax.Array) -> jax.Array:
    """CV(v)^2 = Var(v) / mean(v)^2 over experts (1701.06538 eq. 7); 0 where all of v is 0."""
    mean = sum_E.mean()
    return jnp.where(mean > 0, sum_E.var() / jnp.where(mean > 0, mean, 1.0) ** 2, 0.0)


def share(function: Callable, here: jax.Array, total: jax.Array, part) -> jax.Array:
    """function(total) where `total` is a sum over the whole batch, of which this call holds `here`: the loss's
    value times `part` (its part of the tokens), and the gradient that reaches its own tokens."""
    value, gradient = jax.value_and_grad(function)(jax.lax.stop_gradient(total))
    return value * part + (gradient * (here - jax.lax.stop_gradient(here))).sum()


def update_bias(bias_E: jax.Array, load_E: jax.Array, rule: str, rate: float) -> jax.Array:
    """The selection bias after one optimiser step; overloaded experts sink, underloaded rise.

    - 'sign': b_i += u sign(mean(load) - load_i). Loss-free balancing (2408.15664) algorithm 1, V3.
    - 'sign_centered': the same minus its mean over experts, Moonlight (2502.16982 appendix C).
    - 'proportional': b_i += u (mean(load) - load_i) / mean(load). 2408.15664 table 3 multiplies the raw
      error of counts; relative to the mean the rate does not depend on the batch size.
    - 'none': unchanged.

    Args:
      bias_E: float32.
      load_E: routes per expert summed over every device and micro-batch of the step.
      rule: see above.
      rate: u.
    """
    error_E = load_E.mean() - load_E
    if rule == "sign":
        return bias_E + rate * jnp.sign(error_E)
    if rule == "sign_centered":
        sign_E = jnp.sign(error_E)
        return bias_E + rate * (sign_E - sign_E.mean())
    if rule == "proportional":
        return bias_E + rate * error_E / jnp.maximum(load_E.mean(), 1.0)
    return bias_E
