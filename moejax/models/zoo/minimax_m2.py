"""MiniMax-M2: sigmoid scores with a selection bias, no shared expert; half of each head is rotated."""

from moejax.config import ModelConfig, ObjectiveConfig
from moejax.models.zoo import fields, mixtral, names
from moejax.models.zoo.mixtral import GROUPED, grouped_attention, grouped_to_hf

MODEL_TYPE = "minimax_m2"
READ = GROUPED | {
    *("num_local_experts", "num_experts_per_tok", "intermediate_size", "router_aux_loss_coef"),
    *("rotary_dim", "partial_rotary_factor", "use_qk_norm", "qk_norm_type", "scoring_func"),
    *("use_routing_bias", "shared_intermediate_size", "attention_bias"),
}
# Every layer's attention is full (a list of ones); the released files have no multi-token prediction.
HARMLESS = frozenset({"attn_type_list", "num_mtp_modules", "mtp_transformer_layers", "use_mtp"})
_BIAS = "router_state/moe_blocks/expert_bias"
NAMES = mixtral.NAMES._replace(
    rows=(
        *mixtral.NAMES.rows,
        names.Row(_BIAS, names.BLOCK + "block_sparse_moe.e_score_correction_bias"),
        names.Row(_BIAS, names.BLOCK + "mlp.e_score_correction_bias"),
    )
)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `minimax_m2` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    head = fields.size(hf, MODEL_TYPE, "head_dim")
    for key, value in (
        *(("use_qk_norm", True), ("qk_norm_type", "per_layer"), ("scoring_func", "sigmoid")),
        *(("use_routing_bias", True), ("shared_intermediate_size", 0), ("attention_bias", False)),
    ):
        fields.only(hf, MODEL_TYPE, key, value, None)
    width = fields.size(hf, MODEL_TYPE, "rotary_dim", head)
    part = {"default_part": width / head}
    return ModelConfig(
        **common,
        num_dense_layers=0,
        d_ff=0,
        attention=grouped_attention(hf, MODEL_TYPE, part, qk_norm="full"),
        moe=mixtral.moe(hf, MODEL_TYPE, score="sigmoid", expert_bias=True),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    return fields.switch_objective(hf, MODEL_TYPE)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as MiniMaxM2ForCausalLM."""
    return fields.decoder_to_hf(
        cfg,
        architectures=["MiniMaxM2ForCausalLM"],
        model_type=MODEL_TYPE,
        rotary_dim=cfg.attention.rope.width or cfg.attention.head_dim,
        **mixtral.moe_to_hf(cfg, objective),
        **grouped_to_hf(cfg),
    )
