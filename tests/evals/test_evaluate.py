"""moejax evaluate: numbers against the definition, over the run's documents and over other text."""

import json
import math

import numpy as np
import pytest

from moejax.commands import evaluate
from moejax.config import ConfigError
from moejax.data import load_corpus, validation_batches
from moejax.evals.evaluate import evaluate_run
from moejax.models import transformer
from moejax.runs.metrics import read_metrics
from moejax.runs.open import load_run


def test_loss_is_that_of_the_definition(trained):
    got = evaluate_run(trained, num_batches=2)
    run = load_run(trained)
    batches = list(validation_batches(load_corpus(run.cfg.data), run.tokenizer, run.cfg.data, 8))
    nll, count, num_bytes = np.zeros(2), np.zeros(2), np.zeros(2)
    for b in batches:
        out = transformer.forward(
            run.params,
            run.router_state,
            b["tokens"],
            run.cfg.model,
            positions_BS=b["positions"],
            segment_ids_BS=b["segment_ids"],
        )
        logits = np.asarray(transformer.logits(run.params, out.hidden_BSD), np.float64)
        log_z = np.log(np.exp(logits).sum(-1))
        chosen = np.take_along_axis(logits, b["targets"][..., None], -1)[..., 0]
        for d in range(2):
            here = (b["domain"] == d) & (b["loss_mask"] > 0)
            nll[d] += (log_z - chosen)[here].sum()
            count[d] += here.sum()
            # Bytes are one token each; the end of a document is none.
            num_bytes[d] += (here & (b["targets"] != run.tokenizer.eos_id)).sum()
    assert count.min() > 0
    # float32 logits of order 1, summed over a few hundred positions.
    want = nll / count
    assert got["loss"] == pytest.approx(nll.sum() / count.sum(), rel=1e-5)
    assert got["perplexity"] == pytest.approx(math.exp(nll.sum() / count.sum()), rel=1e-4)
    assert [got["loss/lower"], got["loss/digits"]] == pytest.approx(list(want), rel=1e-5)
    bits = nll / math.log(2) / num_bytes
    assert [got["bits_per_byte/lower"], got["bits_per_byte/digits"]] == pytest.approx(
        bits, rel=1e-5
    )
    assert got["bits_per_byte"] == pytest.approx(
        nll.sum() / math.log(2) / num_bytes.sum(), rel=1e-5
    )


@pytest.mark.usefixtures("parameters_are_arguments")
def test_evaluate_says_what_training_said(trained, capsys):
    """The same text for both commands, whatever the batch; the seed of the order of training is none of it."""
    logged = list(read_metrics(trained)["validation"].values())[-1]
    for batch_size in (None, 3):
        got = evaluate_run(trained, batch_size=batch_size)
        assert got["loss"] == pytest.approx(
            logged["loss"], rel=1e-6
        )  # another order of float32 sums
        assert [got[k] for k in ("tokens", "bytes")] == [logged[k] for k in ("tokens", "bytes")]
    assert (logged["batches"], logged["tokens"]) == (2, 2 * 4 * 32)
    everything = evaluate_run(trained, num_batches=0)
    held_out = load_corpus(load_run(trained).cfg.data).validation.values()
    assert everything["bytes"] == sum(len(d.text.encode()) for group in held_out for d in group)
    assert everything["tokens"] > got["tokens"]
    assert evaluate.main([f"--workdir={trained}"]) == 0
    assert f"{trained} on held-out documents: 2 batches, 256 tokens" in capsys.readouterr().out


def test_other_text_and_the_command(trained, tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a b c d e f g h\n" * 20)
    (tmp_path / "x.txt").write_text("\u00e9~{}|" * 60)  # bytes that the model has never seen
    flags = [f"--workdir={trained}", f"--sources=known={tmp_path}/a.txt,strange={tmp_path}/x.txt"]
    assert evaluate.main([*flags, f"--json={tmp_path}/out.json"]) == 0
    got = json.loads((tmp_path / "out.json").read_text())
    assert got["loss/known"] < got["loss/strange"]
    printed = capsys.readouterr().out
    assert f"{got['loss/strange']:.4f}" in printed and f"{got['bits_per_byte']:.4f}" in printed


def test_same_on_a_mesh(trained):
    one = evaluate_run(trained, num_batches=2)
    many = evaluate_run(trained, num_batches=2, mesh="data=2,tensor=2")
    assert many == pytest.approx(one, rel=1e-5)  # float32 sums in another order


def test_bad_input(trained, tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        evaluate_run(tmp_path)
    with pytest.raises(ConfigError, match="no file matches"):
        evaluate_run(trained, (f"x={tmp_path}/*.txt",))
    with pytest.raises(ConfigError, match="seq_len=9999 exceeds"):
        evaluate_run(trained, seq_len=9999)
    with pytest.raises(
        ConfigError, match=r"batch_size=4 does not divide evenly over the 8 .*=8 would work"
    ):
        evaluate_run(trained, mesh="data=8")
    with pytest.raises(ConfigError, match="needs --workdir"):
        evaluate.main([])
