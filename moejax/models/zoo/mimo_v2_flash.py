"""MiMo-V2-Flash (2601.02780): DeepSeek-V3's routing; five layers with a window and sinks for one without."""

from moejax.config import AttentionConfig, ConfigError, ModelConfig, ObjectiveConfig
from moejax.models.zoo import deepseek, dots1, fields, glm4_moe_lite, names, windows
from moejax.models.zoo.deepseek_v3 import BIAS, sigmoid_router
from moejax.routers import RouterOptions
from moejax.text import shown

MODEL_TYPE = "mimo_v2_flash"
READ = dots1.ROUTED | {
    *("head_dim", "v_head_dim", "attention_value_scale", "layer_types", "mlp_layer_types"),
    *("hybrid_layer_pattern", "sliding_window", "sliding_window_size", "layernorm_epsilon"),
    *("swa_num_attention_heads", "swa_num_key_value_heads", "swa_head_dim", "swa_v_head_dim"),
    *("swa_rope_theta", "partial_rotary_factor", "topk_method"),
    *("add_swa_attention_sink_bias", "add_full_attention_sink_bias"),
}
# Sizes that kernels choose; multi-token prediction has tensors of its own, which transformers leaves out.
HARMLESS = frozenset({"attention_chunk_size", "hybrid_block_size", "num_nextn_predict_layers"})


def _keys(kind: str) -> tuple[names.Row, ...]:
    return (
        names.Row(f"{kind}_attn/w_k", names.BLOCK + "self_attn.k_proj.weight", names.TRANSPOSE),
        names.Row(f"{kind}_attn/w_v", names.BLOCK + "self_attn.v_proj.weight", names.TRANSPOSE),
        names.Row(f"{kind}_attn/b_k", names.BLOCK + "self_attn.k_proj.bias"),
        names.Row(f"{kind}_attn/b_v", names.BLOCK + "self_attn.v_proj.bias"),
    )


_QUERIES = tuple(r for r in names.ATTENTION if r.path in ("attn/w_q", "attn/b_q", "attn/w_o"))
NAMES = names.decoder(
    *_QUERIES,
    *deepseek.FFNS,
    others=(
        BIAS,
        *_keys("full"),
        *_keys("window"),
        names.Row("window_attn/sinks", names.BLOCK + "self_attn.attention_sink_bias"),
        names.Row("window_attn/sinks", names.BLOCK + "self_attn.sinks"),
    ),
    ignorable=(r"model\.mtp\..*",),
)
_DEFAULT_PART = 0.334


def _ropes(hf: dict) -> tuple[dict, float]:
    """The file with the rotation of full layers in the usual keys, and the base of layers with a window."""
    by_kind = hf.get("rope_parameters")
    if not isinstance(by_kind, dict) or not {windows.FULL, windows.SLIDING} & by_kind.keys():
        fields.given(hf, MODEL_TYPE, "swa_rope_theta")
        return hf, fields.number(hf, MODEL_TYPE, "swa_rope_theta", 0.0, least=1.0)
    odd = by_kind.keys() - {windows.FULL, windows.SLIDING}
    full, sliding = (by_kind.get(k) for k in (windows.FULL, windows.SLIDING))
    if odd or not isinstance(full, dict) or not isinstance(sliding, dict):
        raise ConfigError(
            f"{MODEL_TYPE} config: rope_parameters={shown(by_kind)} must have an object for each of "
            f"{windows.FULL} and {windows.SLIDING}"
        )
    fields.given(full, f"{MODEL_TYPE} {windows.FULL}", "rope_theta")
    fields.given(sliding, f"{MODEL_TYPE} {windows.SLIDING}", "rope_theta")
    for key in (full.keys() | sliding.keys()) - {"rope_theta"}:
        if full.get(key) != sliding.get(key):
            raise ConfigError(
                f"{MODEL_TYPE} config: {key} of the two rope_parameters differ; only rope_theta may"
            )
    theta = fields.number(sliding, MODEL_TYPE, "rope_theta", 0.0, least=1.0)
    return {**hf, "rope_parameters": full, "rope_scaling": None}, theta


def _attention(hf: dict) -> AttentionConfig:
    heads = fields.size(hf, MODEL_TYPE, "num_attention_heads")
    n = fields.sizes(hf, MODEL_TYPE, "num_key_value_heads", "head_dim", "v_head_dim")
    # Layers with a window have twice the key heads in transformers; where the file says, it must be so.
    for key, value in (
        ("swa_num_attention_heads", heads),
        ("swa_num_key_value_heads", 2 * n["num_key_value_heads"]),
        ("swa_head_dim", n["head_dim"]),
        ("swa_v_head_dim", n["v_head_dim"]),
        ("add_swa_attention_sink_bias", True),
        ("add_full_attention_sink_bias", False),
    ):
        fields.only(hf, MODEL_TYPE, key, value, None)
    every, theta = _ropes(hf)
    return AttentionConfig(
        kind="hybrid",
        num_heads=heads,
        num_kv_heads=n["num_key_value_heads"],
        window_kv_heads=2 * n["num_key_value_heads"],
        head_dim=n["head_dim"],
        v_head_dim=n["v_head_dim"],
        qkv_bias=fields.flag(hf, MODEL_TYPE, "attention_bias"),
        value_scale=fields.number(hf, MODEL_TYPE, "attention_value_scale", 1.0),
        sinks=True,
        windows=_windows(hf),
        window_theta=theta,
        rope=fields.rope_from_hf(every, MODEL_TYPE, default_theta=None, default_part=_DEFAULT_PART),
    )


def _windows(hf: dict) -> tuple[int, ...]:
    """`sliding_window_size` counts the tokens before, `sliding_window` the token itself, too."""
    layers = hf["num_hidden_layers"]
    pattern = fields.layers_of(hf, MODEL_TYPE, "hybrid_layer_pattern", 0, 1)
    slides = [p == 1 for p in pattern] or [i > 0 and (i + 1) % 6 > 0 for i in range(layers)]
    if hf.get("sliding_window_size") is not None:
        before = fields.size(hf, MODEL_TYPE, "sliding_window_size")
        fields.size(hf, MODEL_TYPE, "sliding_window", before)
        hf = {**hf, "sliding_window": before + 1}
    return windows.from_hf(hf, MODEL_TYPE, slides, 129)


def _dense(hf: dict) -> dict:
    """By `moe_layer_freq` or `mlp_layer_types`; else the first layer."""
    flags = fields.layers_of(hf, MODEL_TYPE, "moe_layer_freq", 0, 1)
    kinds = fields.layers_of(hf, MODEL_TYPE, "mlp_layer_types", "dense", "sparse")
    dense = [f == 0 for f in flags] or [k == "dense" for k in kinds]
    if flags and kinds and dense != [k == "dense" for k in kinds]:
        raise ConfigError(
            f"{MODEL_TYPE} config: moe_layer_freq and mlp_layer_types name different layers; leave one out"
        )
    return fields.dense_layers(dense or [i == 0 for i in range(hf["num_hidden_layers"])])


def _router(hf: dict) -> RouterOptions:
    """`routed_scaling_factor` is null in the published file."""
    return sigmoid_router(
        {**hf, "routed_scaling_factor": hf.get("routed_scaling_factor") or 1.0}, MODEL_TYPE
    )


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `mimo_v2_flash` config.json; ConfigError names what does not work."""
    fields.number(hf, MODEL_TYPE, "layernorm_epsilon", 0.0)
    hf = fields.same(hf, MODEL_TYPE, "rms_norm_eps", "layernorm_epsilon")
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.only(hf, MODEL_TYPE, "topk_method", "noaux_tc", None)
    fields.only(hf, MODEL_TYPE, "n_shared_experts", None, 0)
    fields.only(hf, MODEL_TYPE, "first_k_dense_replace", None)
    return ModelConfig(
        **common,
        **_dense(hf),
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=_attention(hf),
        moe=dots1.moe({**hf, "n_shared_experts": 0}, MODEL_TYPE, _router(hf)),
    )


objective_from_hf = dots1.objective_from_hf


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as MiMoV2FlashForCausalLM."""
    a, moe = cfg.attention, dots1.moe_to_hf(cfg, objective)
    part = {"partial_rotary_factor": (a.rope.width or a.head_dim) / a.head_dim}
    rope = {"rope_type": "default", **part}
    return fields.decoder_to_hf(
        cfg,
        architectures=["MiMoV2FlashForCausalLM"],
        model_type=MODEL_TYPE,
        num_key_value_heads=a.num_kv_heads,
        head_dim=a.head_dim,
        v_head_dim=a.v_head_dim,
        attention_bias=a.qkv_bias,
        attention_value_scale=a.value_scale,
        rope_parameters={
            windows.FULL: {**rope, "rope_theta": a.rope.theta},
            windows.SLIDING: {**rope, "rope_theta": a.window_theta},
        },
        mlp_layer_types=glm4_moe_lite.dense_layers_to_hf(cfg)["mlp_layer_types"],
        **windows.to_hf(cfg),
        **{k: v for k, v in moe.items() if k not in ("n_shared_experts", "first_k_dense_replace")},
    )
