"""The whole step: it learns, and a step that is not finite changes nothing and is counted."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import (
    AttentionConfig,
    ComputeConfig,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
)
from moejax.data import synthetic_batch
from moejax.routers import router_options
from moejax.train.state import create_state
from moejax.train.step import train_step

MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    d_ff=32,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    moe=MoEConfig(
        num_experts=4, d_expert=8, router=router_options(score="sigmoid", expert_bias=True)
    ),
    mtp_depth=1,
)
CFG = ExperimentConfig(
    model=MODEL,
    objective=ObjectiveConfig(bias_update="sign"),
    data=DataConfig(seq_len=8, batch_size=4),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=5, schedule="constant"),
)


@pytest.fixture(scope="module")
def step():
    return jax.jit(lambda state, batch: train_step(state, batch, CFG))


def test_learns_a_batch_and_moves_the_bias_by_its_rate(step):
    batch = synthetic_batch(8, 4, 32)
    state = create_state(CFG, jax.random.key(0), None)
    first = None
    for _ in range(30):
        state, metrics = step(state, batch)
        first = metrics if first is None else first
    assert first is not None
    # ln 32 = 3.47 at the start; one batch is learned by heart.
    assert abs(float(first["cross_entropy"]) - np.log(32)) < 0.1
    assert float(metrics["cross_entropy"]) < 0.5 * float(first["cross_entropy"])
    assert int(state.skipped) == 0
    # After 30 steps of the sign rule every bias is a multiple of the rate, at most 30 of them.
    for name in ("moe_blocks", "mtp"):
        moves = np.asarray(state.router_state[name]["expert_bias"]) / CFG.objective.bias_rate
        np.testing.assert_allclose(moves, np.round(moves), atol=1e-3)
        assert 0 < np.abs(moves).max() <= 30.001


def test_a_step_that_is_not_finite_is_skipped_and_counted(step):
    batch = synthetic_batch(8, 4, 32)
    good = create_state(CFG, jax.random.key(0), None)
    scale = good.params["final_norm"]["scale"].at[0].set(jnp.nan)
    state = good._replace(params={**good.params, "final_norm": {"scale": scale}})
    for expected in (1, 2):
        before = state
        state, metrics = step(before, batch)
        assert not np.isfinite(metrics["loss"])
        assert int(state.skipped) == int(state.bad_in_a_row) == int(state.step) == expected
        for name in ("params", "opt_state", "router_state"):
            chex.assert_trees_all_equal(getattr(state, name), getattr(before, name))
    state, metrics = step(state._replace(params=good.params), batch)
    # The optimiser's first step, whatever was left out before: a fifth of the way up.
    assert metrics["learning_rate"] == pytest.approx(CFG.optimizer.learning_rate / 5)
    assert (int(state.skipped), int(state.bad_in_a_row)) == (2, 0)


def test_an_update_that_is_not_finite_is_skipped_although_loss_and_gradient_are():
    """An eps below float32's smallest number is 0: the first Adam step divides 0 by 0 for every token that is
    not in the batch."""
    optimizer = dataclasses.replace(CFG.optimizer, eps=1e-46)
    cfg = dataclasses.replace(CFG, optimizer=optimizer)
    before = create_state(cfg, jax.random.key(0), None)
    batch = synthetic_batch(8, 4, 16)  # half of the vocabulary
    state, metrics = jax.jit(lambda s, b: train_step(s, b, cfg))(before, batch)
    assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["grad_norm"])
    assert int(state.skipped) == int(metrics["bad_in_a_row"]) == 1
    for name in ("params", "opt_state", "router_state"):
        chex.assert_trees_all_equal(getattr(state, name), getattr(before, name))


@pytest.mark.product
def test_bfloat16_computes_and_float32_remembers(step):
    batch = synthetic_batch(8, 4, 32)
    half = dataclasses.replace(CFG, compute=ComputeConfig(dtype="bfloat16"))
    half_step = jax.jit(lambda state, batch: train_step(state, batch, half))
    ours, theirs = (create_state(CFG, jax.random.key(0), None) for _ in range(2))
    for _ in range(10):
        ours, half_metrics = half_step(ours, batch)
        theirs, metrics = step(theirs, batch)
        # bfloat16 has 8 bits: a logit of order 1 is off by 2^-9 = 0.2%, and the mean over tokens of a
        # loss of order 3 by less. A loss that was itself kept in bfloat16 would be off by 0.4%.
        loss = float(metrics["cross_entropy"])
        assert float(half_metrics["cross_entropy"]) == pytest.approx(loss, rel=4e-3)
    assert float(half_metrics["cross_entropy"]) != loss  # it did compute in another precision
    for name in ("params", "opt_state"):
        leaves = jax.tree.leaves(getattr(ours, name))
        assert {a.dtype for a in leaves if a.ndim} == {jnp.dtype("float32")}
    # Values that bfloat16 does not have: the masters were never rounded to it.
    rest = jax.tree.leaves(jax.tree.map(lambda a: a - a.astype(jnp.bfloat16), ours.params))
    assert max(float(jnp.abs(r).max()) for r in rest) > 0
