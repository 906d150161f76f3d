"""ERNIE 4.5 MoE: softmax scores with a selection bias, shared experts, rotation of adjacent pairs."""

from moejax.config import ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import deepseek, fields, names
from moejax.models.zoo.mixtral import GROUPED, grouped_attention, grouped_to_hf
from moejax.routers import router_options

MODEL_TYPE = "ernie4_5_moe"
READ = GROUPED | {
    *("intermediate_size", "moe_intermediate_size", "moe_k", "moe_num_experts"),
    *("moe_num_shared_experts", "moe_layer_start_index", "moe_layer_end_index"),
    *("moe_layer_interval", "moe_norm_min", "use_bias", "moe_use_aux_free", "moe_gate"),
    "router_aux_loss_coef",
}
# Capacities of training; multi-token prediction, which transformers leaves out too.
HARMLESS = frozenset({"moe_capacity", "num_nextn_predict_layers"})
_BIAS = "router_state/moe_blocks/expert_bias"
_STATICS = "moe_statics.e_score_correction_bias"
NAMES = names.decoder(
    *names.ATTENTION,
    *deepseek.FFNS,
    others=(
        names.Row(_BIAS, names.BLOCK + "mlp." + _STATICS, names.LEAD),
        names.Row(_BIAS, names.BLOCK + "mlp.gate." + _STATICS, names.LEAD),
    ),
    ignorable=(r"(model\.)?mtp.*",),
)


def dense_layers(hf: dict) -> dict:
    """All but every `moe_layer_interval`-th from the start index to the end index."""
    layers = hf["num_hidden_layers"]
    step = fields.size(hf, MODEL_TYPE, "moe_layer_interval", 1)
    first = fields.size(hf, MODEL_TYPE, "moe_layer_start_index", 1, least=0)
    last = layers - 1
    if hf.get("moe_layer_end_index") != -1:
        last = fields.size(hf, MODEL_TYPE, "moe_layer_end_index", last, least=0)
    if step == 1 and last >= layers - 1:
        return {"num_dense_layers": first}
    return fields.dense_layers(
        [not (first <= i <= last) or (i + 1) % step != 0 for i in range(layers)]
    )


def dense_layers_to_hf(cfg: ModelConfig) -> dict:
    """The three keys; a pattern that they cannot express is lost."""
    moe = cfg.layers["moe_blocks"]
    first, last = (moe[0], moe[-1]) if moe else (cfg.num_layers, cfg.num_layers - 1)
    step = moe[1] - moe[0] if cfg.dense_at and len(moe) > 1 else 1
    return {
        "moe_layer_start_index": first,
        "moe_layer_end_index": last,
        "moe_layer_interval": step,
    }


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of an `ernie4_5_moe` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.only(hf, MODEL_TYPE, "use_bias", False, None)
    fields.only(hf, MODEL_TYPE, "moe_use_aux_free", True, None)
    fields.only(hf, MODEL_TYPE, "moe_gate", "topk", None)
    fields.number(hf, MODEL_TYPE, "moe_norm_min", 1e-12)  # no sum of chosen scores comes near
    n = fields.sizes(hf, MODEL_TYPE, "moe_num_experts", "moe_k", "moe_intermediate_size")
    return ModelConfig(
        **common,
        **dense_layers(hf),
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=grouped_attention(hf, MODEL_TYPE, {"interleaved": True}),
        moe=MoEConfig(
            num_experts=n["moe_num_experts"],
            experts_per_token=n["moe_k"],
            d_expert=n["moe_intermediate_size"],
            shared_experts=fields.size(hf, MODEL_TYPE, "moe_num_shared_experts", 2, least=0),
            router=router_options(normalize_weights=True, expert_bias=True),
        ),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    return fields.switch_objective({**hf, "num_experts_per_tok": hf["moe_k"]}, MODEL_TYPE)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as Ernie4_5_MoeForCausalLM."""
    m = cfg.moe
    return fields.decoder_to_hf(
        cfg,
        architectures=["Ernie4_5_MoeForCausalLM"],
        model_type=MODEL_TYPE,
        use_bias=False,
        intermediate_size=cfg.d_ff,
        moe_intermediate_size=m.d_expert,
        moe_k=m.experts_per_token,
        moe_num_experts=m.num_experts,
        moe_num_shared_experts=m.shared_experts,
        **dense_layers_to_hf(cfg),
        **fields.switch_objective_to_hf(cfg, objective),
        **grouped_to_hf(cfg),
    )
