"""Parameters, FLOPs, cache and checkpoint sizes against what was published."""

import pytest

from moejax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from moejax.cost.architecture import of_model
from moejax.cost.counted import of_hf
from moejax.cost.flops import flops_per_token, mean_keys, paper_2401_06066, paper_flops
from moejax.cost.memory import cache_bytes, cache_elements, checkpoint_bytes
from moejax.cost.params import active, counts, total
from moejax.models import zoo
from moejax.models.transformer import param_specs
from moejax.params import count

ALL, NO_INPUT, NONE = "with embeddings", "without input embedding", "without embeddings"


def arch(name):
    return of_hf(zoo.load_hf(name), name)


# Published, in billions, to the printed digits: total, active, the convention active follows,
# source.
PUBLISHED = {
    "deepseek-moe-2b": ("2.0", "0.3", ALL, "2401.06066 Table 1"),
    "deepseek-moe-16b": ("16.4", "2.8", ALL, "2401.06066 Table 3"),
    "deepseek-moe-145b": ("144.6", "22.2", ALL, "2401.06066 Table 6"),
    "deepseek-llm-7b": ("6.9", "6.9", ALL, "2401.06066 Table 3"),
    "deepseek-llm-67b": ("67.4", "67.4", ALL, "2401.06066 Table 6"),
    # 2.45 was printed as 2.4.
    "deepseek-v2-lite": ("15.7", "2.5", NO_INPUT, "2405.04434 appendix B"),
    "deepseek-v2": ("236", "21", NO_INPUT, "2405.04434"),
    "deepseek-v2.5": ("236", "21", ALL, "2405.04434"),
    "deepseek-v3": ("671", "37", NO_INPUT, "2412.19437"),
    "deepseek-r1": ("671", "37", NO_INPUT, "2412.19437"),
    "deepseek-v3.2": ("672", "37", NO_INPUT, "671 / 37; the indexer's 0.85 is not in the 671"),
    "deepseek-v4-flash": ("284", "13", NO_INPUT, "2606.19348"),
    "deepseek-v4-pro": ("1573", "49", NO_INPUT, "2606.19348, printed 1.6T"),
    "moonlight-16b-a3b": ("16", "3", ALL, "2502.16982 section 3.3"),
    "kimi-k2": ("1026", "32", NO_INPUT, "release notes: 1T / 32"),
    "mixtral-8x7b": ("46.7", "12.9", ALL, "2401.04088"),
    "qwen1.5-moe-a2.7b": ("14.3", "2.7", ALL, "release notes"),
    "qwen3-30b-a3b": ("30.5", "3.4", ALL, "release notes, printed 3.3"),
    "olmoe-1b-7b": ("6.9", "1.3", ALL, "2409.02060"),
    "gpt-oss-120b": ("116.83", "5.13", NO_INPUT, "2508.10925"),
    "gpt-oss-20b": ("20.91", "3.61", NO_INPUT, "2508.10925"),
    "llama-2-7b": ("6.7", "6.7", ALL, "2307.09288"),
    "llama-2-13b": ("13.0", "13.0", ALL, "2307.09288"),
    "llama-2-70b": ("69.0", "69.0", ALL, "2307.09288"),
    # Printed 65.2: cut off, not rounded.
    "llama-1-65b": ("65.3", "65.3", ALL, "2302.13971 Table 2"),
    "gpt-2": ("0.124", "0.124", ALL, "released checkpoint"),
    "gpt-2-medium": ("0.355", "0.355", ALL, "released checkpoint"),
    "gpt-2-large": ("0.774", "0.774", ALL, "released checkpoint"),
    "gpt-2-xl": ("1.558", "1.558", ALL, "released checkpoint"),
}


def as_printed(value, like):
    digits = len(like.partition(".")[2])
    return f"{value / 1e9:.{digits}f}"


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    published_total, published_active, convention, source = PUBLISHED[name]
    c = counts(arch(name))
    assert as_printed(c[ALL].total, published_total) == published_total, source
    assert as_printed(c[convention].active, published_active) == published_active, source


def test_last_digit():
    """Sums over the tensors of the released checkpoints."""
    assert total(arch("deepseek-v3")) == 671_026_419_200
    assert total(arch("llama-2-7b")) == 6_738_415_616
    assert sum(p.total for p in arch("deepseek-v3").mtp) == 11_610_068_224
    assert sum(p.total for p in arch("deepseek-v4.1-flash").apart) == 768_022_850 * 256


def test_conventions():
    """Moonlight's 15.29B / 2.24B are without embeddings (2502.16982); Qwen1.5-MoE's 2.0B, Qwen3's
    29.9B too (their release notes)."""
    c = counts(arch("moonlight-16b-a3b"))[NONE]
    assert as_printed(c.total, "15.29") == "15.29" and as_printed(c.active, "2.24") == "2.24"
    assert counts(arch("qwen1.5-moe-a2.7b"))[NONE].active == pytest.approx(2.0668e9, abs=1e5)
    assert as_printed(counts(arch("qwen3-30b-a3b"))[NONE].total, "29.9") == "29.9"
    # V3's active parameters in the three conventions.
    v3 = [x.active / 1e9 for x in counts(arch("deepseek-v3")).values()]
    assert v3 == pytest.approx([37.5523, 36.6256, 35.6989], abs=1e-4)
    # GPT-2's tied matrix is the head; its positions are input embedding.
    g = counts(arch("gpt-2"))
    assert g[ALL].total - g[NO_INPUT].total == 1024 * 768
    assert g[NONE].total == pytest.approx(85.1e6, abs=5e4)


def test_expert_parameters_of_the_2b_model():
    """2401.06066 Table 2: 1.89B expert parameters, 0.24B activated."""
    a = arch("deepseek-moe-2b")
    parts = [p for p in (a.part("routed experts"), a.part("shared experts")) if p]
    assert as_printed(sum(p.total for p in parts), "1.89") == "1.89"
    assert as_printed(sum(p.active for p in parts), "0.24") == "0.24"


def test_half_activated_142b_is_not_as_printed():
    """2401.06066 Table 6 prints 142.3B / 12.2B for half the shared and activated experts. The total
    agrees within the first layer's unpublished width; the active count of these shapes is 13.6B,
    which the table's own FLOPs (374.6T) agree with, not 12.2B."""
    hf = zoo.load_hf("deepseek-moe-145b") | {
        "n_shared_experts": 2, "num_experts_per_tok": 6, "intermediate_size": 8 * 1408
    }  # fmt: skip
    a = of_hf(hf)
    assert total(a) == pytest.approx(142.3e9, abs=3 * 4096 * 8 * 1408)
    assert as_printed(active(a), "13.6") == "13.6"


def test_v4_1_flash_is_counted_as_far_as_it_is_published():
    """Report of September 2026: 552B + 196B Engram, 16B active in decoding."""
    a = arch("deepseek-v4.1-flash")
    assert as_printed(total(a), "552") == "552"
    assert as_printed(counts(a)[NO_INPUT].active, "16") == "16"
    assert a.attention is None and "compressors" in a.missing
    assert flops_per_token(a, "decode", 4096).total is None
    assert cache_elements(a, 1) is None


@pytest.mark.parametrize("name", zoo.PRESETS)
def test_counts_equal_the_parameter_tree(name):
    """The balance bias is in published counts and is router state in moejax."""
    a, specs = arch(name), param_specs(zoo.load_preset(name))
    mtp = specs.pop("mtp", {})
    bias = lambda parts: sum(p.total for p in parts if p.name == "balance bias")  # noqa: E731
    assert count(specs) == total(a) - bias(a.parts)
    assert count(mtp) == sum(p.total for p in a.mtp) - bias(a.mtp)
    routed = a.part("routed experts")
    if routed:
        m = zoo.load_preset(name).moe
        experts = count(specs["moe_blocks"]["moe"]["experts"])
        assert active(a) == total(a) - experts + experts * m.experts_per_token // m.num_experts


ODD = ModelConfig(
    num_dense_layers=2,
    ffn_bias=True,
    norm="layernorm",
    mtp_depth=2,
    attention=AttentionConfig(qkv_bias=True, out_bias=True, qk_norm="full", sinks=True),
    moe=MoEConfig(
        num_experts=6, d_expert=24, shared_experts=1, d_shared=40, shared_gate=True, ffn_bias=True,
        router_bias=True, activation="gelu_tanh", bias_update="sign",
    ),
)  # fmt: skip


def test_counts_equal_the_parameter_tree_with_every_option():
    a, specs = of_model(ODD), param_specs(ODD)
    assert count(specs) + 6 * (2 + 2) == total(a) + sum(p.total for p in a.mtp)


# --------------------------------------------------------------------------------------------------
# FLOPs.

# 2401.06066 Tables 3 and 6, per sequence of 4096 tokens.
PAPER = {
    "llama-2-7b": "187.9",
    "deepseek-llm-7b": "183.5",
    "deepseek-moe-16b": "74.4",
    "deepseek-llm-67b": "2057.5",
}


@pytest.mark.parametrize("name", PAPER)
def test_flops_of_the_deepseek_moe_paper(name):
    flops = paper_flops(zoo.load_preset(name), 4096)
    assert flops is not None and f"{flops / 1e12:.1f}" == PAPER[name]


@pytest.mark.parametrize(
    "layers, d, vocab, seq, ffns, printed",
    [
        (62, 4096, 102400, 4096, 2, "572.7"),  # GShard 137B, Table 6
        (9, 1280, 8192, 2048, 2, "4.3"),  # GShard and DeepSeekMoE 2B, Table 1
        (9, 1280, 8192, 2048, 1, "2.9"),  # dense, hash layer, Switch, Table 1
        (9, 1280, 8192, 2048, 16, "24.6"),  # dense x 16, Table 2
        (9, 1280, 8192, 2048, 3, "5.8"),  # GShard x 1.5, Table 2
    ],
)
def test_flops_of_the_papers_baselines(layers, d, vocab, seq, ffns, printed):
    flops = paper_2401_06066(layers, d, vocab, seq, layers * ffns * 8 * d * d)
    assert f"{flops / 1e12:.1f}" == printed


def test_flops_of_145b_are_the_exception():
    """Table 6 prints 585.6T (and 374.6T half-activated). Ideal widths give GShard's 572.7T; the
    rounded width 1408 gives 585.5T, one digit off, and 374.6T."""
    cfg = zoo.load_preset("deepseek-moe-145b")
    assert f"{(paper_flops(cfg, 4096) or 0) / 1e12:.1f}" == "572.7"
    assert f"{(paper_flops(cfg, 4096, ideal=False) or 0) / 1e12:.2f}" == "585.49"
    hf = zoo.load_hf("deepseek-moe-145b") | {"n_shared_experts": 2, "num_experts_per_tok": 6}
    half = paper_flops(zoo.config_from_hf(hf), 4096, ideal=False)
    assert f"{(half or 0) / 1e12:.1f}" == "374.6"


def test_ratios_of_the_deepseek_moe_paper():
    """Abstract and section 5: 16B takes 39.6% of LLaMA 2 7B and 40.5% of DeepSeek 7B (40.54)."""
    f = {n: paper_flops(zoo.load_preset(n), 4096) or 0 for n in PAPER}
    assert f"{f['deepseek-moe-16b'] / f['llama-2-7b']:.3f}" == "0.396"
    assert f["deepseek-moe-16b"] / f["deepseek-llm-7b"] == pytest.approx(0.405, abs=1e-3)


def test_paper_mode_knows_where_it_ends():
    assert paper_flops(zoo.load_preset("llama-2-70b"), 4096) is None


@pytest.mark.parametrize("name, printed", [("deepseek-v3", "250"), ("deepseek-v2", "155")])
def test_flops_of_v2_and_v3(name, printed):
    """2505.09343 Table 2: GFLOPs per token, training, sequences of 4096, causal."""
    f = flops_per_token(arch(name), "train", 4096).total
    assert f is not None and f"{f / 1e9:.0f}" == printed


def test_exact_flops_by_hand():
    """2 layers, d=8, 2 heads of 4 (1 key/value head), FFN 16, V=10, S=6."""
    cfg = ModelConfig(
        vocab_size=10, d_model=8, num_layers=2, num_dense_layers=2, d_ff=16,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=4),
    )  # fmt: skip
    a = of_model(cfg)
    matrices = 2 * (8 * 8 * 2 + 8 * 4 * 2 + 3 * 8 * 16) + 80
    forward = flops_per_token(a, "forward", 6, causal=False)
    assert forward.matmul == 2 * matrices
    assert forward.attention == 2 * 2 * 2 * (4 + 4) * 6
    assert flops_per_token(a, "train", 6, causal=False).total == 3 * (forward.total or 0)
    assert flops_per_token(a, "prefill", 6).matmul == 2 * (matrices - 80)
    assert flops_per_token(a, "forward", 6).attention == (forward.attention or 0) / 2
    assert flops_per_token(a, "decode", 6).attention == forward.attention


def test_mean_keys_is_the_mean():
    """The closed form against the sum over positions; it counts half a key less per query."""
    for limit in (0, 3, 100):
        sees = [min(p, limit) if limit else p for p in range(1, 65)]
        assert mean_keys(64, limit, True) == pytest.approx(sum(sees) / 64, abs=0.51)
    assert mean_keys(64, 3, False) == 64


def test_sparse_attention_grows_slowly():
    """2606.19348 Figure 1: at 1M tokens V4-Flash and V4-Pro decode far below V3.2 (10% and 27% in
    its own precision-weighted FLOPs; here every FLOP counts 1)."""
    at = {n: flops_per_token(arch(n), "decode", 2**20).total or 0 for n in zoo.COUNTED_PRESETS}
    assert at["deepseek-v4-flash"] < 0.15 * at["deepseek-v3.2"]
    assert at["deepseek-v4-pro"] < 0.3 * at["deepseek-v3.2"]
    assert at["deepseek-v3.2"] < 0.1 * (
        flops_per_token(arch("deepseek-v3"), "decode", 2**20).total or 0
    )


# --------------------------------------------------------------------------------------------------
# Cache and checkpoints.

# Numbers per token: 2 x key/value heads x head width x layers, or (latent + rope key) x layers.
# Those of 2405.04434 Table 9 and 2505.09343 Table 1 are published; the rest follow from the
# configs.
CACHE = {
    "deepseek-llm-67b": 194_560,
    "deepseek-llm-7b": 245_760,
    "deepseek-moe-16b": 114_688,
    "deepseek-v2-lite": 15_552,  # 15.6K, 2405.04434 Table 9
    "deepseek-v2": 34_560,  # 34.6K, 2405.04434 Table 9
    "deepseek-v2.5": 34_560,
    "deepseek-v3": 35_136,  # 70.272 KB in BF16, 2505.09343 Table 1
    "deepseek-r1": 35_136,
    "deepseek-v3.2": 35_136,
    "deepseek-moe-145b": 507_904,
    "deepseek-moe-2b": 23_040,
    "gpt-oss-120b": 36_864,
    "gpt-oss-20b": 24_576,
    "gpt-2": 18_432,
    "gpt-2-medium": 49_152,
    "gpt-2-large": 92_160,
    "gpt-2-xl": 153_600,
    "kimi-k2": 35_136,
    "llama-1-65b": 1_310_720,
    "llama-2-7b": 262_144,
    "llama-2-13b": 409_600,
    "llama-2-70b": 163_840,
    "mixtral-8x7b": 65_536,
    "moonlight-16b-a3b": 15_552,
    "olmoe-1b-7b": 65_536,
    "qwen1.5-moe-a2.7b": 98_304,
    "qwen3-30b-a3b": 49_152,
}


@pytest.mark.parametrize("name", CACHE)
def test_cache_elements(name):
    assert cache_elements(arch(name), 1) == CACHE[name]
    if name != "deepseek-v3.2":  # published in a quantised layout
        assert cache_bytes(arch(name), 100) == 200 * CACHE[name]


def test_cache_of_multi_head_attention_in_v2s_ablation():
    """2405.04434 Table 9: 110.6K for 27 layers of 16 heads of 128."""
    cfg = ModelConfig(
        num_layers=27, attention=AttentionConfig(num_heads=16, num_kv_heads=16, head_dim=128)
    )
    assert cache_elements(of_model(cfg), 1) == 110_592


def test_v2_saves_93_percent_of_the_cache():
    """2405.04434 abstract: 93.3% less than DeepSeek 67B, with 6 bits against 16."""
    v2 = cache_bytes(arch("deepseek-v2"), 1, 6 / 8) or 0
    dense = cache_bytes(arch("deepseek-llm-67b"), 1) or 1
    assert f"{1 - v2 / dense:.3f}" == "0.933"


def test_windows_stop_growing():
    """gpt-oss: half the layers keep 128 tokens."""
    for length in (100, 5000):
        want = 18 * 1024 * (min(length, 128) + length)
        assert cache_elements(arch("gpt-oss-120b"), length) == want


def test_published_quantised_caches():
    """Bytes per token at 1M tokens: V4-Pro 9.5x and V4-Flash 13.7x below V3.2 (2606.19348)."""
    million = 2**20
    v32 = cache_bytes(arch("deepseek-v3.2"), million) or 0
    assert v32 / million == 48_068
    assert v32 / (cache_bytes(arch("deepseek-v4-pro"), million) or 1) == pytest.approx(9.5, abs=0.1)
    assert v32 / (cache_bytes(arch("deepseek-v4-flash"), million) or 1) == pytest.approx(
        13.7, abs=0.1
    )


@pytest.mark.parametrize("name, gib", [("gpt-oss-120b", "60.8"), ("gpt-oss-20b", "12.8")])
def test_checkpoint_size_of_gpt_oss(name, gib):
    """2508.10925: MXFP4 experts, the rest BF16."""
    assert f"{checkpoint_bytes(arch(name), zoo.load_hf(name)) / 2**30:.1f}" == gib


def test_checkpoint_size_of_v3():
    """The released files' tensors: 688,574,839,360 bytes. Scales of partial blocks are rounded up
    in the
    file and not here: 1e-7 of it."""
    size = checkpoint_bytes(arch("deepseek-v3"), zoo.load_hf("deepseek-v3"))
    assert size == pytest.approx(688_574_839_360, rel=1e-7)


@pytest.mark.parametrize(
    "name, change, text",
    [
        ("deepseek-v3.2", {"index_topk": None}, "missing index_topk"),
        ("deepseek-v4-pro", {"o_groups": None, "head_dim": None}, "missing head_dim, o_groups"),
        ("deepseek-v4-pro", {"compress_ratios": [4, 7]}, "at least 61 of 0, 4 and 128"),
        ("deepseek-v4.1-flash", {"text_config": None}, "missing text_config"),
    ],
)
def test_bad_counted_configs(name, change, text):
    with pytest.raises(ConfigError) as e:
        of_hf(zoo.load_hf(name) | change)
    assert text in str(e.value)


def test_unknown_phase():
    with pytest.raises(ValueError, match="expected one of train"):
        flops_per_token(arch("gpt-2"), "backward", 10)
