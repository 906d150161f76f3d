"""Dispatch: the one door from a routing to its experts. The form of the routing decides, and how it is
computed.

Every way gives the same values, gradients and load as `dense` when nothing is dropped.
"""

from typing import Any

import jax
import jax.numpy as jnp

from moejax.config import ComputeConfig, MoEConfig
from moejax.moe.dispatch.capacity import capacity, slots
from moejax.moe.dispatch.dense import dense
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.dispatch.expert_parallel import expert_parallel
from moejax.moe.dispatch.merge import merge
from moejax.moe.dispatch.soft import soft
from moejax.moe.experts import Params, of_experts
from moejax.routers.contract import MergeRouting, Routing, SlotRouting, SoftRouting
from moejax.sharding import Layout


@jax.named_scope("dispatch")
def dispatch(
    params: Params,
    x_TD: jax.Array,
    routing: Routing | SlotRouting | SoftRouting | MergeRouting,
    moe: MoEConfig,
    compute: ComputeConfig,
    *,
    weighs_inputs: bool = False,
    capacity_factor: float = 0.0,
    layout: Layout | None = None,
    stack: tuple[Params, Any] | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Tokens through the experts that `routing` names.

    Args:
      params: of the experts.
      x_TD: tokens.
      routing: without special experts.
      moe: the activation.
      compute: dispatcher, kernels, buffers.
      weighs_inputs: see `Router.weighs_inputs`; of routes of tokens only.
      capacity_factor: slots per expert, see `capacity`; 0: all routes find one.
      layout: the mesh; only routes of tokens are exchanged by hand, the compiler partitions the rest.
      stack: see `routed_ffn`.

    Returns:
      y_TD in x's dtype, and the number of dropped routes.
    """
    act, none = of_experts(moe), jnp.zeros((), jnp.float32)
    if isinstance(routing, Routing) and weighs_inputs:
        rows_RD, single = _one_row_per_route(x_TD, routing, by_rank=capacity_factor > 0)
        y_RD, dropped = dispatch(
            params,
            rows_RD,
            single,
            moe,
            compute,
            capacity_factor=capacity_factor,
            layout=layout,
            stack=stack,
        )
        return _sum_over_routes(y_RD, x_TD.shape[0], by_rank=capacity_factor > 0), dropped
    if isinstance(routing, SoftRouting):
        return soft(params, x_TD, routing, act), none
    if isinstance(routing, MergeRouting):
        return merge(params, x_TD, routing, act), none
    if isinstance(routing, Routing) and capacity_factor:
        return capacity(params, x_TD, routing, act, capacity_factor, moe.experts_per_token)
    if compute.dispatcher == "dense":
        return dense(params, x_TD, routing, act), none
    if isinstance(routing, SlotRouting):
        return slots(params, x_TD, routing, act), none
    if layout is not None:
        return expert_parallel(params, x_TD, routing, moe, compute, layout)
    return dropless(params, x_TD, routing, act, compute.grouped_matmul, stack=stack)


def _one_row_per_route(
    x_TD: jax.Array, routing: Routing, by_rank: bool
) -> tuple[jax.Array, Routing]:
    """T tokens with K routes as T K rows, scaled by their weight, with one route each that weighs 1.

    Rows of a token lie side by side, so that a mesh splits them as it splits tokens; `by_rank`: all first
    choices come first, as `capacity` fills its slots.
    """
    index_TK, weights_TK = routing
    x_TKD = (weights_TK[:, :, None] * x_TD[:, None].astype(weights_TK.dtype)).astype(x_TD.dtype)
    if by_rank:
        index_TK, x_TKD = index_TK.T, x_TKD.swapaxes(0, 1)
    index_R1 = index_TK.reshape(-1, 1)
    single = Routing(index_R1, (index_R1 >= 0).astype(weights_TK.dtype))
    return x_TKD.reshape(-1, x_TD.shape[1]), single


def _sum_over_routes(y_RD: jax.Array, num_tokens: int, by_rank: bool) -> jax.Array:
    """What the rows of each token add up to, summed in float32."""
    shape = (-1, num_tokens) if by_rank else (num_tokens, -1)
    wide = y_RD.astype(jnp.promote_types(y_RD.dtype, jnp.float32))
    return wide.reshape(*shape, y_RD.shape[1]).sum(axis=0 if by_rank else 1).astype(y_RD.dtype)
