"""Routes: which experts each token of a batch has in each MoE layer, read off a forward pass.

The one view of a model's routing that traces, figures and interventions share. T = B*S tokens, in the order of
the batch.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from moejax.config import ComputeConfig, ConfigError, ModelConfig
from moejax.models import transformer
from moejax.models.replay import forced_routes
from moejax.routers import ROUTERS
from moejax.routers.contract import Routing, SlotRouting


class Routes(NamedTuple):
    """Every route of a batch.

    Attributes:
      expert_LTK: int32; 0 .. E-1 are experts, from E on special experts, -1 an empty slot. K is the
        most that a token can have; E where experts choose tokens.
      weights_LTK: what each expert's output is multiplied by, 0 in an empty slot.
      scores_LTE: the router's scores of all experts before any bias, or None if it has none.
      choice_LTN: what the router ranked: its scores, with a selection bias if it has one, and special experts
        if they are ranked, too; None if it has no scores.
      inputs_LTD: what each layer read, normalised, or None if it was not asked for.
      hidden_BSD: after the final norm.
    """

    expert_LTK: jax.Array
    weights_LTK: jax.Array
    scores_LTE: jax.Array | None
    choice_LTN: jax.Array | None
    inputs_LTD: jax.Array | None
    hidden_BSD: jax.Array


def check_routes(cfg: ModelConfig, what: str) -> None:
    """ConfigError if the model's tokens have no routes: it is dense, or its router mixes tokens or merges
    experts. `what` begins the error."""
    if cfg.router is None:
        raise ConfigError(
            f"{what}: the model is dense, no layer routes; a model with experts would work"
        )
    if cfg.router.form not in ("token", "slot"):
        named = ", ".join(n for n, r in ROUTERS.items() if r.form in ("token", "slot"))
        raise ConfigError(
            f"{what}: the router {cfg.moe.router.name!r} sends no token to an expert, it gives every expert a "
            f"mix; a model with one of these would work: {named}"
        )


def routes_of(
    params: dict,
    router_state: dict,
    batch: dict[str, jax.Array],
    cfg: ModelConfig,
    compute: ComputeConfig,
    *,
    layout=None,
    inputs: bool = False,
) -> Routes:
    """One forward pass over a batch (its fields: DESIGN.md), as evaluation does it. Pure; jit it.

    Args:
      params, router_state: of the model.
      batch: needs tokens, positions and segment_ids; padding has no routes. `routes` are taken if it has any.
      cfg: the model (static), see `check_routes`.
      compute: how it is computed (static).
      layout: the mesh and its table, or None.
      inputs: whether to return what each layer read.
    """
    out = transformer.forward(
        params,
        router_state,
        batch["tokens"],
        cfg,
        compute=compute,
        positions_BS=batch["positions"],
        segment_ids_BS=batch["segment_ids"],
        forced_LTK=forced_routes(batch, cfg)[0],
        layout=layout,
        keep_inputs=inputs,
    )
    aux = out.aux["moe_blocks"]
    num_tokens = batch["tokens"].size
    expert_LTK, weights_LTK = jax.vmap(lambda r: by_token(r, num_tokens))(aux.routing)
    read = None
    if aux.inputs_BSD is not None:  # here stacked over layers
        read = aux.inputs_BSD.reshape(aux.inputs_BSD.shape[0], num_tokens, -1)
    choice_LTN = aux.scores_TE if aux.choice_TN is None else aux.choice_TN
    return Routes(expert_LTK, weights_LTK, aux.scores_TE, choice_LTN, read, out.hidden_BSD)


def by_token(routing: Routing | SlotRouting, num_tokens: int) -> tuple[jax.Array, jax.Array]:
    """(expert_TK, weights_TK) of one layer. Where experts choose tokens K is E, heaviest first."""
    if isinstance(routing, Routing):
        return routing
    token_EC, weights_EC = routing
    num_experts = token_EC.shape[0]
    row_EC = jnp.where(token_EC < 0, num_tokens, token_EC)  # an empty slot: a row that is cut off
    expert_E1 = jnp.arange(num_experts)[:, None]
    zeros = jnp.zeros((num_tokens + 1, num_experts), weights_EC.dtype)
    weights_TE = zeros.at[row_EC, expert_E1].add(weights_EC)[:-1]
    has_TE = zeros.at[row_EC, expert_E1].add(1)[:-1] > 0
    order_TE = jnp.argsort(jnp.where(has_TE, -weights_TE, jnp.inf), axis=1)
    expert_TE = jnp.where(jnp.take_along_axis(has_TE, order_TE, axis=1), order_TE, -1)
    return expert_TE.astype(jnp.int32), jnp.take_along_axis(weights_TE, order_TE, axis=1)
