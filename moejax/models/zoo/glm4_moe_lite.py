"""GLM-4.7-Flash: DeepSeek-V3's attention, routing and MTP, with dense layers named one by one."""

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.models.zoo import deepseek_v3, fields

MODEL_TYPE = "glm4_moe_lite"
READ = deepseek_v3.READ | {"mlp_layer_types", "partial_rotary_factor"}
HARMLESS = deepseek_v3.HARMLESS
NAMES = deepseek_v3.NAMES


def dense_layers(hf: dict, family: str) -> int:
    """The first layers, by `mlp_layer_types`, else `first_k_dense_replace`, else one."""
    first = fields.size(hf, family, "first_k_dense_replace", 1, least=0)
    kinds = fields.layers_of(hf, family, "mlp_layer_types", "dense", "sparse")
    if not kinds:
        return first
    return fields.first_layers(hf, family, "mlp_layer_types", [k == "dense" for k in kinds])


def dense_layers_to_hf(cfg: ModelConfig) -> dict:
    kinds = ["dense"] * cfg.num_dense_layers + ["sparse"] * cfg.num_moe_layers
    return {"first_k_dense_replace": cfg.num_dense_layers, "mlp_layer_types": kinds}


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `glm4_moe_lite` config.json; ConfigError names what does not work."""
    fields.only(hf, MODEL_TYPE, "partial_rotary_factor", 1.0)
    fields.decoder_from_hf(hf, MODEL_TYPE)
    groups = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8}
    hf = {**groups, **hf, "first_k_dense_replace": dense_layers(hf, MODEL_TYPE)}
    return deepseek_v3.config_from_hf(hf)


objective_from_hf = deepseek_v3.objective_from_hf


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as Glm4MoeLiteForCausalLM (without MTP)."""
    return deepseek_v3.config_to_hf(cfg, objective) | {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": MODEL_TYPE,
        **dense_layers_to_hf(cfg),
    }
