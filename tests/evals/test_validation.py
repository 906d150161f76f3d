"""What a validation batch is summed to."""

import dataclasses

import chex

from moejax.config import AttentionConfig, ExperimentConfig, ModelConfig, MoEConfig
from moejax.data import synthetic_batch
from moejax.evals.validation import eval_step
from moejax.train.state import create_state

MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=2,
    d_ff=32,
    attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=8),
    moe=MoEConfig(num_experts=4, d_expert=8, score="sigmoid", bias_update="sign"),
)


def test_evaluation_drops_nothing(key):
    """Under a capacity a token's loss would depend on later tokens; the model that generates has none."""
    moe = dataclasses.replace(MODEL.moe, dispatcher="capacity", capacity_factor=0.25)
    loose = ExperimentConfig(model=MODEL)
    tight = ExperimentConfig(model=dataclasses.replace(MODEL, moe=moe))
    state = create_state(loose, key, None)
    batch = synthetic_batch(8, 4, 32)
    chex.assert_trees_all_equal(
        *(eval_step(state.params, state.router_state, batch, cfg) for cfg in (tight, loose))
    )
    assert loose.model.without_drops is loose.model
