"""Parameter counts against what was published, and against real parameter trees."""

import re

import jax
import pytest

from moejax.config import AttentionConfig, ConfigError, ModelConfig, MoEConfig
from moejax.cost.architecture import active, counts, of_model, total
from moejax.cost.counted import of_hf
from moejax.cost.published import published
from moejax.models import zoo
from moejax.models.transformer import param_specs
from moejax.params import count, init_params
from moejax.routers import router_options

ALL, NO_INPUT, NONE = "with embeddings", "without input embedding", "without embeddings"


def arch(name):
    return of_hf(zoo.load_hf(name), name)


# Billions, worked out by hand from each config.json apart from this code: total, then active with
# embeddings, without the input embedding, without both.
COUNTS = {
    "deepseek-moe-2b": ("1.967", "0.3165", "0.3061", "0.2956"),
    "deepseek-moe-16b": ("16.3757", "2.8287", "2.6189", "2.4092"),
    "deepseek-moe-145b": ("144.62", "22.195", "21.78", "21.36"),
    "deepseek-llm-7b": ("6.9104", "6.9104", "6.4909", "6.0715"),
    "deepseek-llm-67b": ("67.4250", "67.4250", "66.5861", "65.7473"),
    "deepseek-v2-lite": ("15.7065", "2.6612", "2.4514", "2.2417"),
    "deepseek-v2": ("235.7414", "21.3758", "20.8515", "20.3272"),
    "deepseek-v2.5": ("235.7414", "21.3758", "20.8515", "20.3272"),
    "deepseek-v3": ("671.0264", "37.5523", "36.6256", "35.6989"),
    "deepseek-v3-0324": ("671.0264", "37.5523", "36.6256", "35.6989"),
    "deepseek-v3.1": ("671.0264", "37.5523", "36.6256", "35.6989"),
    "deepseek-r1": ("671.0264", "37.5523", "36.6256", "35.6989"),
    "deepseek-v3.2": ("671.8779", "38.4038", "37.4771", "36.5505"),
    "deepseek-v4-flash": ("284.3322", "13.80", "13.27", "12.74"),
    "deepseek-v4-pro": ("1572.9972", "49.78", "48.85", "47.93"),
    "moonlight-16b-a3b": ("15.9601", "2.9148", "2.5792", "2.2437"),
    "kimi-k2": ("1026.4082", "32.86", "31.69", "30.51"),
    "mixtral-8x7b": ("46.7028", "12.880", "12.749", "12.618"),
    "qwen1.5-moe-a2.7b": ("14.3158", "2.6892", "2.3780", "2.0668"),
    "qwen3-30b-a3b": ("30.5321", "3.353", "3.042", "2.731"),
    "olmoe-1b-7b": ("6.9192", "1.2820", "1.1790", "1.0760"),
    "gpt-oss-120b": ("116.8292", "5.712", "5.1328", "4.554"),
    "gpt-oss-20b": ("20.9148", "4.187", "3.6083", "3.029"),
    "llama-2-7b": ("6.7384", "6.7384", "6.6073", "6.4763"),
    "llama-2-13b": ("13.0159", "13.0159", "12.8520", "12.6882"),
    "llama-2-70b": ("68.9766", "68.9766", "68.7145", "68.4524"),
    "llama-1-65b": ("65.2857", "65.2857", "65.0235", "64.7614"),
    "llama-3-8b": ("8.0303", "8.0303", "7.5049", "6.9796"),
    "llama-3.1-70b": ("70.5537", "70.5537", "69.5030", "68.4524"),
    "llama-3.1-405b": ("405.853", "405.853", "403.752", "401.651"),
    "llama-3.2-1b": ("1.2358", "1.2358", "1.2358", "0.9731"),
    "llama-3.2-3b": ("3.2127", "3.2127", "3.2127", "2.8187"),
    "mistral-7b": ("7.2417", "7.2417", "7.1107", "6.9796"),
    "qwen3-0.6b": ("0.5960", "0.5960", "0.5960", "0.4405"),
    "qwen3-8b": ("8.1907", "8.1907", "7.5684", "6.9461"),
    "qwen3-32b": ("32.7621", "32.7621", "31.9842", "31.2063"),
    "granite-3.0-1b-a400m": ("1.3346", "0.4287", "0.4287", "0.3783"),
    "granite-3.0-3b-a800m": ("3.2988", "0.8829", "0.8829", "0.8074"),
    "dots.llm1": ("142.774", "14.017", "13.394", "12.771"),
    "glm-4.5": ("352.798", "33.632", "32.856", "32.080"),
    "glm-4.5-air": ("106.852", "13.424", "12.803", "12.183"),
    "glm-4.7-flash": ("29.943", "3.897", "3.580", "3.262"),
    "glm-5": ("743.911", "41.785", "40.833", "39.882"),
    "ernie-4.5-21b-a3b": ("21.825", "3.352", "3.352", "3.087"),
    "hunyuan-a13b": ("80.393", "12.747", "12.747", "12.222"),
    "minimax-m2": ("228.690", "11.031", "10.416", "9.801"),
    "mimo-v2-flash": ("308.779", "15.446", "14.821", "14.196"),
    "k-exaone-236b-a23b": ("236.571", "23.668", "22.725", "21.781"),
    "solar-open-100b": ("102.652", "12.055", "11.250", "10.444"),
    "gpt-2": ("0.12444", "0.12444", "0.12365", "0.0851"),
    "gpt-2-medium": ("0.35482", "0.35482", "0.35377", "0.3023"),
    "gpt-2-large": ("0.77403", "0.77403", "0.77272", "0.7084"),
    "gpt-2-xl": ("1.55761", "1.55761", "1.55597", "1.4756"),
    "gpt-3": ("174.6", "174.6", "174.6", "173.96"),
}


def as_printed(value, like):
    """`value` in billions, with as many decimals as `like`."""
    return f"{value / 1e9:.{len(like.partition('.')[2])}f}"


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    c = counts(arch(name))
    found = (c[ALL].total, c[ALL].active, c[NO_INPUT].active, c[NONE].active)
    assert [as_printed(n, like) for n, like in zip(found, COUNTS[name])] == list(COUNTS[name])


# Where a published figure is not our count rounded to its digits: our count, and why.
EXCEPTIONS = {
    ("deepseek-v2-lite", "active"): ("2.5", "2.4514, cut off"),
    ("deepseek-v3.2", "total"): ("672", "the indexer's 0.85B is not in the 671B"),
    ("qwen3-30b-a3b", "active"): ("3.4", "3.353, cut off"),
    ("llama-1-65b", "total"): ("65.3", "65.2857, cut off"),
    ("llama-1-65b", "active"): ("65.3", "65.2857, cut off"),
    ("llama-2-70b", "total"): ("69", "its name; 68.98"),
    ("llama-2-70b", "active"): ("69", "its name; 68.98"),
    ("llama-3.1-405b", "total"): ("406", "405.85, cut off"),
    ("llama-3.1-405b", "active"): ("406", "405.85, cut off"),
    ("llama-3.2-1b", "total"): ("1.24", "1.2358, cut off"),
    ("llama-3.2-1b", "active"): ("1.24", "1.2358, cut off"),
    ("mistral-7b", "total"): ("7.2", "7.2417, rounded up"),
    ("mistral-7b", "active"): ("7.2", "7.2417, rounded up"),
    ("dots.llm1", "total"): ("143", "142.77, cut off"),
    ("glm-4.5", "total"): ("353", "its 355B have multi-token prediction and no embeddings"),
    ("glm-4.5-air", "total"): ("107", "its 106B have no embeddings"),
    ("ernie-4.5-21b-a3b", "total"): ("22", "21.83, cut off"),
    ("minimax-m2", "total"): ("229", "228.69, rounded up"),
    ("k-exaone-236b-a23b", "total"): ("237", "236.57, cut off"),
    ("solar-open-100b", "total"): ("102.7", "102.65, cut off"),
    ("gpt-2-xl", "total"): ("1.6", "1.5576, cut off"),
    ("gpt-2-xl", "active"): ("1.6", "1.5576, cut off"),
}
UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}


@pytest.mark.parametrize("name", sorted(set(published()) - {"gpt-4", "deepseek-v4.1-flash"}))
def test_published_counts(name):
    """What `compare` prints as published is our count, to the printed digit, in the convention that
    the table names."""
    facts, c = published()[name], counts(arch(name))
    ours = {"total": c[ALL].total, "active": c[facts.get("convention", ALL)].active}
    for key, value in ours.items():
        number, unit = re.findall(r"^([\d.]+)([MBT])$", facts[key])[0]
        printed = as_printed(value * 1e9 / UNITS[unit], number)
        want = EXCEPTIONS[name, key][0] if (name, key) in EXCEPTIONS else number
        assert printed == want, (key, facts["source"])
        assert (name, key) not in EXCEPTIONS or printed != number, "no exception any more"


def test_figures_that_no_convention_gives():
    # README_WEIGHTS of V3: 36.7B active with one embedding and the head; we count 36.6 with the
    # head alone and 37.6 with both.
    v3 = [as_printed(x.active, "36.7") for x in counts(arch("deepseek-v3")).values()]
    assert v3 == ["37.6", "36.6", "35.7"]
    # The Kimi K2 report prints 1.04T / 32.6B; its checkpoint has 1.026T.
    k2 = arch("kimi-k2")
    assert as_printed(total(k2) / 1e3, "1.04") == "1.03"
    assert "32.6" not in [as_printed(x.active, "32.6") for x in counts(k2).values()]
    # The GPT-2 paper's Table 2 prints 117M, 345M, 762M, 1542M; only the last is nearly its
    # checkpoint, 1558M.
    sizes = ("gpt-2", "gpt-2-medium", "gpt-2-large", "gpt-2-xl")
    ours = [round(total(arch(n)) / 1e6) for n in sizes]
    assert ours == [124, 355, 774, 1558]


def test_what_glm_counts():
    """Table 1 of 2508.06471 counts no embeddings: 355B with multi-token prediction, Air's 106B without."""
    glm, air = arch("glm-4.5"), arch("glm-4.5-air")
    assert as_printed(counts(glm)[NONE].total + sum(p.total for p in glm.mtp), "355") == "355"
    assert as_printed(counts(air)[NONE].total, "106") == "106"


def test_last_digit():
    """Sums over the tensors of the released checkpoints."""
    assert total(arch("deepseek-v3")) == 671_026_419_200
    assert total(arch("llama-2-7b")) == 6_738_415_616
    # Kimi K2's files hold besides 61 stray tensors of 56 rotary frequencies.
    assert total(arch("kimi-k2")) == 1_026_408_235_864 - 61 * 56
    assert sum(p.total for p in arch("deepseek-v4.1-flash").apart) == 768_022_850 * 256


def test_multi_token_prediction_of_v3():
    """README_WEIGHTS: 11.5B of its own and 2.4B active with embedding and head. Both are ours
    without the projection of two hidden states to one, 2 x 7168 x 7168."""
    a = arch("deepseek-v3")
    own, used = sum(p.total for p in a.mtp), sum(p.active for p in a.mtp)
    assert own == 11_610_068_224
    embeddings = sum(p.total for p in a.parts if p.name in ("embedding", "head"))
    assert as_printed(used + embeddings, "2.5415") == "2.5415"
    projection = 2 * 7168 * 7168
    assert as_printed(own - projection, "11.5") == "11.5"
    assert as_printed(used + embeddings - projection, "2.4") == "2.4"
    # Hugging Face's 685B counts the module's copies of embedding and head too.
    assert as_printed(total(a) + own + embeddings, "684.49") == "684.49"


def test_gshard_137b():
    """2401.06066 Table 6: 136.5B, 21.6B active: 16 standard FFNs, 2 per token, in 62 layers of the
    145B model's widths. Active parameters agree; the total is 138.1B with all layers MoE, 1.2% off
    (the baseline's first layer is not described)."""
    cfg = ModelConfig(
        vocab_size=102_400, d_model=4096, num_layers=62, num_dense_layers=0,
        attention=AttentionConfig(num_heads=32, num_kv_heads=32, head_dim=128),
        moe=MoEConfig(num_experts=16, experts_per_token=2, d_expert=round(4096 * 8 / 3)),
    )  # fmt: skip
    a = of_model(cfg)
    assert as_printed(active(a), "21.6") == "21.6"
    assert total(a) != pytest.approx(136.5e9, rel=0.01)
    assert total(a) == pytest.approx(136.5e9, rel=0.0125)


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
    # The Engram tables' 196.61B were cut off to 196.
    assert as_printed(sum(p.total for p in a.apart), "196.61") == "196.61"
    # A prompt runs through the encoder half: 8B with the embedding.
    encoder = counts(a)[NONE].active / 2
    assert as_printed(encoder + counts(a)[ALL].active - counts(a)[NO_INPUT].active, "8") == "8"
    assert a.attention is None and "compressors" in a.missing


@pytest.mark.parametrize("name", zoo.PRESETS)
def test_counts_equal_the_parameter_tree(name):
    """Of the tree that training would allocate. The balance bias is in published counts and is router
    state in moejax."""
    a, specs = arch(name), param_specs(zoo.load_preset(name))
    tree = jax.eval_shape(lambda: init_params(specs, jax.random.key(0)))
    mtp = tree.pop("mtp", {})
    bias = lambda parts: sum(p.total for p in parts if p.name == "balance bias")  # noqa: E731
    assert count(tree) == total(a) - bias(a.parts)
    assert count(mtp) == sum(p.total for p in a.mtp) - bias(a.mtp)
    routed = a.part("routed experts")
    if routed:
        m = zoo.load_preset(name).moe
        experts = count(tree["moe_blocks"]["moe"]["experts"])
        assert active(a) == total(a) - experts + experts * m.experts_per_token // m.num_experts


ODD = ModelConfig(
    num_dense_layers=2,
    ffn_bias=True,
    norm="layernorm",
    mtp_depth=2,
    attention=AttentionConfig(qkv_bias=True, out_bias=True, qk_norm="full", sinks=True),
    moe=MoEConfig(
        num_experts=6, d_expert=24, shared_experts=1, d_shared=40, shared_gate=True, ffn_bias=True,
        activation="gelu_tanh", router=router_options(router_bias=True, expert_bias=True),
    ),
)  # fmt: skip


def test_counts_equal_the_parameter_tree_with_every_option():
    a, specs = of_model(ODD), param_specs(ODD)
    assert count(specs) + 6 * (2 + 2) == total(a) + sum(p.total for p in a.mtp)


@pytest.mark.parametrize(
    "name, change, text",
    [
        ("deepseek-v3.2", {"index_topk": None}, "missing index_topk"),
        ("deepseek-v4-pro", {"o_groups": None, "head_dim": None}, "missing head_dim, o_groups"),
        ("deepseek-v4-pro", {"compress_ratios": [4, 7]}, "must hold 61 times 0"),
        ("deepseek-v4.1-flash", {"text_config": None}, "missing text_config"),
    ],
)
def test_bad_counted_configs(name, change, text):
    with pytest.raises(ConfigError) as e:
        of_hf(zoo.load_hf(name) | change)
    assert text in str(e.value)
