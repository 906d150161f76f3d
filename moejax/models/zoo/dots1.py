"""dots.llm1 (2506.05767): DeepSeek-V3's routing with normed grouped-query attention."""

from moejax.config import ModelConfig, MoEConfig, ObjectiveConfig
from moejax.models.zoo import deepseek, fields, names, windows
from moejax.models.zoo.deepseek_v2 import only_first_layers
from moejax.models.zoo.deepseek_v3 import BIAS, sigmoid_router, sigmoid_router_to_hf
from moejax.models.zoo.mixtral import grouped_attention, grouped_to_hf
from moejax.routers.contract import RouterOptions

MODEL_TYPE = "dots1"
# What this family and later ones with this routing read.
ROUTED = deepseek.READ | {"n_group", "topk_group", "routed_scaling_factor", "num_local_experts"}
READ = ROUTED | {"sliding_window", "max_window_layers", "layer_types"}
HARMLESS = frozenset({"use_sliding_window"})  # the model class looks at max_window_layers alone
NAMES = names.decoder(*names.ATTENTION, *deepseek.FFNS, others=(BIAS,))


def moe(hf: dict, family: str, router: RouterOptions) -> MoEConfig:
    """Experts under V3's keys; the score of the router is fixed in these families."""
    fields.only(hf, family, "scoring_func", "sigmoid", "noaux_tc", None)
    hf = fields.same(hf, family, "n_routed_experts", "num_local_experts")
    return MoEConfig(**deepseek.moe_shape(hf, family), router=router)


def moe_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    return deepseek.moe_shape_to_hf(cfg, objective) | sigmoid_router_to_hf(cfg)


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `dots1` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    bias = fields.flag(hf, MODEL_TYPE, "attention_bias")
    last = fields.size(hf, MODEL_TYPE, "max_window_layers", 62, least=0)
    slides = [
        hf.get("sliding_window", 1) is not None and i >= last for i in range(common["num_layers"])
    ]
    return ModelConfig(
        **common,
        num_dense_layers=only_first_layers(hf, MODEL_TYPE),
        d_ff=fields.size(hf, MODEL_TYPE, "intermediate_size"),
        attention=grouped_attention(
            hf,
            MODEL_TYPE,
            qk_norm="head",
            qkv_bias=bias,
            out_bias=bias,
            windows=windows.from_hf(hf, MODEL_TYPE, slides, 4096),
        ),
        moe=moe(hf, MODEL_TYPE, sigmoid_router(hf, MODEL_TYPE, normalize=False)),
    )


def objective_from_hf(hf: dict) -> ObjectiveConfig:
    return fields.deepseek_objective(hf, MODEL_TYPE, 0.0)


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json that `transformers` loads as Dots1ForCausalLM."""
    return fields.decoder_to_hf(
        cfg,
        architectures=["Dots1ForCausalLM"],
        model_type=MODEL_TYPE,
        attention_bias=cfg.attention.qkv_bias,
        max_window_layers=cfg.num_layers,
        **windows.to_hf(cfg),
        **moe_to_hf(cfg, objective),
        **grouped_to_hf(cfg),
    )
