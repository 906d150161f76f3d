"""Options that single families brought: multipliers, a part of each head rotated, layers without positions, the
norm after the rotation. Each against the same function written with other means; float32, sums of a few dozen
terms, so 1e-5 of values near 1."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention.rope import inverse_frequencies, rotate, rotation
from moejax.config import AttentionConfig, ModelConfig, MoEConfig, RopeConfig
from moejax.config_checks import model_problems
from moejax.models import transformer
from moejax.models.cache import init_layers

CFG = ModelConfig(
    vocab_size=31,
    d_model=16,
    num_layers=1,
    num_dense_layers=1,
    d_ff=24,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
)
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 31, (2, 7)))


def model(cfg):
    params, state = transformer.init_model(cfg, jax.random.key(1))
    return jax.tree.map(lambda a: a * 20 if a.ndim > 2 else a, params), state


@functools.partial(jax.jit, static_argnums=0)
def logits(cfg, params, state, tokens=TOKENS):
    out = transformer.forward(params, state, tokens, cfg)
    return transformer.logits(params, out.hidden_BSD)


def with_attention(**changes):
    return dataclasses.replace(CFG, attention=dataclasses.replace(CFG.attention, **changes))


def test_multipliers_are_factors_of_weights():
    plain = dataclasses.replace(CFG, num_layers=2, moe=MoEConfig(num_experts=4, d_expert=8))
    params, state = model(plain)
    attention = dataclasses.replace(CFG.attention, scale=0.3)
    cfg = dataclasses.replace(
        plain,
        attention=attention,
        embedding_multiplier=3.0,
        residual_multiplier=0.7,
        logits_divisor=4.0,
    )
    got = logits(cfg, params, state)
    folded = jax.tree.map(jnp.copy, params)
    folded["embed"]["tokens"] *= 3.0
    folded["head"] /= 4.0
    for stack in ("dense_blocks", "moe_blocks"):
        block = folded[stack]
        block["attn"]["w_q"] *= 0.3 * math.sqrt(8)
        block["attn"]["w_o"] *= 0.7
        (block["ffn"] if "ffn" in block else block["moe"]["experts"])["w_down"] *= 0.7
    np.testing.assert_allclose(got, logits(plain, folded, state), atol=1e-5)
    assert abs(got - logits(plain, params, state)).max() > 1e-2


@pytest.mark.parametrize("interleaved", [False, True])
def test_only_the_first_channels_turn(interleaved):
    x = jax.random.normal(jax.random.key(0), (2, 7, 3, 8))
    at = jnp.broadcast_to(jnp.arange(7), (2, 7))
    cos_sin = rotation(at, RopeConfig(), 4)
    out = rotate(x, cos_sin, interleaved)
    np.testing.assert_array_equal(out[..., 4:], x[..., 4:])
    np.testing.assert_array_equal(out[..., :4], rotate(x[..., :4], cos_sin, interleaved))
    params, state = model(CFG)
    part = with_attention(rope=RopeConfig(width=4))
    assert abs(logits(part, params, state) - logits(CFG, params, state)).max() > 1e-3


def test_frequencies_of_llama_3():
    """2407.21783's factor 8: wavelengths below 8192/4 tokens stay, those above 8192 are eight times as long."""
    rope = RopeConfig(
        theta=500_000.0, yarn_factor=8.0, yarn_original_len=8192, yarn_beta_fast=4.0, yarn_beta_slow=1.0,
        yarn_mscale=0.0, yarn_ramp="turns",
    )  # fmt: skip
    plain = inverse_frequencies(RopeConfig(theta=500_000.0), 128)
    ratio = inverse_frequencies(rope, 128) / plain
    length = 2 * math.pi / plain
    np.testing.assert_array_equal(ratio[length < 2048], 1.0)
    np.testing.assert_allclose(ratio[length > 8192], 1 / 8, rtol=1e-12)
    between = ratio[(length > 2048) & (length < 8192)]
    assert len(between) == 6 and (np.diff(between) < 0).all() and between.max() < 1
    cos, _ = rotation(jnp.zeros((1, 1), int), rope, 128)
    assert (cos == 1).all()  # no magnitude besides


def test_layers_without_a_window_know_no_positions():
    """Without positions, a full layer sees a set: tokens before the last may change places."""
    full = with_attention(windows=(0,), rope_layers="all")
    params, state = model(full)
    swapped = TOKENS.at[:, jnp.array([1, 2])].set(TOKENS[:, jnp.array([2, 1])])
    one = full

    def last(cfg, tokens):
        return logits(cfg, params, state, tokens)[:, -1]

    nope = dataclasses.replace(
        one, attention=dataclasses.replace(one.attention, rope_layers="windowed")
    )
    np.testing.assert_allclose(last(nope, TOKENS), last(nope, swapped), atol=1e-5)
    assert abs(last(one, TOKENS) - last(one, swapped)).max() > 1e-3
    # A layer with a window that reaches everywhere is rotated as ever.
    wide = dataclasses.replace(nope.attention, windows=(99,))
    np.testing.assert_allclose(
        last(dataclasses.replace(nope, attention=wide), TOKENS), last(one, TOKENS), atol=1e-6
    )


def test_norm_after_the_rotation():
    """The two orders agree where scales are 1, for a rotation keeps lengths, and only there."""
    before, after = with_attention(qk_norm="head"), with_attention(qk_norm="head_rotated")
    params, state = model(before)
    np.testing.assert_allclose(
        logits(before, params, state), logits(after, params, state), atol=1e-5
    )
    params["dense_blocks"]["attn"]["q_norm"]["scale"] *= jnp.linspace(0.2, 3.0, 8)[None]
    assert abs(logits(before, params, state) - logits(after, params, state)).max() > 1e-3


def test_dense_layers_after_experts():
    """A block that adds nothing can be left out: the MoE block is the first, the dense one the second."""
    moe = MoEConfig(num_experts=4, d_expert=8)
    both = dataclasses.replace(CFG, num_layers=2, moe=moe, dense_at=(1,))
    alone = {
        "dense_blocks": dataclasses.replace(CFG, num_layers=1),
        "moe_blocks": dataclasses.replace(CFG, num_layers=1, num_dense_layers=0, moe=moe),
    }
    params, state = model(both)
    first = dataclasses.replace(both, dense_at=())
    assert abs(logits(both, params, state) - logits(first, params, state)).max() > 1e-3
    for kept, cfg in alone.items():
        empty = "moe_blocks" if kept == "dense_blocks" else "dense_blocks"
        rest = {k: v for k, v in params.items() if k != empty}
        nothing = {**params, empty: jax.tree.map(jnp.zeros_like, params[empty])}
        want = logits(cfg, rest, state if kept == "moe_blocks" else {})
        np.testing.assert_allclose(logits(both, nothing, state), want, atol=1e-6)
    # The same with lists of layers, and from the cache of each layer.
    apart = transformer.unstack(params)
    want = logits(both, params, state)
    np.testing.assert_allclose(logits(both, apart, state), want, atol=1e-5)
    out = jax.jit(
        lambda p: transformer.forward(
            p, state, TOKENS, both, cache=init_layers(both, 2, 7), prefill=True
        )
    )(apart)
    np.testing.assert_allclose(transformer.logits(params, out.hidden_BSD), want, atol=1e-5)


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"rope": RopeConfig(width=3)}, "rope.width=3 must be even"),
        ({"rope": RopeConfig(width=10)}, "head_dim=8"),
        ({"rope_layers": "windowed"}, "needs model.attention.windows"),
        ({"rope": RopeConfig(yarn_ramp="turns", yarn_beta_fast=1.0)}, "yarn_ramp='turns' needs"),
    ],
)
def test_what_does_not_fit_is_named(changes, text):
    assert any(text in p for p in model_problems(with_attention(**changes)))


def test_dense_layers_that_do_not_fit_are_named():
    moe = MoEConfig(num_experts=4, d_expert=8)
    for at, text in (
        ((2,), "below model.num_layers=2"),
        ((0, 1), "needs model.num_dense_layers=2"),
    ):
        cfg = dataclasses.replace(CFG, num_layers=2, moe=moe, dense_at=at)
        assert any(text in p for p in model_problems(cfg))
