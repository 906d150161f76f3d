"""DeepSeek-V4's folders: what is in two spellings, tables of hash-routed layers, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest

from moejax.config import ConfigError
from moejax.interop.files import InteropError
from moejax.interop.load import load_model
from moejax.interop.safetensors_file import NewTensor, write_file
from moejax.models import transformer, zoo

CONFIG = published.config("deepseek_v4")
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def test_what_files_do_not_hold_is_that_of_a_new_model(tmp_path):
    """Only hash-routed layers have a table, only the others a bias; and multi-token prediction has no table."""
    tensors = published.random_tensors(CONFIG)
    published.write(tmp_path, CONFIG, tensors)
    cfg, params, state = load_model(tmp_path)
    fresh = transformer.init_router_state(cfg)["moe_blocks"]
    own = state["moe_blocks"]
    np.testing.assert_array_equal(own["table"][0], tensors["layers.0.ffn.gate.tid2eid"])
    np.testing.assert_array_equal(own["table"][1:], fresh["table"][1:])
    np.testing.assert_array_equal(own["hashed"], [1, 0, 0])
    np.testing.assert_array_equal(own["expert_bias"][0], np.zeros(4))
    np.testing.assert_array_equal(own["expert_bias"][2], tensors["layers.2.ffn.gate.bias"])
    np.testing.assert_array_equal(state["mtp"]["expert_bias"][0], tensors["mtp.0.ffn.gate.bias"])
    np.testing.assert_array_equal(state["mtp"]["hashed"], [0])
    same = np.testing.assert_array_equal
    same(params["csa_attn"]["indexer"]["w_q"][0], tensors["layers.1.attn.indexer.wq_b.weight"].T)
    same(
        params["hca_attn"]["compressor"]["position_bias"][0],
        tensors["layers.2.attn.compressor.ape"],
    )
    same(params["mtp"]["embed_proj"][0], tensors["mtp.0.e_proj.weight"].T)
    same(params["mtp"]["hidden_proj"][0], tensors["mtp.0.h_proj.weight"].T)
    same(params["mtp"]["streams_head"]["kernel"][0], tensors["mtp.0.hc_head_fn"].T)
    same(params["moe_blocks"]["ffn_streams"]["kernel"][2], tensors["layers.2.hc_ffn_fn"].T)


@pytest.mark.parametrize(
    "change, text",
    [
        (
            lambda table: np.minimum(table + 3, 4),
            r"layers\.0\.ffn\.gate\.tid2eid names expert 4; there are 4",
        ),
        (lambda table: table - 1, "names expert -1"),
        (
            lambda table: np.where(np.arange(41)[:, None] == 7, 2, table),
            "an expert twice for token 7",
        ),
        (lambda table: table[:-1], r"tid2eid has shape \[40, 2\], config.json asks for \[41, 2\]"),
        (
            lambda table: table.astype(np.float32),
            "tid2eid has dtype float32; I32 or I64 would work",
        ),
        (lambda table: table + np.int64(2) ** 32, "names expert 42949672"),
    ],
)
def test_tables_that_cannot_be(tmp_path, change, text):
    tensors = published.random_tensors(CONFIG)
    name = "layers.0.ffn.gate.tid2eid"
    published.write(tmp_path, CONFIG, tensors | {name: change(tensors[name])})
    with pytest.raises(InteropError, match=text):
        load_model(tmp_path)


def test_missing_indexers_are_named(tmp_path):
    tensors = published.random_tensors(CONFIG)
    rest = {n: t for n, t in tensors.items() if ".indexer." not in n}
    published.write(tmp_path, CONFIG, rest)
    with pytest.raises(InteropError, match=r"missing \(6\): layers\.1\.attn\.indexer"):
        load_model(tmp_path)


CSA, HCA = "compressed_sparse_attention", "heavily_compressed_attention"


@pytest.mark.parametrize(
    "changes, text",
    [
        ({"compress_ratios": [0, 4]}, "compress_ratios must hold 3 times 0"),
        ({"compress_ratios": [0, 4, 8]}, r"not \[0, 4, 8\]"),
        ({"compress_ratios": [0, 4, 128, 4]}, "then 0 for multi-token prediction"),
        ({"compress_ratios": None}, "missing compress_ratios"),
        (
            {"layer_types": [CSA, CSA, "linear_attention"]},
            "layer_types must hold 3 times 'sliding_attention'",
        ),
        ({"layer_types": [CSA, CSA, HCA]}, "name different layers"),
        ({"compress_rates": {HCA: 8}}, f"compress_rates has no '{CSA}', which layers have"),
        ({"compress_rates": {CSA: 0, HCA: 8}}, f"{CSA}=0 must be an integer between 1"),
        ({"compress_rates": {"linear_attention": 2}}, "compress_rates=.* must be an object"),
        ({"num_hash_layers": 4}, "num_hash_layers=4 does not fit 3 layers"),
        ({"mlp_layer_types": ["moe", "hash_moe", "moe"]}, "must begin with all of its 'hash_moe'"),
        ({"mlp_layer_types": ["hash_moe"] * 3}, "does not fit mlp_layer_types, which has 3"),
        ({"hc_mult": 1}, "hc_mult=1 is not supported"),
        ({"scoring_func": "sigmoid"}, "'sqrtsoftplus' would work"),
        ({"partial_rotary_factor": 0.5}, "name different channels"),
        ({"rope_parameters": {"main": {}}}, "needs an object for 'main' and one for 'compress'"),
        (
            {"rope_parameters": {"main": {"rope_type": "yarn"}, "compress": {}}},
            "'default' alone would work",
        ),
        ({"rope_parameters": {"attention_factor": 1.2}}, "attention_factor=1.2 is not supported"),
        ({"o_groups": 3}, "num_heads=4 must be a multiple of attention.o_groups=3"),
    ],
)
def test_configs_that_cannot_be(changes, text):
    with pytest.raises(ConfigError, match=text):
        zoo.config_from_hf(CONFIG | changes)


def test_both_spellings_of_a_config_are_one_model():
    spelled = {k: v for k, v in CONFIG.items() if k not in ("compress_ratios", "num_hash_layers")}
    spelled |= {
        "layer_types": ["sliding_attention", CSA, HCA],
        "compress_rates": {CSA: 4, HCA: 128},
        "mlp_layer_types": ["hash_moe", "moe", "moe"],
        "partial_rotary_factor": 4 / 6,
        "rope_parameters": {
            "main": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 4 / 6},
            "compress": {"rope_type": "yarn", "rope_theta": 2e4, "factor": 4.0, "beta_fast": 32,
                         "beta_slow": 1, "original_max_position_embeddings": 16,
                         "attention_factor": 1.0, "partial_rotary_factor": 4 / 6},
        },
    }  # fmt: skip
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
    assert zoo.config_from_hf(spelled) == zoo.config_from_hf(CONFIG | {"rope_scaling": yarn})
    assert zoo.config_from_hf(spelled).attention.rope.yarn_factor == 4


def test_a_folder_in_fp8_and_fp4(tmp_path):
    """As published: experts in FP4, projections in FP8, what makes entries, streams and norms as they are."""
    config = CONFIG | {"hidden_size": 32, "moe_intermediate_size": 64, "expert_dtype": "fp4"}
    tensors, plain = published.random_tensors(config), {}
    packed, rng = {}, np.random.default_rng(1)
    whole = ("compressor.wkv", "wgate", "weights_proj", "gate", "embed", "head")
    for name, value in tensors.items():
        rows, cols = value.shape if value.ndim == 2 else (0, 0)
        base = name.removesuffix(".weight")
        if ".experts." in name:
            packed[name] = rng.integers(-128, 128, (rows, cols // 2)).astype(np.int8)
            scale = rng.integers(120, 134, (rows, cols // 32)).astype(np.uint8)
            low, high = packed[name].view(np.uint8) & 15, packed[name].view(np.uint8) >> 4
            value = E2M1[np.stack([low, high], axis=-1).reshape(rows, cols)]
            value = value * np.repeat(2.0 ** (scale.astype(int) - 127), 32, axis=1)
        elif rows and base != name and not base.endswith(whole):
            packed[name] = value.astype(jnp.float8_e4m3fn)
            scale = rng.integers(120, 134, (-(-rows // 4), -(-cols // 8))).astype(np.uint8)
            spread = np.repeat(np.repeat(2.0 ** (scale.astype(int) - 127), 4, 0), 8, 1)[
                :rows, :cols
            ]
            value = packed[name].astype(np.float32) * spread
        else:
            packed[name] = plain[name] = value
            continue
        packed[base + ".scale"] = scale.view(jnp.float8_e8m0fnu)
        plain[name] = value.astype(published.BF16)
    quantization = {"quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [4, 8]}
    for folder, stored in (("packed", packed), ("plain", plain)):
        published.write(tmp_path / folder, config, {})
        new = [NewTensor(n, a.dtype, a.shape, lambda a=a: a) for n, a in stored.items()]
        with (tmp_path / folder / "model.safetensors").open("wb") as f:
            write_file(f, new, lambda _: None)
    published_config = json.dumps(config | {"quantization_config": quantization})
    (tmp_path / "packed" / "config.json").write_text(published_config)
    (_, a, a_state), (_, b, b_state) = (load_model(tmp_path / n) for n in ("packed", "plain"))
    assert sum(n.endswith(".scale") for n in packed) > 60
    jax.tree.map(np.testing.assert_array_equal, (a, a_state), (b, b_state))
