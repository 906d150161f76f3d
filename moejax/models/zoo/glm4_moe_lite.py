"""GLM-4.7-Flash: DeepSeek-V3's attention, routing and MTP, with dense layers named one by one."""

import dataclasses

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.models.zoo import deepseek_v3, fields

MODEL_TYPE = "glm4_moe_lite"
READ = deepseek_v3.READ | {"mlp_layer_types", "partial_rotary_factor"}
HARMLESS = deepseek_v3.HARMLESS
NAMES = deepseek_v3.NAMES


def dense_layers(hf: dict, family: str) -> dict:
    """By `mlp_layer_types`, else the `first_k_dense_replace` first, else one."""
    first = fields.size(hf, family, "first_k_dense_replace", 1, least=0)
    fields.only(hf, family, "moe_layer_freq", 1, None)
    kinds = fields.layers_of(hf, family, "mlp_layer_types", "dense", "sparse")
    return (
        fields.dense_layers([k == "dense" for k in kinds]) if kinds else {"num_dense_layers": first}
    )


def dense_layers_to_hf(cfg: ModelConfig) -> dict:
    dense = set(cfg.layers["dense_blocks"])
    kinds = ["dense" if i in dense else "sparse" for i in range(cfg.num_layers)]
    first = next((i for i, k in enumerate(kinds) if k == "sparse"), cfg.num_layers)
    return {"first_k_dense_replace": first, "mlp_layer_types": kinds}


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `glm4_moe_lite` config.json; ConfigError names what does not work."""
    fields.only(hf, MODEL_TYPE, "partial_rotary_factor", 1.0)
    fields.decoder_from_hf(hf, MODEL_TYPE)
    groups = {"n_group": 1, "topk_group": 1, "routed_scaling_factor": 1.8}
    every = {**groups, **hf, "first_k_dense_replace": 0}
    return dataclasses.replace(deepseek_v3.config_from_hf(every), **dense_layers(hf, MODEL_TYPE))


objective_from_hf = deepseek_v3.objective_from_hf


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as Glm4MoeLiteForCausalLM (without MTP)."""
    return deepseek_v3.config_to_hf(cfg, objective) | {
        "architectures": ["Glm4MoeLiteForCausalLM"],
        "model_type": MODEL_TYPE,
        **dense_layers_to_hf(cfg),
    }
