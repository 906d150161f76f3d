"""Expert parallelism at the level of one dispatch: which collectives, how many rows, what is dropped."""

import collections
import functools
import re

import jax
import jax.numpy as jnp
import mesh_case
import numpy as np
import pytest
from mesh_case import MOE, QUICK, config, layout_of, make_inputs

from moejax import axes
from moejax.config import ComputeConfig, MeshConfig
from moejax.moe.dispatch.dense import dense as dense_dispatch
from moejax.moe.dispatch.expert_parallel import expert_parallel
from moejax.moe.experts import expert_param_specs, of_experts
from moejax.params import init_params
from moejax.routers.contract import Routing
from moejax.sharding import Layout, make_mesh

D, TOKENS = 8, 32
COLLECTIVE = re.compile(
    r" (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("
)


def problem(seed=0):
    """Expert parameters, tokens, routing (with an empty slot and a padding token) and a cotangent."""
    specs = expert_param_specs(MOE, D, 0.5)
    params = init_params(specs, jax.random.key(seed))
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(8)[:2] for _ in range(TOKENS)]).astype(np.int32)
    index[3, 1], index[5] = -1, -1
    weights = np.where(index >= 0, rng.random((TOKENS, 2)), 0).astype(np.float32)
    x, target = rng.standard_normal((2, TOKENS, D)).astype(np.float32)
    return params, jnp.asarray(x), Routing(jnp.asarray(index), jnp.asarray(weights)), target


def layout_for(**mesh) -> Layout:
    layout = layout_of(config(mesh=mesh))
    assert layout is not None
    return layout


def compiled(layout: Layout, compute, gradient: bool):
    """The dispatch (and its gradient in all inputs), its inputs laid out as in training."""
    params, x_TD, routing, target = problem()
    params = jax.device_put(params, layout.of_specs(expert_param_specs(MOE, D, 0.5)))
    x_TD, routing, target = jax.device_put(
        (x_TD, routing, target), layout.sharding(axes.BATCH, None)
    )

    def value(params, x_TD, weights_TK):
        y_TD, dropped = expert_parallel(
            params, x_TD, Routing(routing.expert_index_TK, weights_TK), MOE, compute, layout
        )
        return (y_TD * target).sum(), (y_TD, dropped)

    f = jax.value_and_grad(value, (0, 1, 2), has_aux=True) if gradient else value
    args = (params, x_TD, routing.combine_weights_TK)
    return jax.jit(f, compiler_options=QUICK).lower(*args).compile(), args


def collectives(program) -> dict[str, int]:
    return dict(collections.Counter(COLLECTIVE.findall(program.as_text())))


# Of one layer with its backward pass, and one all-reduce of the loss.
COLLECTIVES = {
    # Forward, tokens, expert indices and weights are gathered and results scattered; backward, the
    # gradient of the results is gathered, those of tokens and weights are scattered.
    "ring": {"all-gather": 4, "reduce-scatter": 3, "all-reduce": 1},
    # Counts, rows there, rows back; the gradient's rows there and back.
    "all_to_all": {"all-to-all": 5, "all-reduce": 1},
}


@pytest.mark.parametrize("strategy", COLLECTIVES)
def test_collectives_of_a_layer(strategy):
    compute = ComputeConfig(expert_parallel=strategy)
    program, _ = compiled(layout_for(expert=4), compute, gradient=True)
    assert collectives(program) == COLLECTIVES[strategy]


def test_axes_of_size_one_cost_nothing():
    """On a mesh of one device nothing is exchanged; on one that only splits the batch, no token."""
    alone = Layout(make_mesh(MeshConfig(data=1), jax.devices()[:1]), layout_for(data=8).rules)
    program, _ = compiled(alone, ComputeConfig(expert_parallel="all_to_all"), True)
    assert collectives(program) == {}
    program, _ = compiled(layout_for(data=8), ComputeConfig(), gradient=False)
    assert collectives(program) == {"all-reduce": 1}  # of the loss


# ---------------------------------------------------------------------------------------------------
# Values and gradients where a whole model cannot easily go.


def dense():
    params, x_TD, routing, target = problem()

    def value(params, x_TD, weights_TK):
        weighed = routing._replace(combine_weights_TK=weights_TK)
        y_TD = dense_dispatch(params, x_TD, weighed, of_experts(MOE))
        return (y_TD * target).sum(), y_TD

    args = (params, x_TD, routing.combine_weights_TK)
    return jax.jit(jax.value_and_grad(value, (0, 1, 2), has_aux=True), compiler_options=QUICK)(
        *args
    )


the_dense = functools.cache(dense)


def run(layout: Layout, **how):
    """Value, y_TD, dropped and gradients, with everything that may differ in the last bits."""
    program, args = compiled(layout, ComputeConfig(**how), gradient=True)
    (value, (y_TD, dropped)), grads = jax.device_get(program(*args))
    return value, y_TD, int(dropped), grads


def assert_dense(got):
    """Nothing dropped, and the oracle's values and gradients. float32 sums of tens of terms of order 10."""
    (value, y_TD), grads = jax.device_get(the_dense())
    _, _, routing, _ = problem()
    grads = (
        *grads[:2],
        np.where(routing.expert_index_TK >= 0, grads[2], 0),
    )  # no slot, no variable
    got_value, got_y_TD, dropped, got_grads = got
    assert dropped == 0
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)
    close(got_value, value)
    close(got_y_TD, y_TD)
    jax.tree.map(close, got_grads, grads)


@pytest.mark.parametrize(
    ("mesh", "strategy"),
    [
        # The batch on 'data' alone: tokens stay whole over the expert axis.
        (dict(data=2, expert=4, rules=("batch=data",)), "ring"),
        # Experts over two axes, both of which hold the batch.
        (dict(data=2, expert=2, rules=("expert=data+expert",)), "all_to_all"),
        (dict(data=2, expert=2, rules=("expert=data+expert",)), "ring"),
        # Experts over one axis that holds the batch and one that does not.
        (dict(data=2, tensor=2, rules=("expert=data+tensor", "expert_mlp=")), "ring"),
        # The FFN width split over an axis that holds the batch: gathered, as fsdp gathers D.
        (dict(data=2, fsdp=2, rules=("expert_mlp=data",)), "ring"),
        # The model width split over an axis that does not hold the batch.
        (dict(data=2, tensor=2, rules=("expert_embed=tensor", "expert_mlp=")), "ring"),
    ],
)
def test_unusual_tables(mesh, strategy):
    assert_dense(run(layout_for(**mesh), expert_parallel=strategy))


@pytest.mark.parametrize("num_tokens", [1, 2, 6])
def test_few_tokens(num_tokens):
    """Fewer tokens than devices (decoding): as many axes split them as divide their number."""
    layout = layout_for(data=2, expert=2, tensor=2)
    params, x_TD, (index_TK, weights_TK), _ = problem()
    x_TD, routing = x_TD[:num_tokens], Routing(index_TK[:num_tokens], weights_TK[:num_tokens])
    compute = ComputeConfig(expert_parallel="all_to_all")
    y_TD, dropped = jax.jit(
        lambda p, x: expert_parallel(p, x, routing, MOE, compute, layout), compiler_options=QUICK
    )(params, x_TD)
    want = dense_dispatch(params, x_TD, routing, of_experts(MOE))
    np.testing.assert_allclose(y_TD, want, rtol=1e-4, atol=1e-5)
    assert dropped == 0


# ---------------------------------------------------------------------------------------------------
# Bounded buffers.


@pytest.mark.parametrize("strategy", COLLECTIVES)
def test_overflow_is_counted_and_contributes_nothing(strategy):
    """All routes go to experts 0 and 1 of device 0 of 4; a factor of 1 leaves room for a quarter."""
    layout = layout_for(expert=4)
    compute = ComputeConfig(expert_parallel=strategy, buffer_factor=1.0)
    params, x_TD, routing, _ = problem()
    index_TK = jnp.broadcast_to(jnp.array([0, 1], jnp.int32)[None], (TOKENS, 2))
    routing = Routing(index_TK, jnp.ones((TOKENS, 2)))

    @functools.partial(jax.jit, compiler_options=QUICK)
    def value_and_grad(params, x_TD):
        def value(x_TD):
            y_TD, dropped = expert_parallel(params, x_TD, routing, MOE, compute, layout)
            return y_TD.sum(), (y_TD, dropped)

        return jax.value_and_grad(value, has_aux=True)(x_TD)

    (_, (y_TD, dropped)), dx_TD = value_and_grad(params, x_TD)
    assert dropped == 2 * TOKENS * 3 // 4
    # Rows are kept expert by expert: half of expert 0's fit, expert 1 gets none.
    both_TE = np.stack([expert_alone(params, x_TD, e) for e in (0, 1)], axis=1)
    kept_T = np.array([np.allclose(y, b[0], rtol=1e-4, atol=1e-5) for y, b in zip(y_TD, both_TE)])
    assert kept_T.sum() == TOKENS // 2
    np.testing.assert_array_equal(y_TD[~kept_T], 0.0)
    np.testing.assert_array_equal(dx_TD[~kept_T], 0.0)
    assert (np.abs(dx_TD[kept_T]).max(axis=1) > 0).all()


def expert_alone(params, x_TD, expert: int):
    index_TK = jnp.full((TOKENS, 1), expert, jnp.int32)
    routing = Routing(index_TK, jnp.ones((TOKENS, 1)))
    return dense_dispatch(params, x_TD, routing, of_experts(MOE))


@pytest.mark.parametrize("strategy", COLLECTIVES)
def test_a_wide_enough_buffer_drops_nothing(strategy):
    assert_dense(run(layout_for(expert=4), expert_parallel=strategy, buffer_factor=3.0))


def test_drops_of_a_step_are_reported():
    """Not only by the dispatcher: in what the step says, for every layer, summed over micro-batches."""
    how = dict(buffer_factor=0.5, expert_parallel="all_to_all")
    got = mesh_case.run(mesh=dict(expert=4), skewed=True, accumulation=2, **how)
    tokens = int((mesh_case.make_batch()["segment_ids"] > 0).sum())
    (stats,) = got["stats"].values()
    dropped_L = stats["dropped"]
    # Per micro-batch and device: 8 tokens, 16 routes, room for 2 rows to the device of the busy experts.
    np.testing.assert_array_equal(stats["load"].sum(axis=1), 2 * tokens)
    assert (dropped_L >= 2 * tokens - 2 * 4 * 2).all() and (dropped_L < 2 * tokens).all()


# ---------------------------------------------------------------------------------------------------
# What cannot run here is at least lowered.


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("strategy", COLLECTIVES)
def test_step_lowers_for_accelerators(platform, strategy):
    cfg = config(mesh=dict(fsdp=2, expert=2, tensor=2), dtype="bfloat16", expert_parallel=strategy)
    layout = layout_of(cfg)
    params, state, batch = make_inputs(cfg, skewed=False)
    lowered = mesh_case.step.trace(params, state, batch, cfg, layout).lower(
        lowering_platforms=(platform,)
    )
    text = lowered.as_text()
    assert "ragged_dot" in text
    assert ("ragged_all_to_all" in text) == (strategy == "all_to_all")
