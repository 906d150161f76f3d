"""Qwen3 (2505.09388), dense: RMSNorm on query and key heads; windows in the last layers, if any."""

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.models.zoo import fields, names, windows
from moejax.models.zoo.mixtral import GROUPED, grouped_attention, grouped_to_hf

MODEL_TYPE = "qwen3"
READ = GROUPED | windows.QWEN | {"intermediate_size", "attention_bias"}
HARMLESS = frozenset()
NAMES = names.decoder(*names.ATTENTION, *names.DENSE_FFN)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `qwen3` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.given(hf, MODEL_TYPE, "head_dim")
    bias = fields.flag(hf, MODEL_TYPE, "attention_bias")
    return ModelConfig(
        **common,
        num_dense_layers=common["num_layers"],
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=grouped_attention(
            hf,
            MODEL_TYPE,
            qk_norm="head",
            qkv_bias=bias,
            out_bias=bias,
            windows=windows.from_qwen(hf, MODEL_TYPE, lambda layer, first: layer >= first),
        ),
    )


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as Qwen3ForCausalLM."""
    del objective
    return fields.decoder_to_hf(
        cfg,
        architectures=["Qwen3ForCausalLM"],
        model_type=MODEL_TYPE,
        intermediate_size=cfg.d_ff,
        attention_bias=cfg.attention.qkv_bias,
        **windows.to_qwen(cfg),
        **grouped_to_hf(cfg),
    )
