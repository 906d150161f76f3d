"""Does a small DeepSeek-style MoE learn real text on two CPU cores?

    moejax train --config=experiments/quickstart.py --workdir=runs/quickstart

Result (that command, two CPU cores, Python 3.11, plain JAX): validation loss 4.7387, 2.21 bits per byte after
500 steps (4.7414 with compiled kernels); no expert without a token after 110 steps, MaxVio below 1 over the
last 160. With five seeds it beat the dense twin (`quickstart.py:dense`, the same active parameters, tokens and
data) by 0.050 nats on average, standard error 0.015, with 0.1.0: the table is in docs/experiments.md.

The text is what a Python installation carries: source code, English documentation, C headers. The layout is
DeepSeekMoE's: fine-grained routed experts, one shared expert, a first dense layer; V3's sigmoid scores with
a selection bias learned by rule.
"""

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


def get_config(variant: str = "moe"):
    """`variant`: 'moe', or 'dense': every layer an FFN as wide as the experts that a token of the MoE
    uses (4 routed + 1 shared, 96 each = 480), so the same active parameters, tokens and data."""
    if variant not in ("moe", "dense"):
        raise ConfigError(f"quickstart.py:{variant} is unknown; variants: moe, dense")
    moe = MoEConfig(
        num_experts=32,
        experts_per_token=4,
        d_expert=96,
        shared_experts=1,
        router=router_options(score="sigmoid", normalize_weights=True, expert_bias=True),
    )
    objective = ObjectiveConfig(
        sequence_loss=1e-4,
        bias_update="sign",
        bias_rate=0.01,  # V3's is 0.001, for runs a thousand times as long
    )
    if variant == "dense":
        moe, objective = MoEConfig(), ObjectiveConfig()  # no experts: a dense model
    model = ModelConfig(
        d_model=192,
        num_layers=4,
        num_dense_layers=1,
        d_ff=480,
        init_std=0.02,
        attention=AttentionConfig(num_heads=6, num_kv_heads=6, head_dim=32),
        moe=moe,
    )
    cfg = ExperimentConfig(
        name="quickstart" if variant == "moe" else "quickstart-dense",
        model=model,
        objective=objective,
        data=DataConfig(seq_len=256, batch_size=8, validation_fraction=0.05),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup_steps=40),
        train=TrainConfig(steps=500, eval_every=100, checkpoint_every=100),
    )
    return to_config_dict(cfg)


def get_sweep():
    """moejax sweep --config=experiments/quickstart.py --workdir=runs/quickstart-sweep --jobs=2"""
    return {
        "variants": {"dense": {"variant": "dense"}, "moe": {}},
        "seeds": (0, 1, 2, 3, 4),
    }
