"""Dropless dispatch on a mesh: one `jax.shard_map` around the local dropless dispatcher.

Tokens are split over the batch's mesh axes, experts over the expert's. Two ways to bring them together:

- ring: all-gather the tokens of the devices that share the experts, let every device compute its own
  experts for all of them, reduce-scatter the results. Works on every backend.
- all_to_all: send every routed row to the device of its expert and the result back (GShard, 2006.16668).
  On GPU and TPU `ragged_all_to_all` sends only the rows that exist; XLA:CPU has none, and there the
  padded buffers travel whole.

An expert's FFN width may be split over further axes (tensor parallelism: partial sums are added up), and
its model width over axes that hold the batch (fsdp: weights are gathered for use, which makes their
gradient a reduce-scatter; without rematerialisation the backward pass keeps the gathered weights of every
layer, with full it gathers them again). The router runs outside, on global arrays. `check_vma=True` derives
the sums in the backward pass from types: a gradient that is not the same on all devices that claim it is
an error.

Here: P devices that exchange rows (peers), C rows of a chunk for one of them.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from moejax import axes
from moejax.config import ComputeConfig, MoEConfig
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.experts import Params, expert_param_specs, of_experts
from moejax.moe.rows import SortedRoutes, sort_routes, to_rows, to_tokens
from moejax.moe.varying import vary, vary_together, varying_axes
from moejax.routers.contract import Routing
from moejax.sharding import Layout
from moejax.weights import partition

Axes = tuple[str, ...]


def expert_parallel(
    params: Params,
    x_TD: jax.Array,
    routing: Routing,
    moe: MoEConfig,
    compute: ComputeConfig,
    layout: Layout,
) -> tuple[jax.Array, jax.Array]:
    """As `dropless`, on the mesh of `layout`: global arrays in, global arrays out.

    Without an expert axis (or one of size 1) every device computes its own tokens and nothing is
    exchanged. Where tokens are too few to be split over an expert axis (decoding), each device computes
    its experts for all of them and the results are summed, whatever the strategy.

    Args:
      params: expert parameters (`experts.expert_param_specs`).
      x_TD: tokens, split over as many of the batch's mesh axes as divide T.
      routing: global expert indices and combine weights.
      moe: the experts.
      compute: `expert_parallel` names the strategy, `buffer_factor` bounds its buffers.
      layout: the mesh and its table.

    Returns:
      y_TD in x's dtype, and the number of routes dropped on all devices for want of buffer: 0 with
      buffer_factor = 0, where buffers hold the worst case.
    """
    batch = layout.dividing(axes.BATCH, x_TD.shape[0])
    experts = layout.used(axes.EXPERT)
    width = layout.used(axes.EXPERT_MLP)
    logical = {k: s.axes for k, s in expert_param_specs(moe, x_TD.shape[1], 0.0).items()}
    # A split of the model width over axes that do not hold the batch is left to the compiler.
    mesh_axes: dict[str | None, Axes] = {
        axes.EXPERT: experts,
        axes.EXPERT_MLP: width,
        axes.EXPERT_EMBED: tuple(a for a in layout.used(axes.EXPERT_EMBED) if a in batch),
    }
    gathered = {*mesh_axes[axes.EXPERT_EMBED], *(a for a in width if a in batch)}
    param_axes = {k: [mesh_axes[name] for name in names] for k, names in logical.items()}

    def local(params_e, x_tD, index_tK, weights_tK):
        if gathered:
            params_e = {
                k: _gather_weights(w.astype(x_tD.dtype), param_axes[k], gathered)
                for k, w in params_e.items()
            }
        split = tuple(a for a in width if a not in batch)
        params_e = _bias_once(params_e, split)
        routing_tK = Routing(index_tK, weights_tK)
        how = (moe, compute, experts)
        if compute.expert_parallel == "all_to_all" and experts and set(experts) <= set(batch):
            y_tD, dropped = _all_to_all(params_e, x_tD, routing_tK, *how)
        else:
            y_tD, dropped = _ring(params_e, x_tD, routing_tK, *how, batch)
        y_tD = jax.lax.psum(y_tD, split) if split else y_tD
        return y_tD, _sum_everywhere(dropped)

    token = PartitionSpec(batch or None)
    param_specs = {
        k: partition(params[k], PartitionSpec(*(a or None for a in dims)))
        for k, dims in param_axes.items()
    }
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(param_specs, token, token, token),
        out_specs=(token, PartitionSpec()),
        check_vma=True,
    )(dict(params), x_TD, *routing)


def _gather_weights(w, dims: list[Axes], gathered: set[str]):
    for i, mesh_axes in enumerate(dims):
        for a in reversed(mesh_axes):  # the last axis is the innermost
            if a in gathered:
                w = jax.lax.all_gather(w, a, axis=i, tiled=True)
    return w


def _bias_once(params_e: Params, split: Axes) -> Params:
    """b_down on the first of the devices whose partial sums are added, zero on the others."""
    if "b_down" not in params_e or not split:
        return params_e
    first = jax.lax.axis_index(split) == 0
    return {**params_e, "b_down": jnp.where(first, params_e["b_down"], 0)}


def _sum_everywhere(count):
    over = tuple(varying_axes(count))
    return jax.lax.psum(count, over) if over else count


def _rows(factor: float, worst: int, balanced: float) -> int:
    """Rows of a buffer: the worst case, or `factor` times the balanced load if that is less."""
    return min(worst, math.ceil(factor * balanced)) if factor else worst


def _ring(params_e, x_tD, routing_tK, moe, compute, experts: Axes, batch: Axes):
    """All-gather tokens, compute the experts at hand, reduce-scatter (or sum) the results."""
    kernel = of_experts(moe), compute.grouped_matmul
    if not experts:
        return dropless(params_e, x_tD, routing_tK, *kernel)
    shared = tuple(a for a in experts if a in batch)  # both tokens and experts are split over these
    apart = tuple(a for a in experts if a not in batch)
    if shared:
        x_tD, index_tK, weights_tK = (
            jax.lax.all_gather(a, shared, axis=0, tiled=True) for a in (x_tD, *routing_tK)
        )
    else:
        index_tK, weights_tK = routing_tK
    held = params_e["w_down"].shape[0]
    num_tokens, k = index_tK.shape
    local_tK = index_tK - held * jax.lax.axis_index(experts).astype(index_tK.dtype)
    local_tK = jnp.where((index_tK >= 0) & (local_tK >= 0) & (local_tK < held), local_tK, -1)
    balanced = num_tokens * min(k, moe.experts_per_token) * held / moe.num_experts
    num_rows = _rows(compute.buffer_factor, num_tokens * min(k, held), balanced)
    routing = Routing(local_tK, weights_tK)
    y_tD, dropped = dropless(params_e, x_tD, routing, *kernel, num_rows=num_rows)
    if shared:
        y_tD = jax.lax.psum_scatter(y_tD, shared, scatter_dimension=0, tiled=True)
    return (jax.lax.psum(y_tD, apart) if apart else y_tD), dropped


def _all_to_all(params_e, x_tD, routing_tK, moe, compute, experts: Axes):
    """Send rows to the devices of their experts, compute, send back, weigh and sum where they came from."""
    kernel = of_experts(moe), compute.grouped_matmul
    held = params_e["w_down"].shape[0]
    num_tokens, k = routing_tK.expert_index_TK.shape
    balanced = num_tokens * min(k, moe.experts_per_token) * held / moe.num_experts
    size = _rows(compute.buffer_factor, num_tokens * min(k, held), balanced)
    routes, send_Pe, dropped = _pack(routing_tK.expert_index_TK, held, moe.num_experts, size)
    receive_Pe = jax.lax.all_to_all(send_Pe, experts, 0, 0, tiled=True)
    # Chunk p of what arrives holds peer p's rows, sorted by expert: the counts say which is whose.
    end_Pe = jnp.cumsum(receive_Pe, axis=1)
    expert_PC = (jnp.arange(size)[None, :, None] >= end_Pe[:, None]).sum(axis=2, dtype=jnp.int32)
    expert_R1 = jnp.where(expert_PC < held, expert_PC, -1).reshape(-1, 1)
    x_tD, weight_r1, routes = vary_together(
        x_tD, routing_tK.combine_weights_TK.reshape(-1, 1), routes
    )
    send_P, receive_P = send_Pe.sum(axis=1), receive_Pe.sum(axis=1)
    x_RD = exchange(*vary_together(to_rows(x_tD, routes), send_P, receive_P), experts)
    one_R1 = jnp.ones(expert_R1.shape, weight_r1.dtype)
    y_RD, _ = dropless(params_e, x_RD, Routing(expert_R1, one_R1), *kernel)
    y_RD = exchange(*vary_together(y_RD, receive_P, send_P), experts)
    # Weighed at home: sending the weights along would cost two more exchanges, there and back.
    y_RD = y_RD * to_rows(weight_r1, routes.one_by_one())
    y_tD = to_tokens(*vary_together(y_RD, routes))
    return y_tD.astype(x_tD.dtype), dropped


def _pack(index_tK, held: int, num_experts: int, size: int):
    """Where each route lies in a buffer of one chunk of `size` rows for every device.

    Returns:
      routes: the rows of all chunks; some are empty.
      send_Pe: rows for each device and each of its experts.
      dropped: routes that found no row.
    """
    routes = sort_routes(index_tK, num_experts)
    wanted_Pe = routes.group_sizes_E.reshape(-1, held)
    end_Pe = jnp.minimum(jnp.cumsum(wanted_Pe, axis=1), size)
    send_Pe = jnp.diff(end_Pe, axis=1, prepend=0)
    total_P = wanted_Pe.sum(axis=1)
    start_P = jnp.cumsum(total_P) - total_P
    device_tK = index_tK // held
    place_tK = routes.row_TK - start_P[device_tK]
    fits_tK = (index_tK >= 0) & (place_tK < size)
    row_tK = jnp.where(fits_tK, device_tK * size + place_tK, start_P.size * size)
    place_C = jnp.arange(size, dtype=jnp.int32)
    sorted_PC = jnp.minimum(start_P[:, None] + place_C[None], index_tK.size - 1)
    filled_PC = place_C[None] < end_Pe[:, -1:]
    route_PC = jnp.where(filled_PC, routes.route_R[sorted_PC], index_tK.size)
    worst = index_tK.shape[0] * min(index_tK.shape[1], held)
    dropped = jnp.zeros((), jnp.int32) if size >= worst else (wanted_Pe - send_Pe).sum()
    return SortedRoutes(route_PC.reshape(-1), row_tK, routes.group_sizes_E), send_Pe, dropped


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange(x_RD: jax.Array, send_P: jax.Array, receive_P: jax.Array, experts: Axes) -> jax.Array:
    """Chunk p of x_RD goes to device p, and becomes its chunk of this device.

    Only the first send_P[p] rows of a chunk matter, and receive_P[p] of those that arrive; the rest is
    zero or what came along. Exchanging twice is the identity, so the gradient is an exchange, too.
    """
    return jax.lax.platform_dependent(
        x_RD,
        send_P,
        receive_P,
        cpu=functools.partial(_padded, experts),
        default=functools.partial(_ragged, experts),
    )


def _padded(experts, x_RD, send_P, receive_P):
    del send_P, receive_P
    return jax.lax.all_to_all(x_RD, experts, 0, 0, tiled=True)


def _ragged(experts, x_RD, send_P, receive_P):
    size = x_RD.shape[0] // send_P.shape[0]
    start_P = size * jnp.arange(send_P.shape[0], dtype=jnp.int32)
    mine = jnp.full_like(start_P, size) * jax.lax.axis_index(experts).astype(jnp.int32)
    buffer_RD = vary(jnp.zeros_like(x_RD), varying_axes(x_RD))
    return jax.lax.ragged_all_to_all(
        x_RD, buffer_RD, start_P, send_P, mine, receive_P, axis_name=experts
    )


def _exchange_forward(x_RD, send_P, receive_P, experts):
    return exchange(x_RD, send_P, receive_P, experts), (send_P, receive_P)


def _exchange_backward(experts, residuals, dy_RD):
    send_P, receive_P = residuals
    none_P = np.zeros(send_P.shape, jax.dtypes.float0)
    return exchange(dy_RD, receive_P, send_P, experts), none_P, none_P


exchange.defvjp(_exchange_forward, _exchange_backward)
