"""Mixtral (2401.04088): 8 wide experts, the two chosen scores renormalised."""

from typing import Any

from moejax.config import AttentionConfig, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import fields, names
from moejax.routers import router_options

MODEL_TYPE = "mixtral"
# What `grouped_attention` reads.
GROUPED = fields.DECODER | {"num_key_value_heads", "head_dim"}
READ = GROUPED | {
    *("num_local_experts", "num_experts_per_tok", "intermediate_size", "sliding_window"),
    "router_aux_loss_coef",
}
HARMLESS = frozenset()
_MOE = "block_sparse_moe."
NAMES = names.decoder(
    *names.ATTENTION,
    names.Row("moe/router/kernel", _MOE + "gate.weight", names.TRANSPOSE),
    names.Row("moe/experts/w_gate", _MOE + "experts.{expert}.w1.weight", names.TRANSPOSE),
    names.Row("moe/experts/w_down", _MOE + "experts.{expert}.w2.weight", names.TRANSPOSE),
    names.Row("moe/experts/w_up", _MOE + "experts.{expert}.w3.weight", names.TRANSPOSE),
    *names.ROUTER,
    *names.FUSED_EXPERTS,
)


def grouped_attention(hf: dict, family: str, rope: dict | None = None, **kwargs) -> AttentionConfig:
    """Grouped-query attention with RoPE, half-split unless `rope`, options of `rope_from_hf`, say else."""
    fields.given(hf, family, "num_key_value_heads")
    heads = fields.size(hf, family, "num_attention_heads")
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.size(hf, family, "num_key_value_heads", heads),
        head_dim=fields.head_dim(hf, family),
        rope=fields.rope_from_hf(hf, family, default_theta=None, **(rope or {})),
        **kwargs,
    )


def grouped_to_hf(cfg: ModelConfig) -> dict:
    """What `grouped_attention` reads."""
    a = cfg.attention
    part = {"partial_rotary_factor": a.rope.width / a.head_dim} if a.rope.width else {}
    heads = {"num_key_value_heads": a.num_kv_heads, "head_dim": a.head_dim}
    return heads | part | fields.rope_to_hf(a.rope)


def moe(hf: dict, family: str, **router: Any) -> MoEConfig:
    """Experts under Mixtral's keys; the router renormalises, `router` has its other options."""
    n = fields.sizes(hf, family, "num_local_experts", "num_experts_per_tok", "intermediate_size")
    return MoEConfig(
        num_experts=n["num_local_experts"],
        experts_per_token=n["num_experts_per_tok"],
        d_expert=n["intermediate_size"],
        router=router_options(normalize_weights=True, **router),
    )


def moe_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """What `moe` and `fields.switch_objective` read."""
    return {
        "num_local_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.experts_per_token,
        "intermediate_size": cfg.moe.d_expert,
        **fields.switch_objective_to_hf(cfg, objective),
    }


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `mixtral` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    window = fields.size(hf, MODEL_TYPE, "sliding_window", 0)
    return ModelConfig(
        **common,
        num_dense_layers=0,
        d_ff=0,
        attention=grouped_attention(hf, MODEL_TYPE, windows=(window,) if window else ()),
        moe=moe(hf, MODEL_TYPE),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    return fields.switch_objective(hf, MODEL_TYPE)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as MixtralForCausalLM."""
    a = cfg.attention
    return fields.decoder_to_hf(
        cfg,
        architectures=["MixtralForCausalLM"],
        model_type=MODEL_TYPE,
        sliding_window=a.windows[0] if a.windows else None,
        **moe_to_hf(cfg, objective),
        **grouped_to_hf(cfg),
    )
