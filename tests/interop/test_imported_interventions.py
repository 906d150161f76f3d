"""Interventions on imported models: OLMoE's layout, and DeepSeekMoE's with its shared experts."""

import json

import pytest
from test_import_export import checkpoint

from moejax.__main__ import main
from moejax.commands import import_


@pytest.mark.product
@pytest.mark.parametrize("family", ["olmoe", "deepseek"])
def test_an_imported_model(tmp_path, capsys, family):
    hf, run, out = checkpoint(tmp_path / "hf", family), tmp_path / "run", tmp_path / "out.json"
    assert import_.main([f"--hf_dir={hf}", f"--workdir={run}"]) == 0
    (tmp_path / "a.txt").write_text("hello world, and all that\n\n" * 40)
    text = [
        f"--workdir={run}",
        f"--sources=a={tmp_path / 'a.txt'}",
        "--seq_len=16",
        f"--json={out}",
    ]
    for what in ("top=1", "random=1:silent", "k=1", "temperature=0.5", "best=1", "uniform"):
        assert main(["evaluate", *text, f"--intervene={what}"]) == 0
        assert json.loads(out.read_text())["all"]["difference"] != 0
    capsys.readouterr()
    assert main(["evaluate", *text, "--intervene=no_shared:one_more"]) == (
        0 if family == "deepseek" else 2
    )
    said = capsys.readouterr()
    assert "no shared experts" in said.err if family == "olmoe" else "no_shared" in said.out
    assert main(["knockout", *text, "--experts=1", "--orders=best,top"]) == 0
    assert (run / "knockout.html").exists()
