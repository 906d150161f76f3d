"""DeepSeek-V3, R1, V3.1, Moonlight, Kimi K2 (2412.19437): sigmoid scores, bias balancing, MTP."""

from moejax.config import ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import deepseek, fields, names
from moejax.models.zoo.deepseek_v2 import (
    MLA,
    latent_attention,
    latent_attention_to_hf,
    only_first_layers,
)
from moejax.routers import router_options

MODEL_TYPE = "deepseek_v3"
READ = MLA | {"num_nextn_predict_layers", "num_mtp_layers", "num_local_experts"}
HARMLESS = frozenset({"ep_size", "head_dim", "qk_head_dim"})
_BIAS = names.BLOCK + "mlp.gate.e_score_correction_bias"
_BLOCKS = ("dense_blocks", "moe_blocks", "mtp/block")
# Multi-token prediction is saved as layers after the last, each with its own copy of the embedding
# and the head. Its projection takes the embedding first, unlike eq. 21 of 2412.19437.
BIAS = names.Row("router_state/moe_blocks/expert_bias", _BIAS)


def table(attention: tuple[names.Row, ...]) -> names.Table:
    """V3's names with these of attention."""
    return names.Table(
        rows=(
            *names.DECODER,
            *names.in_blocks(names.NORMS + attention + deepseek.FFNS, _BLOCKS),
            BIAS,
            names.Row("router_state/mtp/expert_bias", _BIAS),
            names.Row("mtp/embed_norm/scale", names.BLOCK + "enorm.weight"),
            names.Row("mtp/hidden_norm/scale", names.BLOCK + "hnorm.weight"),
            names.Row("mtp/proj", names.BLOCK + "eh_proj.weight", names.TRANSPOSE),
            names.Row("mtp/norm/scale", names.BLOCK + "shared_head.norm.weight"),
        ),
        duplicates=(
            names.Duplicate(
                names.BLOCK + "embed_tokens.weight", ("model.embed_tokens.weight",), written=True
            ),
            names.Duplicate(
                names.BLOCK + "shared_head.head.weight",
                ("lm_head.weight", "model.embed_tokens.weight"),
                written=True,
            ),
            names.TIED_HEAD,
        ),
        ignorable=(names.ROTARY_BUFFER,),
    )


NAMES = table(names.LATENT_ATTENTION)


def sigmoid_router(hf: dict, family: str, *, normalize: bool = True, scaling: float = 1.0):
    """V3's router, as many later families have it; `normalize` and `scaling`: where the file is silent."""
    return router_options(
        score="sigmoid",
        normalize_weights=fields.flag(hf, family, "norm_topk_prob", normalize),
        routed_scaling=fields.number(hf, family, "routed_scaling_factor", scaling),
        num_groups=fields.size(hf, family, "n_group", 1),
        topk_groups=fields.size(hf, family, "topk_group", 1),
        group_score="top2_sum",
        expert_bias=True,
    )


def sigmoid_router_to_hf(cfg: ModelConfig) -> dict:
    router = cfg.moe.router
    return {
        "norm_topk_prob": router.normalize_weights,
        "routed_scaling_factor": router.routed_scaling,
        "n_group": router.num_groups,
        "topk_group": router.topk_groups,
    }


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `deepseek_v3` or `kimi_k2` config.json; ConfigError names what fails.

    The file does not say how the selection bias was learned, so no rule moves it; the presets say
    how (objective.bias_update of 'sign', 'sign_centered').
    """
    # Names of transformers 5.
    hf = fields.same(hf, MODEL_TYPE, "n_routed_experts", "num_local_experts")
    hf = fields.same(hf, MODEL_TYPE, "num_nextn_predict_layers", "num_mtp_layers")
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.only(hf, MODEL_TYPE, "scoring_func", "sigmoid")
    fields.only(hf, MODEL_TYPE, "topk_method", "noaux_tc")
    fields.given(hf, MODEL_TYPE, "first_k_dense_replace", "routed_scaling_factor")
    fields.given(hf, MODEL_TYPE, "n_group", "topk_group")
    return ModelConfig(
        **common,
        num_dense_layers=only_first_layers(hf, MODEL_TYPE),
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=latent_attention(hf, MODEL_TYPE),
        moe=MoEConfig(
            **deepseek.moe_shape(hf, MODEL_TYPE),
            router=sigmoid_router(hf, MODEL_TYPE),
        ),
        mtp_depth=fields.size(hf, MODEL_TYPE, "num_nextn_predict_layers", 0, least=0),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    return fields.deepseek_objective(hf, MODEL_TYPE, 0.0)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as DeepseekV3ForCausalLM (without MTP)."""
    return fields.decoder_to_hf(
        cfg,
        architectures=["DeepseekV3ForCausalLM"],
        model_type=MODEL_TYPE,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        num_nextn_predict_layers=cfg.mtp_depth,
        **deepseek.moe_shape_to_hf(cfg, objective) | sigmoid_router_to_hf(cfg),
        **latent_attention_to_hf(cfg),
    )
