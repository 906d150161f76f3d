"""What a run begins with, if not from scratch: `train.init_from`, another run or a Hugging Face folder.

Its weights, router state and tokenizer go into a new workdir; the base itself is only read. Model and tokenizer
must be the base's. Groups that a config leaves at their defaults (`model`, `objective`, the tokenizer) mean
those of the base: `as_base`.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from moejax.config import (
    ConfigError,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    ObjectiveConfig,
)
from moejax.config_io import to_json
from moejax.data.tokenizer import JsonTokenizer, Tokenizer
from moejax.interop import convert
from moejax.runs import agree, folder, lock
from moejax.runs.checksums import checksums
from moejax.runs.open import read_config
from moejax.runs.restore import check_trainable, model_at
from moejax.sharding import Layout
from moejax.train import processes, upcycle

EXPECTED = (
    "expected the folder of a run, one of its checkpoints (RUN/checkpoints/STEP), or a Hugging Face folder "
    "(config.json and *.safetensors)"
)


class Base(NamedTuple):
    """Attributes:
    name: `train.init_from`, with the step if it is a run.
    cfg: its model, what it was trained for, its tokenizer's name.
    tokenizer: its own.
    files: what the new run keeps of an import, by name in the run's folder.
    load: (layout) -> (params, router_state) on its devices, params in float32. All processes must call it.
    """

    name: str
    cfg: ExperimentConfig
    tokenizer: Tokenizer
    files: dict[str, bytes]
    load: Callable[[Layout | None], tuple[dict, dict]]


def as_base(cfg: ExperimentConfig, workdir: pathlib.Path | None) -> ExperimentConfig:
    """The experiment, with `model`, `objective` and tokenizer, each if left at its default, from its base; from
    the run in `workdir` if there is one, for then the base may be gone."""
    if workdir is not None and (workdir / folder.CONFIG).exists():
        theirs = read_config(workdir)
    else:
        root, step = _where(cfg.train.init_from)
        theirs = convert.open_source(root).experiment if step is None else read_config(root)
    data, default = cfg.data, DataConfig()
    if (data.tokenizer, data.vocab_size) == (default.tokenizer, default.vocab_size):
        other = theirs.data
        data = dataclasses.replace(data, tokenizer=other.tokenizer, vocab_size=other.vocab_size)
    return dataclasses.replace(
        cfg,
        model=theirs.model if cfg.model == ModelConfig() else cfg.model,
        objective=theirs.objective if cfg.objective == ObjectiveConfig() else cfg.objective,
        data=data,
    )


def open_base(cfg: ExperimentConfig, workdir: pathlib.Path) -> tuple[ExperimentConfig, Base]:
    """(the experiment, its vocabulary included; the base of a run that begins in `workdir`); without arrays.

    Raises ConfigError if there is no base, if it is being written or holds the workdir, and for what does not
    fit the config: each key, both values, and what would work.
    """
    given = cfg.train.init_from
    root, step = _where(given)
    check_apart(cfg, workdir)
    base = _hugging_face(given, root) if step is None else _run(given, root, step)
    if cfg.train.upcycle:
        base = _upcycled(base, cfg)
    if not cfg.model.vocab_size:
        model = dataclasses.replace(cfg.model, vocab_size=base.cfg.model.vocab_size)
        cfg = dataclasses.replace(cfg, model=model)
    _check_fits(cfg, base)
    return cfg, base


def check_apart(cfg: ExperimentConfig, workdir: pathlib.Path) -> None:
    """ConfigError if the workdir is the base, or in it."""
    given = cfg.train.init_from
    root = _root(pathlib.Path(given).expanduser())[0].resolve()
    if workdir.resolve().is_relative_to(root):
        raise ConfigError(
            f"train.init_from={given} and --workdir={workdir} are one folder: a base is only read. Another "
            "--workdir would work"
        )


def fingerprint(params: dict, router_state: dict) -> str:
    """A sha256 of the checksums of every array: the same on any mesh, and for float32 and shorter floats."""
    sums = checksums({"params": params, "router_state": router_state})
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------------------------------------------
# The two kinds.


def _root(path: pathlib.Path) -> tuple[pathlib.Path, int | None]:
    """(folder of the run, step) of the path of a checkpoint; any other path is as it is."""
    if path.parent.name == folder.CHECKPOINTS and path.name.isascii() and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def _where(given: str) -> tuple[pathlib.Path, int | None]:
    """(folder of a run, step), or (Hugging Face folder, None)."""
    root, step = _root(pathlib.Path(given).expanduser())
    if not root.is_dir():
        raise ConfigError(f"train.init_from={given}: there is no folder {root}; {EXPECTED}")
    steps = sorted(int(p.name) for p in folder.steps(root))
    if step is not None and step not in steps:
        have = ", ".join(map(str, steps)) or "none"
        raise ConfigError(
            f"train.init_from={given}: there is no such checkpoint; {root} has {have}"
        )
    if steps:
        return root, steps[-1] if step is None else step
    if not any(root.glob("*.safetensors")):
        begun = (root / folder.CHECKPOINTS).is_dir() or (root / folder.LOCK).exists()
        why = "it has no checkpoint yet; moejax train writes one" if begun else EXPECTED
        raise ConfigError(f"train.init_from={given}: {why}")
    return root, None


def _run(given: str, root: pathlib.Path, step: int) -> Base:
    at = root / folder.CHECKPOINTS / str(step)
    writer = lock.writer(root)
    if writer is not None and _root(pathlib.Path(given))[1] is None:
        raise ConfigError(
            f"train.init_from={given} is being trained ({writer}), so its newest checkpoint changes: wait for "
            f"its end, or name the checkpoint: --config.train.init_from={at}"
        )
    cfg = read_config(root)
    check_trainable(root, step)
    tokenizer, files = convert.tokenizer_of_run(root, cfg)
    load = functools.partial(_load_run, root, cfg, step)
    return Base(f"{root}, step {step}", cfg, tokenizer, files, load)


def _load_run(root: pathlib.Path, cfg: ExperimentConfig, step: int, layout: Layout | None):
    try:
        return model_at(root, cfg, step, layout)
    except ConfigError as e:
        others = ", ".join(p.name for p in folder.steps(root) if p.name != str(step))
        rest = f"; other checkpoints there: {others}" if others else ""
        raise ConfigError(f"train.init_from: {e}{rest}") from e


def _hugging_face(given: str, root: pathlib.Path) -> Base:
    source = convert.open_source(root)

    def load(layout: Layout | None) -> tuple[dict, dict]:
        model, error = None, None
        try:
            model = convert.read_source(source, jnp.float32, layout)
        except ConfigError as e:
            error = e
        agree.raise_together(error)
        assert model is not None
        if source.more_rows:
            processes.say(source.said_of_rows())
        return model[1], model[2]

    return Base(given, source.experiment, source.tokenizer, source.run_files(), load)


def _upcycled(base: Base, cfg: ExperimentConfig) -> Base:
    """The base as the mixture that it becomes."""
    dense = base.cfg.model
    model = upcycle.begun_from(dense, dataclasses.replace(cfg.model, vocab_size=dense.vocab_size))

    def load(layout: Layout | None) -> tuple[dict, dict]:
        params, _ = base.load(layout)
        return upcycle.upcycle(params, model, cfg.train.seed, layout)

    return base._replace(cfg=dataclasses.replace(base.cfg, model=model), load=load)


# ---------------------------------------------------------------------------------------------------
# Whether it fits.


def _check_fits(cfg: ExperimentConfig, base: Base) -> None:
    there, here = (json.loads(to_json(c)) for c in (base.cfg, cfg))
    differ = folder.differences(there["model"], here["model"], "model")
    lines = [f"{key}: {a!r} there, {b!r} here" for key, a, b in differ]
    ways = [f"--config.{key}={a}" for key, a, _ in differ]
    if any(key == "model.mtp_depth" for key, *_ in differ):
        lines.append(
            "layers for multi-token prediction are neither added nor removed; "
            "objective.mtp_loss_weight=0 leaves them out of the loss"
        )
    if not _same_tokenizer(cfg.data, base):
        keys = ("tokenizer", "vocab_size")[: 1 + (cfg.data.tokenizer == "bpe")]
        for key in keys:
            a, b = getattr(base.cfg.data, key), getattr(cfg.data, key)
            if a != b or key == "tokenizer" != keys[-1]:
                lines.append(f"data.{key}: {a!r} there, {b!r} here")
                ways.append(f"--config.data.{key}={a}")
    if lines:
        few = " ".join(ways[:4]) + (" .." if len(ways) > 4 else "")
        raise ConfigError(
            f"train.init_from={cfg.train.init_from} has another model or tokenizer than this config:\n"
            + "\n".join(f"  - {line}" for line in lines)
            + f"\n{few} would work, or an experiment that leaves them out, and so takes them from there: "
            f"--config=experiments/finetune.py:{cfg.train.init_from}"
        )


def _same_tokenizer(data: DataConfig, base: Base) -> bool:
    theirs = base.cfg.data
    if data.tokenizer in ("byte", "bpe") or data.tokenizer == theirs.tokenizer:
        same_size = data.tokenizer != "bpe" or data.vocab_size == theirs.vocab_size
        return data.tokenizer == theirs.tokenizer and same_size
    path = pathlib.Path(data.tokenizer).expanduser()
    path = path / folder.TOKENIZER if path.is_dir() else path
    if not isinstance(base.tokenizer, JsonTokenizer) or not path.is_file():
        return False
    return path.read_text("utf-8", "replace") == base.tokenizer.text
