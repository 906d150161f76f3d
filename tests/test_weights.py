"""Every form of a weight: its values, its products and their gradients, and what a decoding program reads."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled import compiled, either  # noqa: F401

from moejax import weights
from moejax.config import ComputeConfig, MoEConfig
from moejax.evals.decode import decode, prefill
from moejax.evals.generate import generate, prepare
from moejax.evals.sample import Sampling, row_keys
from moejax.models import transformer
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.experts import expert_param_specs, ffn, of_experts
from moejax.params import by_path, count, init_params, path_name
from moejax.routers.contract import Routing
from moejax.weights import FORMATS, Format, as_bits, dot, dot_of_few, is_quantized, quantize
from tests.evals.test_generate import CFG, PROMPTS

FEWER = {**FORMATS, "int4 in blocks of 64": Format(4, 64)}
FORMS = ["float32", "bfloat16", *FEWER]
D, F = 128, 24


def form(w, name):
    if name == "bits":
        return as_bits(w.astype(jnp.bfloat16))
    return quantize(w, FEWER[name]) if name in FEWER else w.astype(name)


def quantized(params, cfg, name, block=8):
    """A model's matrices in a form; blocks that fit toy widths."""
    how = None if name not in FEWER else FEWER[name]._replace(block=block)
    roles = {path: spec.role for path, spec in by_path(transformer.param_specs(cfg)).items()}

    def one(path, a):
        if roles[path_name(path)] != "matrix":
            return a
        return a.astype(name) if how is None else quantize(a, how)

    return jax.tree_util.tree_map_with_path(one, params)


@pytest.mark.parametrize("name", FEWER)
def test_values_are_rounded_to_the_nearest(name):
    """Within half a step of their block (int4's last value, at the border opposite to the largest one, within
    a whole one), zeros stay zeros, and what is on the grid stays what it is."""
    w = jax.random.normal(jax.random.key(0), (3, D, F)).at[0, :, 0].set(0)
    q = quantize(w, FEWER[name])
    got = q.astype(jnp.float32)
    step = jnp.repeat(q.scale.astype(jnp.float32), q.block, axis=1)
    # bfloat16's scale is off by 2^-8 of itself, and 8 steps of it by 2^-5.
    most = abs(step) * (0.5 if q.bits == 8 else 1 + 2**-5)
    assert (abs(got - w) <= most + 1e-6).all()
    assert (got[0, :, 0] == 0).all()
    # The scale is computed anew: a few roundings of float32.
    np.testing.assert_allclose(quantize(got, FEWER[name]).astype(jnp.float32), got, rtol=1e-6)
    # As many bits as it says, and the errors of normal values in so many.
    assert (
        q.shape == w.shape and q.nbytes == FEWER[name].nbytes(w.shape) and count({"w": q}) == w.size
    )
    assert q.q.nbytes == w.size * q.bits // 8
    assert jnp.linalg.norm(got - w) < {8: 0.01, 4: 0.1}[q.bits] * jnp.linalg.norm(w)
    np.testing.assert_array_equal(q[1].astype(jnp.float32), got[1])


DEAR = "int4 in blocks of 64"


@pytest.mark.parametrize(
    "name",
    [n if n != DEAR else pytest.param(n, marks=pytest.mark.product) for n in [*FORMS, "bits"]],
)
def test_dot(name):
    """As the product with the matrix written out, in x's dtype, with the gradient of x. float32 sums of 128
    products of order 1: 1e-4."""
    stack = form(jax.random.normal(jax.random.key(0), (2, D, F)), name)
    x_TD = jax.random.normal(jax.random.key(1), (5, D))
    w, full = stack[1], stack[1].astype(jnp.float32)
    products = {
        "few": (lambda x: dot(x, w), x_TD[:1]),
        "many": (lambda x: dot(x, w), x_TD),
        "in a stack": (lambda x: dot_of_few(x, stack, jnp.int32(1)), x_TD[:2]),
    }
    for product, x in products.values():
        y, pullback = jax.vjp(product, x)
        np.testing.assert_allclose(y, x @ full, atol=1e-4)
        np.testing.assert_allclose(pullback(y)[0], y @ full.T, rtol=1e-4, atol=1e-3)
        short = product(x.astype(jnp.bfloat16))
        assert short.dtype == jnp.bfloat16
        # Sums of 128 values of order 1 have order 11; bfloat16 keeps 8 bits of each factor and of the result.
        np.testing.assert_allclose(short.astype(jnp.float32), x @ full, atol=0.5)


@pytest.mark.parametrize("name", ["float32", "bits", *FORMATS])
def test_columns_are_read_a_few_at_a_time(name, monkeypatch):
    """A matrix with many outputs, as a head has: two pieces of 10 and a rest of 4, the same sums."""
    stack = form(jax.random.normal(jax.random.key(0), (2, D, F)), name)
    x_TD = jax.random.normal(jax.random.key(1), (2, D))
    want = jax.jit(dot_of_few)(x_TD, stack, jnp.int32(1))
    monkeypatch.setattr(weights, "COLUMNS", 10)
    got = jax.jit(lambda *a: dot_of_few(*a))(x_TD, stack, jnp.int32(1))
    # float32 sums of 128 products of order 1.
    np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 3])
def test_the_head_as_bits(rows):
    """As the product of its bfloat16 values, each exact in float32, in sums of that."""
    head = jax.random.normal(jax.random.key(0), (D, F)).astype(jnp.bfloat16)
    hidden_BSD = jax.random.normal(jax.random.key(1), (rows, 1, D)).astype(jnp.bfloat16)
    got = transformer.logits({"head": as_bits(head)}, hidden_BSD)
    want = transformer.logits({"head": head}, hidden_BSD)
    assert got.dtype == want.dtype == jnp.float32 and got.shape == want.shape
    np.testing.assert_allclose(got, want, atol=1e-4)
    assert is_quantized(prepare({"head": head}, "bfloat16")["head"])
    # A tied one is read like any other; the embedding stays what it was.
    tied = {"embed": {"tokens": head.T}}
    ready = prepare(tied, "bfloat16")
    assert is_quantized(ready["head"]) and ready["embed"]["tokens"] is tied["embed"]["tokens"]
    np.testing.assert_allclose(
        transformer.logits(ready, hidden_BSD), transformer.logits(tied, hidden_BSD), atol=1e-4
    )
    assert "head" not in prepare({"embed": {"tokens": head.T.astype(jnp.float32)}}, "float32")


@pytest.mark.parametrize("tokens, implementation", [(3, "auto"), (40, "auto"), (40, "reference")])
@pytest.mark.parametrize("name", ["bfloat16", *FORMATS])
def test_experts(name, tokens, implementation, either):  # noqa: F811
    """A few rows and many (the two paths of a CPU), and grouped products: as each token through its experts one
    by one; so is the gradient of tokens and weights, and a quantised matrix has none. Sums of order 1 in
    float32, and bfloat16's products in it too: 1e-4."""
    moe = MoEConfig(num_experts=4, d_expert=16, ffn_bias=True)
    whole = init_params(expert_param_specs(moe, 16, 0.3), jax.random.key(0))
    how = functools.partial(form, name=name)
    if name in FEWER:
        how = lambda w: quantize(w, FEWER[name]._replace(block=8))  # noqa: E731
    params = {k: how(w) if k.startswith("w_") else w + 0.1 for k, w in whole.items()}
    x_TD = jax.random.normal(jax.random.key(1), (tokens, 16))
    index_TK = jax.random.randint(jax.random.key(2), (tokens, 2), -1, 4)
    weights_TK = jax.random.uniform(jax.random.key(3), (tokens, 2))
    act = of_experts(moe)

    def routed(params, x_TD, weights_TK):
        return dropless(params, x_TD, Routing(index_TK, weights_TK), act, implementation)[0]

    def one_by_one(params, x_TD, weights_TK):
        each = [ffn(jax.tree.map(lambda a: a[e], params), x_TD, act) for e in range(4)]  # noqa: B023
        weight_ET = jnp.stack([((index_TK == e) * weights_TK).sum(1) for e in range(4)])
        return sum(w[:, None] * y for w, y in zip(weight_ET, each))

    full = {k: w.astype(jnp.float32) for k, w in params.items()}
    np.testing.assert_allclose(
        jax.jit(routed)(params, x_TD, weights_TK), one_by_one(full, x_TD, weights_TK), atol=1e-4
    )
    learned = {k: w for k, w in params.items() if not is_quantized(w)}

    def loss(learned, x_TD, weights_TK, f, rest):
        return (f({**rest, **learned}, x_TD, weights_TK) ** 2).sum()

    got = jax.jit(jax.grad(loss, (0, 1, 2)), static_argnums=3)(
        learned, x_TD, weights_TK, routed, params
    )
    want = jax.grad(loss, (0, 1, 2))(
        {k: full[k] for k in learned}, x_TD, weights_TK, one_by_one, full
    )
    # Sums over 40 tokens of products of order 1; bfloat16's own gradients are rounded to 8 bits.
    rough = 0.02 if name == "bfloat16" else 1e-4
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=rough, atol=max(rough, 1e-3))


@pytest.fixture(scope="module")
def model():
    cfg = dataclasses.replace(CFG, num_layers=3)
    return cfg, init_params(transformer.param_specs(cfg), jax.random.key(0))


@pytest.mark.parametrize("name", ["int4", pytest.param("int8", marks=pytest.mark.product)])
def test_generating_is_as_with_the_matrices_written_out(model, name, either):  # noqa: F811
    cfg, params = model
    state = transformer.init_router_state(cfg)
    few = quantized(params, cfg, name)
    full = jax.tree.map(lambda w: w.astype(jnp.float32), few, is_leaf=is_quantized)
    assert generate(few, state, cfg, PROMPTS, 6) == generate(full, state, cfg, PROMPTS, 6)
    whole = generate(params, state, cfg, PROMPTS, 6)
    assert name == "int8" or whole != generate(few, state, cfg, PROMPTS, 6)  # rounding is seen


@pytest.mark.parametrize("name", ["float32", *FORMATS])
def test_experts_stay_where_they_lie(model, name):
    """A second copy of them, in layers, would not fit beside the first."""
    cfg, params = model
    params = quantized(params, cfg, name)
    before = params["moe_blocks"]["moe"]["experts"]
    after = prepare(params, "float32")
    leaves = jax.tree.leaves(after["experts"])
    assert len(leaves) >= 3
    for a, b in zip(leaves, jax.tree.leaves(before), strict=True):
        assert a.unsafe_buffer_pointer() == b.unsafe_buffer_pointer()


# Operations that compute nothing: names for what lies somewhere.
_NAMES = ("parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call")


def results(text):
    """(size, operation) of every array that a compiled program writes. What happens inside of a fusion is not
    written."""
    inside = set(re.findall(r"calls=(%[\w.-]+)", text))
    for part in re.split(r"\n(?=(?:ENTRY )?%[\w.-]+ \()", text):
        if part.split(" ", 1)[0] in inside:
            continue
        for dims, op in re.findall(r"\n\s*(?:ROOT )?%\S+ = \w+\[([\d,]*)\]\S* ([\w-]+)\(", part):
            if op not in _NAMES:
                yield int(np.prod([int(n) for n in dims.split(",") if n])), op


@pytest.mark.parametrize("name", ["float32", "bfloat16", *FORMATS])
def test_decoding_touches_only_the_experts_of_its_token(model, name, either):  # noqa: F811
    """Nothing in the compiled program has the size of one matrix of each of a layer's experts."""
    cfg, params = model
    # Many experts and a small vocabulary: nothing else is as large.
    moe = dataclasses.replace(cfg.moe, num_experts=64, d_expert=32)
    cfg = dataclasses.replace(cfg, moe=moe)
    params = init_params(transformer.param_specs(cfg), jax.random.key(0))
    compute = ComputeConfig(dtype="bfloat16" if name == "bfloat16" else "float32")
    params = prepare(quantized(params, cfg, name), compute.dtype)
    state, one = transformer.init_router_state(cfg), jnp.ones(1, jnp.int32)
    how, keys = Sampling(0.0, 0, 1.0), row_keys(0, [0])
    prompt = (jnp.ones((1, 16), jnp.int32), one, one, keys, one)
    before = prefill(params, state, *prompt, cfg, compute, 16, how, False, None)
    args = (before, jnp.int32(1), keys, one, cfg, compute, how, None)
    text = decode.jitted.lower(params, state, *args).compile().as_text()
    stack = 64 * cfg.d_model * 32
    sizes = sorted(set(results(text)), reverse=True)
    assert len(sizes) > 5
    assert sizes[0][0] < stack // 4, sizes[:5]
