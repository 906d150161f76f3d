"""The report: one page that needs nothing else, its numbers, and hostile text kept as text."""

import base64
import dataclasses
import re
import shutil

import numpy as np
import pytest

from moejax.commands import report as report_command
from moejax.config import MoEConfig, ObjectiveConfig
from moejax.config_io import to_json
from moejax.evals import report
from moejax.evals.token_counts import count_tokens
from moejax.routers import router_options
from moejax.runs.metrics import read_metrics
from moejax.runs.open import load_run, read_config
from moejax.train.loop import train


@pytest.mark.usefixtures("parameters_are_arguments")
def test_page_is_whole_and_alone(trained, capsys):
    assert report_command.main([f"--workdir={trained}", "--step=10"]) == 0
    assert "report.html" in capsys.readouterr().out
    page = (trained / "report.html").read_text()
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert len(images) == 9  # of them two of the router: its counts, and the bias of every expert
    assert all(base64.b64decode(i).startswith(b"\x89PNG") for i in images)
    for title in (
        "Loss",
        "Load of every expert over time",
        "Balance",
        "The router&#39;s own state and counts",
        "Which domain goes to which expert",
        "How much a route reveals about the domain",
        "How large router logits are",
        "What experts read",
        "Samples",
        "Optimisation",
    ):
        assert f"<h2>{title}</h2>" in page
    assert not re.search(r'(src|href)="(?!data:)', page)  # self-contained
    assert "the model of step 10 goes on" in page and "held-out text at step 10" in page
    rows = read_metrics(trained)
    assert f"{rows['validation'][20]['loss']:.3f}" in page


def test_names_and_text_are_escaped(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    cfg = read_config(run)
    cfg = dataclasses.replace(cfg, name="<script>alert(1)</script>")
    (run / "config.json").write_text(to_json(cfg))
    page = report.write_report(run)[0].read_text()
    assert "<script>" not in page and "&lt;script&gt;" in page


@pytest.mark.product
def test_a_model_that_cannot_generate_has_a_report_too(trained, tmp_path):
    moe = MoEConfig(
        num_experts=8,
        experts_per_token=2,
        d_expert=8,
        router=router_options("expert_choice"),
    )
    cfg = read_config(trained)
    cfg = dataclasses.replace(
        cfg,
        model=dataclasses.replace(cfg.model, moe=moe),
        objective=ObjectiveConfig(),
        train=dataclasses.replace(cfg.train, steps=2),
    )
    train(cfg, tmp_path)
    path, samples = report.write_report(tmp_path)
    assert not samples and "&#39;expert_choice&#39; is not causal" in path.read_text()


def test_routes_by_token(trained):
    run = load_run(trained)
    tokens = np.tile(np.array([97, 98, 99, 48], np.int32), (2, 8))
    batch = {
        "tokens": tokens,
        "positions": np.tile(np.arange(32, dtype=np.int32), (2, 1)),
        "segment_ids": (np.arange(32) < 24).astype(np.int32) * np.ones((2, 1), np.int32),
    }
    counts = count_tokens(run.params, run.router_state, run.cfg, [batch, batch], [1])[1]
    # 2 batches x 2 rows x 6 times each token (the rest is padding) x 2 experts per token.
    assert counts.sum() == 2 * 2 * 24 * 2
    assert set(np.flatnonzero(counts.sum(axis=0))) == {97, 98, 99, 48}
    assert set(counts.sum(axis=0)[[97, 98, 99, 48]]) == {48}
