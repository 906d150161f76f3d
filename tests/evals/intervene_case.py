"""Two layouts of a model, small, for tests of interventions."""

import dataclasses

from moejax.config import AttentionConfig, ModelConfig, MoEConfig

ATTENTION = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8)
DEEPSEEK = ModelConfig(  # a dense layer, then fine-grained experts beside a shared one
    vocab_size=32,
    d_model=16,
    num_layers=3,
    num_dense_layers=1,
    d_ff=32,
    init_std=0.3,
    attention=ATTENTION,
    moe=MoEConfig(num_experts=8, experts_per_token=3, d_expert=8, shared_experts=2, ffn_bias=True),
)
OLMOE = dataclasses.replace(
    DEEPSEEK,
    num_layers=2,
    num_dense_layers=0,
    attention=dataclasses.replace(ATTENTION, qk_norm="full"),
    moe=MoEConfig(num_experts=8, experts_per_token=2, d_expert=8),
)
LAYOUTS = {"deepseek": DEEPSEEK, "olmoe": OLMOE}
