"""Small models with sparse attention, their weights, and a batch of packed documents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp

from moejax.attention.selection import Index
from moejax.config import AttentionConfig, ComputeConfig, ModelConfig, MoEConfig, RopeConfig
from moejax.models import transformer
from moejax.params import init_params
from moejax.routers import router_options

# 16 heads of the indexer: with few, the relu makes a score 0 for some keys, and rounding decides among equals.
DSA = AttentionConfig(
    kind="dsa", num_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
    v_head_dim=6, rope=RopeConfig(interleaved=True), index_heads=16, index_head_dim=6, index_topk=4,
)  # fmt: skip
CFG = ModelConfig(
    vocab_size=32, d_model=16, num_layers=3, d_ff=16, init_std=0.3, attention=DSA,
    moe=MoEConfig(
        num_experts=4, experts_per_token=2, d_expert=8,
        router=router_options(score="sigmoid", expert_bias=True),
    ),
)  # fmt: skip
SHARING = dataclasses.replace(
    CFG, attention=dataclasses.replace(DSA, index_shared_at=(1,), index_interleaved=True)
)
DENSE = ComputeConfig(dispatcher="dense")  # compiles faster
S = 11
TOKENS = jax.random.randint(jax.random.key(2), (2, S), 0, 32)
SEGMENTS = jnp.array([[1] * 6 + [2] * 5, [1] * 8 + [2] * 2 + [0]])
POSITIONS = jnp.array([[*range(6), *range(5)], [*range(8), 0, 1, 0]])


@functools.cache
def weights(cfg):
    params = init_params(transformer.param_specs(cfg), jax.random.key(1))
    return params, transformer.init_router_state(cfg)


def batch():
    return dict(
        tokens=TOKENS, targets=jnp.roll(TOKENS, -1, 1), positions=POSITIONS, segment_ids=SEGMENTS,
        loss_mask=(SEGMENTS > 0).astype(jnp.int32),
    )  # fmt: skip


def index_of(seed: int, rows=2, queries=S, heads=3, width=5) -> Index:
    draw = lambda i, *shape: jax.random.normal(jax.random.key(seed + i), (rows, *shape))  # noqa: E731
    return Index(draw(0, queries, heads, width), draw(1, queries, heads), draw(2, queries, width))
