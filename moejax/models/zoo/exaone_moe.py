"""K-EXAONE 236B: DeepSeek-V3's routing; windows with rotary positions, full layers without any."""

from moejax.config import ConfigError, ModelConfig, ObjectiveConfig
from moejax.models.zoo import deepseek, dots1, fields, glm4_moe_lite, names, windows
from moejax.models.zoo.deepseek_v3 import sigmoid_router
from moejax.models.zoo.mixtral import grouped_attention, grouped_to_hf
from moejax.text import shown

MODEL_TYPE = "exaone_moe"
READ = (
    dots1.ROUTED
    | {
        *("num_experts", "num_shared_experts", "mlp_layer_types", "is_moe_layer"),
        *("sliding_window", "sliding_window_pattern", "layer_types", "topk_method"),
    }
) - {"n_routed_experts", "n_shared_experts", "num_local_experts"}
# Multi-token prediction, which transformers leaves out too, has tensors and keys of its own.
HARMLESS = frozenset({"num_nextn_predict_layers", "first_last_k_dense_replace"})
_BIAS = "router_state/moe_blocks/expert_bias"
NAMES = names.decoder(
    *names.ATTENTION,
    *deepseek.FFNS,
    others=(
        names.Row(_BIAS, names.BLOCK + "mlp.e_score_correction_bias"),
        names.Row(_BIAS, names.BLOCK + "mlp.gate.e_score_correction_bias"),
    ),
    ignorable=(r"mtp\..*",),
)


def _pattern(hf: dict) -> str:
    """L for a layer with a window and G for a full one, to be repeated."""
    pattern = hf.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and pattern and not pattern.strip("LG"):
        return pattern
    if pattern is None or (type(pattern) is int and 0 < pattern < 1000):
        return "L" * ((pattern or 1) - 1) + "G"
    raise ConfigError(
        f"exaone_moe config: sliding_window_pattern={shown(pattern)} must be an integer, letters L and G, "
        "or null"
    )


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of an `exaone_moe` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.only(hf, MODEL_TYPE, "topk_method", "noaux_tc", None)
    fields.only(hf, MODEL_TYPE, "attention_bias", False, None)
    experts = fields.size(hf, MODEL_TYPE, "num_experts")
    shared = fields.size(hf, MODEL_TYPE, "num_shared_experts", 1, least=0)
    dense = glm4_moe_lite.dense_layers(hf, MODEL_TYPE)
    flags = fields.layers_of(hf, MODEL_TYPE, "is_moe_layer", False, True)
    if flags and fields.dense_layers([not f for f in flags]) != {"dense_at": (), **dense}:
        raise ConfigError(
            f"exaone_moe config: is_moe_layer={shown(flags)} and the other keys name different layers; "
            "leave it out"
        )
    every = {**hf, "n_routed_experts": experts, "n_shared_experts": shared}
    # Without windows the class rotates in every layer: another model, of which there is none.
    fields.sizes(hf, MODEL_TYPE, "sliding_window")
    pattern = _pattern(hf)
    slides = [pattern[i % len(pattern)] == "L" for i in range(common["num_layers"])]
    return ModelConfig(
        **common,
        **dense,
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=grouped_attention(
            hf,
            MODEL_TYPE,
            qk_norm="head",
            windows=windows.from_hf(hf, MODEL_TYPE, slides),
            rope_layers="windowed",
        ),
        moe=dots1.moe(every, MODEL_TYPE, sigmoid_router(hf, MODEL_TYPE, scaling=2.5)),
    )


objective_from_hf = dots1.objective_from_hf


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as ExaoneMoeForCausalLM."""
    moe = dots1.moe_to_hf(cfg, objective) | glm4_moe_lite.dense_layers_to_hf(cfg)
    for theirs, ours in (
        ("num_experts", "n_routed_experts"),
        ("num_shared_experts", "n_shared_experts"),
    ):
        moe[theirs] = moe.pop(ours)
    return fields.decoder_to_hf(
        cfg,
        architectures=["ExaoneMoeForCausalLM"],
        model_type=MODEL_TYPE,
        **windows.to_hf(cfg),
        **moe,
        **grouped_to_hf(cfg),
    )
