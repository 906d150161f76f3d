"""Mistral 7B (2310.06825): LLaMA with grouped queries and one sliding window."""

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.models.zoo import fields, names
from moejax.models.zoo.mixtral import GROUPED, grouped_attention, grouped_to_hf

MODEL_TYPE = "mistral"
READ = GROUPED | {"intermediate_size", "sliding_window"}
HARMLESS = frozenset()
NAMES = names.decoder(*names.ATTENTION, *names.DENSE_FFN)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `mistral` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.given(hf, MODEL_TYPE, "sliding_window")
    window = fields.size(hf, MODEL_TYPE, "sliding_window", 0)
    return ModelConfig(
        **common,
        num_dense_layers=common["num_layers"],
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=grouped_attention(hf, MODEL_TYPE, windows=(window,) if window else ()),
    )


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as MistralForCausalLM."""
    del objective
    return fields.decoder_to_hf(
        cfg,
        architectures=["MistralForCausalLM"],
        model_type=MODEL_TYPE,
        intermediate_size=cfg.d_ff,
        sliding_window=cfg.attention.windows[0] if cfg.attention.windows else None,
        **grouped_to_hf(cfg),
    )
