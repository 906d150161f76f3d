"""Where the rows of a run go besides metrics.jsonl: TensorBoard, Weights & Biases, or what you write.

    train(cfg, workdir, writers=[lambda workdir, cfg, begin: MyWriter()])

A row has a step, a kind ('train', 'validation', 'load', 'router', 'routing', 'receipt') and values: numbers,
and lists of them by layer, or by layer and expert.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import os
import pathlib
import secrets
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import histogram, histogram_raw, hparams, scalar, text

from moejax.config import ConfigError, ExperimentConfig
from moejax.config_io import to_json
from moejax.runs import folder


class Writer(Protocol):
    """What `train` calls in process 0, after each row of metrics.jsonl."""

    def write(self, step: int, kind: str, values: dict) -> None: ...

    def close(self) -> None: ...


# (workdir, config, first step that will be written) -> a writer.
OpenWriter = Callable[[pathlib.Path, ExperimentConfig, int], Writer]

# The charts of TensorBoard and W&B, by what is in them; a name goes to the first group with a pattern for it.
GROUPS = {
    "domains": ("loss/*", "bits_per_byte/*", "tokens/*"),
    "balance": (
        *("balance/*", "max_vio", "*_entropy", "dead_experts", "drop_fraction", "stray_routes"),
        "experts_per_token",
    ),
    "speed": ("*_per_second",),
    "loss": ("loss", "cross_entropy", "perplexity", "bits_per_byte", "mtp*", "attention/*"),
    "optimiser": ("learning_rate", "grad_norm", "skipped", "bad_in_a_row", "*norm*"),
}


def tag(kind: str, name: str) -> str:
    """'loss/train/cross_entropy': under the heading of its group."""
    for group, patterns in GROUPS.items():
        if any(fnmatch.fnmatchcase(name, p) for p in patterns):
            return f"{group}/{kind}/{name}"
    return f"other/{kind}/{name}"


class Counted(NamedTuple):
    """A histogram that is counted already: how many numbers lie between each edge and the next."""

    counts: np.ndarray
    edges: np.ndarray


def counted_logits(values: dict) -> Iterator[tuple[str, Counted]]:
    """Of a row 'routing': the router's logits of each layer. The outermost bins, which have no end, get one as
    far out as the last edge and its neighbour would have it."""
    if "logits_LN" in values:
        edges = np.asarray(values["logit_edges"], float)
        first, last = edges[0] * edges[0] / edges[1], edges[-1] * edges[-1] / edges[-2]
        for i, counts_N in enumerate(values["logits_LN"]):
            counted = Counted(np.asarray(counts_N), np.array([first, *edges, last]))
            yield f"experts/logits/layer_{i}", counted


def shown(kind: str, values: dict) -> Iterator[tuple[str, float | np.ndarray | Counted]]:
    """(tag, number), (tag, numbers of all experts of a layer) and (tag, histogram) of a row. What is neither is
    left out: the receipt's and the routes by domain, which the report draws."""
    if kind == "routing":
        yield from counted_logits(values)
    if kind in ("routing", "receipt"):
        return
    for name, value in values.items():
        if isinstance(value, int | float):
            yield tag(kind, name), float(value)
            continue
        try:
            by_layer = np.asarray(value, float)
        except (TypeError, ValueError):
            continue
        name = name.removesuffix("_LE").replace("stats/", "").replace("state/", "")
        for i, numbers in enumerate(by_layer if by_layer.ndim else ()):
            whole = float(numbers) if np.ndim(numbers) == 0 else np.ravel(numbers)
            yield f"experts/{name}/layer_{i}", whole


class TensorBoard:
    """Scalars under a few headings, histograms over the experts of each layer, the config as text and as
    hyper-parameters. Raises OSError."""

    def __init__(self, workdir: pathlib.Path, cfg: ExperimentConfig | None, begin: int):
        path = workdir / folder.TENSORBOARD
        path.mkdir(exist_ok=True)
        # Written here and now: SummaryWriter's thread dies of a full disk, and then blocks for ever.
        self._board = EventsWriter(str(path / "events"), f".{os.getpid()}.{begin}")
        # Forget later steps.
        self._event(begin, session_log=SessionLog(status=SessionLog.START))
        if cfg is not None:
            for summary in hparams(hyper_parameters(cfg), {tag("validation", "loss"): 0.0}):
                self._event(begin, summary=summary)
            self._event(begin, summary=text("config", f"```\n{to_json(cfg)}\n```"))
        self._board.flush()

    def write(self, step: int, kind: str, values: dict) -> None:
        for name, value in shown(kind, values):
            if isinstance(value, float):
                self._event(step, summary=scalar(name, value))
            elif isinstance(value, Counted):
                self._event(step, summary=_drawn(name, value))
            elif np.isfinite(value).all():
                self._event(step, summary=histogram(name, value, "auto", 64))
        self._board.flush()

    def sample(self, step: int, prompt: str, continued: str) -> None:
        """What the model wrote, as text."""
        quoted = "\n".join(f"    {line}" for line in f"{prompt} | {continued}".split("\n"))
        self._event(step, summary=text("sample", quoted))
        self._board.flush()

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of a disk that is full, which was reported
            self._board.close()

    def _event(self, step: int, **content) -> None:
        self._board.write_event(Event(wall_time=time.time(), step=step, **content))


def _drawn(name: str, of: Counted):
    """For TensorBoard. The sums are those of the bins' middles: nobody kept the numbers."""
    middle = (of.edges[1:] + of.edges[:-1]) / 2
    return histogram_raw(
        name,
        min=of.edges[0],
        max=of.edges[-1],
        num=int(of.counts.sum()),
        sum=float((of.counts * middle).sum()),
        sum_squares=float((of.counts * middle**2).sum()),
        bucket_limits=of.edges[1:].tolist(),
        bucket_counts=of.counts.tolist(),
    )


def hyper_parameters(cfg: ExperimentConfig) -> dict[str, Any]:
    """'model.d_model': 192, and so on: every number, word and switch of a config that is not at its default."""

    def flat(value, prefix=""):
        for key, v in value.items():
            if isinstance(v, dict):
                yield from flat(v, f"{prefix}{key}.")
            else:
                yield f"{prefix}{key}", v if isinstance(v, bool | int | float | str) else str(v)

    default = dict(flat(json.loads(to_json(ExperimentConfig()))))
    return {k: v for k, v in flat(json.loads(to_json(cfg))) if default.get(k) != v}


class WeightsAndBiases:
    """The same charts in a project of Weights & Biases: one run there for each folder."""

    def __init__(self, project: str, workdir: pathlib.Path, cfg: ExperimentConfig):
        wandb = _wandb()
        self._histogram = wandb.Histogram
        self._run = wandb.init(
            project=project,
            name=cfg.name,
            id=_run_id(workdir),
            resume="allow",
            dir=str(workdir),
            config=dataclasses.asdict(cfg),
        )
        self._run.define_metric(
            "*", step_metric="step"
        )  # a run that goes on may write a step again

    def write(self, step: int, kind: str, values: dict) -> None:
        of = {}
        for name, v in shown(kind, values):
            if isinstance(v, float):
                of[name] = v
            elif isinstance(v, Counted):
                of[name] = self._histogram(np_histogram=(v.counts, v.edges))
            elif np.isfinite(v).all():
                of[name] = self._histogram(v)
        if of:
            self._run.log({"step": step, **of})

    def close(self) -> None:
        self._run.finish()


def weights_and_biases(project: str) -> OpenWriter:
    """For `train(writers=[..])`. ConfigError without the extra `moejax[wandb]`."""
    _wandb()
    return lambda workdir, cfg, begin: WeightsAndBiases(project, workdir, cfg)


def _wandb() -> Any:
    try:
        import wandb
    except ImportError as e:
        raise ConfigError(
            "--wandb needs Weights & Biases: pip install 'moejax[wandb]', and `wandb login`"
        ) from e
    return wandb


def _run_id(workdir: pathlib.Path) -> str:
    """The same whenever this run goes on; another one when its folder is made anew."""
    path = workdir / folder.WANDB_ID
    if not path.exists():
        path.write_text(hashlib.sha256(secrets.token_bytes(16)).hexdigest()[:16], "utf-8")
    return path.read_text("utf-8").strip()


class Guarded:
    """A writer of somebody else, which must not end a training: after its first error it gets no more rows."""

    def __init__(self, open_writer: OpenWriter, *how):
        self._writer: Writer | None = None
        self._tried(lambda: setattr(self, "_writer", open_writer(*how)))

    def write(self, step: int, kind: str, values: dict) -> None:
        writer = self._writer
        if writer is not None:
            self._tried(lambda: writer.write(step, kind, values))

    def close(self) -> None:
        if self._writer is not None:
            self._tried(self._writer.close)

    def _tried(self, do: Callable[[], object]) -> None:
        try:
            do()
        except Exception as e:
            name = type(self._writer).__name__ if self._writer else "a writer"
            self._writer = None
            warnings.warn(
                f"{name} failed and gets no more rows; metrics.jsonl has them all: "
                f"{type(e).__name__}: {str(e)[:200]}",
                stacklevel=3,
            )
