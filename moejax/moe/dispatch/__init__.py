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
from moejax.moe.dispatch.soft import soft
from moejax.moe.experts import Params, of_experts
from moejax.routers.contract import Routing, SlotRouting, SoftRouting
from moejax.sharding import Layout


def dispatch(
    params: Params,
    x_TD: jax.Array,
    routing: Routing | SlotRouting | SoftRouting,
    moe: MoEConfig,
    compute: ComputeConfig,
    *,
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
      capacity_factor: slots per expert, see `capacity`; 0: all routes find one.
      layout: the mesh; only routes of tokens are exchanged by hand, the compiler partitions the rest.
      stack: see `routed_ffn`.

    Returns:
      y_TD in x's dtype, and the number of dropped routes.
    """
    act, none = of_experts(moe), jnp.zeros((), jnp.float32)
    if isinstance(routing, SoftRouting):
        return soft(params, x_TD, routing, act), none
    if isinstance(routing, Routing) and capacity_factor:
        return capacity(params, x_TD, routing, act, capacity_factor, moe.experts_per_token)
    if compute.dispatcher == "dense":
        return dense(params, x_TD, routing, act), none
    if isinstance(routing, SlotRouting):
        return slots(params, x_TD, routing, act), none
    if layout is not None:
        return expert_parallel(params, x_TD, routing, moe, compute, layout)
    return dropless(params, x_TD, routing, act, compute.grouped_matmul, stack=stack)
