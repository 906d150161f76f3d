"""GPT-2: dense, LayerNorm, learned positions, tied head, biases (Radford et al. 2019)."""

from moejax.config import AttentionConfig, ConfigError, ModelConfig, ObjectiveConfig
from moejax.models.zoo import fields, keys, names

MODEL_TYPE = "gpt2"
READ = keys.words(
    """
    vocab_size n_embd n_head n_layer n_positions n_inner activation_function layer_norm_epsilon
    initializer_range scale_attn_weights scale_attn_by_inverse_layer_idx tie_word_embeddings
    """
)
HARMLESS = keys.words(
    """
    n_ctx n_special output_past predict_special_tokens reorder_and_upcast_attn resid_pdrop embd_pdrop
    attn_pdrop summary_activation summary_first_dropout summary_proj_to_labels summary_type
    summary_use_proj
    """
)
_BLOCK = "transformer.h.{layer}."
# Conv1D: weights are [in, out] already. The published files leave out "transformer."; the masks
# that old versions of `transformers` saved as buffers are ignored.
NAMES = names.Table(
    rows=(
        names.Row("embed/tokens", "transformer.wte.weight"),
        names.Row("embed/positions", "transformer.wpe.weight"),
        names.Row("final_norm/scale", "transformer.ln_f.weight"),
        names.Row("final_norm/bias", "transformer.ln_f.bias"),
        *(
            names.Row("dense_blocks/" + path, _BLOCK + hf, transform)
            for path, hf, transform in (
                ("attn_norm/scale", "ln_1.weight", names.COPY),
                ("attn_norm/bias", "ln_1.bias", names.COPY),
                *((f"attn/w_{p}", "attn.c_attn.weight", t) for p, t in zip("qkv", names.THIRDS)),
                *((f"attn/b_{p}", "attn.c_attn.bias", t) for p, t in zip("qkv", names.THIRDS)),
                ("attn/w_o", "attn.c_proj.weight", names.COPY),
                ("attn/b_o", "attn.c_proj.bias", names.COPY),
                ("ffn_norm/scale", "ln_2.weight", names.COPY),
                ("ffn_norm/bias", "ln_2.bias", names.COPY),
                ("ffn/w_up", "mlp.c_fc.weight", names.COPY),
                ("ffn/b_up", "mlp.c_fc.bias", names.COPY),
                ("ffn/w_down", "mlp.c_proj.weight", names.COPY),
                ("ffn/b_down", "mlp.c_proj.bias", names.COPY),
            )
        ),
    ),
    duplicates=(names.Duplicate("lm_head.weight", ("transformer.wte.weight",), written=False),),
    ignorable=(r"transformer\.h\.[0-9]+\.attn\.(masked_)?bias",),
    prefix="transformer.",
)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `gpt2` config.json; ConfigError names what is missing or unsupported."""
    n = fields.sizes(hf, MODEL_TYPE, "vocab_size", "n_embd", "n_head", "n_layer", "n_positions")
    fields.only(hf, MODEL_TYPE, "activation_function", "gelu_new")
    fields.only(hf, MODEL_TYPE, "scale_attn_weights", True)
    fields.only(hf, MODEL_TYPE, "scale_attn_by_inverse_layer_idx", False)
    fields.only(hf, MODEL_TYPE, "tie_word_embeddings", True)
    if n["n_embd"] % n["n_head"]:
        raise ConfigError(
            f"gpt2 config: n_embd={n['n_embd']} is not a multiple of n_head={n['n_head']}"
        )
    return ModelConfig(
        vocab_size=n["vocab_size"],
        d_model=n["n_embd"],
        num_layers=n["n_layer"],
        num_dense_layers=n["n_layer"],
        d_ff=fields.size(hf, MODEL_TYPE, "n_inner", 4 * n["n_embd"]),
        activation="gelu_tanh",
        ffn_bias=True,
        norm="layernorm",
        norm_eps=fields.number(hf, MODEL_TYPE, "layer_norm_epsilon", 1e-5),
        positions="learned",
        tie_embeddings=True,
        max_seq_len=n["n_positions"],
        init_std=fields.number(hf, MODEL_TYPE, "initializer_range", 0.02),
        attention=AttentionConfig(
            num_heads=n["n_head"],
            num_kv_heads=n["n_head"],
            head_dim=n["n_embd"] // n["n_head"],
            qkv_bias=True,
            out_bias=True,
        ),
    )


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as GPT2LMHeadModel."""
    del objective
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": MODEL_TYPE,
        "vocab_size": cfg.vocab_size,
        "n_embd": cfg.d_model,
        "n_layer": cfg.num_layers,
        "n_head": cfg.attention.num_heads,
        "n_positions": cfg.max_seq_len,
        "n_ctx": cfg.max_seq_len,
        "n_inner": cfg.d_ff,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": cfg.norm_eps,
        "initializer_range": cfg.init_std,
        "tie_word_embeddings": True,
    }
