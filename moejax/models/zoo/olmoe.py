"""OLMoE (2409.02060): RMSNorm over all queries and keys before the split, unnormalised top-8."""

from moejax.config import ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import fields, names
from moejax.models.zoo.mixtral import GROUPED, grouped_attention
from moejax.routers import router_options

MODEL_TYPE = "olmoe"
READ = GROUPED | {
    *("num_experts", "num_experts_per_tok", "intermediate_size", "norm_topk_prob"),
    *("attention_bias", "clip_qkv", "router_aux_loss_coef"),
}
HARMLESS = frozenset()
NAMES = names.decoder(*names.ATTENTION, *names.ROUTER, *names.EXPERTS)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of an `olmoe` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    n = fields.sizes(hf, MODEL_TYPE, "num_experts", "num_experts_per_tok", "intermediate_size")
    fields.only(hf, MODEL_TYPE, "clip_qkv", None)
    bias = fields.flag(hf, MODEL_TYPE, "attention_bias")
    return ModelConfig(
        **common,
        num_dense_layers=0,
        d_ff=0,
        attention=grouped_attention(hf, MODEL_TYPE, qk_norm="full", qkv_bias=bias, out_bias=bias),
        moe=MoEConfig(
            num_experts=n["num_experts"],
            experts_per_token=n["num_experts_per_tok"],
            d_expert=n["intermediate_size"],
            router=router_options(normalize_weights=fields.flag(hf, MODEL_TYPE, "norm_topk_prob")),
        ),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    return fields.switch_objective(hf, MODEL_TYPE, default=0.01)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as OlmoeForCausalLM."""
    return fields.decoder_to_hf(
        cfg,
        architectures=["OlmoeForCausalLM"],
        model_type=MODEL_TYPE,
        num_key_value_heads=cfg.attention.num_kv_heads,
        head_dim=cfg.attention.head_dim,
        attention_bias=cfg.attention.qkv_bias,
        clip_qkv=None,
        num_experts=cfg.moe.num_experts,
        num_experts_per_tok=cfg.moe.experts_per_token,
        intermediate_size=cfg.moe.d_expert,
        norm_topk_prob=cfg.moe.router.normalize_weights,
        **fields.switch_objective_to_hf(cfg, objective),
        **fields.rope_to_hf(cfg.attention.rope),
    )
