"""Granite MoE 3.0 and 3.1: Mixtral's routing over small experts, and four fixed multipliers."""

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.models.zoo import fields, mixtral, names
from moejax.models.zoo.mixtral import GROUPED, grouped_attention, grouped_to_hf

MODEL_TYPE = "granitemoe"
READ = GROUPED | {
    *("num_local_experts", "num_experts_per_tok", "intermediate_size", "attention_bias"),
    *("embedding_multiplier", "attention_multiplier", "residual_multiplier", "logits_scaling"),
    "router_aux_loss_coef",
}
HARMLESS = frozenset()
_MOE = "block_sparse_moe."
NAMES = names.decoder(
    *names.ATTENTION,
    names.Row("moe/router/kernel", _MOE + "router.layer.weight", names.TRANSPOSE),
    names.Row("moe/experts/w_gate", _MOE + "input_linear.weight", names.HALVES[0]),
    names.Row("moe/experts/w_up", _MOE + "input_linear.weight", names.HALVES[1]),
    names.Row("moe/experts/w_down", _MOE + "output_linear.weight", names.TRANSPOSE),
)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `granitemoe` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    bias = fields.flag(hf, MODEL_TYPE, "attention_bias")
    # Not 1 / sqrt(head width) where the file is silent, but 1.
    scale = fields.number(hf, MODEL_TYPE, "attention_multiplier", 1.0, least=1e-9)
    return ModelConfig(
        **common,
        num_dense_layers=0,
        d_ff=0,
        embedding_multiplier=fields.number(hf, MODEL_TYPE, "embedding_multiplier", 1.0),
        residual_multiplier=fields.number(hf, MODEL_TYPE, "residual_multiplier", 1.0),
        logits_divisor=fields.number(hf, MODEL_TYPE, "logits_scaling", 1.0),
        attention=grouped_attention(hf, MODEL_TYPE, qkv_bias=bias, out_bias=bias, scale=scale),
        moe=mixtral.moe(hf, MODEL_TYPE),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    return fields.switch_objective(hf, MODEL_TYPE)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as GraniteMoeForCausalLM."""
    a = cfg.attention
    return fields.decoder_to_hf(
        cfg,
        architectures=["GraniteMoeForCausalLM"],
        model_type=MODEL_TYPE,
        attention_bias=a.qkv_bias,
        embedding_multiplier=cfg.embedding_multiplier,
        residual_multiplier=cfg.residual_multiplier,
        logits_scaling=cfg.logits_divisor,
        attention_multiplier=a.scale or a.head_dim**-0.5,
        **mixtral.moe_to_hf(cfg, objective),
        **grouped_to_hf(cfg),
    )
