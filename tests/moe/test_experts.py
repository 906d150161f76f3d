"""Expert FFNs and the dropless dispatcher against a plain NumPy oracle in float64."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from moejax.config import ModelConfig, MoEConfig
from moejax.moe import routed_ffn, rows, windowed_ffn
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.experts import (
    ACTIVATIONS,
    expert_ffn_slots,
    expert_param_specs,
    ffn,
    ffn_param_specs,
    of_experts,
)
from moejax.moe.grouped_matmul import windows
from moejax.moe.rows import sort_routes
from moejax.options import choices_of
from moejax.params import init_params
from moejax.routers.contract import Routing

E, D, F, T, K = 6, 8, 5, 24, 3
LIMIT = 1.5  # low enough to clamp about a tenth of the values below


def _config(activation="swiglu", bias=False):
    return MoEConfig(
        num_experts=E,
        experts_per_token=K,
        d_expert=F,
        activation=activation,
        activation_limit=LIMIT,
        ffn_bias=bias,
    )


def _params(moe, seed=0):
    """Random parameters, biases too, of a size that makes hidden values about 1."""
    rng = np.random.default_rng(seed)
    specs = expert_param_specs(moe, D, 0.006)
    return {k: rng.normal(size=s.shape) / np.sqrt(D) for k, s in specs.items()}


def _silu(x):
    return x / (1 + np.exp(-x))


def _hidden(activation, gate, up):
    """The activations again, from their papers, in NumPy."""
    if activation == "swiglu":
        return _silu(gate) * up
    if activation == "swiglu_clamped":
        return _silu(np.minimum(gate, LIMIT)) * np.clip(up, -LIMIT, LIMIT)
    if activation == "swiglu_oai":
        gate, up = np.minimum(gate, LIMIT), np.clip(up, -LIMIT, LIMIT)
        return (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    return 0.5 * up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))


def _expert(params, e, x, activation):
    """One expert's FFN of one token."""

    def linear(name, x):
        return x @ params[f"w_{name}"][e] + (params[f"b_{name}"][e] if f"b_{name}" in params else 0)

    gate = linear("gate", x) if "w_gate" in params else None
    return linear("down", _hidden(activation, gate, linear("up", x)))


def _layer(params, x_TD, index_TK, weights_TK, activation):
    """The whole layer, one route at a time."""
    y_TD = np.zeros_like(x_TD)
    for t, k in np.ndindex(index_TK.shape):
        if index_TK[t, k] >= 0:
            y_TD[t] += weights_TK[t, k] * _expert(params, index_TK[t, k], x_TD[t], activation)
    return y_TD


def _routes(kind, seed=1):
    rng = np.random.default_rng(seed)
    if kind.startswith("many rows"):
        # 720 rows: windows of seven lengths (`windows.static_lengths`) or of the longest alone; groups longer
        # than that.
        index_TK = rng.choice(E, size=(240, K), p=[0.4, 0.3, 0.2, 0.08, 0.02, 0]).astype(np.int32)
        return index_TK, rng.random((240, K))
    if kind == "a row for an expert":
        return np.array([[4, 0, -1], [0, 5, 2]], np.int32), rng.random((2, K))
    if kind == "rows without experts":
        return np.array([[-1, -1, -1], [3, -1, 2]], np.int32), rng.random((2, K))
    index_TK = np.stack([rng.permutation(E)[:K] for _ in range(T)]).astype(np.int32)
    if kind == "skewed":
        index_TK = rng.choice(E, size=(T, K), p=[0.8, 0.1, 0.06, 0.04, 0, 0]).astype(np.int32)
    if kind == "with empty slots":
        index_TK[rng.random((T, K)) < 0.4] = -1
        index_TK[3] = -1
    if kind == "all empty":
        index_TK[:] = -1
    return index_TK, rng.random((T, K))


def _numerical_gradient(loss, array, entries, step=1e-6):
    """Central differences of `loss` at random entries of `array` (changed in place and
    restored)."""
    rng = np.random.default_rng(2)
    out = []
    for i in rng.choice(array.size, size=min(entries, array.size), replace=False):
        old = array.flat[i]
        array.flat[i] = old + step
        up = loss()
        array.flat[i] = old - step
        out.append((i, (up - loss()) / (2 * step)))
        array.flat[i] = old
    return out


# 'auto' on a CPU, what it is on other devices ("auto elsewhere"), and the implementations. These differ in the
# products alone: one activation, with biases, will do for them. Windows of many lengths are the CPU path's own.
CASES = [
    (implementation, activation, kind)
    for implementation in ("auto", "auto elsewhere", "ragged", "reference")
    for activation in (ACTIVATIONS if implementation.startswith("auto") else ("swiglu_oai",))
    for kind in (
        *("uniform", "skewed", "with empty slots", "all empty"),
        # As many experts as rows: each row by itself.
        *("a row for an expert", "rows without experts"),
    )
] + [("auto", "swiglu_oai", "many rows"), ("auto", "swiglu_oai", "many rows, one length")]


@pytest.mark.parametrize(("implementation", "activation", "kind"), CASES)
def test_dropless_against_numpy(implementation, activation, kind, monkeypatch):
    """Value and every gradient (x, weights, each parameter), in float64."""
    if kind == "many rows":
        monkeypatch.setattr(windows, "TINY", 0)
    if implementation == "auto elsewhere":
        implementation = "auto"
        monkeypatch.setattr(routed_ffn, "_choose", lambda cpu, grouped, *args: grouped(*args))
    lengths = windows.static_lengths(720, E, D * F)
    assert len(lengths) == (7 if kind == "many rows" else 1) and lengths[-1] == 168
    moe = _config(activation, bias=activation == "swiglu_oai")
    params = _params(moe)
    rng = np.random.default_rng(3)
    index_TK, weights_TK = _routes(kind)
    x_TD, target_TD = rng.normal(size=(2, len(index_TK), D))

    def numpy_loss():
        return np.sum(_layer(params, x_TD, index_TK, weights_TK, activation) * target_TD)

    @jax.jit
    def value_and_gradients(params, x, weights):
        def loss(params, x, weights):
            routing = Routing(index_TK, weights)
            y, dropped = dropless(params, x, routing, of_experts(moe), implementation)
            return jnp.sum(y * target_TD), (y, dropped)

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, weights)

    with jax.enable_x64(True):
        (_, (y, dropped)), (dparams, dx, dweights) = value_and_gradients(params, x_TD, weights_TK)
    want = _layer(params, x_TD, index_TK, weights_TK, activation)
    np.testing.assert_allclose(y, want, rtol=0, atol=1e-12)  # float64 sums of a few dozen terms
    assert dropped == 0
    for name, array, got in [
        ("x", x_TD, dx),
        ("weights", weights_TK, dweights),
        *((k, params[k], dparams[k]) for k in params),
    ]:
        entries = 4 if kind.startswith("many rows") else 12  # the oracle takes a route at a time
        for i, slope in _numerical_gradient(numpy_loss, array, entries):
            # Central differences: step^2 f'''/6 plus eps |loss| / step, about 1e-9 here.
            np.testing.assert_allclose(
                np.asarray(got).flat[i], slope, rtol=1e-6, atol=1e-7, err_msg=f"{name}[{i}]"
            )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dropless_dtypes(dtype):
    """float32 parameters, tokens in the compute dtype: results in that dtype, gradients in float32
    for parameters and weights."""
    moe = _config("swiglu", bias=True)
    params = _params(moe)
    x_TD = np.random.default_rng(3).normal(size=(T, D))
    index_TK, weights_TK = _routes("with empty slots")
    as_f32 = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    x, weights = jnp.asarray(x_TD, dtype), jnp.asarray(weights_TK, jnp.float32)

    def forward(params, x, weights):
        routing = Routing(jnp.asarray(index_TK), weights)
        return dropless(params, x, routing, of_experts(moe))[0]

    y, pull = jax.vjp(jax.jit(forward), as_f32, x, weights)
    dparams, dx, dweights = pull(y)
    assert y.dtype == dx.dtype == dtype and dweights.dtype == jnp.float32
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(dparams))
    want = _layer(params, x_TD, index_TK, weights_TK, "swiglu")
    # Inputs, weights, hidden values and results are rounded to dtype: four roundings of values
    # up to about 3, and their errors summed over K routes.
    atol = 4 * 3 * K * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(y, np.float64), want, rtol=0, atol=atol)
    np.testing.assert_array_equal(np.asarray(y[3], np.float32), 0)  # a token without experts


# Few shapes, so few compiles; the groups within them are free.
@hypothesis.settings(max_examples=40, deadline=None, derandomize=True)
@hypothesis.given(
    tokens=st.sampled_from([7, 150]),
    shares=st.lists(st.integers(0, 9), min_size=E + 1, max_size=E + 1),
    seed=st.integers(0, 2**16),
)
def test_windows_of_drawn_groups(tokens, shares, seed):
    """The CPU path against one product per expert; `shares` of the experts, and of empty slots."""
    rng = np.random.default_rng(seed)
    total = sum(shares)
    chance = [s / total for s in shares] if total else [0] * E + [1]
    index = rng.choice([*range(E), -1], size=(tokens, 1), p=chance).astype(np.int32)
    arrays = [rng.normal(size=shape) for shape in ((tokens, D), (tokens, 1), (tokens, D))]
    x, weights, target = (jnp.asarray(a, jnp.float32) for a in arrays)
    params = jax.tree.map(jnp.float32, _params(_config(bias=True)))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(windows, "TINY", 0)  # of all lengths
        got = _drawn(params, x, weights, index, target, "auto")
    want = _drawn(params, x, weights, index, target, "reference")
    # float32 sums of at most 150 terms of order 1, in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=5e-5), got, want)


@functools.partial(jax.jit, static_argnames="implementation")
def _drawn(params, x, weights, index, target, implementation):
    def loss(params, x, weights):
        act = of_experts(_config(bias=True))
        y, _ = dropless(params, x, Routing(index, weights), act, implementation)
        return jnp.sum(y * target), y

    return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(params, x, weights)


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_the_path_is_chosen_at_lowering(platform):
    """Windows in a loop on CPU; ragged products on accelerators, and no trace of the loop."""
    params = jax.tree.map(jnp.float32, _params(_config()))
    index, weights = _routes("many rows")
    args = (params, jnp.ones((240, D)), jnp.asarray(weights, jnp.float32))
    args += (jnp.asarray(index), jnp.ones((240, D)), "auto")
    text = _drawn.trace(*args).lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) == (platform == "cpu")
    assert ("ragged_dot" in text) == (platform != "cpu")


@pytest.mark.parametrize("kind", ["rows without experts", "no row at all"])
def test_a_row_by_itself_reads_no_token_without_an_expert(kind):
    """And no expert without a row, neither forward nor backward; windows of whole experts give the same."""
    params = jax.tree.map(jnp.float32, _params(_config(bias=True)))
    broken = jax.tree.map(lambda a: a.at[E - 1].set(jnp.nan), params)
    index, weights = _routes("rows without experts")
    index = index if kind == "rows without experts" else np.full_like(index, -1)
    x = jnp.stack([jnp.full(D, jnp.nan), jnp.ones(D)])
    args = x, jnp.asarray(weights, jnp.float32), jnp.asarray(index), jnp.ones((2, D))
    got = _drawn(broken, *args, "auto")
    with pytest.MonkeyPatch.context() as m:
        m.setattr(windowed_ffn, "ROW_BY_ROW", 0)
        want = jax.jit(lambda *a: _drawn.__wrapped__(*a, "auto"))(params, *args)
    chex.assert_tree_all_finite(got)
    # float32 sums of a few terms of order 1.
    chex.assert_trees_all_close(got, want, atol=1e-6)


def test_a_row_by_itself_finds_its_layer_in_a_stack():
    """Forward and backward, of the second of two layers, as of that layer alone."""
    layers = [jax.tree.map(jnp.float32, _params(_config(), seed)) for seed in (0, 1)]
    both = jax.tree.map(lambda *a: jnp.concatenate(a), *layers)
    act, sizes = of_experts(_config()), jnp.array([1, 0, 0, 2, 0, 0], jnp.int32)
    x, dy = np.random.default_rng(3).normal(size=(2, 2, D)).astype("float32")
    rows = jnp.asarray(x), jnp.array([0.5, 2.0, 1.0]), jnp.array([0, 1, 0]), sizes

    @jax.jit
    def run(stack, first):
        y, inputs = windowed_ffn.forward(stack, first, *rows, act)
        return y, windowed_ffn.backward(stack, first, *rows, inputs, jnp.asarray(dy), act)

    got, want = run(both, jnp.int32(E)), run(layers[1], jnp.int32(0))
    chex.assert_trees_all_equal(got, want)
    assert all(np.any(np.asarray(a)) for a in jax.tree.leaves(got))


def test_dropless_is_deterministic_and_gradients_need_no_scatter():
    moe, params = _config(), jax.tree.map(jnp.float32, _params(_config()))
    x = jnp.ones((T, D), jnp.float32)
    index_TK, weights_TK = _routes("uniform")

    def loss(params, x, weights):
        routing = Routing(jnp.asarray(index_TK), weights)
        return jnp.sum(dropless(params, x, routing, of_experts(moe))[0] ** 2)

    gradients = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    args = (params, x, jnp.asarray(weights_TK, jnp.float32))
    for a, b in zip(jax.tree.leaves(gradients(*args)), jax.tree.leaves(gradients(*args))):
        np.testing.assert_array_equal(a, b)
    # The one scatter left inverts the permutation: integers, each written once.
    scatters = [
        line
        for line in gradients.lower(*args).as_text().splitlines()
        if "stablehlo.scatter" in line
    ]
    assert len(scatters) <= 1, scatters


def test_dropless_in_shard_map():
    """Tokens split, experts replicated: gradients are sums over devices, types checked."""
    moe = _config("swiglu", bias=True)
    params = jax.tree.map(jnp.float32, _params(moe))
    index_TK, weights_TK = _routes("with empty slots")
    x = jnp.asarray(np.random.default_rng(3).normal(size=(T, D)), jnp.float32)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    P = PartitionSpec

    def local(params, x, index, weights):
        return dropless(params, x, Routing(index, weights), of_experts(moe))[0]

    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P("data"), P("data"), P("data")), out_specs=P("data")
    )

    @functools.partial(jax.jit, static_argnums=0)
    def value_and_gradients(function, *args):
        def loss(params, x, weights):
            y = function(params, x, jnp.asarray(index_TK), weights)
            return jnp.sum(y**2), y

        return jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(*args)

    args = (params, x, jnp.asarray(weights_TK, jnp.float32))
    got, want = value_and_gradients(sharded, *args), value_and_gradients(local, *args)
    # The same float32 sums in another order: sums of at most T K = 72 terms of about 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5), got, want)


def test_tokens_without_experts_are_not_read():
    """They may hold anything: NaN there reaches no value and no gradient."""
    moe, params = _config(bias=True), jax.tree.map(jnp.float32, _params(_config(bias=True)))
    index_TK, weights_TK = _routes("with empty slots")
    x = jnp.asarray(np.random.default_rng(3).normal(size=(T, D)), jnp.float32)
    routing = Routing(jnp.asarray(index_TK), jnp.asarray(weights_TK, jnp.float32))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def gradients(params, x):
        y, _ = dropless(params, x, routing, of_experts(moe))
        return jnp.sum(y**2), y

    got, want = gradients(params, x.at[3].set(jnp.nan)), gradients(params, x)
    chex.assert_trees_all_equal(got, want)


@pytest.mark.parametrize("index", [0, 2])
def test_experts_read_in_the_stack_of_layers(index):
    """The same values, and the whole gradient goes to the slice."""
    moe = _config(bias=True)
    layers = [jax.tree.map(jnp.float32, _params(moe, seed)) for seed in range(3)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *layers)
    index_TK, weights_TK = _routes("uniform")
    routing = Routing(jnp.asarray(index_TK), jnp.asarray(weights_TK, jnp.float32))
    x = jnp.asarray(np.random.default_rng(3).normal(size=(T, D)), jnp.float32)

    @jax.jit
    def alone(params):
        return jnp.sum(dropless(params, x, routing, of_experts(moe))[0] ** 2)

    @jax.jit
    def in_the_stack(stacked, i):
        params = jax.tree.map(lambda a: a[index], stacked)
        y, _ = dropless(params, x, routing, of_experts(moe), stack=(stacked, i))
        return jnp.sum(y**2)

    want, dparams = jax.value_and_grad(alone)(layers[index])
    got, dstack = jax.value_and_grad(in_the_stack)(stacked, jnp.int32(index))
    np.testing.assert_allclose(got, want, rtol=1e-6)  # one rounding of a float32 sum
    for k, g in dstack.items():
        np.testing.assert_allclose(g[index], dparams[k], rtol=1e-5, atol=1e-5)
        assert not np.any(np.delete(g, index, axis=0))


@pytest.mark.parametrize("compared", [0, 2**24])
def test_routes_are_sorted_stably_and_counted(monkeypatch, compared):
    """By comparing, or by searching what is sorted; where route and expert fit one integer, or not."""
    monkeypatch.setattr(rows, "COMPARED", compared)
    index_TK = np.random.default_rng(0).integers(-1, 7, (50, 3)).astype(np.int32)
    for num_experts in (7, 9, 2**31 // 150):
        if compared and num_experts > 9:
            continue  # as many comparisons
        routes = sort_routes(jnp.asarray(index_TK), num_experts)
        flat_R = np.where(index_TK < 0, num_experts, index_TK).reshape(-1)
        np.testing.assert_array_equal(routes.route_R, np.argsort(flat_R, kind="stable"))
        counts = np.bincount(flat_R, minlength=num_experts)[:num_experts]
        np.testing.assert_array_equal(routes.group_sizes_E, counts)
        assert routes.group_sizes_E.dtype == jnp.int32
    routes = sort_routes(jnp.asarray([[2, 0], [-1, 2], [0, -1]], jnp.int32), 3)
    np.testing.assert_array_equal(routes.route_R, [1, 4, 0, 3, 2, 5])
    np.testing.assert_array_equal(routes.row_TK, [[2, 0], [4, 3], [1, 5]])
    np.testing.assert_array_equal(routes.group_sizes_E, [2, 0, 2])


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_slots_and_single_ffn(activation, bias):
    """E FFNs over slots, and one dense FFN, against the same oracle."""
    moe = _config(activation, bias)
    params = _params(moe)
    x_ECD = np.random.default_rng(4).normal(size=(E, 4, D))
    f32 = functools.partial(jax.tree.map, lambda a: jnp.asarray(a, jnp.float32))
    want = np.stack([[_expert(params, e, x, activation) for x in x_ECD[e]] for e in range(E)])
    atol = 5e-6  # float32 sums of 8 terms of about 1
    np.testing.assert_allclose(
        expert_ffn_slots(f32(params), f32(x_ECD), of_experts(moe)), want, atol=atol
    )
    one = {k: v[2] for k, v in params.items()}
    got = ffn(f32(one), f32(x_ECD)[2], of_experts(moe))
    np.testing.assert_allclose(got, want[2], atol=atol)
    # A slice of the experts is a set of experts.
    part = {k: v[1:3] for k, v in params.items()}
    rows = f32(x_ECD)[1:3].reshape(8, D)
    routing = Routing(jnp.repeat(jnp.arange(2), 4)[:, None], jnp.ones((8, 1)))
    got, _ = dropless(f32(part), rows, routing, of_experts(moe))
    np.testing.assert_allclose(got, want[1:3].reshape(8, D), atol=atol)


def test_param_specs():
    for cls in (MoEConfig, ModelConfig):
        assert set(ACTIVATIONS) == set(choices_of(cls, "activation"))
    specs = expert_param_specs(_config("swiglu_oai", bias=True), D, 0.02)
    assert {k: s.shape for k, s in specs.items()} == {
        "w_gate": (E, D, F),
        "w_up": (E, D, F),
        "w_down": (E, F, D),
        "b_gate": (E, F),
        "b_up": (E, F),
        "b_down": (E, D),
    }
    assert specs["w_gate"].axes == ("expert", "expert_embed", "expert_mlp")
    assert specs["w_down"].axes == ("expert", "expert_mlp", "expert_embed")
    assert specs["b_down"].axes == ("expert", "expert_embed")
    assert specs["w_up"].std == 0.02 and specs["b_up"].init == "zeros"
    dense = ffn_param_specs(D, 11, "gelu_tanh", True, 0.02)
    assert {k: s.axes for k, s in dense.items()} == {
        "w_up": ("embed", "mlp"),
        "w_down": ("mlp", "embed"),
        "b_up": ("mlp",),
        "b_down": ("embed",),
    }
    values = init_params(expert_param_specs(_config(), D, 0.02), jax.random.key(0))
    assert values["w_down"].shape == (E, F, D)
