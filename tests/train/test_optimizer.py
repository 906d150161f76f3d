"""Schedules at the steps where they turn, the decay mask, and AdamW against NumPy."""

import jax
import numpy as np
import pytest

from moejax.config import AttentionConfig, ModelConfig, MoEConfig, OptimizerConfig
from moejax.models import transformer
from moejax.params import path_name
from moejax.train.optimizer import decay_mask, make_optimizer, schedule

PEAK = 0.5


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # Warm-up over 10 steps begins at a tenth; x 0.316 at 80% and again at 90% (2401.06066 4.1.3).
        (
            dict(schedule="multistep"),
            {0: 0.1, 4: 0.5, 9: 1, 79: 1, 80: 0.316, 89: 0.316, 90: 0.316**2, 99: 0.316**2},
        ),
        (dict(schedule="constant"), {0: 0.1, 9: 1, 10: 1, 99: 1}),
        (dict(schedule="constant", warmup_steps=0), {0: 1, 99: 1}),
        # Half way down the cosine at step 10 + 45; the last step has nearly arrived at a tenth.
        (dict(schedule="cosine"), {9: 1, 10: 1, 55: 0.55, 100: 0.1}),
        # Stable to 80%, then straight down to a tenth.
        (dict(schedule="wsd", decay_at=(0.8,)), {9: 1, 80: 1, 90: 0.55, 100: 0.1}),
    ],
)
def test_schedules(options, expected):
    cfg = OptimizerConfig(**({"learning_rate": PEAK, "warmup_steps": 10} | options))
    rate = schedule(cfg, 100)
    got = {step: float(rate(step)) / PEAK for step in expected}
    assert got == pytest.approx(expected, rel=1e-5)


def test_matrices_decay_and_nothing_else():
    cfg = ModelConfig(
        d_model=8,
        num_layers=2,
        d_ff=8,
        ffn_bias=True,
        norm="layernorm",
        attention=AttentionConfig(
            num_heads=2, num_kv_heads=2, head_dim=4, qkv_bias=True, out_bias=True, sinks=True
        ),
        moe=MoEConfig(num_experts=2, d_expert=4, router_bias=True, ffn_bias=True),
    )
    specs = transformer.param_specs(cfg)
    shapes = jax.eval_shape(lambda: jax.tree.map(lambda s: np.zeros(s.shape), specs))
    mask = decay_mask(shapes)
    for path, decays in jax.tree_util.tree_flatten_with_path(mask)[0]:
        name = path_name(path)
        last = name.rsplit("/", 1)[-1]
        one_dimensional = "scale" in last or "bias" in last or last.startswith("b_")
        assert decays == (not one_dimensional and last != "sinks"), name
    assert sum(jax.tree.leaves(mask)) > 8 and not all(jax.tree.leaves(mask))


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_two_steps_of_adamw_by_hand(clip):
    cfg = OptimizerConfig(
        learning_rate=0.1, warmup_steps=0, schedule="constant", clip_norm=clip, weight_decay=0.5
    )
    optimizer = make_optimizer(cfg, 100)
    params = {"w": np.array([[1.0, -2.0]], np.float32), "b_up": np.array([3.0], np.float32)}
    grads = {"w": np.array([[3.0, 0.0]], np.float32), "b_up": np.array([4.0], np.float32)}  # norm 5
    state = optimizer.init(params)
    want = {k: v.astype(np.float64) for k, v in params.items()}
    m, v = ({k: np.zeros_like(p, np.float64) for k, p in params.items()} for _ in range(2))
    for t in (1, 2):
        updates, state = optimizer.update(grads, state, params)
        params = jax.tree.map(np.add, params, updates)
        for k in want:
            g = grads[k] / (5.0 if clip else 1.0)
            m[k] = cfg.b1 * m[k] + (1 - cfg.b1) * g
            v[k] = cfg.b2 * v[k] + (1 - cfg.b2) * g**2
            step = m[k] / (1 - cfg.b1**t) / (np.sqrt(v[k] / (1 - cfg.b2**t)) + cfg.eps)
            want[k] -= 0.1 * (step + (0.5 * want[k] if k == "w" else 0.0))
        # float32: a few roundings of 6e-8.
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), params, want)
