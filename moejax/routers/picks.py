"""Which experts a token has, where their number varies or some of them are special: shared by those
routers.

Here: N experts and special experts.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import Problems, number
from moejax.routers import parts
from moejax.routers.contract import RouterConfig, RouterOptions, Tokens


@dataclasses.dataclass(frozen=True)
class VariableOptions(RouterOptions):
    """Options of routers that give a token as many experts as it needs."""

    # The most experts of one token; buffers of routes are so wide. 0: all of them.
    max_experts: int = number(0, least=0)


def most_experts(cfg: RouterConfig) -> int:
    return cfg.options.max_experts or cfg.num_experts


def most_experts_problems(cfg: RouterConfig, prefix: str) -> list[str]:
    """`max_experts` against E, and against K, the number that is meant on average."""
    most, e, k, out = cfg.options.max_experts, cfg.num_experts, cfg.experts_per_token, Problems()
    key = f"{prefix}router.max_experts={most}"
    out.need(most <= e, f"{key} is more than {prefix}num_experts={e}; 0 means all of them")
    out.need(
        most == 0 or most >= k,
        f"{key} is less than {prefix}experts_per_token={k}, the mean; {k} to {e} would work",
    )
    return out


def best(score_TN: jax.Array, most: int, tokens: Tokens, open_TN=None) -> jax.Array:
    """index_TK of a token's `most` best, best first; -1 in every slot of padding, and where fewer are open.

    Args:
      score_TN: what decides. No gradient passes.
      most: K.
      tokens: their mask; routes that they are forced to are taken as they are.
      open_TN: which experts a token may have; None: all.
    """
    index_TK = tokens.forced_TK
    if index_TK is None:
        score_TN = jax.lax.stop_gradient(score_TN)
        if open_TN is not None:
            score_TN = jnp.where(open_TN, score_TN, -jnp.inf)
        score_TK, index_TK = jax.lax.top_k(score_TN, most)
        index_TK = jnp.where(score_TK > -jnp.inf, index_TK, -1)
    return jnp.where(tokens.mask_T[:, None] > 0, index_TK, -1).astype(jnp.int32)


def weigh(index_TK: jax.Array, value_TN: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The values of a token's experts, weights_TK, 0 in empty slots; and routes_TN, 1 where it has the expert,
    without gradient."""
    # A product with the one-hot, not a gather: its gradient is not a scatter.
    chosen_TKN = parts.chosen(index_TK, value_TN.shape[1], value_TN.dtype)
    weights_TK = (chosen_TKN * value_TN[:, None, :]).sum(axis=-1)
    return weights_TK, jax.lax.stop_gradient(chosen_TKN.sum(axis=1))


def count(routes_TN: jax.Array, scores_TN: jax.Array, tokens: Tokens) -> dict[str, jax.Array]:
    """The stats of every router here: routes of each expert, and the entropy of the scores."""
    entropy = parts.entropy_sum(scores_TN, tokens.mask_T)
    return {"load": routes_TN.sum(axis=0), "score_entropy": entropy}


def normalized(weights_TK: jax.Array) -> jax.Array:
    """Weights over their sum; a token that has none keeps none (and no NaN in its gradient)."""
    total_T1 = weights_TK.sum(axis=-1, keepdims=True)
    return weights_TK / jnp.where(total_T1 > 0, total_T1 + 1e-20, 1.0)
