"""Runs that were trained here as Hugging Face folders: the family, the ids and the text."""

import dataclasses
import json

import pytest

from moejax.__main__ import main
from moejax.config import (
    AttentionConfig,
    ConfigError,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
)
from moejax.config_io import to_json
from moejax.data import load_corpus, load_tokenizer
from moejax.evals.writer import Writer
from moejax.interop import convert
from moejax.models import transformer
from moejax.params import init_params
from moejax.routers import router_options
from moejax.runs.checkpoint import Checkpoints
from moejax.runs.folder import claim_workdir


def test_export_of_a_run_that_was_trained_here(tmp_path, key, capsys):
    """The first family that fits, and the others are named; ids of the tokenizer go into config.json."""
    cfg = ModelConfig(vocab_size=258, d_model=8, num_layers=1, num_dense_layers=1, d_ff=8)
    experiment = ExperimentConfig(model=cfg, data=DataConfig(tokenizer="byte"))
    params = init_params(transformer.param_specs(cfg), key)
    checkpoints = Checkpoints(tmp_path / "run", experiment)
    checkpoints.save_model(params, {})
    checkpoints.close()
    (tmp_path / "run/config.json").write_text(to_json(experiment))
    convert.export_run(tmp_path / "run", tmp_path / "out")
    assert "--model_type=mistral" in capsys.readouterr().out
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("llama", 256)
    assert config["torch_dtype"] == "float32"
    sigmoid = MoEConfig(num_experts=4, d_expert=8, router=router_options(score="sigmoid"))
    with pytest.raises(ConfigError, match=r"- deepseek: .*moe\.router\.score='sigmoid'"):
        convert._families(dataclasses.replace(cfg, num_dense_layers=0, moe=sigmoid))
    softmax = dataclasses.replace(sigmoid, router=router_options(normalize_weights=True))
    wide = dataclasses.replace(cfg, d_model=128, num_dense_layers=0, moe=softmax)
    assert convert._families(wide)[:2] == ["deepseek", "mixtral"]
    with pytest.raises(ConfigError, match=r"mixtral config\.json cannot express this model"):
        convert.export_run(tmp_path / "run", tmp_path / "other", "mixtral")
    assert not (tmp_path / "other").exists()


def test_text_of_a_run_with_a_tokenizer_trained_here_survives_export_and_import(
    tmp_path, key, capsys
):
    """Written as Mixtral: a prompt begins with the same ids, and greedy text is the same. A tokenizer.json
    that puts nothing before a text would lose the separator that every document was trained behind."""
    sources = (f"text={tmp_path}/text.txt",)
    (tmp_path / "text.txt").write_text("\n\n".join(f"abcd dcb {n}" for n in range(400)))
    cfg = ModelConfig(
        vocab_size=300,
        d_model=16,
        num_layers=1,
        num_dense_layers=0,
        init_std=0.5,
        max_seq_len=64,
        attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
        moe=MoEConfig(
            num_experts=4, experts_per_token=2, d_expert=8, router=router_options("mixtral")
        ),
    )
    data = DataConfig(sources=sources, tokenizer="bpe", vocab_size=300, seq_len=32)
    experiment = ExperimentConfig(model=cfg, data=data)
    tokenizer = load_tokenizer(data, load_corpus(data))
    run, hf, again = tmp_path / "run", tmp_path / "hf", tmp_path / "again"
    checkpoints = Checkpoints(run, experiment)
    checkpoints.save_model(*transformer.init_model(cfg, key))
    checkpoints.close()
    claim_workdir(run, experiment, tokenizer)
    assert main(["export", f"--workdir={run}", f"--hf_dir={hf}", "--model_type=mixtral"]) == 0
    assert main(["import", f"--hf_dir={hf}", f"--workdir={again}"]) == 0
    capsys.readouterr()
    for prompt in ("ab", "", "abcd dcb"):
        said = []
        for workdir in (run, again):
            argv = [
                "generate",
                f"--workdir={workdir}",
                f"--prompt={prompt}",
                "--greedy",
                "--max_new=12",
            ]
            assert main(argv) == 0
            said.append(capsys.readouterr().out)
        assert said[0] == said[1] and len(said[0]) > len(prompt) + 1
    # Neither begins without the separator.
    writers = [Writer(workdir, max_new=1) for workdir in (run, again)]
    ids = [w.encode("ab") for w in writers]
    assert ids[0] == ids[1] == [tokenizer.bos_id, *tokenizer.encode("ab")]
