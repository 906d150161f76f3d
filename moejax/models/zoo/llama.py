"""LLaMA 1 to 3, DeepSeek LLM: dense, RMSNorm, SwiGLU, half-split RoPE (2302.13971, 2307.09288, 2407.21783)."""

from moejax.config import AttentionConfig, ModelConfig, ObjectiveConfig
from moejax.models.zoo import fields, names

MODEL_TYPE = "llama"
READ = fields.DECODER | {
    *("intermediate_size", "num_key_value_heads", "head_dim", "attention_bias", "mlp_bias"),
}
HARMLESS = frozenset({"max_sequence_length"})  # LLaMA 1
NAMES = names.decoder(*names.ATTENTION, *names.DENSE_FFN)


def attention(hf: dict, family: str) -> AttentionConfig:
    """Attention with as many key/value heads as query heads unless the file says else, and half-split RoPE."""
    bias = fields.flag(hf, family, "attention_bias")
    heads = fields.size(hf, family, "num_attention_heads")
    return AttentionConfig(
        num_heads=heads,
        num_kv_heads=fields.size(hf, family, "num_key_value_heads", heads),
        head_dim=fields.head_dim(hf, family),
        qkv_bias=bias,
        out_bias=bias,
        rope=fields.rope_from_hf(hf, family),
    )


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `llama` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    return ModelConfig(
        **common,
        num_dense_layers=common["num_layers"],
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        ffn_bias=fields.flag(hf, MODEL_TYPE, "mlp_bias"),
        attention=attention(hf, MODEL_TYPE),
    )


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as LlamaForCausalLM."""
    del objective
    a = cfg.attention
    return fields.decoder_to_hf(
        cfg,
        architectures=["LlamaForCausalLM"],
        model_type=MODEL_TYPE,
        intermediate_size=cfg.d_ff,
        num_key_value_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        attention_bias=a.qkv_bias,
        mlp_bias=cfg.ffn_bias,
        **fields.rope_to_hf(a.rope),
    )
