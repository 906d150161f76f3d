"""Models with every kind of parameter, and what the tests of optimisers share."""

import dataclasses

import jax
import numpy as np

from moejax.config import AttentionConfig, ModelConfig, MoEConfig, OptimizerConfig
from moejax.params import init_params, is_spec, path_name
from moejax.routers import router_options

# Every kind of parameter there is: with biases, sinks, gates, norms of heads, learned positions ...
BIASED = ModelConfig(
    vocab_size=32,
    d_model=8,
    num_layers=4,
    num_dense_layers=2,
    d_ff=12,
    ffn_bias=True,
    norm="layernorm",
    positions="learned",
    max_seq_len=16,
    init_std=0.3,
    attention=AttentionConfig(
        num_heads=2,
        num_kv_heads=1,
        head_dim=4,
        qkv_bias=True,
        out_bias=True,
        sinks=True,
        qk_norm="head",
    ),
    moe=MoEConfig(
        num_experts=4,
        d_expert=6,
        shared_experts=1,
        shared_gate=True,
        router=router_options(router_bias=True),
        ffn_bias=True,
    ),
    mtp_depth=1,
)
# ... and with latent attention.
MLA = dataclasses.replace(
    BIASED,
    positions="rope",
    attention=AttentionConfig(
        kind="mla",
        num_heads=2,
        q_lora_rank=6,
        kv_lora_rank=4,
        qk_nope_head_dim=4,
        qk_rope_head_dim=2,
        v_head_dim=4,
    ),
)


def options(**changes) -> OptimizerConfig:
    base = {"learning_rate": 0.1, "warmup_steps": 0, "schedule": "constant", "clip_norm": 0.0}
    return OptimizerConfig(**{**base, **changes})


def drawn(specs, seed: int):
    """A value for every parameter, none of it zero."""
    specs = jax.tree.map(
        lambda s: dataclasses.replace(s, init="normal", std=1.0), specs, is_leaf=is_spec
    )
    return init_params(specs, jax.random.key(seed))


def leaves(tree) -> dict[str, np.ndarray]:
    return {path_name(p): np.asarray(a) for p, a in jax.tree_util.tree_leaves_with_path(tree)}
