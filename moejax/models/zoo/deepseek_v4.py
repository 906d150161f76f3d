"""DeepSeek-V4, Flash and Pro (2606.19348): compressed attention, several residual streams, hash-routed layers.

A config.json comes in two spellings, that of the published files and that of `transformers`, and so do the
tensors. `transformers` 5.24 saves a mixture: published names under 'model.', with some of its own. All are
read, the published ones are written.
"""

from moejax.config import (
    AttentionConfig,
    ConfigError,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    StreamsConfig,
)
from moejax.models.zoo import fields
from moejax.models.zoo.deepseek_v4_names import NAMES as NAMES
from moejax.models.zoo.keys import words
from moejax.routers import router_options
from moejax.text import shown

MODEL_TYPE, ROUTER = "deepseek_v4", "deepseek_v4_hash"
READ = fields.DECODER | words(
    """
    attention_bias compress_rate_csa compress_rate_hca compress_rates compress_ratios compress_rope_theta
    expert_dtype hc_eps hc_mult hc_sinkhorn_iters head_dim index_head_dim index_n_heads index_topk layer_types
    mlp_bias mlp_layer_types moe_intermediate_size n_routed_experts n_shared_experts norm_topk_prob
    num_experts_per_tok num_hash_layers num_key_value_heads num_nextn_predict_layers o_groups o_lora_rank
    partial_rotary_factor q_lora_rank qk_rope_head_dim routed_scaling_factor scoring_func sliding_window
    swiglu_limit topk_method
    """
)
# A balance loss that only `transformers` has, and the drafter of one release, which is beside the model.
HARMLESS = words(
    """
    router_aux_loss_coef dspark_block_size dspark_noise_token_id dspark_target_layer_ids dspark_markov_rank
    """
)
# Kinds of layers as `transformers` calls them, and as numbers of the published list, which stay these whatever
# the rates are.
KINDS = {
    "sliding_attention": "sliding",
    "compressed_sparse_attention": "csa",
    "heavily_compressed_attention": "hca",
}
RATIOS = {0: "sliding", 4: "csa", 128: "hca"}
RATE = {kind: ratio for ratio, kind in RATIOS.items()}


def _layer_kinds(hf: dict) -> tuple[str, ...]:
    """The kind of every layer, by `layer_types` or `compress_ratios`."""
    n = hf["num_hidden_layers"]
    kinds = tuple(KINDS[k] for k in fields.layers_of(hf, MODEL_TYPE, "layer_types", *KINDS))
    ratios = fields.items(hf, MODEL_TYPE, "compress_ratios")
    if not ratios and not kinds:
        raise ConfigError(f"{MODEL_TYPE} config: missing compress_ratios (or layer_types)")
    known = all(type(r) is int and r in RATIOS for r in ratios)
    # What follows the layers is of multi-token prediction, which has a window alone.
    if ratios and (not known or len(ratios) < n or any(ratios[n:])):
        raise ConfigError(
            f"{MODEL_TYPE} config: compress_ratios must hold {n} times 0 (a window alone), 4 (compressed "
            "sparse attention) or 128 (heavily compressed), then 0 for multi-token prediction, not "
            f"{shown(ratios)}"
        )
    named = tuple(RATIOS[r] for r in ratios[:n])
    if kinds and named and kinds != named:
        raise ConfigError(
            f"{MODEL_TYPE} config: layer_types and compress_ratios name different layers; leave one out"
        )
    return kinds or named


def _rates(hf: dict, kinds: tuple[str, ...]) -> dict[str, int]:
    """Tokens of an entry, 4 and 128 where the file is silent: `compress_rates`, or a key for each kind."""
    given, names = hf.get("compress_rates"), {v: k for k, v in KINDS.items() if v != "sliding"}
    given = {} if given is None else given
    if not isinstance(given, dict) or not set(given) <= set(names.values()):
        raise ConfigError(
            f"{MODEL_TYPE} config: compress_rates={shown(given)} must be an object with the tokens of an entry "
            f"for {' and '.join(map(repr, names.values()))}"
        )
    out = {}
    for kind, name in names.items():
        if given and name not in given and kind in kinds:
            raise ConfigError(
                f"{MODEL_TYPE} config: compress_rates has no {name!r}, which layers have"
            )
        rate = fields.size(given, f"{MODEL_TYPE} compress_rates", name, RATE[kind])
        out[f"{kind}_rate"] = fields.size(hf, MODEL_TYPE, f"compress_rate_{kind}", rate)
    return out


def _hash_layers(hf: dict) -> int:
    """Leading layers that route by a table: `num_hash_layers`, or `mlp_layer_types`."""
    n = hf["num_hidden_layers"]
    kinds = fields.layers_of(hf, MODEL_TYPE, "mlp_layer_types", "hash_moe", "moe")
    count = kinds.count("hash_moe")
    if kinds != ["hash_moe"] * count + ["moe"] * (len(kinds) - count):
        raise ConfigError(
            f"{MODEL_TYPE} config: mlp_layer_types must begin with all of its 'hash_moe'"
        )
    layers = fields.size(hf, MODEL_TYPE, "num_hash_layers", count if kinds else None, least=0)
    if layers > n or (kinds and layers != count):
        raise ConfigError(
            f"{MODEL_TYPE} config: num_hash_layers={layers} does not fit "
            + (f"mlp_layer_types, which has {count}; leave one out" if kinds else f"{n} layers")
        )
    return layers


def _rope(hf: dict, rotated: int) -> dict:
    """`rope` and `compress_theta`: plain angles for sliding layers, YaRN for the others alone."""
    thetas = [
        fields.number(hf, MODEL_TYPE, name, default, least=1.0)
        for name, default in (("rope_theta", 1e4), ("compress_rope_theta", 1.6e5))
    ]
    scaling, both = hf.get("rope_scaling"), hf.get("rope_parameters")
    if isinstance(both, dict) and {"main", "compress"} & both.keys():
        where = f"{MODEL_TYPE} config: rope_parameters"
        main, scaling = both.get("main"), both.get("compress")
        if not isinstance(main, dict) or not isinstance(scaling, dict):
            raise ConfigError(
                f"{where} needs an object for 'main' and one for 'compress', or neither"
            )
        known = {"rope_type", "rope_theta", "partial_rotary_factor"}
        if main.get("rope_type", "default") != "default" or not main.keys() <= known:
            raise ConfigError(f"{where}.main={shown(main)}: rope_type 'default' alone would work")
        for part in (main, scaling):
            share = fields.number(
                part, MODEL_TYPE, "partial_rotary_factor", rotated / hf["head_dim"]
            )
            if int(hf["head_dim"] * share) != rotated:
                raise ConfigError(
                    f"{where}: partial_rotary_factor={share} does not give {rotated} channels"
                )
        thetas = [
            fields.number(part, MODEL_TYPE, "rope_theta", theta, least=1.0)
            for part, theta in zip((main, scaling), thetas)
        ]
    elif scaling is None:
        scaling = both
    if isinstance(scaling, dict):
        fields.only(scaling, f"{MODEL_TYPE} rope", "attention_factor", 1.0, None)
        own = ("attention_factor", "partial_rotary_factor", "rope_theta")
        scaling = {k: v for k, v in scaling.items() if k not in own}
    rest = {k: v for k, v in hf.items() if k != "rope_parameters"}
    rest |= {"rope_scaling": scaling, "rope_theta": thetas[0]}
    rope = fields.rope_from_hf(rest, MODEL_TYPE, interleaved=True)
    return {"rope": rope, "compress_theta": thetas[1]}


def _rotated(hf: dict) -> int:
    """Channels of a head that are rotated."""
    width, share = fields.size(hf, MODEL_TYPE, "head_dim"), hf.get("partial_rotary_factor")
    if share is None:
        return fields.size(hf, MODEL_TYPE, "qk_rope_head_dim")
    rotated = int(width * fields.number(hf, MODEL_TYPE, "partial_rotary_factor", 0.0))
    if fields.size(hf, MODEL_TYPE, "qk_rope_head_dim", rotated) != rotated:
        raise ConfigError(
            f"{MODEL_TYPE} config: partial_rotary_factor={share} of head_dim={width} and "
            f"qk_rope_head_dim={hf['qk_rope_head_dim']} name different channels; leave one out"
        )
    return rotated


def config_from_hf(hf: dict) -> ModelConfig:
    """The ModelConfig of a `deepseek_v4` config.json; ConfigError names what does not work."""
    common = fields.decoder_from_hf(hf, MODEL_TYPE)
    for name, *allowed in (
        ("scoring_func", "sqrtsoftplus"),
        ("topk_method", "noaux_tc", None),
        ("norm_topk_prob", True, None),
        ("attention_bias", False, None),
        ("mlp_bias", False, None),
        ("num_key_value_heads", 1),
        ("tie_word_embeddings", False, None),
        ("expert_dtype", None, "fp4", "fp8"),
    ):
        fields.only(hf, MODEL_TYPE, name, *allowed)
    n = fields.sizes(
        hf, MODEL_TYPE, "head_dim", "q_lora_rank", "sliding_window", "o_groups", "o_lora_rank",
        "index_n_heads", "index_head_dim", "index_topk", "hc_mult", "hc_sinkhorn_iters", "n_routed_experts",
        "num_experts_per_tok", "moe_intermediate_size",
    )  # fmt: skip
    fields.given(hf, MODEL_TYPE, "routed_scaling_factor", "swiglu_limit", "n_shared_experts")
    if n["hc_mult"] < 2:
        raise ConfigError(
            f"{MODEL_TYPE} config: hc_mult=1 is not supported; 2 or more streams would work"
        )
    kinds, rotated = _layer_kinds(hf), _rotated(hf)
    return ModelConfig(
        **common,
        num_dense_layers=0,
        attention=AttentionConfig(
            kind="compressed",
            num_heads=hf["num_attention_heads"],
            head_dim=n["head_dim"],
            qk_rope_head_dim=rotated,
            q_lora_rank=n["q_lora_rank"],
            layer_kinds=kinds,
            sliding_window=n["sliding_window"],
            **_rates(hf, kinds),
            o_groups=n["o_groups"],
            o_lora_rank=n["o_lora_rank"],
            index_heads=n["index_n_heads"],
            index_head_dim=n["index_head_dim"],
            index_topk=n["index_topk"],
            **_rope(hf, rotated),
        ),
        moe=MoEConfig(
            num_experts=n["n_routed_experts"],
            experts_per_token=n["num_experts_per_tok"],
            d_expert=n["moe_intermediate_size"],
            shared_experts=fields.size(hf, MODEL_TYPE, "n_shared_experts", least=0),
            activation="swiglu_clamped",
            activation_limit=fields.number(hf, MODEL_TYPE, "swiglu_limit", 10.0),
            router=router_options(
                ROUTER,
                hash_layers=_hash_layers(hf),
                routed_scaling=fields.number(hf, MODEL_TYPE, "routed_scaling_factor", 1.0),
            ),
        ),
        streams=StreamsConfig(
            count=n["hc_mult"],
            sinkhorn_steps=n["hc_sinkhorn_iters"],
            eps=fields.number(hf, MODEL_TYPE, "hc_eps", 1e-6),
        ),
        mtp_depth=fields.size(hf, MODEL_TYPE, "num_nextn_predict_layers", 0, least=0),
    )


def config_to_hf(cfg: ModelConfig, objective: ObjectiveConfig) -> dict:
    """The config.json of the published spelling, which `transformers` loads as DeepseekV4ForCausalLM."""
    del objective
    a, m = cfg.attention, cfg.moe
    if a.kind != "compressed" or m.router.name != ROUTER:
        raise ConfigError(
            f"{MODEL_TYPE} has attention.kind='compressed' and moe.router.name={ROUTER!r}, not "
            f"{a.kind!r} and {m.router.name!r}"
        )
    rates = {}
    if (a.csa_rate, a.hca_rate) != (4, 128):
        of = {"csa": a.csa_rate, "hca": a.hca_rate}
        rates["compress_rates"] = {name: of[kind] for name, kind in KINDS.items() if kind in of}
    rope = fields.rope_to_hf(a.rope)
    return fields.decoder_to_hf(
        cfg,
        architectures=["DeepseekV4ForCausalLM"],
        model_type=MODEL_TYPE,
        head_dim=a.head_dim,
        qk_rope_head_dim=a.qk_rope_head_dim,
        num_key_value_heads=1,
        q_lora_rank=a.q_lora_rank,
        o_groups=a.o_groups,
        o_lora_rank=a.o_lora_rank,
        sliding_window=a.sliding_window,
        compress_ratios=[RATE[k] for k in a.layer_kinds] + [0] * cfg.mtp_depth,
        **rates,
        compress_rope_theta=a.compress_theta,
        **rope,
        index_n_heads=a.index_heads,
        index_head_dim=a.index_head_dim,
        index_topk=a.index_topk,
        hc_mult=cfg.streams.count,
        hc_sinkhorn_iters=cfg.streams.sinkhorn_steps,
        hc_eps=cfg.streams.eps,
        n_routed_experts=m.num_experts,
        num_experts_per_tok=m.experts_per_token,
        moe_intermediate_size=m.d_expert,
        n_shared_experts=m.shared_experts,
        num_hash_layers=m.router.hash_layers,
        scoring_func="sqrtsoftplus",
        topk_method="noaux_tc",
        norm_topk_prob=True,
        routed_scaling_factor=m.router.routed_scaling,
        swiglu_limit=m.activation_limit,
        num_nextn_predict_layers=cfg.mtp_depth,
        attention_bias=False,
    )
