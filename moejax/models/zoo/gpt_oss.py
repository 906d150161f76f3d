"""gpt-oss (2508.10925): attention sinks, alternating windows, clamped SwiGLU, biases everywhere."""

from moejax.config import ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import fields, names, windows
from moejax.models.zoo.mixtral import GROUPED, grouped_attention
from moejax.routers import router_options

MODEL_TYPE = "gpt_oss"
READ = GROUPED | {
    *("num_local_experts", "num_experts_per_tok", "intermediate_size", "attention_bias"),
    *("swiglu_limit", "layer_types", "sliding_window"),
}
HARMLESS = frozenset({"experts_per_token", "initial_context_length", "router_aux_loss_coef"})
# Where the file is silent. The same in the class of `transformers`.
SCALING = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
# Experts are one tensor with the input axis first, as the parameters; MXFP4 files are unpacked to it.
_FUSED = "mlp.experts.gate_up_proj"
NAMES = names.Table(
    rows=(
        *names.DECODER,
        *names.in_blocks(
            (
                *names.NORMS,
                *names.ATTENTION,
                names.Row("moe/router/kernel", "mlp.router.weight", names.TRANSPOSE),
                names.Row("moe/router/bias", "mlp.router.bias"),
                names.Row("moe/experts/w_gate", _FUSED, names.EVEN),
                names.Row("moe/experts/w_up", _FUSED, names.ODD),
                names.Row("moe/experts/b_gate", _FUSED + "_bias", names.EVEN),
                names.Row("moe/experts/b_up", _FUSED + "_bias", names.ODD),
                names.Row("moe/experts/w_down", "mlp.experts.down_proj"),
                names.Row("moe/experts/b_down", "mlp.experts.down_proj_bias"),
            )
        ),
    ),
    duplicates=(names.TIED_HEAD,),
    ignorable=(names.ROTARY_BUFFER,),
)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `gpt_oss` config.json; ConfigError names what is missing or unsupported."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    n = fields.sizes(
        hf, MODEL_TYPE, "num_local_experts", "num_experts_per_tok", "intermediate_size"
    )
    bias = fields.flag(hf, MODEL_TYPE, "attention_bias", True)
    return ModelConfig(
        **common,
        num_dense_layers=0,
        d_ff=0,
        attention=grouped_attention(
            hf,
            MODEL_TYPE,
            {"default_scaling": SCALING},
            qkv_bias=bias,
            out_bias=bias,
            sinks=True,
            windows=windows.from_hf(
                hf, MODEL_TYPE, [i % 2 == 0 for i in range(common["num_layers"])]
            ),
        ),
        moe=MoEConfig(
            num_experts=n["num_local_experts"],
            experts_per_token=n["num_experts_per_tok"],
            d_expert=n["intermediate_size"],
            # Softmax over the chosen logits = softmax over all of them, renormalised.
            router=router_options(normalize_weights=True, router_bias=True),
            activation="swiglu_oai",
            activation_limit=fields.number(hf, MODEL_TYPE, "swiglu_limit", 7.0),
            ffn_bias=True,
        ),
    )


# No `objective_from_hf`: the paper names no balance loss, and the file's router_aux_loss_coef of 0.9 is far
# from any trained value.


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as GptOssForCausalLM (with BF16 experts)."""
    del objective
    a, m = cfg.attention, cfg.moe
    rope = fields.rope_to_hf(a.rope)
    # Silence would mean SCALING.
    rope["rope_scaling"] = rope["rope_scaling"] or {"rope_type": "default"}
    return fields.decoder_to_hf(
        cfg,
        architectures=["GptOssForCausalLM"],
        model_type=MODEL_TYPE,
        num_key_value_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        attention_bias=a.qkv_bias,
        **windows.to_hf(cfg),
        num_local_experts=m.num_experts,
        num_experts_per_tok=m.experts_per_token,
        experts_per_token=m.experts_per_token,
        intermediate_size=m.d_expert,
        swiglu_limit=m.activation_limit,
        **rope,
    )
