"""DeepSeekMoE v1 (2401.06066): fine-grained and shared experts, raw softmax weights."""

from moejax.config import ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import fields, llama, names
from moejax.routers import router_options

MODEL_TYPE = "deepseek"
# What the readers below take, of this family and the later ones.
MOE = fields.DECODER | {
    *("intermediate_size", "first_k_dense_replace", "n_routed_experts", "num_experts_per_tok"),
    *("moe_intermediate_size", "moe_layer_freq", "n_shared_experts", "scoring_func"),
    *("norm_topk_prob", "aux_loss_alpha", "seq_aux", "attention_bias", "num_key_value_heads"),
}
READ = MOE | {"head_dim"}
HARMLESS = frozenset()
# The blocks' FFNs: dense, or a router, routed experts, and the shared experts as one wide FFN.
FFNS = names.DENSE_FFN + names.ROUTER + names.EXPERTS + names.SHARED_EXPERTS
NAMES = names.decoder(*names.ATTENTION, *FFNS)


def moe_shape(hf: dict, family: str) -> dict:
    """Keyword arguments of MoEConfig that all DeepSeek families share."""
    n = fields.sizes(hf, family, "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size")
    fields.given(hf, family, "n_shared_experts")
    return {
        "num_experts": n["n_routed_experts"],
        "experts_per_token": n["num_experts_per_tok"],
        "d_expert": n["moe_intermediate_size"],
        "shared_experts": fields.size(hf, family, "n_shared_experts", 0, least=0),
    }


def moe_shape_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    m = cfg.moe
    return {
        "intermediate_size": cfg.d_ff,
        "first_k_dense_replace": cfg.num_dense_layers,
        "n_routed_experts": m.num_experts,
        "num_experts_per_tok": m.experts_per_token,
        "moe_intermediate_size": m.d_expert,
        "n_shared_experts": m.shared_experts,
        "norm_topk_prob": m.router.normalize_weights,
        **fields.deepseek_objective_to_hf(objective),
    }


def _dense_layers(hf: dict) -> dict:
    """The first ones, and then all that are no multiple of `moe_layer_freq`."""
    first = fields.size(hf, MODEL_TYPE, "first_k_dense_replace", 0, least=0)
    step = fields.size(hf, MODEL_TYPE, "moe_layer_freq", 1)
    if step == 1:
        return {"num_dense_layers": first}
    return fields.dense_layers([i < first or i % step != 0 for i in range(hf["num_hidden_layers"])])


def _dense_layers_to_hf(cfg: ModelConfig) -> dict:
    """The two keys; a pattern that they cannot express is lost."""
    moe = cfg.layers["moe_blocks"]
    if not cfg.dense_at or len(moe) < 2:
        return {"first_k_dense_replace": cfg.num_dense_layers, "moe_layer_freq": 1}
    return {"first_k_dense_replace": moe[0], "moe_layer_freq": moe[1] - moe[0]}


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `deepseek` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    fields.only(hf, MODEL_TYPE, "scoring_func", "softmax")
    return ModelConfig(
        **common,
        **_dense_layers(hf),
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=llama.attention(hf, MODEL_TYPE),
        moe=MoEConfig(
            **moe_shape(hf, MODEL_TYPE),
            router=router_options(normalize_weights=fields.flag(hf, MODEL_TYPE, "norm_topk_prob")),
        ),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    """The released model class counts 0.001 where the file is silent."""
    return fields.deepseek_objective(hf, MODEL_TYPE, 0.001)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that DeepSeekMoE's published model class loads."""
    a = cfg.attention
    return fields.decoder_to_hf(
        cfg,
        architectures=["DeepseekForCausalLM"],
        model_type=MODEL_TYPE,
        num_key_value_heads=a.num_kv_heads,
        attention_bias=a.qkv_bias,
        scoring_func="softmax",
        **moe_shape_to_hf(cfg, objective) | _dense_layers_to_hf(cfg),
        **fields.rope_to_hf(a.rope),
    )
