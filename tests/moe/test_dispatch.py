"""The dispatchers against the dense oracle, values and gradients; drops are counted exactly."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ComputeConfig, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.moe import layer
from moejax.moe.dispatch import dispatch
from moejax.moe.dispatch.capacity import fill_slots
from moejax.moe.experts import expert_param_specs
from moejax.params import init_params
from moejax.routers import router_options
from moejax.routers.contract import Routing, SlotRouting

CFG = MoEConfig(num_experts=4, experts_per_token=2, d_expert=8)
# Every way through the one door. Factor 2 with K = 2, E = 4: C = T, so nothing can be dropped.
WAYS = {
    "dense": dict(compute=ComputeConfig(dispatcher="dense")),
    "capacity": dict(compute=ComputeConfig(), capacity_factor=2.0),
    "dropless": dict(compute=ComputeConfig()),
    "dropless, ragged": dict(compute=ComputeConfig(grouped_matmul="ragged")),
}
# Token 3 is padding; token 4 has lost one route; expert 3 is empty.
INDEX_TK = jnp.array([[0, 1], [0, 2], [1, 0], [-1, -1], [2, -1], [0, 1]], jnp.int32)


def run(name):
    params = init_params(expert_param_specs(CFG, 16, 0.5), jax.random.key(0))
    x_TD = jax.random.normal(jax.random.key(1), (6, 16))
    weights = jnp.where(INDEX_TK >= 0, jax.random.uniform(jax.random.key(2), (6, 2)), 0.0)
    target = jax.random.normal(jax.random.key(3), (6, 16))

    def loss(p, x, w):
        y, dropped = dispatch(p, x, Routing(INDEX_TK, w), CFG, **WAYS[name])
        return (y * target).sum(), (y, dropped)

    (_, aux), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(
        params, x_TD, weights
    )
    dparams, dx, dw = grads
    # An empty slot's weight is not a variable.
    return aux, (dparams, dx, jnp.where(INDEX_TK >= 0, dw, 0.0))


@pytest.fixture(scope="module")
def oracle():
    return run("dense")


@pytest.mark.parametrize("name", sorted(set(WAYS) - {"dense"}))
def test_equals_dense(name, oracle):
    (y, dropped), grads = run(name)
    (want_y, _), want_grads = oracle
    assert dropped == 0
    # float32 sums of tens of terms of order 1 to 10 in another order.
    np.testing.assert_allclose(y, want_y, rtol=1e-4, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, want_grads
    )
    np.testing.assert_array_equal(y[3], 0.0)
    np.testing.assert_array_equal(grads[1][3], 0.0)


def test_drops_are_counted_and_first_choices_win():
    weights = jnp.arange(12.0).reshape(6, 2)
    slots, dropped = fill_slots(Routing(INDEX_TK, weights), 4, 1)
    # First choices: 0 <- token 0, 1 <- 2, 2 <- 4. Of 9 routes 3 fit.
    np.testing.assert_array_equal(slots.token_index_EC[:, 0], [0, 2, 4, -1])
    np.testing.assert_array_equal(slots.combine_weights_EC[:, 0], [0.0, 4.0, 8.0, 0.0])
    assert dropped == 6


def test_a_layer_drops_what_exceeds_its_capacity():
    """C = ceil(0.5 * 6 * 2 / 4) = 2 slots per expert; a token's logits are its numbers. First choices take
    slots first, then second ones, each in the order of tokens."""
    moe = MoEConfig(num_experts=4, d_expert=3, router=router_options(routed_scaling=2.0))
    objective = ObjectiveConfig(capacity_factor=0.5)
    x_TD = np.array(
        [
            [3.0, 2.0, 0.0, -1.0],  # 0, 1: both fit
            [2.0, 0.0, 1.0, -1.0],  # 0, 2: both fit
            [1.5, 1.0, 0.0, -2.0],  # 0, 1: both are full
            [2.0, 2.5, 1.0, -1.0],  # 1, 0: 0 is full
            [-1.0, 1.0, 2.0, 0.5],  # 2, 1: 1 is full
            [4.0, 2.0, 1.0, -1.0],  # padding
        ]
    )
    kept = {0: (0, 1), 1: (0, 2), 3: (1,), 4: (2,)}
    cfg = ModelConfig(d_model=4, moe=moe)
    params = init_params(layer.param_specs(cfg), jax.random.key(0))
    w = {
        k: np.random.default_rng(i).normal(size=a.shape)
        for i, (k, a) in enumerate(params["experts"].items())
    }
    params = {"router": {"kernel": jnp.eye(4)}, "experts": jax.tree.map(jnp.asarray, w)}

    @jax.jit
    def run(x, mask):
        args = (params, {}, x.reshape(2, 3, 4), cfg)
        return layer.moe(*args, objective=objective, mask_BS=mask.reshape(2, 3))

    y, aux = run(jnp.asarray(x_TD), jnp.arange(6) < 5)
    want = np.zeros((6, 4))
    for t, experts in kept.items():
        for e in experts:
            gate, up = x_TD[t] @ w["w_gate"][e], x_TD[t] @ w["w_up"][e]
            weight = 2.0 * np.exp(x_TD[t, e]) / np.exp(x_TD[t]).sum()  # a drop leaves the others
            want[t] += weight * (gate / (1 + np.exp(-gate)) * up) @ w["w_down"][e]
    assert aux.stats["dropped"] == 4
    np.testing.assert_array_equal(aux.stats["load"], [4, 4, 2, 0])  # what was asked for
    np.testing.assert_allclose(y.reshape(6, 4), want, rtol=1e-5, atol=1e-5)


def test_slots_equal_dense():
    """The other form, by its own way and by the oracle: an empty slot, and a token in two experts."""
    params = init_params(expert_param_specs(CFG, 16, 0.5), jax.random.key(0))
    x_TD, target = jax.random.normal(jax.random.key(1), (2, 6, 16))
    index_EC = jnp.array([[0, 3], [3, -1], [5, 1], [-1, -1]], jnp.int32)
    weights_EC = jnp.where(index_EC >= 0, jax.random.uniform(jax.random.key(2), (4, 2)), 0.0)

    def run(compute):
        def loss(p, x, w):
            y, dropped = dispatch(p, x, SlotRouting(index_EC, w), CFG, compute)
            return (y * target).sum(), (y, dropped)

        return jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(params, x_TD, weights_EC)

    got, want = run(ComputeConfig()), run(WAYS["dense"]["compute"])
    # float32 sums of tens of terms of order 1 to 10 in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), got, want)
    (_, (y, dropped)), _ = got
    assert dropped == 0
    np.testing.assert_array_equal(y[jnp.array([2, 4])], 0.0)  # tokens that no expert chose
