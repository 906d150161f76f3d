"""DeepSeek-V2, V2-Lite, V2.5 (2405.04434): latent attention, device-limited softmax routing."""

from moejax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import deepseek, fields, names
from moejax.routers import router_options

MODEL_TYPE = "deepseek_v2"
# What this family and the next read. Widths of heads that follow from others are repeated by newer files.
MLA = deepseek.MOE | {
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("rope_interleave", "topk_method", "n_group", "topk_group", "routed_scaling_factor"),
    "mlp_bias",
}
READ = MLA
HARMLESS = frozenset({"ep_size", "head_dim", "qk_head_dim"})
NAMES = names.Table(
    rows=(
        *names.DECODER,
        *names.in_blocks(names.NORMS + names.LATENT_ATTENTION + deepseek.FFNS),
    ),
    duplicates=(names.TIED_HEAD,),
    ignorable=(names.ROTARY_BUFFER,),
)


def latent_attention(hf: dict, family: str) -> AttentionConfig:
    """Multi-head latent attention of V2 and V3; RoPE turns adjacent pairs."""
    n = fields.sizes(
        hf, family, "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"
    )
    fields.only(hf, family, "attention_bias", False)
    fields.only(hf, family, "mlp_bias", False, None)
    fields.only(hf, family, "rope_interleave", True)
    fields.given(hf, family, "q_lora_rank")
    heads = fields.size(hf, family, "num_attention_heads")
    fields.only(hf, family, "num_key_value_heads", heads, None)
    return AttentionConfig(
        kind="mla",
        num_heads=heads,
        num_kv_heads=heads,
        q_lora_rank=fields.size(hf, family, "q_lora_rank", 0, least=0),
        kv_lora_rank=n["kv_lora_rank"],
        qk_nope_head_dim=n["qk_nope_head_dim"],
        qk_rope_head_dim=n["qk_rope_head_dim"],
        v_head_dim=n["v_head_dim"],
        rope=fields.rope_from_hf(hf, family, interleaved=True, mla=True),
    )


def latent_attention_to_hf(cfg: ModelConfig) -> dict:
    a = cfg.attention
    return {
        "num_key_value_heads": a.num_heads,
        "q_lora_rank": a.q_lora_rank or None,
        "kv_lora_rank": a.kv_lora_rank,
        "qk_nope_head_dim": a.qk_nope_head_dim,
        "qk_rope_head_dim": a.qk_rope_head_dim,
        "v_head_dim": a.v_head_dim,
        "attention_bias": False,
        **fields.rope_to_hf(a.rope, mla=True),
    }


def only_first_layers(hf: dict, family: str) -> int:
    """How many of the first layers are dense. DeepSeek's code reads `moe_layer_freq`, `transformers` not."""
    fields.only(hf, family, "moe_layer_freq", 1, None)
    return fields.size(hf, family, "first_k_dense_replace", 0, least=0)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `deepseek_v2` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.only(hf, MODEL_TYPE, "scoring_func", "softmax")
    method = fields.only(hf, MODEL_TYPE, "topk_method", "greedy", "group_limited_greedy")
    if fields.flag(hf, MODEL_TYPE, "norm_topk_prob"):
        # DeepSeek's code then drops routed_scaling_factor, transformers drops the normalisation.
        raise ConfigError(
            "deepseek_v2 config: norm_topk_prob=true has two meanings in published code; "
            "false (every released V2) would work"
        )
    groups = {}
    if method == "group_limited_greedy":
        n = fields.sizes(hf, MODEL_TYPE, "n_group", "topk_group")
        groups = {"num_groups": n["n_group"], "topk_groups": n["topk_group"], "group_score": "max"}
    return ModelConfig(
        **common,
        num_dense_layers=only_first_layers(hf, MODEL_TYPE),
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=latent_attention(hf, MODEL_TYPE),
        moe=MoEConfig(
            **deepseek.moe_shape(hf, MODEL_TYPE),
            router=router_options(
                **groups,
                routed_scaling=fields.number(hf, MODEL_TYPE, "routed_scaling_factor", 1.0),
            ),
        ),
    )


objective_from_hf = deepseek.objective_from_hf


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as DeepseekV2ForCausalLM."""
    router = cfg.moe.router
    return fields.decoder_to_hf(
        cfg,
        architectures=["DeepseekV2ForCausalLM"],
        model_type=MODEL_TYPE,
        scoring_func="softmax",
        topk_method="group_limited_greedy" if router.num_groups > 1 else "greedy",
        n_group=router.num_groups,
        topk_group=router.topk_groups,
        routed_scaling_factor=router.routed_scaling,
        **deepseek.moe_shape_to_hf(cfg, objective),
        **latent_attention_to_hf(cfg),
    )
