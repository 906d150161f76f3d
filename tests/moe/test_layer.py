"""The layer as a whole, with routers that say what a test wants: special experts, stray routes, soft slots."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import (
    ComputeConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
)
from moejax.moe import layer
from moejax.params import ParamSpec, init_params
from moejax.routers import ROUTERS
from moejax.routers.contract import Routed, Router, RouterOptions, Routing, SoftRouting
from moejax.sharding import make_layout

B, S, D, F, E = 2, 2, 3, 2, 2
KINDS = ("zero", "copy", "constant")  # experts 2, 3 and 4
CFG = ModelConfig(
    d_model=D,
    init_std=0.7,
    moe=MoEConfig(num_experts=E, d_expert=F, shared_experts=1, router=RouterOptions("fixed")),
)
INDEX_TK = jnp.array([[0, 3], [1, 4], [2, 0], [4, 3]], jnp.int32)


def fixed(routing, form="token", specials=KINDS) -> Router:
    """A router that always says the same; the weights are its parameters, so that they have a gradient."""

    def route(params, state, tokens, cfg):
        stats = {"load": jnp.zeros(E + len(specials))}
        return Routed(routing(params["weights"]), {}, stats)

    return Router(
        options=RouterOptions(),
        route=route,
        form=form,
        causal=True,
        param_specs=lambda cfg: {"weights": ParamSpec((B * S, 2), (None, None), std=0.5)},
        specials=lambda cfg: specials,
    )


@pytest.fixture
def given(monkeypatch):
    monkeypatch.setitem(ROUTERS, "fixed", fixed(lambda weights_TK: Routing(INDEX_TK, weights_TK)))
    params = init_params(layer.param_specs(CFG), jax.random.key(0))
    assert set(params) == {"router", "experts", "specials", "shared"}
    assert set(params["specials"]) == {"2"}  # constant alone has parameters
    return params, jax.random.normal(jax.random.key(2), (B, S, D))


def without(params, token, slot):
    """As if the router gave this route no weight."""
    return {**params, "router": {"weights": params["router"]["weights"].at[token, slot].set(0.0)}}


def numpy_layer(params, x_BSD):
    """y = shared(x) + sum_k w_k E_k(x), the special experts by their formulas, one route at a time."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def ffn(w, x_D):
        gate = x_D @ w["w_gate"]
        return (gate / (1 + np.exp(-gate)) * (x_D @ w["w_up"])) @ w["w_down"]

    def constant(x_D):
        a = np.exp(x_D @ p["specials"]["2"]["w"])
        a /= a.sum()
        return a[0] * x_D + a[1] * p["specials"]["2"]["v"]

    y_TD = []
    for t, x_D in enumerate(np.asarray(x_BSD, np.float64).reshape(-1, D)):
        outputs = [ffn({k: w[e] for k, w in p["experts"].items()}, x_D) for e in range(E)]
        outputs += [0 * x_D, x_D, constant(x_D)]
        routed = sum(
            w * outputs[e] for e, w in zip(np.asarray(INDEX_TK)[t], p["router"]["weights"][t])
        )
        y_TD.append(ffn(p["shared"], x_D) + routed)
    return np.reshape(y_TD, x_BSD.shape)


@pytest.mark.parametrize("dispatcher", ["auto", "dense"])
def test_special_experts_beside_experts(given, dispatcher):
    params, x_BSD = given
    compute = ComputeConfig(dispatcher=dispatcher)
    y, aux = jax.jit(lambda p, x: layer.moe(p, {}, x, CFG, compute=compute))(params, x_BSD)
    np.testing.assert_allclose(y, numpy_layer(params, x_BSD), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(aux.routing.expert_index_TK, INDEX_TK)  # as the router said it
    assert aux.stats["load"].shape == (E + 3,)
    assert aux.stats["stray"] == aux.stats["dropped"] == 0


def test_special_experts_have_gradients(given):
    """Each weight's is its expert's output times the target; the constant's, by central differences."""
    params, x_BSD = given
    target = np.random.default_rng(0).normal(size=(B, S, D))

    def loss(p, x):
        return (layer.moe(p, {}, x, CFG)[0] * target).sum()

    got, dx_BSD = jax.grad(loss, argnums=(0, 1))(params, x_BSD)
    assert got["router"]["weights"][2, 0] == 0  # zero says nothing, whatever its weight
    np.testing.assert_allclose(  # copy, in the second slot of the first token
        got["router"]["weights"][0, 1], (x_BSD[0, 0] * target[0, 0]).sum(), rtol=1e-5
    )
    arrays = jax.tree.map(lambda a: np.array(a, np.float64), (params, x_BSD))
    constant, here = got["specials"]["2"], arrays[0]["specials"]["2"]
    for gradient, array in (
        (constant["w"], here["w"]),
        (constant["v"], here["v"]),
        (got["router"]["weights"], arrays[0]["router"]["weights"]),
        (dx_BSD, arrays[1]),
    ):
        numeric = np.zeros(gradient.shape)
        for at in np.ndindex(array.shape):
            old, values = array[at], []
            for move in (1e-6, -1e-6):
                array[at] = old + move
                values.append((numpy_layer(*arrays) * target).sum())
            array[at] = old
            numeric[at] = (values[0] - values[1]) / 2e-6
        np.testing.assert_allclose(gradient, numeric, rtol=1e-4, atol=1e-5)  # float32 against 1e-9


def test_a_capacity_is_about_experts_alone(given):
    """C = ceil(0.25 * 4 * 2 / 2) = 1: the third token's second choice finds no slot of expert 0. A special
    expert takes any number of tokens, and what it takes is no drop."""
    params, x_BSD = given
    objective = ObjectiveConfig(capacity_factor=0.25)
    y, aux = layer.moe(params, {}, x_BSD, CFG, objective=objective)
    assert aux.stats["dropped"] == 1 and aux.stats["stray"] == 0
    np.testing.assert_allclose(y, numpy_layer(without(params, 2, 1), x_BSD), rtol=1e-5, atol=1e-6)


def test_a_stray_route_raises_eagerly_and_is_counted_under_jit(given, monkeypatch):
    params, x_BSD = given
    wrong_TK = INDEX_TK.at[1, 0].set(5)
    monkeypatch.setitem(ROUTERS, "fixed", fixed(lambda weights: Routing(wrong_TK, weights)))
    with pytest.raises(ValueError, match="named expert 5; there are 0 to 4"):
        layer.moe(params, {}, x_BSD, CFG)
    y, aux = jax.jit(lambda p, x: layer.moe(p, {}, x, CFG))(params, x_BSD)
    assert aux.stats["stray"] == 1
    np.testing.assert_allclose(y, numpy_layer(without(params, 1, 0), x_BSD), rtol=1e-5, atol=1e-6)


def test_soft_slots(given, monkeypatch):
    """A soft router through the layer: no route is counted as stray, none is dropped, experts mix tokens."""
    params, x_BSD = given
    mix_TEC = jax.random.normal(jax.random.key(3), (2, B * S, E, 1))
    soft = fixed(lambda weights: SoftRouting(*mix_TEC.reshape(2, 1, B * S, E, 1)), "soft", ())
    monkeypatch.setitem(ROUTERS, "fixed", soft)
    y, aux = layer.moe(params, {}, x_BSD, CFG, objective=ObjectiveConfig())
    assert set(aux.stats) == {"load", "dropped"} and aux.stats["dropped"] == 0
    w = jax.tree.map(np.asarray, params)
    x_TD = np.asarray(x_BSD).reshape(-1, D)

    def ffn(w, x):
        gate = x @ w["w_gate"]
        return (gate / (1 + np.exp(-gate)) * (x @ w["w_up"])) @ w["w_down"]

    want = ffn(w["shared"], x_TD)
    for e in range(E):
        slot_1D = np.asarray(mix_TEC[0, :, e]).T @ x_TD
        one = {k: a[e] for k, a in w["experts"].items()}
        want = want + np.asarray(mix_TEC[1, :, e]) @ ffn(one, slot_1D)
    np.testing.assert_allclose(y.reshape(-1, D), want, rtol=1e-5, atol=1e-5)


def test_special_experts_on_a_mesh(given):
    """Experts are exchanged by hand, special ones laid out by the compiler: the values of one device."""
    params, x_BSD = given
    cfg = ExperimentConfig(model=CFG, mesh=MeshConfig(data=2, expert=2))
    layout = make_layout(cfg, jax.devices()[:4])
    assert layout is not None
    placed = jax.device_put((params, x_BSD), layout.replicated)
    run = jax.jit(lambda p, x: layer.moe(p, {}, x, CFG, layout=layout))
    y, aux = run(*placed)
    np.testing.assert_allclose(y, numpy_layer(params, x_BSD), rtol=1e-5, atol=1e-6)
    assert aux.stats["dropped"] == aux.stats["stray"] == 0


@pytest.mark.parametrize("name", ["token_choice", "moe_pp", "soft_moe"])
def test_a_router_in_bfloat16_reads_rounded_numbers(name):
    """compute.router_dtype: the routes of the rounded parameters and inputs, and the experts' values of the
    inputs as they were; rounding once more changes nothing."""
    router = dataclasses.replace(ROUTERS[name].options, name=name)
    moe = dataclasses.replace(CFG.moe, num_experts=4, experts_per_token=2, router=router)
    cfg = dataclasses.replace(CFG, moe=moe)
    params = init_params(layer.param_specs(cfg), jax.random.key(0))
    x_BSD = jax.random.normal(jax.random.key(2), (B, S, D))
    carried = layer.nothing_carried(x_BSD, cfg)
    coarse = ComputeConfig(dispatcher="dense", router_dtype="bfloat16")
    short = lambda a: jnp.asarray(np.asarray(a, jnp.bfloat16), a.dtype)  # noqa: E731

    def run(params, x_BSD, compute):
        y_BSD, aux = layer.moe(params, {}, x_BSD, cfg, compute=compute, carried_BSW=carried)
        return y_BSD, aux.routing

    whole = dataclasses.replace(coarse, router_dtype="float32")
    y, routing = run(params, x_BSD, coarse)
    rounded = {**params, "router": jax.tree.map(short, params["router"])}
    _, expected = run(rounded, short(x_BSD), whole)
    chex.assert_trees_all_equal(routing, expected)
    again, _ = run(rounded, x_BSD, coarse)
    chex.assert_trees_all_equal(y, again)
    other, _ = run(params, x_BSD, whole)
    assert not np.array_equal(y, other)
    if router.name == "token_choice":
        # The experts read x itself: with the routes given, nothing else of the layer changes.
        weights_TK, index_TK = routing.combine_weights_TK, routing.expert_index_TK
        oracle = layer.dispatch(
            params["experts"], x_BSD.reshape(B * S, D), Routing(index_TK, weights_TK), moe, whole
        )[0]
        shared = layer.ffn(params["shared"], x_BSD, layer.of_experts(moe), None)
        chex.assert_trees_all_close(y, oracle.reshape(x_BSD.shape) + shared, rtol=1e-6)


def test_a_router_in_bfloat16_learns_by_rounded_gradients(given):
    """The gradient passes the rounding, and is rounded itself."""
    params, x_BSD = given

    def loss(params, dtype):
        y_BSD, _ = layer.moe(params, {}, x_BSD, CFG, compute=ComputeConfig(router_dtype=dtype))
        return (
            y_BSD.sum()
        )  # linear in the weights: their own rounding does not reach their gradient

    whole = jax.grad(loss)(params, "float32")["router"]["weights"]
    coarse = jax.grad(loss)(params, "bfloat16")["router"]["weights"]
    assert coarse.dtype == jnp.float32
    chex.assert_trees_all_equal(coarse, whole.astype(jnp.bfloat16).astype(jnp.float32))
    assert not np.array_equal(coarse, whole)


def test_a_table_of_ids_is_not_rounded():
    """Whole numbers are no precision: 257 is not 256."""
    tokens = layer.tokens_of(jnp.ones((1, D)), 1)
    params, _ = layer.rounded({"table": jnp.array([257])}, tokens, "bfloat16")
    assert int(params["table"][0]) == 257
