"""A router of one's own, as the recipe in CONTRIBUTING.md has it: random, with a loss that counts."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import (
    AttentionConfig,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
)
from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.moe import balance
from moejax.moe.routers import ROUTERS, token_choice
from moejax.moe.routing import Router
from moejax.train.state import init_state
from moejax.train.step import loss_and_grads

CFG = ExperimentConfig(
    model=ModelConfig(
        vocab_size=32,
        d_model=16,
        num_layers=3,
        num_dense_layers=1,
        d_ff=16,
        init_std=0.3,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
        moe=MoEConfig(num_experts=8, d_expert=8, router="own"),
    ),
    data=DataConfig(seq_len=8, batch_size=4),
)


def own(noise: float):
    """Token choice by scores with noise, and the expert-level loss (2401.06066 eq. 12) whatever the config."""

    def route(params, state, x_TD, cfg, *, key, totals, mask_T, **args):
        out = token_choice.route(
            params, state, x_TD, cfg, key=None, mask_T=mask_T, totals=totals, **args
        )
        if noise:
            scores_TE = out.scores_TE + noise * jax.random.uniform(key, out.scores_TE.shape)
            _, index_TK = jax.lax.top_k(scores_TE, cfg.experts_per_token)
            out = out._replace(routing=out.routing._replace(expert_index_TK=index_TK))
            hot = jax.nn.one_hot(index_TK, cfg.num_experts)
            return out._replace(load_E=hot.sum(axis=(0, 1)))
        load_E = out.load_E if totals is None or totals.load_E is None else totals.load_E
        tokens = mask_T.sum() if totals is None else totals.num_tokens
        score_sum_E = (out.scores_TE * mask_T[:, None]).sum(axis=0)
        loss = balance.expert_level(score_sum_E, load_E, tokens, cfg.experts_per_token)
        return out._replace(losses={"own": 0.1 * loss})

    return Router(
        token_choice.param_specs, lambda cfg: {}, route, lambda s, *_: s, causal=True, form="token"
    )


@pytest.fixture
def state():
    cfg = dataclasses.replace(CFG.model.moe, router="token_choice")
    model = dataclasses.replace(CFG.model, moe=cfg)
    return init_state(dataclasses.replace(CFG, model=model), jax.random.key(0))


def test_its_loss_does_not_depend_on_accumulation(monkeypatch, state):
    monkeypatch.setitem(ROUTERS, "own", own(noise=0.0))
    batch = synthetic_batch(8, 4, 32)

    def at(accumulation):
        cfg = dataclasses.replace(CFG, train=TrainConfig(accumulation=accumulation))
        run = jax.jit(lambda p: loss_and_grads(p, state.router_state, batch, cfg))
        loss, parts, grads = run(state.params)
        return loss, parts.balance["own"], grads

    whole, parts = at(1), at(2)
    # Sums of 64 float32 terms in another order.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, parts)
    assert whole[1] > 0.05


def test_its_noise_differs_by_layer_and_micro_batch(monkeypatch, state):
    monkeypatch.setitem(ROUTERS, "own", own(noise=1e3))
    batch = synthetic_batch(8, 4, 32)
    key = jax.random.key(1)
    cfg = CFG.model
    out = transformer.forward(
        state.params, {}, batch["tokens"], cfg, mask_BS=jnp.ones((4, 8)), key=key
    )
    first, second = out.aux["moe_blocks"].routing.expert_index_TK
    assert (first != second).any()
    # Two equal micro-batches: with the same noise every load would be even.
    twice = {k: jnp.repeat(jnp.asarray(v[:2]), 2, axis=0) for k, v in batch.items()}
    two = dataclasses.replace(CFG, train=TrainConfig(accumulation=2))
    parts = loss_and_grads(state.params, {}, twice, two, key=key)[1]
    assert (parts.aux["moe_blocks"].load_E % 2 == 1).any()
