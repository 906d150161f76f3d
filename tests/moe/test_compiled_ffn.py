"""The expert FFN by compiled products against products in plain JAX, which NumPy has checked (test_experts)."""

import functools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled  # noqa: F401

from moejax.config import MoEConfig
from moejax.moe import compiled_ffn
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.experts import ACTIVATIONS, expert_param_specs, of_experts
from moejax.params import init_params
from moejax.routers.contract import Routing
from moejax.weights import FORMATS, is_quantized, quantize

E, D, F, T, K = 6, 32, 24, 40, 3


def case(activation="swiglu", bias=True, seed=0):
    moe = MoEConfig(
        num_experts=E,
        experts_per_token=K,
        d_expert=F,
        activation=activation,
        activation_limit=1.5,
        ffn_bias=bias,
    )
    key = jax.random.key(seed)
    params = init_params(expert_param_specs(moe, D, D**-0.5), key)
    shift = lambda k, w: w + 0.1 * jax.random.normal(key, w.shape) if k.startswith("b_") else w  # noqa: E731
    return of_experts(moe), {k: shift(k, w) for k, w in params.items()}


def rows(shares, tokens=T, seed=1):
    """Tokens, weights, a target, and routes of which each expert (and the empty slot) gets its share."""
    rng = np.random.default_rng(seed)
    chance = np.asarray(shares) / max(sum(shares), 1)
    index_TK = rng.choice([*range(E), -1], size=(tokens, K), p=chance).astype(np.int32)
    x, target = rng.normal(size=(2, tokens, D))
    weights = rng.random((tokens, K))
    return (*(jnp.asarray(a, jnp.float32) for a in (x, weights, target)), index_TK)


@functools.partial(jax.jit, static_argnames=("act", "implementation"))
def run(params, x, weights, target, index, act, implementation="auto"):
    """The value, and the gradients of what can have one."""
    learned = {k: w for k, w in params.items() if not is_quantized(w)}

    def loss(learned, x, weights):
        routing = Routing(index, weights)
        y, _ = dropless({**params, **learned}, x, routing, act, implementation)
        return jnp.sum(y.astype(jnp.float32) * target), y

    (_, y), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(learned, x, weights)
    return y, gradients


def plain(*args):
    return run(*args, implementation="reference")


def assert_close(got, want, scale=1.0):
    """Sums of up to T K products of about 1, in float32 and in another order."""
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    chex.assert_trees_all_close(got, want, rtol=1e-4 * scale, atol=2e-5 * scale)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_value_and_gradients(compiled, activation, bias):  # noqa: F811
    act, params = case(activation, bias)
    args = (params, *rows([3, 1, 2, 0, 5, 1, 2]), act)
    assert "moejax_outer" in str(jax.make_jaxpr(run, static_argnums=5)(*args))
    assert_close(run(*args), plain(*args))


@hypothesis.settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@hypothesis.given(
    tokens=st.sampled_from([3, 150]),
    shares=st.lists(st.integers(0, 9), min_size=E + 1, max_size=E + 1).filter(any),
    seed=st.integers(0, 2**16),
)
def test_drawn_groups(compiled, tokens, shares, seed):  # noqa: F811
    """Few rows and many, empty experts, empty slots."""
    act, params = case()
    args = (params, *rows(shares, tokens, seed), act)
    assert_close(run(*args), plain(*args), 4)


def test_without_a_gradient_few_rows_give_the_same(compiled):  # noqa: F811
    """Decoding takes the forward pass alone."""
    act, params = case()
    x, weights, _, index = rows([1] * (E + 1), tokens=2)
    y = dropless(params, x, Routing(index, weights), act)[0]
    want = dropless(params, x, Routing(index, weights), act, "reference")[0]
    assert_close(y, want)


@pytest.mark.parametrize("name", FORMATS)
def test_quantised_experts(compiled, name):  # noqa: F811
    """Their products, and the gradients of all that is not quantised."""
    act, params = case()
    quantised = {
        k: quantize(w, FORMATS[name].of(w.shape[1])) if k.startswith("w_") else w
        for k, w in params.items()
    }
    written_out = {k: w.astype(jnp.float32) for k, w in quantised.items()}
    args = (*rows([3, 1, 2, 0, 5, 1, 2]), act)
    y, (dparams, *others) = run(quantised, *args)
    want, (dwhole, *others_wanted) = plain(written_out, *args)
    assert set(dparams) == {"b_gate", "b_up", "b_down"}
    wanted = (want, {k: dwhole[k] for k in dparams}, others_wanted)
    assert_close((y, dparams, others), wanted, 4)


def test_bfloat16_tokens(compiled):  # noqa: F811
    """Four roundings to 8 bits of values up to about 3, summed over K routes; parameters' gradients stay
    float32."""
    act, params = case()
    x, weights, target, index = rows([3, 1, 2, 0, 5, 1, 2])
    got = run(params, x.astype(jnp.bfloat16), weights, target, index, act)
    want = plain(params, x, weights, target, index, act)
    assert got[0].dtype == got[1][1].dtype == jnp.bfloat16
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(got[1][0]))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want)):
        atol = 4 * K * 2**-8 * float(jnp.abs(b).max())
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=0, atol=atol)


def test_no_token_without_an_expert_and_no_expert_without_a_row_is_read(compiled):  # noqa: F811
    act, params = case()
    x, weights, target, index = rows([3, 1, 2, 0, 5, 1, 2])
    index[5] = -1
    broken = {k: w.at[3].set(jnp.nan) for k, w in params.items()}
    got = run(broken, x.at[5].set(jnp.nan), weights, target, index, act)
    chex.assert_trees_all_equal(got, run(params, x, weights, target, index, act))


def test_the_second_layer_of_a_stack(compiled):  # noqa: F811
    """Read where it lies, forward and backward."""
    act, first = case()
    second = case(seed=1)[1]
    both = jax.tree.map(lambda *a: jnp.concatenate(a), first, second)
    x, weights, dy, _ = rows([1] * (E + 1))
    sizes = jnp.array([4, 0, 20, 1, 7, 2], jnp.int32)
    args = x, weights[:34, 0], jnp.arange(34, dtype=jnp.int32), sizes

    @jax.jit
    def layer(stack, at):
        y, inputs = compiled_ffn.forward(stack, at, *args, act)
        return y, compiled_ffn.backward(stack, at, *args, inputs, dy, act)

    chex.assert_trees_all_equal(layer(both, E), layer(second, 0))


def test_the_same_bits_again(compiled):  # noqa: F811
    act, params = case()
    args = (params, *rows([3, 1, 2, 0, 5, 1, 2]), act)
    chex.assert_trees_all_equal(run(*args), run(*args))


def test_float64_on_either_side_is_left_to_jax(compiled):  # noqa: F811
    act, params = case()
    with jax.enable_x64(True):
        for kind, wide in (("float32", "float64"), ("float64", "float32")):
            given = {k: w.astype(wide) for k, w in params.items()}
            x, weights, target, index = rows([3, 1, 2, 0, 5, 1, 2])
            args = (given, x.astype(kind), weights, target, index, act)
            assert "moejax" not in str(jax.make_jaxpr(run, static_argnums=5)(*args))
