"""FLOPs per token: the DeepSeekMoE paper's convention, exact shapes, and published figures."""

import pytest

from moejax.config import AttentionConfig, ModelConfig
from moejax.cost.architecture import counts, of_model
from moejax.cost.counted import of_hf
from moejax.cost.flops import flops_per_token, mean_keys, paper_2401_06066, paper_flops
from moejax.models import zoo


def arch(name):
    return of_hf(zoo.load_hf(name), name)


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


def test_exact_shapes_differ_from_the_papers_convention():
    """What the same sequences cost in exact shapes, attention not causal: each matrix at its real
    width, the first layer dense, the router counted. 6 N + 12 L d S with all parameters but the
    input embedding is the same within norms."""
    for name, exact in (("llama-2-7b", "188.76"), ("deepseek-moe-16b", "75.90")):
        a = arch(name)
        per_token = flops_per_token(a, "train", 4096, causal=False).total or 0
        assert f"{4096 * per_token / 1e12:.2f}" == exact
        n = counts(a)["without input embedding"].active
        assert per_token == pytest.approx(6 * n + 12 * a.num_layers * a.d_model * 4096, rel=1e-4)


def test_ratios_of_table_6():
    """2401.06066 section 7: 145B takes 28.5% of the 67B model's FLOPs, half-activated 18.2%."""
    dense = paper_flops(zoo.load_preset("deepseek-llm-67b"), 4096) or 1
    whole = paper_flops(zoo.load_preset("deepseek-moe-145b"), 4096, ideal=False) or 0
    hf = zoo.load_hf("deepseek-moe-145b") | {"n_shared_experts": 2, "num_experts_per_tok": 6}
    half = paper_flops(zoo.config_from_hf(hf), 4096, ideal=False) or 0
    assert f"{whole / dense:.3f}" == "0.285" and f"{half / dense:.3f}" == "0.182"


def test_paper_mode_knows_where_it_ends():
    assert paper_flops(zoo.load_preset("llama-2-70b"), 4096) is None


@pytest.mark.parametrize("name, printed", [("deepseek-v3", "250"), ("deepseek-v2", "155")])
def test_flops_of_v2_and_v3(name, printed):
    """2505.09343 Table 2: GFLOPs per token, training, sequences of 4096, causal."""
    f = flops_per_token(arch(name), "train", 4096).total
    assert f is not None and f"{f / 1e9:.0f}" == printed


def test_flops_of_gpt_3():
    """2005.14165 Table D.1: 3.14e23 FLOPs for 300B tokens, attention's scores left out."""
    matmuls = flops_per_token(arch("gpt-3"), "train", 2048).matmul
    assert f"{300e9 * matmuls:.2e}" == "3.14e+23"


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


SPARSE = ("deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro")


def test_sparse_attention_grows_slowly():
    """2606.19348 Figure 1: at 1M tokens V4-Flash and V4-Pro decode far below V3.2 (10% and 27% in
    its own precision-weighted FLOPs; here every FLOP counts 1)."""
    at = {n: flops_per_token(arch(n), "decode", 2**20).total or 0 for n in SPARSE}
    assert at["deepseek-v4-flash"] < 0.15 * at["deepseek-v3.2"]
    assert at["deepseek-v4-pro"] < 0.3 * at["deepseek-v3.2"]
    assert at["deepseek-v3.2"] < 0.1 * (
        flops_per_token(arch("deepseek-v3"), "decode", 2**20).total or 0
    )


def test_unknown_phase():
    with pytest.raises(ValueError, match="expected one of train"):
        flops_per_token(arch("gpt-2"), "backward", 10)


def test_v4_1_flash_is_counted_as_far_as_it_is_published():
    """Its attention is not, so FLOPs are matrix products alone; a prompt runs half the layers."""
    a = arch("deepseek-v4.1-flash")
    decode, prefill = (flops_per_token(a, phase, 4096) for phase in ("decode", "prefill"))
    assert decode.total is None and prefill.total is None
    head = 2 * (a.part("head") or a.parts[0]).active_matrix
    assert prefill.matmul == (decode.matmul - head) / 2
