"""A config.json means here what it means to `transformers`: rotary frequencies, and which keys there are."""

import dataclasses
import json

import numpy as np
import parity_oracle as oracle
import pytest
import transformers
from parity_cases import BASE
from parity_shapes import GQA, MHA

from moejax.attention import kind_of
from moejax.attention.rope import inverse_frequencies, softmax_scale, yarn_mscale
from moejax.models import zoo
from moejax.models.zoo import keys

FAMILIES = [f for f in zoo.FAMILIES if f not in ("deepseek", "kimi_k2")]  # not in transformers
YARN = {"rope_type": "yarn", "original_max_position_embeddings": 16}
DEFAULT = {"rope_type": "default"}

# max_position_embeddings is 64.
ROPES = {
    "factor": {"rope_scaling": {**YARN, "factor": 3.0}},
    "factor null": {"rope_scaling": {**YARN, "factor": None}},
    "no original": {"rope_scaling": {"rope_type": "yarn", "factor": 3.0}},
    "old name": {"rope_scaling": {"type": "yarn", "factor": 3.0}},
    "both": {"rope_scaling": {**YARN, "factor": 4.0}, "rope_parameters": DEFAULT},
    "own base": {"rope_scaling": {**YARN, "factor": 4.0, "rope_theta": 300.0}},
    "empty scaling": {"rope_scaling": {}, "rope_parameters": {**YARN, "factor": 2.0}},
    "mscale": {"rope_scaling": {**YARN, "factor": 4.0, "mscale": 0.707}},
    "mscale_all_dim": {"rope_scaling": {**YARN, "factor": 4.0, "mscale_all_dim": 0.707}},
    "mscale one": {"rope_scaling": {**YARN, "factor": 4.0, "mscale": 1.0, "mscale_all_dim": 0.0}},
    "betas null": {"rope_scaling": {**YARN, "factor": 4.0, "beta_fast": None, "beta_slow": None}},
    "no truncation": {"rope_scaling": {**YARN, "factor": 4.0, "truncate": False}},
    "llama3": {
        "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 50.0,
        }
    },
    "nothing": {},
    "default": {"rope_parameters": DEFAULT},
}  # fmt: skip


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "qwen3_moe"])
def test_rope(family, rope):
    hf = {**BASE[family], **MHA, "head_dim": 12, "rms_norm_eps": 1e-6, "rope_theta": 1e4, **rope}
    hf |= {"sliding_window": 8, "rope_theta": 1e4} if family == "gpt_oss" else {"rope_theta": 1e4}
    config = transformers.AutoConfig.for_model(family, **json.loads(json.dumps(hf)))
    model = transformers.AutoModelForCausalLM.from_config(config, **oracle.EAGER).model
    cfg = zoo.config_from_hf({"model_type": family, **hf}).attention
    r = cfg.rope
    # Theirs is float32.
    want = model.rotary_emb.inv_freq.numpy()
    np.testing.assert_allclose(inverse_frequencies(r, 12), want, rtol=1e-6)
    got = yarn_mscale(r.yarn_factor, r.yarn_mscale) / yarn_mscale(
        r.yarn_factor, r.yarn_mscale_all_dim
    )
    np.testing.assert_allclose(got, model.rotary_emb.attention_scaling, rtol=1e-12)
    np.testing.assert_allclose(
        softmax_scale(cfg, kind_of(cfg).widths(cfg).query),
        model.layers[0].self_attn.scaling,
        rtol=1e-12,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_every_field_of_the_class_is_known(family, tmp_path):
    """Those it declares, at their defaults, and those it writes for a small model."""
    class_of = type(transformers.AutoConfig.for_model(family))
    declared = {f.name: "x" for f in dataclasses.fields(class_of)}
    unknown = set(keys.unknown(declared, zoo.FAMILIES[family]))
    assert unknown <= keys.NEUTRAL.keys() | {"name_or_path"}, unknown
    heads = {"n_head": 3} if family == "gpt2" else GQA
    small = transformers.AutoConfig.for_model(family, **(heads | BASE[family]))
    for config in (class_of(), small):
        config.save_pretrained(tmp_path)
        written = json.loads((tmp_path / "config.json").read_text())
        assert keys.unknown(written, zoo.FAMILIES[family]) == []
