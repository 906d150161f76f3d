"""`moejax import --quantize`: what the commands do with such a run, what it weighs, and what is refused."""

import json
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
from safetensors.numpy import load_file, save_file
from test_import_export import checkpoint

from moejax.__main__ import main
from moejax.config import ConfigError
from moejax.evals.writer import Writer, mesh_layout
from moejax.interop.quantizer import Quantizer
from moejax.models import transformer
from moejax.params import by_path, path_name
from moejax.runs.open import load_run, read_config
from moejax.weights import FORMATS, is_quantized, quantize

WIDE = dict(hidden_size=64, moe_intermediate_size=64, intermediate_size=64)


def flat(params):
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=is_quantized)[0]
    return {path_name(path): w for path, w in leaves}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A checkpoint, and runs of it as it is and in each format."""
    root = tmp_path_factory.mktemp("quantized")
    checkpoint(root / "hf", "deepseek", **WIDE)
    (root / "text.txt").write_text("hello world, hello\n" * 40)
    assert main(["import", f"--hf_dir={root / 'hf'}", f"--workdir={root / 'whole'}"]) == 0
    for name in FORMATS:
        args = [f"--hf_dir={root / 'hf'}", f"--workdir={root / name}", f"--quantize={name}"]
        assert main(["import", *args]) == 0
    return root


# What reads whole models, in `make test` for the format with the most to go wrong.
ONE = ["int4", pytest.param("int8", marks=pytest.mark.product)]


@pytest.mark.parametrize("name", FORMATS)
def test_matrices_are_quantised_and_nothing_else(folders, name):
    whole, few = load_run(folders / "whole"), load_run(folders / name)
    specs = by_path(transformer.param_specs(whole.cfg.model))
    for path, w in flat(few.params).items():
        full = flat(whole.params)[path]
        if specs[path].role != "matrix":
            np.testing.assert_array_equal(w, full)
            continue
        how = FORMATS[name]
        assert w.bits == how.bits and w.block == (how.block or full.shape[-2])
        chex.assert_trees_all_equal(w, quantize(full, how))
    assert few.cfg.model == whole.cfg.model


@pytest.mark.parametrize("name", ONE)
def test_commands(folders, tmp_path, capsys, name):
    """Everything that reads a model reads this one; its export is what it computes with."""
    run, out = folders / name, tmp_path / "out"
    text = [f"--sources=text={folders / 'text.txt'}", "--seq_len=32", "--batch_size=2"]
    assert main(["generate", f"--workdir={run}", "--prompt=hello", "--max_new=2", "--greedy"]) == 0
    losses = {}
    for which in ("whole", name):
        args = [f"--workdir={folders / which}", *text, "--batches=2", f"--json={tmp_path / which}"]
        assert main(["evaluate", *args]) == 0
        losses[which] = json.loads((tmp_path / which).read_text())["loss"]
    # Random weights: near the whole model's, and not the same.
    assert 0 < abs(losses[name] - losses["whole"]) < 0.1 * losses["whole"]
    if name == "int4":  # these read the weights as evaluation does
        assert main(["analyze", f"--workdir={run}", *text, "--batches=2"]) == 0
        assert main(["knockout", f"--workdir={run}", *text, "--batches=1"]) == 0
        assert main(["routes", f"--workdir={run}", "--text=hello"]) == 0
    assert main(["export", f"--workdir={run}", f"--hf_dir={out}"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    w = flat(load_run(run).params)["moe_blocks/moe/experts/w_up"]
    got = tensors["model.layers.1.mlp.experts.2.up_proj.weight"]
    assert got.dtype == published.BF16
    np.testing.assert_array_equal(got.T, w[0, 2].astype(jnp.bfloat16))


def test_the_import_says_what_it_did(tmp_path, capsys):
    hf = checkpoint(tmp_path / "hf", "deepseek", **{**WIDE, "moe_intermediate_size": 48})
    args = [f"--hf_dir={hf}", f"--workdir={tmp_path / 'run'}", "--quantize=int4", "--block=64"]
    assert main(["import", *args]) == 0
    out = capsys.readouterr().out
    assert re.search(r"experts/w_down +4 +16 +\d\.\d\d%, \d\.\d\d% \(layer \d\)", out), out
    assert (
        "blocks of 64 do not divide the inputs of 2 arrays" in out
    )  # of the experts, and of the shared ones


@pytest.mark.parametrize("name", ONE)
def test_on_a_mesh(folders, name):
    """Scales lie where their inputs and outputs do, and the text is that of one device."""
    mesh = "expert=2,tensor=2"
    run = load_run(folders / name, mesh_layout(read_config(folders / name), mesh))
    w = run.params["moe_blocks"]["moe"]["experts"]["w_down"]  # [L, E, F, D]
    for whole, splits in ((w.q, 4), (w.scale, 2 if name == "int8" else 4)):
        assert whole.addressable_shards[0].data.size == whole.size // splits
    if name == "int4":
        how, texts = dict(max_new=6, temperature=0, dtype="float32"), ["hello", "world w"]
        alone, together = Writer(folders / name, **how), Writer(folders / name, mesh=mesh, **how)
        assert together.write_each(texts, 0) == alone.write_each(texts, 0)
        with pytest.raises(ConfigError, match=r"blocks of 32 of its 64 inputs.*fewer"):
            load_run(folders / name, mesh_layout(read_config(folders / name), "fsdp=4"))


REFUSED = {
    "quantised twice": ({}, ["--quantize=int8"], "would be rounded twice; leave --quantize out"),
    "no block": (
        dict(WIDE, moe_intermediate_size=9),
        ["--quantize=int4"],
        "9 inputs, which no block of 8 to 32 divides; --quantize=int8 would work",
    ),
    "a block of int8": (WIDE, ["--quantize=int8", "--block=64"], "--block is of int4"),
    "a block of nothing": (WIDE, ["--block=64"], "--block is of --quantize=int4"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path, capsys, case):
    changes, args, message = REFUSED[case]
    hf = checkpoint(tmp_path / "hf", "deepseek", **changes)
    if case == "quantised twice":
        file = next(hf.glob("*.safetensors"))
        tensors = load_file(file)
        name = next(n for n in tensors if n.endswith("proj.weight"))
        tensors[name] = tensors[name].astype(jnp.float8_e4m3fn)
        tensors[name + "_scale_inv"] = np.ones((1, 1), np.float32)
        save_file(tensors, file)
        index = hf / "model.safetensors.index.json"
        weights = json.loads(index.read_text())["weight_map"] | {f"{name}_scale_inv": file.name}
        index.write_text(json.dumps({"weight_map": weights}))
    assert main(["import", f"--hf_dir={hf}", f"--workdir={tmp_path / 'run'}", *args]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_training_is_refused(folders, tmp_path, capsys):
    base = f"--config=experiments/finetune.py:{folders / 'int8'}"
    sizes = ["--config.data.seq_len=32", "--config.data.batch_size=8"]
    assert main(["train", base, *sizes, f"--workdir={tmp_path / 'run'}"]) == 2
    assert "quantised, so they cannot be trained" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_errors_are_those_of_the_matrices(folders):
    """The relative error of every expert, as the table has it."""
    from moejax.interop.hf_folder import open_folder
    from moejax.interop.load import read_model

    quantizer = Quantizer(FORMATS["int4"])
    read_model(open_folder(folders / "hf"), quantizer=quantizer)
    name = "moe_blocks/moe/experts/w_gate"
    w = flat(load_run(folders / "whole").params)[name].astype(jnp.float32)
    off = w - flat(load_run(folders / "int4").params)[name].astype(jnp.float32)
    norm = lambda a: jnp.sqrt((a**2).sum(axis=(-2, -1)))  # noqa: E731
    np.testing.assert_allclose(quantizer.errors[name], norm(off) / norm(w), rtol=1e-5)
