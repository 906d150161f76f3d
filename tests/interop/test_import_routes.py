"""Routes of imported models by the commands: a trace, its replay, the page, and what is refused."""

import json

import pytest
from test_import_export import checkpoint

from moejax.__main__ import main
from moejax.evals.evaluate import evaluate_run


@pytest.mark.product
@pytest.mark.parametrize("family", ["olmoe", "deepseek", "deepseek_v2", "deepseek_v3", "mixtral"])
def test_an_imported_model_is_traced_and_replayed(tmp_path, capsys, family):
    hf, run = checkpoint(tmp_path / "hf", family), tmp_path / "run"
    assert main(["import", f"--hf_dir={hf}", f"--workdir={run}"]) == 0
    (tmp_path / "x.txt").write_text("hello world, hello\n" * 30)
    text = [f"--sources=x={tmp_path}/x.txt", "--seq_len=16", "--batch_size=3"]
    out = tmp_path / "t.jsonl"
    assert main(["routes", f"--workdir={run}", *text, f"--out={out}", "--step=0"]) == 0
    header, *lines = map(json.loads, out.read_text().splitlines())
    assert header["step"] == 0 and header["tokenizer"].startswith("sha256:")
    experts = [e for line in lines for layer in line["experts"] for e in layer]
    assert len(lines) > 100 and 0 <= min(experts) <= max(experts) < header["num_experts"]
    assert {line["text"] for line in lines} >= {"<|endoftext|>", "\n"}
    options = dict(sources=(f"x={tmp_path}/x.txt",), seq_len=16, batch_size=3)
    assert evaluate_run(run, replay=out, **options) == evaluate_run(run, **options)
    assert main(["routes", f"--workdir={run}", "--text=hello", f"--out={tmp_path}/p.html"]) == 0
    assert main(["routes", f"--workdir={run}", "--prompt=he", "--max_new=3"]) == 0
    assert main(["routes", f"--workdir={run}", *text, "--compare=prefill,decode"]) == 0
    assert "any" in capsys.readouterr().out
    assert main(["routes", f"--workdir={run}", "--step=3", "--text=a"]) == 2
    assert "no checkpoint of step 3" in capsys.readouterr().err


def test_a_dense_model_is_refused_by_every_form_of_the_command(tmp_path, capsys):
    hf, run = checkpoint(tmp_path / "hf", "llama"), tmp_path / "run"
    assert main(["import", f"--hf_dir={hf}", f"--workdir={run}"]) == 0
    (tmp_path / "t.jsonl").write_text(
        '{"format": "moejax.routes", "version": 1, "num_experts": 4, "experts_per_token": 2, "layers": [0]}\n'
    )
    for command in (
        ["routes", "--text=a"],
        ["routes", "--compare=float32,bfloat16"],
        ["evaluate", f"--replay={tmp_path}/t.jsonl"],
    ):
        assert main([*command, f"--workdir={run}"]) == 2
        assert "the model is dense" in capsys.readouterr().err
