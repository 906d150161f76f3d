"""Qwen3-MoE (2505.09388): RMSNorm on query and key heads, renormalised top-8."""

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.models.zoo import fields, names
from moejax.models.zoo.mixtral import grouped_attention
from moejax.models.zoo.qwen2_moe import FFNS, MOE, dense_layers, moe_from_hf, moe_to_hf

MODEL_TYPE = "qwen3_moe"
READ = MOE | {"attention_bias", "use_sliding_window", "sliding_window"}
HARMLESS = frozenset({"max_window_layers", "layer_types"})
NAMES = names.decoder(*names.ATTENTION, *FFNS)


def _windows(hf: dict) -> tuple[int, ...]:
    """The same window in every layer, whatever `layer_types` says: so does the model class."""
    window = fields.size(hf, MODEL_TYPE, "sliding_window", 0, least=0)
    used = fields.flag(hf, MODEL_TYPE, "use_sliding_window") and window
    return (window,) if used else ()


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `qwen3_moe` config.json; ConfigError names what does not work."""
    bias = fields.flag(hf, MODEL_TYPE, "attention_bias")
    return ModelConfig(
        **fields.decoder_from_hf(hf, MODEL_TYPE),
        **dense_layers(hf, MODEL_TYPE),
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=grouped_attention(
            hf, MODEL_TYPE, qk_norm="head", qkv_bias=bias, out_bias=bias, windows=_windows(hf)
        ),
        moe=moe_from_hf(hf, MODEL_TYPE),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    return fields.switch_objective(hf, MODEL_TYPE)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as Qwen3MoeForCausalLM."""
    return fields.decoder_to_hf(
        cfg,
        architectures=["Qwen3MoeForCausalLM"],
        model_type=MODEL_TYPE,
        attention_bias=cfg.attention.qkv_bias,
        **moe_to_hf(cfg, objective),
    )
