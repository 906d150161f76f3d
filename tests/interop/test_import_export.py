"""`moejax import` and `moejax export` from outside: in sequence, killed, and with bad input."""

import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import published
import pytest
import tokenizers
from compile_flags import UNOPTIMISED
from safetensors.numpy import load_file
from tokenizers import decoders, models, pre_tokenizers, trainers

from moejax.__main__ import main
from moejax.commands import export, import_
from moejax.config import ConfigError
from moejax.data import load_corpus, validation_batches
from moejax.interop import convert
from moejax.runs import provenance
from moejax.runs.open import load_run

ROOT = pathlib.Path(__file__).parent.parent.parent
VOCAB = 300  # more rows than the tokenizer has tokens, as in published models


def write_tokenizer(folder):
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|endoftext|>", "<|pad|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["hello world"] * 3, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def checkpoint(folder, family, **changes):
    config = published.config(family) | {"vocab_size": VOCAB, "torch_dtype": "bfloat16"} | changes
    published.write(folder, config, published.random_tensors(config), shards=2)
    write_tokenizer(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    (folder / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    (folder / "modeling_remote.py").write_text("raise SystemExit")  # never read, never copied
    return folder


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_import_then_export(tmp_path, capsys, family):
    """The folder comes back: every tensor, and config and tokenizer files byte for byte."""
    hf = checkpoint(tmp_path / "hf", family)
    assert import_.main([f"--hf_dir={hf}", f"--workdir={tmp_path / 'run'}"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"missing +0", out) and family in out
    run = load_run(tmp_path / "run")
    assert run.step == 0 and run.params["embed"]["tokens"].dtype == published.BF16
    assert export.main([f"--workdir={tmp_path / 'run'}", f"--hf_dir={tmp_path / 'out'}"]) == 0
    before, after = {}, {}
    for file in sorted(hf.glob("*.safetensors")):
        before |= load_file(file)
    for file in (tmp_path / "out").glob("*.safetensors"):
        after |= load_file(file)
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name].view(np.uint8), after[name].view(np.uint8))
    for name in (
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "generation_config.json",
    ):
        assert (tmp_path / "out" / name).read_bytes() == (hf / name).read_bytes()
    assert not (tmp_path / "out" / "modeling_remote.py").exists()


def test_import_says_what_was_left_out(tmp_path, capsys):
    hf = checkpoint(tmp_path / "hf", "deepseek_v3", num_nextn_predict_layers=0)
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    convert.import_run(hf, tmp_path / "run")
    assert "no layers for multi-token prediction" in capsys.readouterr().out
    convert.export_run(tmp_path / "run", tmp_path / "out")  # its own config.json all the same
    assert (tmp_path / "out/config.json").read_bytes() == (hf / "config.json").read_bytes()


# The two that differ most; test_every_family.py has all.
@pytest.mark.parametrize("family", [pytest.param("gpt2", marks=pytest.mark.product), "deepseek_v3"])
def test_commands_in_sequence(tmp_path, capsys, family):
    """import, generate, evaluate, export; and the export imports again."""
    hf = checkpoint(tmp_path / "hf", family)
    text = tmp_path / "text.txt"
    text.write_text("hello world, hello")
    run, out = tmp_path / "run", tmp_path / "out"
    assert main(["import", f"--hf_dir={hf}", f"--workdir={run}"]) == 0
    assert main(["generate", f"--workdir={run}", "--prompt=hello", "--max_new=2", "--greedy"]) == 0
    evaluate = [f"--sources=text={text}", "--seq_len=16", "--batch_size=1", "--batches=1"]
    assert main(["evaluate", f"--workdir={run}", *evaluate, f"--json={tmp_path / 'e.json'}"]) == 0
    assert 0 < json.loads((tmp_path / "e.json").read_text())["loss"] < 1000
    assert main(["export", f"--workdir={run}", f"--hf_dir={out}"]) == 0
    assert main(["import", f"--hf_dir={out}", f"--workdir={tmp_path / 'again'}"]) == 0
    assert "Traceback" not in capsys.readouterr().err
    a, b = load_run(run), load_run(tmp_path / "again")
    chex.assert_trees_all_equal(a.params, b.params)
    assert a.cfg.model == b.cfg.model


def test_an_import_computes_in_the_dtype_that_its_config_names(tmp_path, capsys):
    run = tmp_path / "run"
    convert.import_run(checkpoint(tmp_path / "hf", "gpt2"), run)
    assert "computed in bfloat16" in capsys.readouterr().out
    text = tmp_path / "text.txt"
    text.write_text("hello world, hello")

    def loss(*how):
        out = tmp_path / "e.json"
        flags = [f"--sources=text={text}", "--seq_len=16", "--batch_size=1", f"--json={out}", *how]
        assert main(["evaluate", f"--workdir={run}", *flags]) == 0
        return json.loads(out.read_text())["loss"]

    exact, rounded = loss("--dtype=float32"), loss()
    assert rounded == loss("--dtype=bfloat16") != exact
    np.testing.assert_allclose(rounded, exact, rtol=0.05)  # 8 bits of mantissa, two layers
    # What moejax does not compute in, and what is not said, is float32.
    for number, named in enumerate(("float16", None)):
        convert.import_run(
            checkpoint(tmp_path / f"hf{number}", "gpt2", torch_dtype=named),
            tmp_path / f"run{number}",
        )
        assert load_run(tmp_path / f"run{number}").cfg.compute.dtype == "float32"


def test_quantised_import_exports_what_it_is(tmp_path):
    """FP8 comes back in bfloat16, and config.json no longer claims otherwise."""
    config = published.config("llama") | {"vocab_size": VOCAB}
    tensors = published.random_tensors(config)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name].astype(jnp.float8_e4m3fn)
    tensors[name + "_scale_inv"] = np.full((1, 1), 2, np.float32)
    quantization = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    published.write(tmp_path / "hf", config | {"quantization_config": quantization}, tensors)
    write_tokenizer(tmp_path / "hf")
    convert.import_run(tmp_path / "hf", tmp_path / "run")
    convert.export_run(tmp_path / "run", tmp_path / "out")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == config | {"torch_dtype": "bfloat16"}
    back = load_file(tmp_path / "out/model.safetensors")
    want = (tensors[name].astype(np.float32) * 2).astype(published.BF16)
    np.testing.assert_array_equal(back[name], want)


def loop(path):
    path.symlink_to(path)


@pytest.mark.parametrize(
    "change, text",
    [
        (lambda hf: (hf / "tokenizer.json").unlink(), "has no tokenizer.json"),
        (lambda hf: (hf / "tokenizer.json").write_bytes(b"\xff"), "not text in UTF-8"),
        (lambda hf: (hf / "tokenizer.json").write_text("{}"), "not a tokenizer.json"),
        (lambda hf: (hf / "generation_config.json").write_text('{"top_k": "x"}'), "top_k='x'"),
        (
            lambda hf: (hf / "tokenizer.json").unlink() or loop(hf / "tokenizer.json"),
            "missing file tokenizer.json",
        ),
        (lambda hf: (hf / "config.json").unlink(), "missing file config.json"),
        (
            lambda hf: (hf / "config.json").write_text('{"a": 1}'),
            "must be an object with a model_type",
        ),
        (lambda hf: (hf / "model-00002-of-00002.safetensors").unlink(), "missing file model-00002"),
    ],
)
def test_failed_import_leaves_nothing(tmp_path, change, text):
    hf = checkpoint(tmp_path / "hf", "mixtral")
    change(hf)
    with pytest.raises(ConfigError, match=text):
        convert.import_run(hf, tmp_path / "new" / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_a_full_disk_is_noticed_before_anything_is_read_or_written(tmp_path, monkeypatch):
    hf = checkpoint(tmp_path / "hf", "mixtral")
    convert.import_run(hf, tmp_path / "run")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=0))
    monkeypatch.setattr(convert, "read_model", None)
    for use in (
        lambda: convert.import_run(hf, tmp_path / "new" / "run"),
        lambda: convert.export_run(tmp_path / "run", tmp_path / "new" / "out"),
    ):
        with pytest.raises(ConfigError, match=r"[\d,]{6,} bytes are needed, 0 are free"):
            use()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]


def test_tokenizer_of_another_model(tmp_path):
    hf = checkpoint(tmp_path / "hf", "mixtral", vocab_size=100)
    with pytest.raises(ConfigError, match=r"tokens, the model's vocabulary only 100"):
        convert.import_run(hf, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["hf"]


def test_workdir_that_is_taken(tmp_path):
    hf = checkpoint(tmp_path / "hf", "mixtral")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/mine.txt").write_text("kept")
    with pytest.raises(ConfigError, match="not an empty folder"):
        convert.import_run(hf, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine.txt"]


def command(*arguments):
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": UNOPTIMISED,
    }
    return subprocess.Popen(
        [sys.executable, "-m", "moejax", *arguments],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.product
def test_killed_import(tmp_path):
    """SIGKILL in the middle: no run, and the same command then succeeds and clears the rest away."""
    hf = checkpoint(tmp_path / "hf", "deepseek_v3", n_routed_experts=64, num_hidden_layers=12)
    arguments = ("import", f"--hf_dir={hf}", f"--workdir={tmp_path / 'run'}")
    partial = tmp_path / ".run.moejax-partial"
    process = command(*arguments)
    while not partial.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert partial.exists() and not (tmp_path / "run").exists()
    process = command(*arguments)
    _, err = process.communicate()
    assert process.returncode == 0, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "run"]
    assert load_run(tmp_path / "run").cfg.model.num_layers == 12


def own_names(folder):
    """Special tokens that no list of names knows: `<begin>` stands before every text, `<fin>` ends one."""
    described = json.loads((folder / "tokenizer.json").read_text())
    size = max(described["model"]["vocab"].values())
    for i, name in enumerate(("<begin>", "<fin>"), size + 1):
        token = {"id": i, "content": name, "special": True, "single_word": False, "lstrip": False}
        described["added_tokens"].append(token | {"rstrip": False, "normalized": False})
    text, special = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": "<begin>", "type_id": 0}},
    )
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [special, text],
        "pair": [special, text],
        "special_tokens": {"<begin>": {"id": "<begin>", "ids": [size + 1], "tokens": ["<begin>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    tokens = {"eos_token": "<fin>", "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(tokens))
    return {"bos_id": size + 1, "eos_id": size + 2, "pad_id": 1}


@pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")  # ml_collections
def test_fine_tune_an_import_or_the_folder_itself(tmp_path, capsys):
    """Both begin with the same weights and tokens, and both are left alone."""
    imported, hf = tmp_path / "imported", checkpoint(tmp_path / "hf", "mixtral")
    wanted = own_names(hf)
    convert.import_run(hf, imported)
    before = load_run(imported)
    assert json.loads((imported / "separators.json").read_text()) == wanted
    (tmp_path / "mine.txt").write_text("hello world, hello\n\n\n" * 100)
    flags = {
        "data.sources": f"('mine={tmp_path}/mine.txt',)",
        "data.seq_len": 16,
        "data.batch_size": 2,
        "train.steps": 2,
        "train.eval_batches": 1,
        "mesh.data": 1,
    }
    overrides = [f"--config.{k}={v}" for k, v in flags.items()]
    found = {}
    for name, base in {"a": imported, "b": hf}.items():
        files = {p: p.read_bytes() for p in base.rglob("*") if p.is_file()}
        config, run = f"--config={ROOT}/experiments/finetune.py:{base}", tmp_path / name
        command = ["train", config, f"--workdir={run}", "--noreport", *overrides]
        assert main(command) == 0, capsys.readouterr().err
        assert {p: p.read_bytes() for p in base.rglob("*") if p.is_file()} == files
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses = [r["loss"] for r in rows if r["kind"] == "validation" and r["step"] == 0]
        found[name] = losses, provenance.read(run)[0]["base_sha256"]
        after = load_run(run)
        assert (after.step, after.cfg.model) == (2, before.cfg.model)
        # The text begins and ends with the tokens that the base's files name.
        assert after.tokenizer.eos_id == wanted["eos_id"] == before.tokenizer.eos_id
        assert after.tokenizer.bos_id == wanted["bos_id"]
        [first, *_] = validation_batches(
            load_corpus(after.cfg.data), after.tokenizer, after.cfg.data
        )
        assert first["tokens"][0, 0] == wanted["bos_id"]
        assert wanted["eos_id"] in first["targets"]
        moved = jax.tree.map(
            lambda a, b: float(jnp.abs(a - b.astype(a.dtype)).max()), after.params, before.params
        )
        # Float32 masters that moved by about two steps of a learning rate that warms up to 1e-5.
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(after.params))
        assert 0 < max(jax.tree.leaves(moved)) < 1e-4
        for file in ("config.json", "tokenizer_config.json", "generation_config.json"):
            assert (run / "hf" / file).read_bytes() == (hf / file).read_bytes()
    assert found["a"] == found["b"]
    # Its own folder, an import's folder, and a key that is not the base's.
    command = ["train", f"--config={ROOT}/experiments/finetune.py:{imported}", *overrides]
    assert main([*command, f"--workdir={imported}"]) == 2
    assert "are one folder" in capsys.readouterr().err
    assert main([*command, f"--workdir={tmp_path / 'c'}", "--config.model.num_layers=4"]) == 2
    assert "model.num_layers: 3 there, 4 here" in capsys.readouterr().err
    # What was fine-tuned exports as what it is.
    convert.export_run(tmp_path / "a", tmp_path / "out")
    exported = json.loads((tmp_path / "out/config.json").read_text())
    assert exported["model_type"] == "mixtral" and exported["torch_dtype"] == "float32"


def test_bad_arguments():
    """Exit code 2 and one clear message, no traceback."""
    process = command("import", "--hf_dir=nowhere", "--workdir=run")
    _, err = process.communicate()
    assert process.returncode == 2 and err.startswith("moejax import: nowhere is not a folder")
    with pytest.raises(ConfigError, match="import needs --workdir"):
        import_.main(["--hf_dir=x"])
    with pytest.raises(ConfigError, match="unknown flag --nonsense"):
        export.main(["--nonsense"])


def test_a_key_that_is_not_known_is_left_out_when_asked(tmp_path):
    """It stops the import; without it the run exports a config.json that says what moejax computes."""
    hf = checkpoint(tmp_path / "hf", "olmoe", clip_qkv=8.0, router_noise=0.5)
    arguments = ["import", f"--hf_dir={hf}", f"--workdir={tmp_path / 'run'}"]
    assert main([*arguments, "--ignore_keys=router_noise"]) == 2
    assert main([*arguments, "--ignore_keys=clip_qkv"]) == 2
    assert main([*arguments, "--ignore_keys=clip_qkv,router_noise"]) == 0
    convert.export_run(tmp_path / "run", tmp_path / "out")
    before, after = (json.loads((d / "config.json").read_text()) for d in (hf, tmp_path / "out"))
    assert after == {k: v for k, v in before.items() if k not in ("clip_qkv", "router_noise")}
