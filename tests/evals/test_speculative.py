"""Speculative decoding says what greedy decoding says, with fewer passes."""

import dataclasses

import jax
import jax.numpy as jnp
import optax
import pytest

from moejax.config import (
    AttentionConfig,
    ComputeConfig,
    ConfigError,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
)
from moejax.evals.generate import Stats, generate
from moejax.models import transformer
from moejax.models.loss import loss_fn
from moejax.params import init_params
from moejax.routers import router_options

MHA = AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8)
MLA = AttentionConfig(
    kind="mla", num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8
)
DSA = dataclasses.replace(
    MLA, kind="dsa", q_lora_rank=8, index_heads=16, index_head_dim=8, index_topk=4
)
CFG = ModelConfig(
    vocab_size=16,
    d_model=16,
    num_layers=1,
    num_dense_layers=0,
    max_seq_len=64,
    init_std=0.3,
    mtp_depth=1,
    attention=MHA,
    moe=MoEConfig(
        num_experts=4, experts_per_token=2, d_expert=8, router=router_options(expert_bias=True)
    ),
)
PROMPTS = [[3, 7, 1, 3, 7], [5, 9], [11]]


def random_model(cfg):
    return init_params(transformer.param_specs(cfg), jax.random.key(0)), (
        transformer.init_router_state(cfg)
    )


def trained_model(cfg, steps):
    """A few optimiser steps on counting by 1 or 3 modulo the vocabulary: predictable, and not fully."""
    params, router_state = random_model(cfg)
    start = jax.random.randint(jax.random.key(1), (8, 1), 0, cfg.vocab_size)
    stride = jnp.array([1, 3, 1, 3, 1, 3, 1, 3])[:, None]
    text = (start + stride * jnp.arange(25)[None]) % cfg.vocab_size
    ones = jnp.ones((8, 24), jnp.int32)
    batch = {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "segment_ids": ones,
        "positions": jnp.broadcast_to(jnp.arange(24)[None], (8, 24)),
        "loss_mask": ones,
    }
    optimizer = optax.adam(1e-2)
    # The oracle compiles in a fraction of the time.
    how = dict(objective=ObjectiveConfig(), compute=ComputeConfig(dispatcher="dense"))

    @jax.jit
    def train(params):
        def step(carry, _):
            params, opt_state = carry
            grads = jax.grad(lambda p: loss_fn(p, router_state, batch, cfg, **how)[0])(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return (optax.apply_updates(params, updates), opt_state), None

        carry, _ = jax.lax.scan(step, (params, optimizer.init(params)), length=steps)
        return carry[0]

    return train(params), router_state


def both(model, cfg, **options):
    stats = Stats()
    plain = generate(*model, cfg, PROMPTS, 20, **options)
    fast = generate(*model, cfg, PROMPTS, 20, speculative_decoding=True, stats=stats, **options)
    assert fast == plain
    return stats


@pytest.mark.parametrize(
    "attention", [pytest.param(MHA, marks=pytest.mark.product), MLA, DSA], ids=["mha", "mla", "dsa"]
)
def test_random_model_says_the_greedy_text(attention):
    """Nearly every guess is rejected: whatever it left in the caches must not be seen."""
    cfg = dataclasses.replace(CFG, attention=attention)
    stats = both(random_model(cfg), cfg)
    assert stats.accepted < stats.passes / 2
    assert f"of {stats.passes} guesses accepted" in str(stats)


@pytest.fixture(scope="module")
def taught():
    return trained_model(CFG, 200)


def test_trained_model_says_the_greedy_text_in_fewer_passes(taught):
    stats = both(taught, CFG)
    # 3 rows of 19 tokens after the first; every accepted guess saves a pass.
    assert stats.passes + stats.accepted == 3 * 19
    assert stats.accepted > 3 * 19 / 4
    assert f"; {stats.accepted / stats.passes:.0%} of {stats.passes} guesses accepted" in str(stats)


def test_a_stop_token_keeps_back_the_token_guessed_after_it(taught):
    plain = generate(*taught, CFG, PROMPTS, 20)
    for stop in set(plain[0][1:6]):
        fast = generate(*taught, CFG, PROMPTS, 20, speculative_decoding=True, stop_ids=(stop,))
        for row, whole in zip(fast, plain):
            assert row == (whole[: whole.index(stop) + 1] if stop in whole else whole)


def test_needs_an_mtp_head_and_is_greedy():
    model = random_model(CFG)
    with pytest.raises(ConfigError, match="mtp_depth=0: train with mtp_depth=1"):
        generate(
            *model, dataclasses.replace(CFG, mtp_depth=0), PROMPTS, 4, speculative_decoding=True
        )
    with pytest.raises(ConfigError, match=r"temperature=0\.5 must be 0"):
        generate(*model, CFG, PROMPTS, 4, speculative_decoding=True, temperature=0.5)
