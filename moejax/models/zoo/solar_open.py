"""Solar Open 100B: DeepSeek-V3's routing in every layer, grouped queries."""

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.models.zoo import deepseek, dots1, fields, names
from moejax.models.zoo.deepseek_v3 import BIAS, sigmoid_router
from moejax.models.zoo.mixtral import grouped_attention, grouped_to_hf

MODEL_TYPE = "solar_open"
READ = (dots1.ROUTED | {"partial_rotary_factor", "use_qk_norm"}) - {"intermediate_size"}
HARMLESS = frozenset({"intermediate_size"})  # of dense layers, of which there are none
NAMES = names.decoder(*names.ATTENTION, *deepseek.FFNS, others=(BIAS,))


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `solar_open` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.given(hf, MODEL_TYPE, "head_dim")
    fields.only(hf, MODEL_TYPE, "first_k_dense_replace", 0, None)
    fields.only(hf, MODEL_TYPE, "moe_layer_freq", 1, None)
    fields.only(hf, MODEL_TYPE, "use_qk_norm", False, None)
    return ModelConfig(
        **common,
        num_dense_layers=0,
        d_ff=0,
        attention=grouped_attention(
            hf,
            MODEL_TYPE,
            {"default_part": 1.0},
            qkv_bias=fields.flag(hf, MODEL_TYPE, "attention_bias"),
        ),
        moe=dots1.moe(hf, MODEL_TYPE, sigmoid_router(hf, MODEL_TYPE)),
    )


objective_from_hf = dots1.objective_from_hf


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as SolarOpenForCausalLM."""
    return fields.decoder_to_hf(
        cfg,
        architectures=["SolarOpenForCausalLM"],
        model_type=MODEL_TYPE,
        attention_bias=cfg.attention.qkv_bias,
        **dots1.moe_to_hf(cfg, objective),
        **grouped_to_hf(cfg),
    )
