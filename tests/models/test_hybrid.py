"""Attention whose layers with a window have key heads of their own: the same as `mha` where sizes are alike."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.attention import hybrid
from moejax.config import AttentionConfig, ComputeConfig, ModelConfig
from moejax.config_checks import model_problems
from moejax.models import transformer
from moejax.params import by_path, init_params

ALIKE = AttentionConfig(
    kind="hybrid",
    num_heads=4,
    num_kv_heads=2,
    window_kv_heads=2,
    head_dim=8,
    v_head_dim=8,
    windows=(3, 0, 5),
)
MODEL = ModelConfig(vocab_size=32, d_model=16, num_layers=4, d_ff=16, init_std=0.2, attention=ALIKE)
TOKENS = jax.random.randint(jax.random.key(2), (2, 12), 0, 32)


def as_mha(params, cfg):
    """The same parameters for `mha`: keys and values of each layer at their places in one stack."""
    blocks = params["dense_blocks"]
    out = {k: v for k, v in params.items() if not k.endswith("_attn")}
    own = {}
    for name in ("w_k", "w_v"):
        rows, place = [], {"full": 0, "window": 0}
        for layer in range(cfg.num_layers):
            kind = hybrid.layer_kind(cfg, layer)
            rows.append(params[f"{kind}_attn"][name][place[kind]])
            place[kind] += 1
        own[name] = jnp.stack(rows)
    return {**out, "dense_blocks": {**blocks, "attn": {**blocks["attn"], **own}}}


def test_with_equal_sizes_it_is_grouped_query_attention():
    """Layers 0, 2 and 3 have a window (the pattern repeats), layer 1 has none; value and all gradients."""
    plain = dataclasses.replace(
        MODEL, attention=dataclasses.replace(ALIKE, kind="mha", window_kv_heads=0)
    )
    params = init_params(transformer.param_specs(MODEL), jax.random.key(0))
    assert params["window_attn"]["w_k"].shape == (3, 16, 16)
    assert params["full_attn"]["w_k"].shape == (1, 16, 16)

    def loss(params, cfg, to=lambda p: p):
        out = transformer.forward(to(params), {}, TOKENS, cfg, compute=ComputeConfig())
        return jnp.square(out.hidden_BSD).mean()

    got = jax.value_and_grad(loss)(params, MODEL)
    want = jax.value_and_grad(lambda p: loss(p, plain, lambda p: as_mha(p, MODEL)))(params)
    # float32, the same products in another order of layers' stacks: a few roundings.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


def test_what_differs_between_the_kinds_of_layers():
    a = dataclasses.replace(ALIKE, window_kv_heads=4, v_head_dim=6, sinks=True, qkv_bias=True)
    specs = by_path(transformer.param_specs(dataclasses.replace(MODEL, attention=a)))
    shapes = {path: spec.shape for path, spec in specs.items() if "attn/" in path}
    assert shapes["window_attn/w_k"] == (3, 16, 32) and shapes["full_attn/w_k"] == (1, 16, 16)
    assert shapes["window_attn/w_v"] == (3, 16, 24) and shapes["full_attn/b_v"] == (1, 12)
    assert shapes["window_attn/sinks"] == (3, 4) and "full_attn/sinks" not in shapes
    assert shapes["dense_blocks/attn/w_o"] == (4, 24, 16)


def hidden(params, **changes):
    cfg = dataclasses.replace(MODEL, attention=dataclasses.replace(ALIKE, **changes))
    return transformer.forward(params, {}, TOKENS, cfg, compute=ComputeConfig()).hidden_BSD


def test_values_are_scaled():
    params = init_params(transformer.param_specs(MODEL), jax.random.key(0))
    double = {
        k: {**v, "w_v": 2 * v["w_v"]} if k.endswith("_attn") else v for k, v in params.items()
    }
    # A factor of 2 is exact, the order of products is the same: float32 within a few roundings.
    np.testing.assert_allclose(
        hidden(params, value_scale=2.0), hidden(double), rtol=1e-5, atol=1e-5
    )


def test_layers_with_a_window_turn_by_their_own_base():
    params = init_params(transformer.param_specs(MODEL), jax.random.key(0))
    theta = ALIKE.rope.theta
    np.testing.assert_array_equal(hidden(params, window_theta=theta), hidden(params))
    moved = jnp.abs(hidden(params, window_theta=7.0) - hidden(params)).max(axis=(0, 2))
    assert moved[0] < 1e-6 and (moved[1:] > 1e-4).all()  # position 0 is not turned


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"windows": ()}, "needs attention.windows, such as (128, 0)"),
        ({"window_kv_heads": 3}, "must be a multiple of attention.window_kv_heads=3"),
        ({"qk_norm": "head"}, "attention.qk_norm='head' is not available with 'hybrid'"),
        ({"v_head_dim": 0}, "attention.v_head_dim=0 must be positive"),
        ({"rope_layers": "windowed"}, "every layer rotates"),
    ],
)
def test_what_does_not_fit_is_named(changes, text):
    cfg = dataclasses.replace(MODEL, attention=dataclasses.replace(ALIKE, **changes))
    assert any(text in problem for problem in model_problems(cfg, ""))
