"""Import and export: every tensor in its place, bit for bit both ways, sharded or piece by piece."""

import dataclasses
import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from safetensors.numpy import load_file

from moejax.config import ConfigError, ExperimentConfig, MeshConfig
from moejax.interop import load, mapping
from moejax.interop.files import InteropError
from moejax.interop.load import load_model
from moejax.interop.save import write_folder
from moejax.models import transformer, zoo
from moejax.params import abstract_params, count, path_name
from moejax.sharding import make_layout

FAMILIES = list(published.FAMILIES)


def bits(a):
    return np.asarray(a).view(np.uint8)


def read_back(folder):
    """Every tensor of a folder, by the reference implementation of the format."""
    out = {}
    for file in sorted(folder.glob("*.safetensors")):
        out |= load_file(file)
    return out


def by_path(tree):
    return {path_name(p): a for p, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


# The names, against the published layouts.


@pytest.mark.parametrize(
    "preset",
    ["deepseek-moe-16b", "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "moonlight-16b-a3b",
     "kimi-k2", "llama-2-70b", "gpt-2", "mixtral-8x7b", "qwen1.5-moe-a2.7b", "qwen3-30b-a3b",
     "olmoe-1b-7b", "gpt-oss-20b", "granite-3.0-3b-a800m",
     "glm-4.5", "glm-4.5-air", "deepseek-v4-flash", "deepseek-v4-pro"],
)  # fmt: skip
def test_names_and_shapes_of_published_models(preset):
    hf = zoo.load_hf(preset)
    kind = {"kimi_k2": "deepseek_v3"}.get(hf["model_type"], hf["model_type"])
    expected = published.FAMILIES[kind](hf)
    cfg = zoo.config_from_hf(hf)
    table = zoo.FAMILIES[kind].NAMES
    targets = mapping.targets(cfg, hf["model_type"])
    ours = {t.name(at): t.file_shape for t in targets.values() for at in t.blocks()}
    ours |= {n: ours[of] for n, of, rule in mapping.duplicates(cfg, table, ours) if rule.written}
    assert ours == expected


def test_number_of_tensors():
    """Published: 5,466 tensors in DeepSeekMoE 16B."""
    cfg = zoo.load_preset("deepseek-moe-16b")
    assert sum(t.count for t in mapping.targets(cfg, "deepseek").values()) == 5466


# Values.


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_experts_in_one_tensor_are_those_of_many(tmp_path, family):
    config = {**published.config(family), "num_nextn_predict_layers": 0}
    if family == "qwen3_moe":
        config.pop("num_nextn_predict_layers")
    tensors = published.random_tensors(config)
    one = published.fused(tensors)
    assert len(one) < len(tensors) - 10
    published.write(tmp_path / "many", config, tensors)
    published.write(tmp_path / "one", config, one)
    many, few = load_model(tmp_path / "many"), load_model(tmp_path / "one")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(bits(a), bits(b)), many[1:], few[1:])
    # Written, they are many again.
    write_folder(tmp_path / "out", *few, family)
    assert set(read_back(tmp_path / "out")) == set(tensors)


@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_bit_for_bit(tmp_path, family):
    """Import and export, one file or several: the same names, dtypes and bits; the arrays have the
    shapes of a fresh model and the file's dtype."""
    config = published.config(family)
    tensors = published.random_tensors(config)
    published.write(tmp_path / "in", config, tensors, shards=1 if family == "gpt2" else 3)
    cfg, params, state = load_model(tmp_path / "in")
    shapes = jax.tree.map(lambda s: s.shape, abstract_params(transformer.param_specs(cfg)))
    assert jax.tree.map(lambda a: a.shape, params) == shapes
    assert {a.dtype for a in jax.tree.leaves(params)} == {published.BF16}
    fresh = transformer.init_router_state(cfg)
    assert jax.tree.map(lambda a: (a.shape, a.dtype), state) == jax.tree.map(
        lambda a: (a.shape, a.dtype), fresh
    )
    write_folder(tmp_path / "out", cfg, params, state, family, max_shard_bytes=4000)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and all(f.stat().st_size < 20_000 for f in files)
    back = read_back(tmp_path / "out")
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype
        np.testing.assert_array_equal(bits(back[name]), bits(tensor), err_msg=name)
    cfg_again, params_again, state_again = load_model(tmp_path / "out")
    assert dataclasses.replace(cfg_again, init_std=cfg.init_std) == cfg
    chex.assert_trees_all_equal((params, state), (params_again, state_again))


def test_values_are_where_they_belong(tmp_path):
    """By hand, for every kind of transform."""

    def load(family):
        config = published.config(family)
        hf = published.random_tensors(config, dtype=np.float32)
        published.write(tmp_path / family, config, hf)
        _, params, state = load_model(tmp_path / family)
        return hf, by_path(params), by_path(state)

    same = np.testing.assert_array_equal
    hf, p, _ = load("mixtral")
    moe = "model.layers.2.block_sparse_moe.experts.3"
    same(p["moe_blocks/moe/experts/w_gate"][2, 3], hf[f"{moe}.w1.weight"].T)
    same(p["moe_blocks/moe/experts/w_up"][2, 3], hf[f"{moe}.w3.weight"].T)
    same(p["moe_blocks/moe/experts/w_down"][2, 3], hf[f"{moe}.w2.weight"].T)
    same(p["head"], hf["lm_head.weight"].T)

    hf, p, _ = load("gpt2")
    fused, bias = hf["transformer.h.1.attn.c_attn.weight"], hf["transformer.h.1.attn.c_attn.bias"]
    for i, name in enumerate("qkv"):
        same(p[f"dense_blocks/attn/w_{name}"][1], fused[:, 12 * i : 12 * (i + 1)])
        same(p[f"dense_blocks/attn/b_{name}"][1], bias[12 * i : 12 * (i + 1)])
    same(p["dense_blocks/ffn/w_up"][1], hf["transformer.h.1.mlp.c_fc.weight"])

    hf, p, _ = load("gpt_oss")
    experts = "model.layers.1.mlp.experts."
    same(p["moe_blocks/moe/experts/w_gate"][1], hf[experts + "gate_up_proj"][..., 0::2])
    same(p["moe_blocks/moe/experts/w_up"][1], hf[experts + "gate_up_proj"][..., 1::2])
    same(p["moe_blocks/moe/experts/b_up"][1], hf[experts + "gate_up_proj_bias"][..., 1::2])
    same(p["moe_blocks/moe/experts/w_down"][1], hf[experts + "down_proj"])

    hf, p, s = load("deepseek_v3")  # one dense layer, two MoE layers, two depths of prediction
    same(p["dense_blocks/ffn/w_up"][0], hf["model.layers.0.mlp.up_proj.weight"].T)
    same(p["moe_blocks/attn/w_q_b"][1], hf["model.layers.2.self_attn.q_b_proj.weight"].T)
    same(p["mtp/proj"][1], hf["model.layers.4.eh_proj.weight"].T)
    down = "model.layers.3.mlp.experts.2.down_proj.weight"
    same(p["mtp/block/moe/experts/w_down"][0, 2], hf[down].T)
    bias = "model.layers.{}.mlp.gate.e_score_correction_bias"
    same(s["moe_blocks/expert_bias"][1], hf[bias.format(2)])
    same(s["mtp/expert_bias"][0], hf[bias.format(3)])


def test_dtypes(tmp_path):
    """The file's dtype is kept, several become one that holds them all, `dtype` converts."""
    config = published.config("llama")
    tensors = published.random_tensors(config)
    norm = "model.layers.1.input_layernorm.weight"
    tensors[norm] = tensors[norm].astype(np.float32)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].astype(np.float16)
    published.write(tmp_path, config, tensors)
    _, params, _ = load_model(tmp_path)
    assert params["head"].dtype == jnp.bfloat16
    assert params["dense_blocks"]["attn_norm"]["scale"].dtype == jnp.float32
    assert params["final_norm"]["scale"].dtype == jnp.float16
    _, params, _ = load_model(tmp_path, dtype=jnp.float32)
    assert {a.dtype for a in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].T.astype(np.float32))


# Streaming and sharding.


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_piece_by_piece(tmp_path, monkeypatch, family):
    """Pieces far smaller than a tensor give the same arrays."""
    config = published.config(family)
    published.write(tmp_path, config, published.random_tensors(config))
    whole = load_model(tmp_path)
    monkeypatch.setattr(load, "PIECE_BYTES", 600)
    chex.assert_trees_all_equal(whole[1:], load_model(tmp_path)[1:])


def test_sharded(tmp_path, monkeypatch):
    """On a mesh, every device holds its slice, and no more is read than the distinct slices."""
    config = published.config("mixtral") | {"vocab_size": 48, "num_key_value_heads": 4}
    tensors = published.random_tensors(config, dtype=np.float32)
    published.write(tmp_path, config, tensors)
    cfg, plain, _ = load_model(tmp_path)
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    layout = make_layout(ExperimentConfig(model=cfg, mesh=mesh))
    read = []
    original = load._read
    monkeypatch.setattr(load, "_read", lambda *args: read.append(value := original(*args)) or value)
    _, params, state = load_model(tmp_path, layout=layout)
    assert state == {"moe_blocks": {}}
    chex.assert_trees_all_equal(plain, params)
    shardings = layout.of_specs(transformer.param_specs(cfg))
    assert jax.tree.map(lambda a: a.sharding, params) == shardings
    assert sum(a.size for a in read) == count(params)


# What is left out, repeated or ignored.


def test_ignorable_and_repeated_tensors(tmp_path):
    config = published.config("llama") | {"tie_word_embeddings": True}
    tensors = published.random_tensors(config)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(3, np.float32)
    published.write(tmp_path, config, tensors)
    opened = load.open_folder(tmp_path)
    cfg, params, _, account = load.read_model(opened)
    assert cfg.tie_embeddings and "head" not in params
    assert [t.name for t, _ in account.repeated] == ["lm_head.weight"]
    assert account.ignored == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert "ignored         1" in account.table()
    tensors["lm_head.weight"] = tensors["lm_head.weight"] + np.asarray(1, published.BF16)
    published.write(tmp_path, config, tensors)
    with pytest.raises(InteropError, match=r"lm_head\.weight differs from model\.embed_tokens"):
        load_model(tmp_path)


def test_gpt2_without_prefix_and_with_masks(tmp_path):
    """As the files published by OpenAI are: no 'transformer.', causal masks saved as buffers."""
    config = published.config("gpt2")
    tensors = published.random_tensors(config)
    published.write(tmp_path / "a", config, tensors)
    short = {n.removeprefix("transformer."): t for n, t in tensors.items()}
    short["h.0.attn.bias"] = np.ones((1, 1, 4, 4), np.float32)
    published.write(tmp_path / "b", config, short)
    a, b = load_model(tmp_path / "a")[1], load_model(tmp_path / "b")[1]
    chex.assert_trees_all_equal(a, b)


def test_v3_saved_without_its_prediction_layers(tmp_path):
    """`transformers` drops those layers and keeps num_nextn_predict_layers; half of them is an error."""
    config = published.config("deepseek_v3")
    tensors = published.random_tensors(config)
    trunk = {
        n: t for n, t in tensors.items() if not n.startswith(("model.layers.3", "model.layers.4"))
    }
    published.write(tmp_path / "trunk", config, trunk)
    cfg, params, state = load_model(tmp_path / "trunk")
    assert cfg.mtp_depth == 0 and "mtp" not in params and set(state) == {"moe_blocks"}
    del tensors["model.layers.4.enorm.weight"]
    published.write(tmp_path / "half", config, tensors)
    with pytest.raises(InteropError, match=r"missing \(1\): model\.layers\.4\.enorm\.weight"):
        load_model(tmp_path / "half")


# Export of what was not imported.


def test_export_refuses_what_does_not_fit(tmp_path):
    config = published.config("mixtral")
    published.write(tmp_path / "in", config, published.random_tensors(config))
    cfg, params, state = load_model(tmp_path / "in")
    with pytest.raises(ConfigError, match="Families that can: mixtral"):
        write_folder(tmp_path / "out", cfg, params, state, "olmoe")
    with pytest.raises(InteropError, match="no array head"):
        rest = {k: v for k, v in params.items() if k != "head"}
        write_folder(tmp_path / "out", cfg, rest, state, "mixtral")
    with pytest.raises(InteropError, match="head has shape"):
        write_folder(tmp_path / "out", cfg, params | {"head": params["head"][1:]}, state, "mixtral")
    with pytest.raises(InteropError, match="unknown model_type 'bert'"):
        write_folder(tmp_path / "out", cfg, params, state, "bert")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("kept")
    with pytest.raises(InteropError, match="not an empty folder"):
        write_folder(tmp_path / "out", cfg, params, state, "mixtral")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]


def test_export_writes_what_it_was_given(tmp_path):
    config = published.config("olmoe")
    published.write(tmp_path / "in", config, published.random_tensors(config))
    cfg, params, state = load_model(tmp_path / "in")
    extra = {"tokenizer.json": b"{}", "config.json": (tmp_path / "in/config.json").read_bytes()}
    write_folder(tmp_path / "out", cfg, params, state, "olmoe", extra_files=extra)
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.json"}
    assert json.loads((tmp_path / "out/config.json").read_text()) == config
