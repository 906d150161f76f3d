"""Qwen1.5-MoE and Qwen2-MoE: unnormalised softmax, a gated shared expert, biases on q, k, v."""

from moejax.config import ConfigError, ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import fields, names, windows
from moejax.models.zoo.mixtral import GROUPED, grouped_attention
from moejax.routers import router_options
from moejax.text import shown

MODEL_TYPE = "qwen2_moe"
# What versions 2 and 3 read.
MOE = GROUPED | {
    *("intermediate_size", "mlp_only_layers", "decoder_sparse_step"),
    *("num_experts", "num_local_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "norm_topk_prob", "router_aux_loss_coef"),
}
READ = MOE | windows.QWEN | {"qkv_bias", "shared_expert_intermediate_size"}
HARMLESS = frozenset()
# The dense layers and the experts of Qwen's MoE models, versions 2 and 3.
FFNS = names.DENSE_FFN + names.ROUTER + names.EXPERTS
NAMES = names.decoder(
    *names.ATTENTION,
    *FFNS,
    *names.swiglu("moe/shared", "mlp.shared_expert"),
    names.Row("moe/shared_gate", "mlp.shared_expert_gate.weight", names.TRANSPOSE),
)


def dense_layers(hf: dict, family: str) -> dict:
    """Which layers are dense: those of `mlp_only_layers`, and all but every `decoder_sparse_step`-th."""
    layers, step = hf["num_hidden_layers"], fields.size(hf, family, "decoder_sparse_step", 1)
    only = fields.items(hf, family, "mlp_only_layers")
    if not all(type(i) is int and 0 <= i < layers for i in only):
        raise ConfigError(
            f"{family} config: mlp_only_layers={shown(only)} must be numbers of layers, 0 to {layers - 1}"
        )
    if step == 1 and not only:
        return fields.dense_layers([])
    dense = set(only)
    return fields.dense_layers([i in dense or (i + 1) % step != 0 for i in range(layers)])


def moe_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    return {
        "intermediate_size": cfg.d_ff,
        "mlp_only_layers": list(cfg.layers["dense_blocks"]),
        "decoder_sparse_step": 1,
        **windows.to_qwen(cfg),
        "num_key_value_heads": cfg.attention.num_kv_heads,
        "head_dim": cfg.attention.head_dim,
        "num_experts": cfg.moe.num_experts,
        "num_experts_per_tok": cfg.moe.experts_per_token,
        "moe_intermediate_size": cfg.moe.d_expert,
        "norm_topk_prob": cfg.moe.router.normalize_weights,
        **fields.switch_objective_to_hf(cfg, objective),
        **fields.rope_to_hf(cfg.attention.rope),
    }


def moe_from_hf(hf: dict, family: str, **kwargs) -> MoEConfig:
    # transformers 5 saves Qwen3's number of experts under Mixtral's name.
    hf = fields.same(hf, family, "num_experts", "num_local_experts")
    n = fields.sizes(hf, family, "num_experts", "num_experts_per_tok", "moe_intermediate_size")
    return MoEConfig(
        num_experts=n["num_experts"],
        experts_per_token=n["num_experts_per_tok"],
        d_expert=n["moe_intermediate_size"],
        router=router_options(normalize_weights=fields.flag(hf, family, "norm_topk_prob")),
        **kwargs,
    )


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `qwen2_moe` config.json; ConfigError names what does not work."""
    return ModelConfig(
        **fields.decoder_from_hf(hf, MODEL_TYPE),
        **dense_layers(hf, MODEL_TYPE),
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=grouped_attention(
            hf,
            MODEL_TYPE,
            qkv_bias=fields.flag(hf, MODEL_TYPE, "qkv_bias", True),
            # Where there are no layer_types, every other one of the first layers has a window.
            windows=windows.from_qwen(hf, MODEL_TYPE, lambda i, last: i % 2 == 0 and i < last),
        ),
        moe=moe_from_hf(
            hf,
            MODEL_TYPE,
            shared_experts=1,
            d_shared=fields.size(hf, MODEL_TYPE, "shared_expert_intermediate_size"),
            shared_gate=True,
        ),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    return fields.switch_objective(hf, MODEL_TYPE)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as Qwen2MoeForCausalLM."""
    return fields.decoder_to_hf(
        cfg,
        architectures=["Qwen2MoeForCausalLM"],
        model_type=MODEL_TYPE,
        qkv_bias=cfg.attention.qkv_bias,
        shared_expert_intermediate_size=cfg.moe.shared_width,
        **moe_to_hf(cfg, objective),
    )
