"""DeepSeek-V3.2 (2512.02556): V3 whose attention sees the keys that an indexer chooses."""

import dataclasses

from moejax.config import ConfigError, ModelConfig, ObjectiveConfig
from moejax.models.zoo import deepseek_v3, fields, glm4_moe_lite, names

MODEL_TYPE = "deepseek_v32"
READ = deepseek_v3.READ | {
    *("index_n_heads", "index_head_dim", "index_topk", "mlp_layer_types", "layer_types"),
    "num_experts",
}
HARMLESS = deepseek_v3.HARMLESS
INDEXER = (
    names.Row("indexer/w_q", "self_attn.indexer.wq_b.weight", names.TRANSPOSE),
    names.Row("indexer/w_k", "self_attn.indexer.wk.weight", names.TRANSPOSE),
    names.Row("indexer/k_norm/scale", "self_attn.indexer.k_norm.weight"),
    names.Row("indexer/k_norm/bias", "self_attn.indexer.k_norm.bias"),
    names.Row("indexer/w_heads", "self_attn.indexer.weights_proj.weight", names.TRANSPOSE),
)
NAMES = deepseek_v3.NAMES._replace(
    rows=(
        *deepseek_v3.NAMES.rows,
        *names.in_blocks(INDEXER, ("indexed_attn", "mtp/block/attn")),
    )
)


def read(hf: dict, family: str, **attention) -> ModelConfig:
    """The ModelConfig of this family and of those with its indexer; `attention`: more of its options."""
    hf = fields.same(hf, family, "n_routed_experts", "num_experts")
    fields.decoder_from_hf(hf, family)
    n = fields.sizes(hf, family, "index_n_heads", "index_head_dim", "index_topk", "q_lora_rank")
    fields.layers_of(hf, family, "layer_types", "indexed_attention")
    if not hf.get("mlp_layer_types"):
        fields.given(hf, family, "first_k_dense_replace")
    cfg = deepseek_v3.config_from_hf({**hf, "first_k_dense_replace": 0})
    indexed = dataclasses.replace(
        cfg.attention,
        kind="dsa",
        index_heads=n["index_n_heads"],
        index_head_dim=n["index_head_dim"],
        index_topk=n["index_topk"],
        **attention,
    )
    dense = glm4_moe_lite.dense_layers(hf, family)
    return dataclasses.replace(cfg, attention=indexed, **dense)


def write(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The keys of this family and of those with its indexer. ConfigError for other attention."""
    a = cfg.attention
    if a.kind != "dsa":
        raise ConfigError(f"attention.kind={a.kind!r} has no indexer")
    return deepseek_v3.config_to_hf(cfg, objective) | {
        **glm4_moe_lite.dense_layers_to_hf(cfg),
        "index_n_heads": a.index_heads,
        "index_head_dim": a.index_head_dim,
        "index_topk": a.index_topk,
    }


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `deepseek_v32` config.json; ConfigError names what does not work."""
    return read(hf, MODEL_TYPE)


objective_from_hf = deepseek_v3.objective_from_hf


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as DeepseekV32ForCausalLM (without MTP)."""
    return write(cfg, objective) | {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": MODEL_TYPE,
    }
