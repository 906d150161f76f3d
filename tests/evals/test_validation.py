"""What a validation batch is summed to."""

import dataclasses

import chex

from moejax.config import AttentionConfig, ExperimentConfig, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.data import synthetic_batch
from moejax.evals.validation import eval_step
from moejax.routers import router_options
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
