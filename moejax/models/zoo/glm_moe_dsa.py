"""GLM-5: DeepSeek-V3.2's attention, rotated in pairs in the indexer too; layers may share a choice of keys."""

from moejax.config import ConfigError, ModelConfig, ObjectiveConfig
from moejax.models.zoo import deepseek_v32, fields
from moejax.text import shown

MODEL_TYPE = "glm_moe_dsa"
READ = deepseek_v32.READ | {
    *("indexer_types", "index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
    "indexer_rope_interleave",
}
HARMLESS = deepseek_v32.HARMLESS
NAMES = deepseek_v32.NAMES
FULL, SHARED = "full", "shared"


def _kinds(hf: dict) -> list[str]:
    """Of each layer: by `indexer_types`, else by the letters of a pattern, else every so many are full."""
    layers = hf["num_hidden_layers"]
    kinds = fields.layers_of(hf, MODEL_TYPE, "indexer_types", FULL, SHARED)
    pattern = hf.get("index_topk_pattern")
    if not kinds and isinstance(pattern, str):
        if pattern.strip("FS") or len(pattern) != layers:
            raise ConfigError(
                f"{MODEL_TYPE} config: index_topk_pattern={shown(pattern)} must be {layers} letters F or S"
            )
        return [FULL if c == "F" else SHARED for c in pattern]
    if not kinds:
        kinds = fields.layers_of(hf, MODEL_TYPE, "index_topk_pattern", FULL, SHARED)
    every = max(fields.size(hf, MODEL_TYPE, "index_topk_freq", 1, least=0), 1)
    first = fields.size(hf, MODEL_TYPE, "index_skip_topk_offset", 2, least=0)
    return kinds or [SHARED if max(i - first + 1, 0) % every else FULL for i in range(layers)]


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `glm_moe_dsa` config.json; ConfigError names what does not work."""
    fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.only(hf, MODEL_TYPE, "indexer_rope_interleave", True, None)
    shared = tuple(i for i, kind in enumerate(_kinds(hf)) if kind == SHARED)
    return deepseek_v32.read(hf, MODEL_TYPE, index_interleaved=True, index_shared_at=shared)


objective_from_hf = deepseek_v32.objective_from_hf


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as GlmMoeDsaForCausalLM (without MTP)."""
    shared = {*cfg.attention.index_shared_at}
    return deepseek_v32.write(cfg, objective) | {
        "architectures": ["GlmMoeDsaForCausalLM"],
        "model_type": MODEL_TYPE,
        "indexer_types": [SHARED if i in shared else FULL for i in range(cfg.num_layers)],
    }
