"""Token rounding (SonicMoE, 2512.14080): in training every expert's number of tokens is rounded to a multiple
of the tile of its matrix product, so that no tile is padded.

Each token chooses its K best experts. An expert chosen by f tokens then computes round(f / tile) * tile:
the tokens that chose it first, in the order of their normalised weights, then those that did not, in the
order of their scores. Weights are the scores. Evaluation and generation are plain token choice. (Order,
weights and ties as in the authors' code.)

A token may get more experts than K, all of them if it must, and none. `max_experts` bounds that, and with
it the rows that are set aside: a token that is full is passed over, expert after expert. An expert that too
few tokens can serve takes what there is.

Not causal in training, where f counts the micro-batch's tokens; causal in evaluation. Options and losses are
those of token_choice; losses count what tokens chose, the load what was computed. The paper claims
faster kernels at many experts, with the quality of token choice.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import choice, number
from moejax.routers import parts, picks, token_choice
from moejax.routers.balance import BalanceConfig
from moejax.routers.contract import Routed, RouterConfig, Tokens


@dataclasses.dataclass(frozen=True)
class Options(token_choice.Options):
    max_experts: int = number(0, least=0)  # that may compute a token; 0: all
    tile: int = number(128, least=1)  # rows of a tile
    rounding: str = choice("nearest", "up", "down")  # to the multiple of a tile


def round_to_tiles(
    chosen_TE: jax.Array, scores_TE: jax.Array, mask_T: jax.Array, room: int, o: Options
) -> jax.Array:
    """Which tokens each expert computes, bool [T, E].

    Args:
      chosen_TE: True where the token chose the expert.
      scores_TE: affinities, -inf for experts that a token may not have.
      mask_T: 1 = token, 0 = padding.
      room: experts of a token at most.
      o: tile and rounding.
    """
    picked_TE = jnp.where(chosen_TE, scores_TE, 0)
    normal_TE = picked_TE / jnp.maximum(picked_TE.sum(axis=1, keepdims=True), 1e-20)
    tiles_E = chosen_TE.sum(axis=0) / o.tile
    how = {"nearest": jnp.round, "up": jnp.ceil, "down": jnp.floor}[o.rounding]
    target_E = (how(tiles_E) * o.tile).astype(jnp.int32)

    def one(used_T, expert):
        chosen_T, normal_T, score_T, target = expert
        may_T = chosen_T | ((mask_T > 0) & (used_T < room) & (score_T > -jnp.inf))
        rank_T = jnp.where(chosen_T, 0, jnp.where(may_T, 1, 2))
        order_T = jnp.lexsort((-jnp.where(chosen_T, normal_T, score_T), rank_T))
        place_T = jnp.zeros_like(order_T).at[order_T].set(jnp.arange(order_T.shape[0]))
        taken_T = may_T & (place_T < target)
        return used_T + taken_T - chosen_T, taken_T

    experts = (chosen_TE.T, normal_TE.T, scores_TE.T, target_E)
    _, taken_ET = jax.lax.scan(one, chosen_TE.sum(axis=1), experts)
    return taken_ET.T


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    o, room = cfg.options, picks.most_experts(cfg)
    totals = tokens.totals
    if totals.stats is not None:  # losses are about what tokens choose
        totals = totals._replace(stats={**totals.stats, "load": totals.stats["chosen"]})
    own = token_choice.route(params, state, tokens._replace(forced_TK=None, totals=totals), cfg)
    index_TK = own.routing.expert_index_TK
    if tokens.forced_TK is not None:
        index_TK = tokens.forced_TK
    elif cfg.training:
        chosen_TE = jax.nn.one_hot(index_TK, cfg.num_experts, dtype=jnp.bool_).any(axis=1)
        scores_TE = jax.lax.stop_gradient(own.scores_TE)
        taken_TE = round_to_tiles(chosen_TE, parts.bar(scores_TE, tokens), tokens.mask_T, room, o)
        _, index_TK = jax.lax.top_k(jnp.where(taken_TE, 1 + scores_TE, 0), room)
        index_TK = jnp.where(jnp.take_along_axis(taken_TE, index_TK, axis=1), index_TK, -1)
    else:
        index_TK = jnp.pad(
            index_TK, ((0, 0), (0, room - cfg.experts_per_token)), constant_values=-1
        )
    tokens = tokens._replace(forced_TK=index_TK.astype(jnp.int32))
    weighed = token_choice.route(
        params, state, tokens, dataclasses.replace(cfg, balance=BalanceConfig())
    )
    stats = {**own.stats, "chosen": own.stats["load"], "load": weighed.stats["load"]}
    return own._replace(routing=weighed.routing, stats=stats, shared_TS=weighed.shared_TS)


def problems(cfg: RouterConfig, prefix: str) -> list[str]:
    return [*picks.most_experts_problems(cfg, prefix), *token_choice.problems(cfg, prefix)]


ROUTER = dataclasses.replace(
    token_choice.ROUTER,
    options=Options(),
    source="SonicMoE, 2512.14080",
    about=__doc__ or "",
    route=route,
    causal_in_training=False,
    routes_per_token=picks.most_experts,
    problems=problems,
)
