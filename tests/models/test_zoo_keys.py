"""Keys of a config.json: read, known to be harmless, or an error that names them; RoPE where files disagree."""

import math

import pytest

from moejax.config import ConfigError, ObjectiveConfig
from moejax.models import zoo
from moejax.models.zoo import gpt_oss, keys
from moejax.models.zoo.architecture import architecture

ONE_OF = {  # a published file of every family
    "deepseek": "deepseek-moe-16b",
    "deepseek_v2": "deepseek-v2",
    "deepseek_v3": "deepseek-v3",
    "deepseek_v32": "deepseek-v3.2",
    "deepseek_v4": "deepseek-v4-flash",
    "dots1": "dots.llm1",
    "ernie4_5_moe": "ernie-4.5-21b-a3b",
    "exaone_moe": "k-exaone-236b-a23b",
    "glm4_moe": "glm-4.5",
    "glm4_moe_lite": "glm-4.7-flash",
    "glm_moe_dsa": "glm-5",
    "gpt2": "gpt-2",
    "gpt_oss": "gpt-oss-20b",
    "granitemoe": "granite-3.0-3b-a800m",
    "hunyuan_v1_moe": "hunyuan-a13b",
    "kimi_k2": "kimi-k2",
    "llama": "llama-2-7b",
    "mimo_v2_flash": "mimo-v2-flash",
    "minimax_m2": "minimax-m2",
    "mistral": "mistral-7b",
    "mixtral": "mixtral-8x7b",
    "olmoe": "olmoe-1b-7b",
    "qwen2_moe": "qwen1.5-moe-a2.7b",
    "qwen3": "qwen3-8b",
    "qwen3_moe": "qwen3-30b-a3b",
    "solar_open": "solar-open-100b",
}
every_family = pytest.mark.parametrize("family", zoo.FAMILIES)


def published(family, **changes):
    return {**zoo.load_hf(ONE_OF[family]), **changes}


def read(hf):
    """The model and what it was trained for: together they read all of a file."""
    return zoo.config_from_hf(hf), zoo.objective_from_hf(hf)


@every_family
def test_every_key_called_read_is_read(family):
    """An absurd value of any of them is an error with its name. rope_scaling goes before rope_parameters."""
    for key in zoo.FAMILIES[family].READ:
        hf = published(family, **{key: "absurd"})
        if key == "rope_parameters":
            hf.pop("rope_scaling", None)
        with pytest.raises(ConfigError) as e:
            read(hf)
        assert key in str(e.value) or key == "rope_parameters"


@every_family
def test_every_key_called_harmless_changes_nothing(family):
    module, want = zoo.FAMILIES[family], read(published(family))
    for key in (module.HARMLESS | keys.HARMLESS | keys.GENERATION) - {"model_type"}:
        assert key not in module.READ
        assert read(published(family, **{key: "absurd"})) == want


@every_family
def test_any_other_key_is_an_error_that_names_it(family):
    """The second is real: LLaMA's class reads it, and 0.1 reads on without it."""
    for key, value in (("no_such_option", 3), ("partial_rotary_factor", 0.5), ("is_decoder", True)):
        if key in zoo.FAMILIES[family].READ:
            continue
        with pytest.raises(ConfigError, match=f"{key}=.*1 keys .*--ignore_keys={key}"):
            zoo.config_from_hf(published(family, **{key: value}))
        assert zoo.config_from_hf(published(family, **{key: None}))
    for key, value in keys.NEUTRAL.items():
        if key not in zoo.FAMILIES[family].READ:
            assert zoo.config_from_hf(published(family, **{key: value}))
    assert zoo.config_from_hf(published(family, _attn_implementation="eager"))


def test_an_unknown_key_cannot_write_to_the_terminal_or_fill_it():
    with pytest.raises(ConfigError) as e:
        zoo.config_from_hf(
            published("llama", **{"a\x1b[2J" + "b" * 10**6: "\x1b]0;" + "c" * 10**6})
        )
    assert "\x1b" not in str(e.value) and len(str(e.value)) < 10_000


def test_two_names_of_one_thing_must_agree():
    with pytest.raises(ConfigError, match="num_experts=128 and num_local_experts=64"):
        zoo.config_from_hf(published("qwen3_moe", num_local_experts=64))
    assert zoo.config_from_hf(published("deepseek_v3", num_mtp_layers=1)).mtp_depth == 1
    with pytest.raises(ConfigError, match="num_nextn_predict_layers=1 and num_mtp_layers=2"):
        zoo.config_from_hf(published("deepseek_v3", num_mtp_layers=2))


# RoPE. Published code says what each means; tests/parity compares the frequencies.


def rope(family="llama", **changes):
    return zoo.config_from_hf(published(family, **changes)).attention.rope


YARN = {"rope_type": "yarn", "original_max_position_embeddings": 1024}  # of LLaMA 2's 4096


def test_factor_null_is_the_ratio_and_absent_an_error():
    assert rope(rope_scaling={**YARN, "factor": None}).yarn_factor == 4
    with pytest.raises(ConfigError, match=r"rope_scaling\.factor is required"):
        rope(rope_scaling=YARN)


def test_original_length_absent_is_the_whole_and_null_an_error():
    whole = rope(rope_scaling={"rope_type": "yarn", "factor": 4.0})
    assert (whole.yarn_original_len, whole.yarn_factor) == (4096, 4)
    with pytest.raises(ConfigError, match="original_max_position_embeddings"):
        rope(rope_scaling={**YARN, "factor": 2.0, "original_max_position_embeddings": None})


def test_rope_scaling_beside_rope_parameters_wins():
    """Whoever adds it by hand to a newer file means it; the base stays that of the file."""
    new = {"rope_type": "default", "rope_theta": 500.0}
    got = rope(rope_parameters=new, rope_scaling={**YARN, "factor": 4.0}, rope_theta=700.0)
    assert (got.yarn_factor, got.theta) == (4, 700)
    assert rope(rope_parameters=new, rope_theta=700.0).theta == 500
    with pytest.raises(ConfigError, match="rope_theta=null"):
        rope(rope_theta=None)


def test_mscale_counts_only_together_with_mscale_all_dim():
    plain = rope(rope_scaling={**YARN, "factor": 4.0})
    for alone in ({"mscale": 0.707}, {"mscale_all_dim": 0.707}):
        assert rope(rope_scaling={**YARN, "factor": 4.0, **alone}) == plain
        # Latent attention in DeepSeek's own code applies it, that of transformers does not.
        with pytest.raises(ConfigError, match="without the other, which has two meanings"):
            rope("deepseek_v3", rope_scaling={**YARN, "factor": 4.0, **alone})
    with pytest.raises(ConfigError, match="leave both out"):
        rope(rope_scaling={**YARN, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 1.0})


def test_gpt_oss_without_rope_scaling_is_its_own_yarn():
    hf = published("gpt_oss")
    want = zoo.config_from_hf(hf)
    assert zoo.config_from_hf({**hf, "rope_scaling": None}) == want
    assert zoo.config_from_hf({k: v for k, v in hf.items() if k != "rope_scaling"}) == want
    off = {**hf, "rope_scaling": None, "rope_parameters": {"rope_type": "default"}}
    cfg = zoo.config_from_hf(off)
    assert cfg.attention.rope.yarn_factor == 1
    # Written, it does not become YaRN again.
    again = zoo.config_from_hf(gpt_oss.config_to_hf(cfg, ObjectiveConfig()))
    assert architecture(again) == architecture(cfg)


def test_llama_3_scaling():
    """Written back as it was read; its two factors must be there."""
    llama3 = zoo.load_hf("llama-3.1-8b")
    cfg = zoo.config_from_hf(llama3)
    again = zoo.config_to_hf(cfg, "llama")
    assert again["rope_scaling"] == llama3["rope_scaling"]
    lame = {k: v for k, v in llama3["rope_scaling"].items() if k != "low_freq_factor"}
    with pytest.raises(ConfigError, match="low_freq_factor must be given"):
        zoo.config_from_hf({**llama3, "rope_scaling": lame})


def test_a_window_where_none_is_used_is_read_and_not_used():
    hf = published("qwen3", sliding_window=4096, max_window_layers=20)
    assert zoo.config_from_hf(hf).attention.windows == ()
    on = {**hf, "use_sliding_window": True}
    assert zoo.config_from_hf(on).attention.windows == (0,) * 20 + (4096,) * 16


@pytest.mark.parametrize("key, value", [("low_freq_factor", 1.0), ("partial_rotary_factor", 0.5)])
def test_an_unknown_part_of_rope_scaling_is_named(key, value):
    with pytest.raises(ConfigError, match=f"rope_scaling has {key}={value}"):
        rope(rope_scaling={**YARN, "factor": 4.0, key: value})
    assert rope(rope_scaling={**YARN, "factor": 4.0, key: None}).yarn_factor == 4


def test_defaults_of_the_class():
    """router_aux_loss_coef: 0.001, OLMoE's 0.01; times the experts of a token, see zoo.mixtral."""
    for family, want in (("mixtral", 0.002), ("qwen3_moe", 0.008), ("olmoe", 0.08)):
        hf = {k: v for k, v in published(family).items() if k != "router_aux_loss_coef"}
        assert math.isclose(zoo.objective_from_hf(hf).expert_loss, want)


def test_windows_of_qwen_by_another_key():
    window = ["sliding_attention"] + ["full_attention"] * 23
    with pytest.raises(ConfigError, match="layer_types"):
        zoo.config_from_hf(published("qwen2_moe", layer_types=window))
    on = published("qwen2_moe", layer_types=window, use_sliding_window=True, sliding_window=9)
    assert zoo.config_from_hf(on).attention.windows == (9,) + (0,) * 23
    assert zoo.config_from_hf(published("qwen2_moe", layer_types=["full_attention"] * 24))


def test_heads_of_latent_attention():
    with pytest.raises(ConfigError, match="num_key_value_heads=8"):
        zoo.config_from_hf(published("deepseek_v3", num_key_value_heads=8))
