"""Key/value caches and checkpoint sizes against what was published."""

import pytest

from moejax.config import AttentionConfig, ModelConfig
from moejax.cost.architecture import of_model
from moejax.cost.counted import of_hf
from moejax.cost.memory import cache_bytes, checkpoint_bytes
from moejax.cost.published import published
from moejax.models import zoo


def arch(name):
    return of_hf(zoo.load_hf(name), name)


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
def test_cache(name):
    assert cache_bytes(arch(name), 1, bytes_per=1) == CACHE[name]
    assert cache_bytes(arch(name), 100) == 200 * CACHE[name]


@pytest.mark.parametrize(
    "layers, kv_heads, elements, source",
    [
        (27, 16, 110_592, "110.6K, 2405.04434 Table 9, multi-head attention"),
        (60, 56, 860_160, "860.2K, 2405.04434 Table 9; its 56 heads are inferred"),
        (80, 8, 327_680 // 2, "Qwen2.5-72B, 327.680 KB, 2505.09343 Table 1"),
        (126, 8, 516_096 // 2, "LLaMA-3.1-405B, 516.096 KB, 2505.09343 Table 1"),
    ],
)
def test_caches_of_other_published_models(layers, kv_heads, elements, source):
    attention = AttentionConfig(num_heads=kv_heads, num_kv_heads=kv_heads, head_dim=128)
    cfg = ModelConfig(num_layers=layers, attention=attention)
    assert cache_bytes(of_model(cfg), 1, bytes_per=1) == elements, source


def test_v2_saves_93_percent_of_the_cache():
    """2405.04434 abstract: 93.3% less than DeepSeek 67B, with 6 bits against 16; 82% at 16."""
    dense = cache_bytes(arch("deepseek-llm-67b"), 1) or 1
    v2 = [cache_bytes(arch("deepseek-v2"), 1, bits / 8) or 0 for bits in (6, 16)]
    assert [f"{1 - b / dense:.3f}" for b in v2] == ["0.933", "0.822"]


def test_v4_1_keeps_890_bytes_a_token():
    """Its report: 890 bytes, 437 times less than DeepSeek 67B. Published, not computed: the shapes
    of its caches are not."""
    stated = published()["deepseek-v4.1-flash"]["kv_bytes_per_token"]
    assert cache_bytes(arch("deepseek-v4.1-flash"), 1) is None
    assert round((cache_bytes(arch("deepseek-llm-67b"), 1) or 0) / stated) == 437


def test_windows_stop_growing():
    """gpt-oss: half the layers keep 128 tokens."""
    for length in (100, 5000):
        want = 18 * 1024 * (min(length, 128) + length)
        assert cache_bytes(arch("gpt-oss-120b"), length, bytes_per=1) == want


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
    in the file and not here: 1e-7 of it."""
    size = checkpoint_bytes(arch("deepseek-v3"), zoo.load_hf("deepseek-v3"))
    assert size == pytest.approx(688_574_839_360, rel=1e-7)


@pytest.mark.parametrize("name, gb", [("deepseek-v4-flash", 160), ("deepseek-v4-pro", 865)])
def test_checkpoint_size_of_v4(name, gb):
    """Pages on the release give 160 and 865 GB."""
    size = checkpoint_bytes(arch(name), zoo.load_hf(name))
    assert size == pytest.approx(gb * 1e9, rel=0.01)
