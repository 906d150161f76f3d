"""What a validation batch is summed to."""

import dataclasses

import chex

from moejax.config import AttentionConfig, ExperimentConfig, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.data import synthetic_batch
from moejax.evals.validation import eval_step
from moejax.moe.stats import LOGIT_EDGES
from moejax.routers import ROUTERS, router_options
from moejax.train.state import create_state

MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    d_ff=32,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    moe=MoEConfig(
        num_experts=4, d_expert=8, router=router_options(score="sigmoid", expert_bias=True)
    ),
)


def test_evaluation_drops_nothing(key):
    """Under a capacity a token's loss would depend on later tokens; the model that generates has none."""
    loose = ExperimentConfig(model=MODEL, objective=ObjectiveConfig(bias_update="sign"))
    objective = dataclasses.replace(loose.objective, capacity_factor=0.25)
    tight = dataclasses.replace(loose, objective=objective)
    state = create_state(loose, key, None)
    batch = synthetic_batch(8, 4, 32)
    chex.assert_trees_all_equal(
        *(eval_step(state.params, state.router_state, batch, cfg) for cfg in (tight, loose))
    )


def test_routes_and_logits_are_counted_without_padding(key):
    """Every token but padding has K routes and E logits in every layer; the logits are those of its scores."""
    cfg = ExperimentConfig(model=MODEL)
    state = create_state(cfg, key, None)
    batch = synthetic_batch(8, 4, 32)
    batch["segment_ids"][:, 6:] = 0
    tokens = int((batch["segment_ids"] > 0).sum())
    sums = eval_step(state.params, state.router_state, batch, cfg, num_domains=3)
    assert 0 < tokens < batch["tokens"].size
    assert sums["load_dLE"].shape == (3, 1, 4) and sums["load_dLE"].sum() == tokens * 2
    assert sums["logits_LN"].shape == (1, len(LOGIT_EDGES) + 1)
    assert sums["logits_LN"].sum() == tokens * 4

    soft = dataclasses.replace(MODEL.moe, router=ROUTERS["soft_moe"].options)
    soft = dataclasses.replace(soft, router=dataclasses.replace(soft.router, name="soft_moe"))
    cfg = ExperimentConfig(model=dataclasses.replace(MODEL, moe=soft))
    state = create_state(cfg, key, None)
    sums = eval_step(state.params, state.router_state, batch, cfg)
    assert "load_dLE" in sums and "logits_LN" not in sums  # it has none
