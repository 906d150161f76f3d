"""Broken and hostile checkpoints: a clear error that names the file or tensor, nothing read outside."""

import errno
import json
import os
import pathlib
import random

import numpy as np
import published
import pytest

from moejax.config import ConfigError
from moejax.interop import mapping
from moejax.interop.files import InteropError, whole_folder
from moejax.interop.hf_folder import open_folder
from moejax.interop.load import load_model
from moejax.interop.safetensors_file import read_header
from moejax.models import zoo

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def folder(tmp_path):
    """A good sharded LLaMA in tmp_path/model."""
    config = published.config("llama")
    published.write(tmp_path / "model", config, published.random_tensors(config), shards=3)
    return tmp_path / "model"


def refused(folder, text):
    with pytest.raises(ConfigError, match=text):
        load_model(folder)


def change_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# The index.


@pytest.mark.parametrize(
    "name",
    ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "..\\x.safetensors",
     "pytorch_model.bin", 7],
)  # fmt: skip
def test_index_points_elsewhere(folder, name):
    (folder.parent / "secret.safetensors").write_bytes((folder / SHARD).read_bytes())

    def change(index):
        index["weight_map"] = {k: name if v == SHARD else v for k, v in index["weight_map"].items()}

    change_json(folder / INDEX, change)
    refused(folder, "not the name of a .safetensors file in this folder")


def test_link_out_of_the_folder(folder):
    (folder / SHARD).rename(folder.parent / "secret.safetensors")
    (folder / SHARD).symlink_to("../secret.safetensors")
    refused(folder, "is a link to .*secret.safetensors, outside the folder")


def test_links_of_the_hugging_face_cache(folder):
    """snapshots/REVISION/FILE -> ../../blobs/HASH is that cache's own layout; links that loop are not."""
    repo = folder.parent / "repo"
    (repo / "snapshots").mkdir(parents=True)
    (repo / "blobs").mkdir()
    folder.rename(repo / "snapshots" / "abc")
    for i, file in enumerate(list((repo / "snapshots/abc").iterdir())):
        file.rename(repo / "blobs" / str(i))
        file.symlink_to(f"../../blobs/{i}")
    load_model(repo / "snapshots/abc")
    (repo / "snapshots/abc" / SHARD).unlink()
    (repo / "snapshots/abc" / SHARD).symlink_to(SHARD)
    refused(repo / "snapshots/abc", f"missing file {SHARD}")


def test_missing_shard(folder):
    (folder / SHARD).unlink()
    refused(folder, f"missing file {SHARD}")


def test_pipe_instead_of_a_file(folder):
    (folder / SHARD).unlink()
    os.mkfifo(folder / SHARD)
    refused(folder, "not a regular file")


def test_tensor_in_two_shards(folder):
    from safetensors.numpy import load_file, save_file

    tensors = load_file(folder / SHARD)
    first = load_file(folder / "model-00001-of-00003.safetensors")
    name = next(iter(first))
    save_file({**tensors, name: first[name]}, folder / SHARD)
    refused(folder, f"{name} is in two shards")


def test_index_and_shards_disagree(folder):
    change_json(folder / INDEX, lambda i: i["weight_map"].update({"ghost": SHARD}))
    refused(folder, f"ghost is not in {SHARD}")
    change_json(folder / INDEX, lambda i: i["weight_map"].pop("ghost"))
    name = next(iter(read_header(folder / SHARD)))
    change_json(folder / INDEX, lambda i: i["weight_map"].pop(name))
    refused(folder, "the index belongs to other shards")


@pytest.mark.parametrize("text", ["[]", "{", '{"weight_map": {}}', '{"weight_map": []}'])
def test_bad_index(folder, text):
    (folder / INDEX).write_text(text)
    refused(folder, INDEX)


def test_only_pickles(folder):
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    refused(folder, "neither model.safetensors nor")
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    refused(folder, "pytorch_model.bin .*never read; save the model again")


# The header of a file.


def rewrite(path, change=lambda header: None, *, length=None, cut=0):
    """The file with its header changed, its header length overwritten or its end cut off."""
    data = path.read_bytes()
    n = int.from_bytes(data[:8], "little")
    header, body = json.loads(data[8 : 8 + n]), data[8 + n :]
    new = change(header) or json.dumps(header)
    new = new.encode() if isinstance(new, str) else new
    size = len(new) if length is None else length
    out = size.to_bytes(8, "little") + new + body
    path.write_bytes(out[: len(out) - cut])


def first(header):
    return header[min(k for k in header if k != "__metadata__")]


def entry(**values):
    return lambda header: first(header).update(values)


HEADERS = {
    "truncated": (dict(cut=1), "truncated; download it again"),
    "longer than the file": (dict(length=2**40), "a header of 1,099,511,627,776 bytes"),
    "negative length": (dict(length=2**64 - 1), "not a whole safetensors file"),
    "cut header": (dict(length=20), "header: not valid JSON"),
    "not an object": (dict(change=lambda h: "[1]"), "expected a JSON object"),
    "not utf-8": (dict(change=lambda h: b"\xff\xfe{}"), "header: not valid JSON"),
    "deep": (dict(change=lambda h: "[" * 100_000), "header: not valid JSON"),
    "twice": (dict(change=lambda h: '{"a": 1, "a": 1}'), "the key 'a' occurs twice"),
    "metadata": (dict(change=lambda h: h.update({"__metadata__": 1})), "__metadata__"),
    "unknown dtype": (dict(change=entry(dtype="F4_X")), "dtype 'F4_X' is not supported"),
    "other dtype": (dict(change=entry(dtype="F32")), "F32 of shape .* takes"),
    "other shape": (dict(change=entry(shape=[2**30, 2**30])), "takes 2,305,843,009,213,693,952"),
    "negative shape": (dict(change=entry(shape=[-1, -41])), "bad shape"),
    "shape not a list": (dict(change=entry(shape="12")), "bad shape"),
    "bool shape": (dict(change=entry(shape=[True])), "bad shape"),
    "backwards": (dict(change=entry(data_offsets=[8, 0])), r"data_offsets \[8, 0\] span -8"),
    "three offsets": (dict(change=entry(data_offsets=[0, 1, 2])), "data_offsets"),
    "extra key": (dict(change=entry(code="import os")), "expected dtype, shape and data_offsets"),
}


@pytest.mark.parametrize("arguments, text", HEADERS.values(), ids=HEADERS)
def test_header_that_lies(folder, arguments, text):
    rewrite(folder / SHARD, **arguments)
    refused(folder, text)


def test_overlap_and_gap(folder):
    """Offsets of one tensor shifted onto, or away from, its neighbour."""

    def move(by):
        def change(header):
            last = max(
                (v for k, v in header.items() if k != "__metadata__"),
                key=lambda v: v["data_offsets"],
            )
            last["data_offsets"] = [x + by for x in last["data_offsets"]]

        return change

    rewrite(folder / SHARD, move(-2))
    refused(folder, "overlap")
    rewrite(folder / SHARD, move(4))
    refused(folder, "leave a gap")


def test_empty_file(folder):
    (folder / SHARD).write_bytes(b"")
    refused(folder, "not a whole safetensors file")


# The tensors.


def test_wrong_shape_dtype_and_names_are_all_told(tmp_path):
    config = published.config("llama")
    tensors = published.random_tensors(config)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:5]
    tensors["lm_head.weight"] = tensors["lm_head.weight"].astype(np.float64)
    tensors["model.layers.7.extra.weight"] = tensors.pop("model.layers.1.mlp.up_proj.weight")
    published.write(tmp_path, config, tensors)
    with pytest.raises(InteropError) as e:
        load_model(tmp_path)
    for text in (
        "model.norm.weight has shape [5], config.json asks for [12]",
        "lm_head.weight has dtype float64; BF16, F16 or F32 would work",
        "missing (1): model.layers.1.mlp.up_proj.weight",
        "not part of the model that config.json describes (1): model.layers.7.extra.weight",
    ):
        assert text in str(e.value)


# The config.


CONFIGS = {
    "unknown type": (dict(model_type="bert"), "unknown model_type 'bert'; known: deepseek"),
    "absurd": (dict(hidden_size=10**15), "hidden_size=1000000000000000"),
    "huge but allowed": (dict(num_hidden_layers=2**24), "16,777,216 layers, the files hold"),
    "wider": (dict(intermediate_size=2**24), r"has shape .*config.json asks for \[16777216"),
    "quantised": (dict(quantization_config={"quant_method": "gptq"}), "quant_method='gptq'"),
    "quantisation not an object": (dict(quantization_config="fp8"), "must be an object"),
    "block size not a pair": (
        dict(quantization_config={"quant_method": "fp8", "weight_block_size": 5}),
        "=5 must be two",
    ),
    "quantised somehow": (dict(quantization_config={}), "quant_method=None"),
    "block size": (
        dict(quantization_config={"quant_method": "fp8", "weight_block_size": [0, 1]}),
        "weight_block_size",
    ),
}


@pytest.mark.parametrize("change, text", CONFIGS.values(), ids=CONFIGS)
def test_config(folder, change, text):
    change_json(folder / "config.json", lambda c: c.update(change))
    refused(folder, text)


def test_many_experts(tmp_path):
    """2^24 layers of 2^24 experts are refused before anything is made of each."""
    config = published.config("deepseek_v3")
    published.write(tmp_path, config, published.random_tensors(config))
    big = dict(num_hidden_layers=2**24, n_routed_experts=2**24)
    change_json(tmp_path / "config.json", lambda c: c.update(big))
    refused(tmp_path, "16,777,216 layers, the files hold")
    change_json(tmp_path / "config.json", lambda c: c.update(config | dict(n_routed_experts=2**24)))
    refused(tmp_path, "tensors, the files hold .*they do not belong together")


@pytest.mark.parametrize("text", ["", "[]", "{", "NaN", '{"model_type": "llama",' * 50_000])
def test_config_not_json(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, r"config\.json")


ODD_VALUES = (
    *(None, -1, 0, 1.5, 1e308, 2**70, float("nan"), True, "x", [], [1, 2], ["sliding_attention"]),
    *({}, {"type": "yarn"}, {"rope_type": "yarn", "factor": "a"}, [[]], {"quant_method": {}}),
)


@pytest.mark.parametrize("family", published.FAMILIES)
def test_any_value_of_any_field_is_a_model_or_a_clear_error(tmp_path, family):
    """Every field that a published config.json of the family has, with values of every type."""
    config = published.config(family)
    published.write(tmp_path, config, published.random_tensors(config))
    opened = open_folder(tmp_path)
    same = [zoo.load_hf(name) for name in zoo.PRESETS]
    known = {k for hf in same if hf["model_type"] == family for k in hf if not k.startswith("_")}
    known |= {"rope_parameters", "rope_scaling", "head_dim"}
    accepted = 0
    for field in sorted(known | config.keys()):
        for value in ODD_VALUES:
            try:
                cfg = zoo.config_from_hf({**config, field: value})
                zoo.objective_from_hf({**config, field: value})
                wanted = mapping.targets(cfg, family)
                mapping.account(cfg, zoo.FAMILIES[family].NAMES, wanted, opened.tensors, "x")
                accepted += 1
            except ConfigError as e:
                assert str(e)
    assert accepted  # such as fields that are not read


def test_damaged_bytes(folder):
    """Bytes changed, removed and added anywhere in config, index and headers: read or refused."""
    rng = random.Random(0)
    files = sorted(folder.iterdir())
    refusals = 0
    for _ in range(300):
        file = rng.choice(files)
        good = file.read_bytes()
        data = bytearray(good)
        at = rng.randrange(min(len(data), rng.choice((16, 4000))))
        kind = rng.randrange(3)
        if kind == 0:
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randrange(1, 9)]
        else:
            data[at:at] = rng.randbytes(rng.randrange(1, 5))
        file.write_bytes(data)
        try:
            open_folder(folder)
        except InteropError as e:
            assert str(folder) in str(e)
            refusals += 1
        file.write_bytes(good)
    assert refusals > 200


def test_no_such_folder(tmp_path):
    refused(tmp_path / "nowhere", "not a folder")
    refused(tmp_path, "missing file config.json")


# What is written appears whole or not at all.


def test_whole_folder(tmp_path):
    target = tmp_path / "run"
    with pytest.raises(RuntimeError), whole_folder(target) as partial:
        (partial / "half").write_text("x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with (
        pytest.raises(InteropError, match=r"nothing is left of it: .*No space"),
        whole_folder(target),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert list(tmp_path.iterdir()) == []
    leftover = tmp_path / ".run.moejax-partial"  # of a killed process
    leftover.mkdir()
    (leftover / "old").write_text("x")
    with whole_folder(target) as partial:
        (partial / "new").write_text("x")
        assert not target.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    assert [p.name for p in target.iterdir()] == ["new"]
    with pytest.raises(InteropError, match="not an empty folder"), whole_folder(target):
        pass
    assert pathlib.Path(target / "new").exists()
