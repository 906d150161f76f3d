"""The residual in several streams (2512.24880) against float64 NumPy, token by token, and in the model.

In float64 both sides differ by rounding alone: 1e-12 of values near 1 after some hundred operations.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention import mha
from moejax.attention.contract import Call
from moejax.config import AttentionConfig, ComputeConfig, ModelConfig, MoEConfig, StreamsConfig
from moejax.models import blocks, embedding, mtp, transformer
from moejax.models import hyper_connections as hc
from moejax.models.zoo import lost_fields
from moejax.moe.layer import moe
from moejax.params import map_specs

N, STEPS, EPS = 3, 4, 1e-3  # few steps and a large eps: each of them shows
CFG = ModelConfig(
    vocab_size=31, d_model=8, num_layers=2, num_dense_layers=0, mtp_depth=2, norm_eps=1e-2,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4),
    moe=MoEConfig(num_experts=3, experts_per_token=2, d_expert=6),
    streams=StreamsConfig(count=N, sinkhorn_steps=STEPS, eps=EPS),
)  # fmt: skip
COMPUTE = ComputeConfig(dtype="float64")
same = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-12)
TOKENS = np.random.default_rng(0).integers(0, 31, (2, 5))


def values(specs, seed=1):
    """Biases and scales away from where they begin, else their places would not matter."""
    noise = np.random.default_rng(seed)
    one = lambda spec: (spec.init == "ones") + 0.7 * noise.normal(size=spec.shape)  # noqa: E731
    return map_specs(one, specs)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def scores(p, x_ID):
    u = x_ID.reshape(-1)
    u = u / np.sqrt((u * u).mean() + CFG.norm_eps)
    return u @ p["kernel"]


def weights(p, x_ID):
    """pre, post, M of one token."""
    z, (s0, s1, s2), b = scores(p, x_ID), p["scale"], p["base"]
    pre = sigmoid(z[:N] * s0 + b[:N]) + EPS
    post = 2 * sigmoid(z[N : 2 * N] * s1 + b[N : 2 * N])
    m = np.exp((z[2 * N :] * s2 + b[2 * N :]).reshape(N, N))
    m = m / m.sum(axis=1, keepdims=True) + EPS
    for step in range(STEPS):
        if step:
            m = m / (m.sum(axis=1, keepdims=True) + EPS)
        m = m / (m.sum(axis=0, keepdims=True) + EPS)
    return pre, post, m


def oracle(p, x_BSID, sub_layer):
    """X' of every token, of a sub-layer BSD -> BSD."""
    every = [weights(p, x) for x in x_BSID.reshape(-1, N, 8)]
    read = [pre @ x for (pre, _, _), x in zip(every, x_BSID.reshape(-1, N, 8))]
    y = np.asarray(sub_layer(np.reshape(read, (*x_BSID.shape[:2], 8)))).reshape(-1, 8)
    new = np.empty((len(every), N, 8))
    for t, (_, post, m) in enumerate(every):
        for k in range(N):
            new[t, k] = post[k] * y[t]
            for j in range(N):
                new[t, k] += m[j, k] * x_BSID.reshape(-1, N, 8)[t, j]
    return new.reshape(x_BSID.shape)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64():
        yield


def test_a_sub_layer_reads_and_writes_as_the_equations_say():
    p = values(hc.sub_layer_specs(CFG))
    x = np.random.default_rng(2).normal(size=(2, 3, N, 8))
    h, write = hc.read(p, jnp.asarray(x), CFG)
    same(write(jnp.sin(h)), oracle(p, x, np.sin))


def test_the_head_reads_as_the_equations_say():
    p = values(hc.head_specs(CFG))
    x = np.random.default_rng(3).normal(size=(2, 3, N, 8))
    pre = lambda x_ID: sigmoid(scores(p, x_ID) * p["scale"][0] + p["base"]) + EPS  # noqa: E731
    want = [[pre(x[b, s]) @ x[b, s] for s in range(3)] for b in range(2)]
    same(hc.head(p, jnp.asarray(x), CFG), want)


def test_sinkhorn_ends_on_columns():
    """Rows are not done: a matrix far from uniform shows how many steps were made, and in which order."""
    m = np.exp(2 * np.random.default_rng(4).normal(size=(5, 4, 4)))
    got = np.asarray(hc.sinkhorn(jnp.asarray(m), 20, 1e-6))
    np.testing.assert_allclose(got.sum(axis=-2), 1, atol=1e-5)
    assert np.abs(got.sum(axis=-1) - 1).max() > 1e-4
    want = m / (m.sum(axis=-2, keepdims=True) + 1e-6)
    for _ in range(19):
        want = want / (want.sum(axis=-1, keepdims=True) + 1e-6)
        want = want / (want.sum(axis=-2, keepdims=True) + 1e-6)
    same(got, want)


@functools.cache
def model():
    params = values(transformer.param_specs(CFG))
    return jax.tree.map(jnp.asarray, params), transformer.init_router_state(CFG)


def of_layer(tree, i=0):
    return jax.tree.map(lambda a: a[i], tree)


def rms_norm(p, x):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + CFG.norm_eps) * np.asarray(p["scale"])


def one_block(p, x, where):
    """The state after a block, its attention and experts taken as given."""

    def attend(h_BSD):
        h_BSD = rms_norm(p["attn_norm"], h_BSD)
        return mha.KIND.attend(p["attn"], jnp.asarray(h_BSD), CFG, Call(where)).y_BSD

    def experts(h_BSD):
        return moe(p["moe"], {}, jnp.asarray(rms_norm(p["ffn_norm"], h_BSD)), CFG, compute=COMPUTE)[
            0
        ]

    x = oracle(jax.tree.map(np.asarray, p["attn_streams"]), x, attend)
    return oracle(jax.tree.map(np.asarray, p["ffn_streams"]), x, experts)


def test_the_model_goes_through_the_streams():
    """Every sub-layer has weights of its own; the streams begin as copies, and the head comes before the norm.
    Multi-token prediction goes on from the streams: one projection of the next token, one of each stream."""
    params, state = model()
    out = transformer.forward(params, state, TOKENS, CFG, compute=COMPUTE)
    where = blocks.locate(TOKENS, CFG)
    x = np.repeat(np.asarray(params["embed"]["tokens"])[TOKENS][:, :, None], N, axis=2)
    for i in range(2):
        x = one_block(of_layer(params["moe_blocks"], i), x, where)
    np.testing.assert_allclose(out.trunk, x, rtol=1e-9, atol=1e-9)
    h = np.asarray(hc.head(params["streams_head"], jnp.asarray(x), CFG))
    np.testing.assert_allclose(
        out.hidden_BSD, rms_norm(params["final_norm"], h), rtol=1e-9, atol=1e-9
    )

    p = of_layer(params["mtp"], 1)
    following = np.roll(TOKENS, -1, axis=1)
    ctx = blocks.Context(cfg=CFG, compute=COMPUTE, where=where)
    got, normed, *_ = mtp.mtp_step(params, p, 1, {}, out.trunk, following, ctx)
    e = (
        rms_norm(p["embed_norm"], np.asarray(params["embed"]["tokens"])[following])
        @ p["embed_proj"]
    )
    x = e[:, :, None] + rms_norm(p["hidden_norm"], x) @ p["hidden_proj"]
    x = one_block(p["block"], np.asarray(x), where)
    np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-9)
    h = hc.head(p["streams_head"], jnp.asarray(x), CFG)
    want = embedding.last_norm(p["norm"], h, CFG)
    np.testing.assert_allclose(normed, want, rtol=1e-9, atol=1e-9)


def test_every_weight_of_the_streams_learns():
    params, state = model()

    def loss(params):
        hidden = transformer.forward(params, state, TOKENS, CFG, compute=COMPUTE).hidden_BSD
        return jnp.square(transformer.logits(params, hidden)).mean()

    grads = jax.jit(jax.grad(loss))(params)
    for name in ("attn_streams", "ffn_streams"):
        for leaf in jax.tree.leaves(grads["moe_blocks"][name]):
            assert (np.abs(leaf).max(axis=tuple(range(1, leaf.ndim))) > 1e-8).all()
    for leaf in jax.tree.leaves(grads["streams_head"]):
        assert np.abs(leaf).max() > 1e-8


def test_one_stream_is_the_ordinary_residual():
    one = dataclasses.replace(CFG, streams=StreamsConfig())
    specs = transformer.param_specs(one)
    assert "streams_head" not in specs and not any("streams" in k for k in specs["moe_blocks"])
    assert set(specs["mtp"]) == {"proj", "embed_norm", "hidden_norm", "block", "norm"}
    x = jnp.ones((1, 2, 8))
    h, write = hc.read(None, x, one)
    assert h is x and hc.head(None, x, one) is x and hc.spread(x, one) is x
    np.testing.assert_array_equal(write(2 * x), 3 * x)


def test_families_without_streams_refuse_them():
    dense = dataclasses.replace(CFG, mtp_depth=0)
    assert any("streams.count=3" in text for text in lost_fields(dense, "mixtral"))
