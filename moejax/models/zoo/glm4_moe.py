"""GLM-4.5 and 4.6 (2508.06471): DeepSeek-V3's routing and MTP; half of each head is rotated."""

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.models.zoo import deepseek_v3, dots1, fields, names
from moejax.models.zoo.deepseek_v2 import only_first_layers
from moejax.models.zoo.mixtral import grouped_attention, grouped_to_hf

MODEL_TYPE = "glm4_moe"
READ = dots1.ROUTED | {
    *("use_qk_norm", "partial_rotary_factor", "num_nextn_predict_layers", "num_mtp_layers"),
}
HARMLESS = frozenset()
NAMES = deepseek_v3.table(names.ATTENTION)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `glm4_moe` config.json; ConfigError names what does not work."""
    hf = fields.same(hf, MODEL_TYPE, "num_nextn_predict_layers", "num_mtp_layers")
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.given(hf, MODEL_TYPE, "first_k_dense_replace", "use_qk_norm")
    return ModelConfig(
        **common,
        num_dense_layers=only_first_layers(hf, MODEL_TYPE),
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=grouped_attention(
            hf,
            MODEL_TYPE,
            {"default_part": 0.5},
            qk_norm="head" if fields.flag(hf, MODEL_TYPE, "use_qk_norm") else "none",
            qkv_bias=fields.flag(hf, MODEL_TYPE, "attention_bias"),
        ),
        moe=dots1.moe(hf, MODEL_TYPE, deepseek_v3.sigmoid_router(hf, MODEL_TYPE)),
        mtp_depth=fields.size(hf, MODEL_TYPE, "num_nextn_predict_layers", 0, least=0),
    )


objective_from_hf = dots1.objective_from_hf


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as Glm4MoeForCausalLM (without MTP)."""
    return fields.decoder_to_hf(
        cfg,
        architectures=["Glm4MoeForCausalLM"],
        model_type=MODEL_TYPE,
        attention_bias=cfg.attention.qkv_bias,
        use_qk_norm=cfg.attention.qk_norm == "head",
        num_nextn_predict_layers=cfg.mtp_depth,
        **dots1.moe_to_hf(cfg, objective),
        **{"partial_rotary_factor": 1.0, **grouped_to_hf(cfg)},
    )
