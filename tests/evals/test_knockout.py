"""Knock-out curves of a run: table, numbers, page."""

import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from moejax.commands import knockout as command
from moejax.config import ConfigError
from moejax.evals import knockout
from moejax.evals.evaluate import evaluate_run
from moejax.evals.intervene_run import intervene_run
from moejax.evals.intervene_text import parse


def test_command(trained, tmp_path, capsys):
    """A point is what evaluate says with the same intervention, none taken away is evaluate itself."""
    files = {kind: tmp_path / f"k.{kind}" for kind in ("json", "html")}
    argv = [f"--workdir={trained}", "--batches=2", "--orders=best,random", "--experts=4,0"]
    argv += ["--seeds=2", *(f"--{kind}={file}" for kind, file in files.items())]
    assert command.main(argv) == 0
    said = capsys.readouterr().out
    assert "each token's best" in said and "50.0%" in said
    data = json.loads(files["json"].read_text())
    assert set(data["curves"]) == {"best", "random"} and data["num_experts"] == 8
    assert list(data["curves"]["best"]) == ["0", "4"]
    nothing = data["curves"]["best"]["0"]["all"]
    assert nothing["difference"] == 0
    plain = evaluate_run(trained, num_batches=2)
    assert nothing["changed"] == pytest.approx(plain["loss"], rel=1e-6)
    for name in ("lower", "digits"):
        there = data["curves"]["best"]["0"][name]
        assert there["untouched"] == pytest.approx(plain[f"loss/{name}"], rel=1e-6)
        assert there["tokens"] == plain[f"tokens/{name}"]
    want = intervene_run(trained, parse(["best=4"]), num_batches=2)["lower"]
    got = data["curves"]["best"]["4"]["lower"]
    assert (got["changed"], got["low"]) == (want.changed, want.low)
    assert len(data["curves"]["random"]["4"]["all"]["seeds"]) == 2
    page = files["html"].read_text()
    assert page.count("<svg") == 3 and "moejax knockout" in page  # all text and two domains
    svg = page[page.index("<svg") : page.index("</svg>") + 6]
    texts = {e.text for e in ET.fromstring(svg).iter() if e.text and e.text.strip()}
    assert {"all text", "each token's best", "random", "nats per token"} <= texts


def test_shares():
    assert knockout.counts_of(64, knockout.SHARES) == [0, 4, 8, 12, 16]
    assert knockout.counts_of(8, knockout.SHARES) == [0, 1, 2]
    with pytest.raises(ConfigError, match=r"1\.5 is no share"):
        knockout.counts_of(8, [1.5])
    assert np.isclose(command._share("3/16"), 0.1875)


@pytest.mark.parametrize(
    ("argv", "problem"),
    [
        (["--orders=worst"], "there is no 'worst'; best, top, bottom, random would work"),
        (["--experts=1", "--shares=0.5"], "not both"),
        (["--experts=a"], "must be numbers"),
        (["--experts=-1"], "none may be negative"),
        (["--shares=1/0"], "must be numbers"),
        (["--experts=7"], "1 are left, and a token needs 2; at most 6 would work"),
        (["--silent"], "a token's best experts are taken from its choice"),
        (["--html=/no/such/folder/k.html"], "there is no such folder"),
    ],
)
def test_what_cannot_be(trained, argv, problem):
    with pytest.raises(ConfigError, match=problem):
        command.main([f"--workdir={trained}", *argv])
