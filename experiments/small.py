"""The model that the questions here change: a small DeepSeek-style mixture.

    moejax train --config=experiments/small.py --workdir=runs/small

32 routed experts of 64 hidden units, 4 of them for each token, and a shared one, in the second and third of
three layers; V3's sigmoid scores with a selection bias moved by rule. The text is the quickstart's, 614,400
tokens of it. `small.py:dense` is its dense twin: an FFN as wide as what a token of the mixture uses.

Its size limits the claims: they are about whether something helps here, not about how much it would help a
model a thousand times as large.
"""

import dataclasses

from moejax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from moejax.config_io import to_config_dict
from moejax.routers import router_options

EXPERTS, PER_TOKEN, WIDTH = 32, 4, 64
TOKEN = PER_TOKEN * WIDTH  # hidden units of the routed experts of a token

SMALL = ExperimentConfig(
    name="small",
    model=ModelConfig(
        d_model=128,
        num_layers=3,
        num_dense_layers=1,
        d_ff=TOKEN + WIDTH,
        init_std=0.02,
        attention=AttentionConfig(num_heads=4, num_kv_heads=4, head_dim=32),
        moe=MoEConfig(
            num_experts=EXPERTS,
            experts_per_token=PER_TOKEN,
            d_expert=WIDTH,
            shared_experts=1,
            d_shared=WIDTH,
            router=router_options(score="sigmoid", normalize_weights=True, expert_bias=True),
        ),
    ),
    objective=ObjectiveConfig(sequence_loss=1e-4, bias_update="sign", bias_rate=0.01),
    data=DataConfig(vocab_size=2048, seq_len=128, batch_size=16, validation_fraction=0.05),
    optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=30),
    train=TrainConfig(steps=300, eval_every=300, eval_batches=40, checkpoint_every=300),
)


def get_config(variant: str = "moe"):
    if variant not in ("moe", "dense"):
        raise ConfigError(f"small.py:{variant} is unknown; variants: moe, dense")
    if variant == "moe":
        return to_config_dict(SMALL)
    model = dataclasses.replace(SMALL.model, moe=MoEConfig())
    return to_config_dict(
        dataclasses.replace(SMALL, name="small-dense", model=model, objective=ObjectiveConfig())
    )
