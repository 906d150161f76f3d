"""--step=N: commands read that checkpoint (report: test_report.py); a missing one is refused at once."""

import pytest

from moejax.commands import evaluate, generate, report
from moejax.config import ConfigError
from moejax.evals.evaluate import evaluate_run
from moejax.evals.writer import Writer
from moejax.runs.metrics import read_metrics


def test_each_step_is_what_training_measured_there(trained, capsys):
    for step in (10, 20):
        logged = read_metrics(trained)["validation"][step]
        # Another order of float32 sums than the step of training had.
        assert evaluate_run(trained, step=step)["loss"] == pytest.approx(logged["loss"], rel=1e-6)
    assert evaluate_run(trained, step=20) == evaluate_run(trained)
    assert evaluate.main([f"--workdir={trained}", "--step=10"]) == 0
    assert f"{trained} at step 10 on held-out documents" in capsys.readouterr().out


def test_generate_reads_that_step(trained, capsys):
    texts = [
        "".join(Writer(trained, step=s, seed=1, max_new=12).write([256, 97])) for s in (10, 20)
    ]
    assert texts[0] != texts[1]
    args = [f"--workdir={trained}", "--prompt=a", "--step=10", "--seed=1", "--max_new=12"]
    assert generate.main(args) == 0
    assert capsys.readouterr().out.strip() == f"a{texts[0]}".strip()


@pytest.mark.parametrize(
    "command, flags", [(evaluate, []), (generate, ["--prompt=a"]), (report, [])]
)
def test_a_step_that_is_not_there_is_refused_before_any_work(trained, command, flags, monkeypatch):
    for heavy in ("moejax.evals.evaluate.held_out", "moejax.runs.restore.abstract_model"):
        monkeypatch.setattr(heavy, None)
    with pytest.raises(ConfigError, match=r"no checkpoint of step 15; .*10"):
        command.main([f"--workdir={trained}", "--step=15", *flags])
