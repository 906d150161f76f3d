"""Every router of the table, as its paper has it, by the commands: plan, train (which evaluates), report (which
generates, or says that the router is not causal)."""

import contextlib
import io
import json
import pathlib

import pytest

from moejax.__main__ import main
from moejax.routers import ROUTERS

ROOT = pathlib.Path(__file__).parents[2]
# experiments/routers.py, tiny; the experts stay as many as the router's options want.
TINY = {
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.d_ff": 32,
    "model.attention.num_heads": 2,
    "model.attention.num_kv_heads": 2,
    "model.attention.head_dim": 8,
    "data.tokenizer": "byte",
    "data.vocab_size": 4096,  # the default: bytes have a vocabulary of their own
    "data.max_bytes": 100_000,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 1,
    "train.steps": 2,
    "train.log_every": 1,
    "train.eval_batches": 1,
    "train.accumulation": 1,
    "mesh.data": 1,
}


def command(*argv) -> tuple[int, str]:
    """Exit code, and what was said."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(a) for a in argv])
    return code, said.getvalue()


@pytest.mark.product
@pytest.mark.parametrize("name", ROUTERS)
def test_from_plan_to_report(name, tmp_path):
    run = tmp_path / "run"
    config = f"--config={ROOT / 'experiments/routers.py'}:{name}"
    flags = [f"--config.{key}={value}" for key, value in TINY.items()]
    if ROUTERS[name].form == "token" and name != "peer":  # which has thousands of experts
        flags.append("--config.compute.dispatcher=dense")  # compiles faster
    code, said = command("plan", config, *flags)
    assert code == 0 and "router" in said, said
    # The plan asks for the memory that is free, which is little beside another worker.
    code, said = command("train", "--force", "--noreport", f"--workdir={run}", config, *flags)
    assert code == 0, said
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {r["step"]: r["loss"] for r in rows if r["kind"] == "train"}
    assert list(losses) == [1, 2] and all(0 < loss < 20 for loss in losses.values())
    [held_out] = [r for r in rows if r["kind"] == "validation" and r["step"] == 2]
    assert 0 < held_out["loss"] < 20
    if not ROUTERS[name].causal:
        code, said = command("generate", f"--workdir={run}", "--prompt=def ")
        assert code == 2 and name in said, said
    code, said = command("report", f"--workdir={run}")
    assert code == 0 and (run / "report.html").stat().st_size > 10_000, said
    page = (run / "report.html").read_text()
    assert ("cannot generate" in page) == (not ROUTERS[name].causal)
