"""Folders of runs as `moejax train` leaves them, without training: config, metrics, provenance, corpus."""

import dataclasses
import json
import pathlib

from moejax.config import DataConfig, ExperimentConfig, ModelConfig, OptimizerConfig, TrainConfig
from moejax.config_io import to_json

BASE = ExperimentConfig(
    model=ModelConfig(d_model=32, num_layers=1, d_ff=64),
    data=DataConfig(batch_size=2, seq_len=10, tokenizer="byte"),
    train=TrainConfig(steps=100),
)


def changed(cfg=BASE, *, rate=1e-3, seed=0, **train) -> ExperimentConfig:
    return dataclasses.replace(
        cfg,
        optimizer=OptimizerConfig(learning_rate=rate),
        data=dataclasses.replace(cfg.data, seed=seed),
        train=dataclasses.replace(cfg.train, seed=seed, **train),
    )


def write_run(
    path: pathlib.Path,
    losses: dict[int, float],
    cfg: ExperimentConfig = BASE,
    *,
    why: str = "finished",
    tokenizer: str | None = None,
    text: str = "a",
    speed: float = 200.0,
    commit: str = "c0ffee",
) -> pathlib.Path:
    """A run with these held-out losses; bits per byte are half of them. Speeds are `speed`, in the first row a
    tenth of it; MaxVio falls from 2 to 1 in the last tenth of the steps."""
    path.mkdir(parents=True)
    (path / "config.json").write_text(to_json(cfg))
    if tokenizer is not None:
        (path / "tokenizer.json").write_text(tokenizer)
    (path / "corpus.json").write_text(json.dumps({"domains": {"d": {"sha256": text * 64}}}))
    rows: list[dict] = []
    last = max(losses, default=20)
    for step in range(10, last + 1, 10):
        values = {"cross_entropy": 6.0, "dead_experts": 0.0, "max_vio": 1.0 if step > 90 else 2.0}
        values["tokens_per_second"] = speed / 10 if step == 10 else speed
        rows.append({"step": step, "kind": "train", **values})
    for step, loss in losses.items():
        values = {"loss": loss, "bits_per_byte": loss / 2, "tokens": 64, "bytes": 64}
        rows.append({"step": step, "kind": "validation", **values})
    (path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    start = {"kind": "start", "step": 0, "commit": commit, "devices": 1, "device": "cpu"}
    end = {"kind": "end", "step": last, "why": why}
    lines = [start] + ([end] if why else [])
    (path / "provenance.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    return path


def write_sweep(root: pathlib.Path, losses: dict[str, list[float]], **options) -> pathlib.Path:
    """VARIANT/seed_SEED with a last loss each; variant number i has learning rate 0.001 (i + 1)."""
    for i, (variant, values) in enumerate(losses.items()):
        for seed, loss in enumerate(values):
            cfg = changed(rate=1e-3 * (i + 1), seed=seed)
            path = root / variant / f"seed_{seed}"
            write_run(path, {50: loss + 1, 100: loss}, cfg, **options)
    return root
