"""`moejax analyze` and `report` on imported models, in OLMoE's and in DeepSeekMoE's layout."""

import json

import numpy as np
import published
import pytest
from test_import_export import checkpoint

from moejax.__main__ import main


@pytest.mark.parametrize("family", ["deepseek", "olmoe"])
@pytest.mark.product
def test_an_imported_model_is_analysed_and_drawn(tmp_path, capsys, family):
    run = tmp_path / "run"
    hf = checkpoint(tmp_path / "hf", family)
    assert main(["import", f"--hf_dir={hf}", f"--workdir={run}"]) == 0
    assert main(["report", f"--workdir={run}"]) == 2
    assert "is an imported model" in capsys.readouterr().err
    for name, text in (("words", "hello world\n"), ("sums", "1 + 1 = 2\n")):
        (tmp_path / f"{name}.txt").write_text(text * 60)
    sources = ",".join(f"{n}={tmp_path / n}.txt" for n in ("words", "sums"))
    args = [f"--sources={sources}", "--seq_len=32", "--batch_size=4", "--batches=4"]
    assert main(["analyze", f"--workdir={run}", *args]) == 0
    found = json.loads((run / "analysis.json").read_text())
    config = published.config(family)
    layers = config["num_hidden_layers"] - config.get("first_k_dense_replace", 0)
    assert np.shape(found["load"]) == np.shape(found["importance"]["reap"]) == (layers, 4)
    assert np.sum(found["load"]) == layers * found["text"]["tokens"] * config["num_experts_per_tok"]
    assert found["domains"] == ["words", "sums"] and found["steps"] == [0]
    names = {r["figure"] for r in found["figures"]}
    assert {"domain_information", "cka_mean", "bf16_flips", "repetition", "margin"} <= names
    assert main(["report", f"--workdir={run}"]) == 0
    page = (run / "report.html").read_text()
    assert "Which domain uses which expert, beside chance" in page and "<svg" in page
