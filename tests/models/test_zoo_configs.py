"""Published configs: every preset loads, survives the round trip, and says what its paper says."""

import dataclasses
import json

import pytest

from moejax.config import ConfigError, ModelConfig
from moejax.config_checks import model_problems
from moejax.models import zoo
from moejax.models.zoo.architecture import architecture
from moejax.routers import router_options


def load(name):
    return zoo.load_preset(name), zoo.load_objective(name)


def read(hf):
    return zoo.config_from_hf(hf), zoo.objective_from_hf(hf)


@pytest.mark.parametrize("name", zoo.PRESETS)
def test_preset_round_trips(name):
    cfg, objective = load(name)
    assert not model_problems(cfg, objective=objective)
    kind = zoo.load_hf(name)["model_type"]
    text = json.dumps(zoo.config_to_hf(cfg, kind, objective))
    assert architecture(zoo.config_from_hf(json.loads(text))) == architecture(cfg)


def test_every_config_file_has_a_name():
    named = set((zoo.PRESETS | zoo.COUNTED_PRESETS).values())
    assert named == {p.stem for p in zoo.CONFIGS.glob("*.json")}


def test_deepseek_moe_16b():
    """2401.06066 section 5.1."""
    cfg, objective = load("deepseek-moe-16b")
    m, r = cfg.moe, cfg.moe.router
    assert (cfg.num_layers, cfg.d_model, cfg.d_ff, cfg.num_dense_layers) == (28, 2048, 10944, 1)
    assert (m.num_experts, m.experts_per_token, m.shared_width) == (64, 6, 2816)
    assert (r.score, r.normalize_weights, r.routed_scaling) == ("softmax", False, 1.0)
    assert (cfg.init_std, objective.expert_loss, objective.sequence_loss) == (0.006, 0.001, 0.0)
    assert not cfg.attention.rope.interleaved


def test_deepseek_v2():
    """2405.04434 sections 2 and 3.1; V2 limits routing to 3 of 8 groups by their best member."""
    (v2, o), lite = load("deepseek-v2"), zoo.load_preset("deepseek-v2-lite")
    r, a = v2.moe.router, v2.attention
    assert (r.num_groups, r.topk_groups, r.group_score, r.routed_scaling) == (8, 3, "max", 16.0)
    assert (o.expert_loss, o.device_loss, o.communication_loss) == (0.003, 0.05, 0.02)
    assert (a.kind, a.q_lora_rank, a.qk_nope_head_dim + a.qk_rope_head_dim, a.rope.interleaved) == (
        "mla",
        1536,
        192,
        True,
    )
    assert (a.rope.yarn_factor, a.rope.yarn_mscale, a.rope.yarn_mscale_all_dim) == (
        40,
        0.707,
        0.707,
    )
    assert (lite.moe.router.num_groups, lite.attention.q_lora_rank) == (1, 0)
    assert zoo.load_preset("deepseek-v2.5").attention.rope.yarn_mscale == 1.0


def test_deepseek_v3_and_its_kin():
    """2412.19437 section 4.2; 2502.16982 appendix C."""
    (v3, o), (moonlight, its) = load("deepseek-v3"), load("moonlight-16b-a3b")
    r = v3.moe.router
    assert (r.score, r.normalize_weights, r.routed_scaling) == ("sigmoid", True, 2.5)
    assert (r.num_groups, r.topk_groups, r.group_score) == (8, 4, "top2_sum")
    assert (o.bias_update, o.bias_rate, o.sequence_loss, v3.mtp_depth) == ("sign", 0.001, 1e-4, 1)
    assert (its.bias_update, moonlight.moe.router.routed_scaling) == ("sign_centered", 2.446)
    # The file alone does not say how the bias was learned.
    hf = zoo.load_hf("deepseek-v3")
    assert zoo.config_from_hf(hf).moe.router.expert_bias
    assert zoo.objective_from_hf(hf).bias_update == "none"
    assert zoo.load_preset("kimi-k2").moe.num_experts == 384
    assert architecture(zoo.load_preset("deepseek-r1")) == architecture(v3)


def test_gpt_oss():
    cfg = zoo.load_preset("gpt-oss-20b")
    a, m = cfg.attention, cfg.moe
    assert a.windows == (128, 0) and a.sinks and a.qkv_bias and a.out_bias
    assert (a.rope.yarn_factor, a.rope.yarn_truncate, a.rope.theta) == (32, False, 150_000)
    assert (m.activation, m.activation_limit, m.ffn_bias, m.router.router_bias) == (
        "swiglu_oai",
        7.0,
        True,
        True,
    )
    hf = {**zoo.load_hf("gpt-oss-20b"), "layer_types": ["full_attention"] * 24}
    assert zoo.config_from_hf(hf).attention.windows == ()
    hf["layer_types"] = ["full_attention"] * 23 + ["sliding_attention"]
    assert zoo.config_from_hf(hf).attention.windows == (0,) * 23 + (128,)


def test_mimo_v2_flash():
    """128 tokens before the token, in five layers of six; `sliding_window` alone counts the token, too."""
    cfg = zoo.load_preset("mimo-v2-flash")
    a = cfg.attention
    heads = a.num_kv_heads, a.window_kv_heads, a.head_dim, a.v_head_dim
    assert (a.kind, *heads) == ("hybrid", 4, 8, 192, 128)
    windows = [a.window(layer) for layer in range(48)]
    assert windows == [129 if i and (i + 1) % 6 else 0 for i in range(48)]
    assert (a.rope.theta, a.window_theta, a.rope.width, a.value_scale) == (5e6, 1e4, 64, 0.707)
    assert cfg.num_dense_layers == 1 and cfg.moe.shared_experts == 0
    hf = zoo.load_hf("mimo-v2-flash")
    for key in ("sliding_window_size", "hybrid_layer_pattern", "moe_layer_freq"):
        hf.pop(key)
    silent = zoo.config_from_hf(hf)
    assert [silent.attention.window(layer) for layer in (0, 1, 5)] == [0, 128, 0]
    assert silent.num_dense_layers == 1


def test_attention_and_routing_of_the_others():
    olmoe, qwen3 = zoo.load_preset("olmoe-1b-7b"), zoo.load_preset("qwen3-30b-a3b")
    qwen2, gpt2 = zoo.load_preset("qwen1.5-moe-a2.7b"), zoo.load_preset("gpt-2")
    assert (olmoe.attention.qk_norm, olmoe.moe.router.normalize_weights) == ("full", False)
    assert (qwen3.attention.qk_norm, qwen3.moe.router.normalize_weights) == ("head", True)
    assert (qwen2.moe.shared_width, qwen2.moe.shared_gate, qwen2.attention.qkv_bias) == (
        5632,
        True,
        True,
    )
    assert zoo.load_preset("mixtral-8x7b").moe.router.normalize_weights
    assert zoo.load_preset("llama-1-65b").attention.num_kv_heads == 64  # no such key in the file
    assert (gpt2.norm, gpt2.positions, gpt2.tie_embeddings, gpt2.d_ff) == (
        "layernorm",
        "learned",
        True,
        3072,
    )


DENSE = {
    "only": ("qwen3-30b-a3b", {"mlp_only_layers": [3, 5]}, (3, 5)),
    "step": ("qwen3-30b-a3b", {"decoder_sparse_step": 2}, tuple(range(0, 48, 2))),
    "types": ("glm-4.7-flash", {"mlp_layer_types": ["sparse", "dense"] + ["sparse"] * 45}, (1,)),
    "interval": (
        "ernie-4.5-21b-a3b",
        {"moe_layer_interval": 3, "moe_layer_end_index": 24},
        tuple(i for i in range(28) if i % 3 != 2 or i > 24),
    ),
    "end": ("ernie-4.5-21b-a3b", {"moe_layer_end_index": 20}, (0, *range(21, 28))),
    "frequency": ("deepseek-moe-16b", {"moe_layer_freq": 2}, (0, *range(1, 28, 2))),
}  # fmt: skip


@pytest.mark.parametrize("name, change, at", DENSE.values(), ids=DENSE)
def test_dense_layers_anywhere(name, change, at):
    """Read from each family's keys, and written to them again."""
    hf = {**zoo.load_hf(name), **change}
    cfg = zoo.config_from_hf(hf)
    assert (cfg.dense_at, cfg.num_dense_layers) == (at, len(at))
    assert cfg.layers["dense_blocks"] == at and not {*at} & {*cfg.layers["moe_blocks"]}
    assert zoo.lost_fields(cfg, hf["model_type"]) == []


def test_a_router_that_is_another_by_a_papers_name_is_written_as_that():
    """Mixtral's and V3's routers are token choice with options; the switch router is a function of its own."""
    cfg, _ = load("mixtral-8x7b")
    named = lambda name, **values: dataclasses.replace(  # noqa: E731
        cfg, moe=dataclasses.replace(cfg.moe, router=router_options(name, **values))
    )
    assert zoo.lost_fields(named("mixtral"), "mixtral") == []
    assert zoo.config_to_hf(named("mixtral"), "mixtral") == zoo.config_to_hf(cfg, "mixtral")
    assert any(
        "routed_scaling=16.0" in lost for lost in zoo.lost_fields(named("deepseek_v2"), "mixtral")
    )
    assert "router.name='cosine'" in zoo.lost_fields(named("cosine"), "mixtral")[0]


def test_balance_coefficient_of_transformers_counts_k_times():
    """Its loss is K times 2401.06066 eq. 12: the coefficient 0.02 of Mixtral (K=2) becomes 0.04."""
    cfg, objective = load("mixtral-8x7b")
    assert objective.expert_loss == 0.04
    assert zoo.config_to_hf(cfg, "mixtral", objective)["router_aux_loss_coef"] == 0.02


def test_rope_parameters_of_newer_files():
    hf = zoo.load_hf("deepseek-v3")
    new = {k: v for k, v in hf.items() if k not in ("rope_theta", "rope_scaling")}
    scaling = {k: v for k, v in hf["rope_scaling"].items() if k != "type"}
    new["rope_parameters"] = {**scaling, "rope_type": "yarn", "rope_theta": 10000}
    assert read(new) == read(hf)


def test_qwen3_saved_by_transformers_5():
    hf = zoo.load_hf("qwen3-30b-a3b")
    new = {k: v for k, v in hf.items() if k != "num_experts"} | {"num_local_experts": 128}
    assert read(new) == read(hf)


BAD = {
    "rope type": ("llama-2-7b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "'yarn'"),
    "attention factor": (
        "gpt-oss-20b",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "attention_factor": 1.2}},
        "attention_factor",
    ),
    "softmax scale": (
        "llama-2-7b",
        {"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "mscale_all_dim",
    ),
    "rope not an object": ("llama-2-7b", {"rope_scaling": "yarn"}, "must be an object"),
    "mla bias": ("deepseek-v3", {"attention_bias": True}, "attention_bias=True"),
    "score": ("deepseek-v3", {"scoring_func": "softmax"}, "'sigmoid' would work"),
    "method": ("deepseek-v2", {"topk_method": "noaux_tc"}, "group_limited_greedy"),
    "v2 normalised": ("deepseek-v2", {"norm_topk_prob": True}, "two meanings"),
    "sparse step": ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "decoder_sparse_step=0"),
    "no such layer": ("qwen3-30b-a3b", {"mlp_only_layers": [48]}, "0 to 47"),
    "frequency": ("deepseek-v3", {"moe_layer_freq": 2}, "moe_layer_freq=2"),
    "clip": ("olmoe-1b-7b", {"clip_qkv": 8.0}, "clip_qkv"),
    "activation": ("llama-2-7b", {"hidden_act": "gelu"}, "'silu' would work"),
    "layer types": ("gpt-oss-20b", {"layer_types": ["full_attention"]}, "24 times"),
    "absurd": ("llama-2-7b", {"hidden_size": 10**12}, "hidden_size=1000000000000"),
    "negative": ("llama-2-7b", {"num_hidden_layers": -3}, "num_hidden_layers=-3"),
    "text": ("llama-2-7b", {"vocab_size": "32000"}, "vocab_size='32000'"),
    "not a number": ("llama-2-7b", {"rms_norm_eps": float("nan")}, "rms_norm_eps"),
    "head split": ("gpt-2", {"n_head": 7}, "n_head=7"),
    "too many per token": ("mixtral-8x7b", {"num_experts_per_tok": 9}, "experts_per_token=9"),
    "groups": ("deepseek-v3", {"n_group": 7}, "num_groups=7"),
    "no window": ("k-exaone-236b-a23b", {"sliding_window": None}, "sliding_window"),
    "pattern": (
        "k-exaone-236b-a23b",
        {"sliding_window_pattern": "LXG"},
        "sliding_window_pattern='LXG'",
    ),
    "other dense layers": (
        "k-exaone-236b-a23b",
        {"is_moe_layer": [True] * 48},
        "name different layers",
    ),
    "too few layer types": ("glm-4.7-flash", {"mlp_layer_types": ["dense"]}, "47 times"),
    "biases": ("ernie-4.5-21b-a3b", {"use_bias": True}, "use_bias=True"),
    "layers differ": ("hunyuan-a13b", {"moe_topk": [8] * 31 + [4]}, "moe_topk"),
    "dynamic": ("hunyuan-a13b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
    "no norm": ("minimax-m2", {"use_qk_norm": False}, "use_qk_norm=False"),
    "shared": ("minimax-m2", {"shared_intermediate_size": 8}, "shared_intermediate_size=8"),
    "odd width": ("minimax-m2", {"rotary_dim": 63}, "rope.width=63"),
    "dense": ("solar-open-100b", {"first_k_dense_replace": 1}, "first_k_dense_replace=1"),
    "negative multiplier": (
        "granite-3.0-3b-a800m",
        {"residual_multiplier": -1.0},
        "residual_multiplier",
    ),
    "zero multiplier": (
        "granite-3.0-3b-a800m",
        {"embedding_multiplier": 0.0},
        "embedding_multiplier",
    ),
}


@pytest.mark.parametrize("name, change, text", BAD.values(), ids=BAD)
def test_bad_config_names_the_field(name, change, text):
    with pytest.raises(ConfigError) as e:
        zoo.config_from_hf({**zoo.load_hf(name), **change})
    assert text in str(e.value)


@pytest.mark.parametrize("kind", zoo.FAMILIES)
def test_missing_fields_are_all_named(kind):
    needed = ("n_embd", "n_head") if kind == "gpt2" else ("hidden_size", "num_hidden_layers")
    with pytest.raises(ConfigError) as e:
        zoo.config_from_hf({"model_type": kind})
    assert all(field in str(e.value) for field in needed)


def test_unknown_names_and_types():
    with pytest.raises(ConfigError, match=r"did you mean .*deepseek-moe-16b"):
        zoo.load_preset("deepseek-moe-16")
    with pytest.raises(ConfigError, match="unknown model_type 'bert'; known: deepseek"):
        zoo.config_from_hf({"model_type": "bert"})
    with pytest.raises(ConfigError, match="must be an object with a model_type"):
        zoo.config_from_hf({"model_type": ["llama"]})
    with pytest.raises(ConfigError, match="can be counted"):
        zoo.load_preset("deepseek-v4.1-flash")


def test_a_family_that_cannot_express_a_model_says_so():
    with pytest.raises(ConfigError, match=r"llama config.json cannot express .*num_experts=64"):
        zoo.config_to_hf(zoo.load_preset("deepseek-moe-16b"), "llama")
    with pytest.raises(ConfigError, match="Families that can: mixtral"):
        zoo.config_to_hf(zoo.load_preset("mixtral-8x7b"), "olmoe")
    odd = dataclasses.replace(ModelConfig(), norm="layernorm")
    with pytest.raises(ConfigError, match="Families that can: none"):
        zoo.config_to_hf(odd, "llama")


@pytest.mark.parametrize(
    "name, field",
    [
        ("llama-2-7b", "rms_norm_eps"),  # 1e-5 and 1e-6 in families' code
        ("mixtral-8x7b", "rope_theta"),  # 1e4 and 1e6
        ("gpt-oss-20b", "num_key_value_heads"),  # 8, or the number of heads
        ("deepseek-v2", "n_shared_experts"),  # none, or 2
        ("deepseek-v2", "q_lora_rank"),  # null is V2-Lite's, absent 1536
        ("deepseek-v3", "routed_scaling_factor"),  # 1.0 and 2.5
        ("deepseek-v3", "n_group"),
    ],
)
def test_no_guess_where_defaults_differ(name, field):
    hf = {k: v for k, v in zoo.load_hf(name).items() if k != field}
    with pytest.raises(ConfigError, match=f"{field}.* must be given"):
        zoo.config_from_hf(hf)
