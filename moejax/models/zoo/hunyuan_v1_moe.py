"""Hunyuan-A13B: renormalised top-8 beside a shared FFN; heads are normed after the rotation."""

from moejax.config import ConfigError, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import fields, names
from moejax.models.zoo.mixtral import GROUPED, grouped_attention, grouped_to_hf
from moejax.routers import router_options
from moejax.text import shown

MODEL_TYPE = "hunyuan_v1_moe"
# What may be a list with an entry for each layer.
_BY_LAYER = ("num_experts", "moe_topk", "num_shared_expert", "moe_intermediate_size")
# Options of the released code with the values of the released model; transformers knows no others.
_FIXED = {
    "use_qk_norm": True,
    "use_cla": False,
    "use_mixed_mlp_moe": True,
    "use_rotary_pos_emb": True,
    "position_embedding_xdrope": False,
    "norm_type": "rms",
    "mlp_bias": False,
    "moe_layer_num_skipped": 0,
    "norm_topk_prob": True,
    "routed_scaling_factor": False,
    "group_limited_greedy": False,
    "add_classification_head": False,
}
READ = GROUPED | {*_BY_LAYER, *_FIXED, "intermediate_size", "attention_bias", "attention_head_dim"}
# Of training; sizes of what is switched off; tokens of the text. The aliases are those of transformers.
HARMLESS = frozenset(
    {
        *(
            "capacity_factor",
            "moe_drop_tokens",
            "moe_random_routing_dropped_token",
            "cla_share_factor",
        ),
        *("class_num", "pool_type", "eod_token_id", "im_end_id", "im_newline_id", "im_start_id"),
        *("image_token_id", "text_start_id", "text_end_id", "mask_init_id", "pad_id", "eod_id"),
        *("n_group", "topk_group", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim"),
        *("qk_rope_head_dim", "v_head_dim", "use_mla"),
    }
)
NAMES = names.decoder(
    *(r for r in names.ATTENTION if "_norm" not in r.path),
    names.Row("attn/q_norm/scale", "self_attn.query_layernorm.weight"),
    names.Row("attn/k_norm/scale", "self_attn.key_layernorm.weight"),
    names.Row("moe/router/kernel", "mlp.gate.wg.weight", names.TRANSPOSE),
    *names.EXPERTS,
    *names.swiglu("moe/shared", "mlp.shared_mlp"),
)


def _same_in_layers(hf: dict, name: str, default: int | None = None) -> int:
    """One number, or a list of equal ones."""
    value = hf.get(name)
    if isinstance(value, list):
        if not value or any(v != value[0] for v in value):
            raise ConfigError(
                f"{MODEL_TYPE} config: {name}={shown(value)} differs between layers; one number would work"
            )
        value = value[0]
    return fields.size({name: value}, MODEL_TYPE, name, default)


def _rope(hf: dict) -> dict:
    """`hf` with a fixed `alpha` of scaling as what it is, a larger base: alpha^(d / (d - 2)) times as large."""
    scaling = hf.get("rope_scaling") or hf.get("rope_parameters")
    if not isinstance(scaling, dict) or not scaling.get("alpha"):
        return hf
    d = fields.head_dim(hf, MODEL_TYPE)
    fields.only(scaling, f"{MODEL_TYPE} rope_scaling", "type", "dynamic", None)
    fields.only(scaling, f"{MODEL_TYPE} rope_scaling", "rope_type", "dynamic", None)
    fields.only(scaling, f"{MODEL_TYPE} rope_scaling", "factor", 1.0, None)
    theta = fields.number(hf | scaling, MODEL_TYPE, "rope_theta", 10_000.0, least=1.0)
    alpha = fields.number(scaling, MODEL_TYPE, "alpha", 1.0, least=1.0)
    rest = {k: v for k, v in hf.items() if k not in ("rope_scaling", "rope_parameters")}
    return {**rest, "rope_theta": theta * alpha ** (d / (d - 2))}


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `hunyuan_v1_moe` config.json; ConfigError names what does not work."""
    fields.size(hf, MODEL_TYPE, "attention_head_dim", 1)
    hf = fields.same(hf, MODEL_TYPE, "head_dim", "attention_head_dim")
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    for key, value in _FIXED.items():
        fields.only(hf, MODEL_TYPE, key, value, None)
    width = fields.size(hf, MODEL_TYPE, "intermediate_size")
    if _same_in_layers(hf, "num_shared_expert", 1) != 1:
        raise ConfigError(f"{MODEL_TYPE} config: num_shared_expert: 1 would work")
    if _same_in_layers(hf, "moe_intermediate_size", width) != width:
        raise ConfigError(
            f"{MODEL_TYPE} config: moe_intermediate_size is not intermediate_size={width}"
        )
    bias = fields.flag(hf, MODEL_TYPE, "attention_bias")
    return ModelConfig(
        **common,
        num_dense_layers=0,
        d_ff=0,
        attention=grouped_attention(
            _rope(hf), MODEL_TYPE, qk_norm="head_rotated", qkv_bias=bias, out_bias=bias
        ),
        moe=MoEConfig(
            num_experts=_same_in_layers(hf, "num_experts"),
            experts_per_token=_same_in_layers(hf, "moe_topk"),
            d_expert=width,
            shared_experts=1,
            router=router_options(normalize_weights=True),
        ),
    )


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as HunYuanMoEV1ForCausalLM."""
    del objective  # the file has no key for it
    m = cfg.moe
    return fields.decoder_to_hf(
        cfg,
        architectures=["HunYuanMoEV1ForCausalLM"],
        model_type=MODEL_TYPE,
        attention_bias=cfg.attention.qkv_bias,
        intermediate_size=m.d_expert,
        num_experts=m.num_experts,
        moe_topk=m.experts_per_token,
        num_shared_expert=m.shared_experts,
        **grouped_to_hf(cfg),
    )
