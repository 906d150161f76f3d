"""Writes the metrics of a run to its folder, and measures how fast it goes."""

import contextlib
import os
import pathlib
import statistics
import time

import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from moejax.runs import folder
from moejax.runs.metrics import cut, line


def scalars(values: dict, domains) -> dict:
    """The scalar metrics of a step as floats, including the loss of each domain."""
    out = {k: float(v) for k, v in values.items() if np.ndim(v) == 0}
    for i, d in enumerate(domains):
        if values["domain_targets"][i]:
            out[f"loss/{d}"] = float(values["domain_nll"][i] / values["domain_targets"][i])
    return out


class Log:
    """metrics.jsonl and TensorBoard, written by process 0 alone (`write=False` in the others).

    Rows of metrics.jsonl have `step` and `kind`: 'train', 'validation', 'load' (routes per layer and
    expert of one step), 'router' (its other counts and its state), 'routing' (routes of the validation
    batches, by domain), 'receipt'.
    """

    def __init__(self, workdir: pathlib.Path, begin: int, *, write: bool = True):
        """`begin`: the first step that will be written; what an earlier part of the run wrote of it and of
        later ones, and lost with its state, is cut off. Raises folder.SaveError, as all here do, for a full
        disk."""
        self.path, self.board_path = workdir / folder.METRICS, workdir / folder.TENSORBOARD
        self.write_rows = write
        if not write:
            return
        with self._writing(self.path, begin):
            cut(self.path, begin - 1)
            self.file = self.path.open("a")
        with self._writing(self.board_path, begin):
            self.board_path.mkdir(exist_ok=True)
            # Written here and now: SummaryWriter's thread dies of a full disk, and then blocks for ever.
            self.board = EventsWriter(str(self.board_path / "events"), f".{os.getpid()}.{begin}")
            self._event(
                begin, session_log=SessionLog(status=SessionLog.START)
            )  # forget later steps
            self.board.flush()

    def write(self, step: int, kind: str, values: dict) -> None:
        """Scalars: to both."""
        self.append(step, kind, values)
        if self.write_rows:
            with self._writing(self.board_path, step):
                for name, value in values.items():
                    self._event(step, summary=scalar(f"{kind}/{name}", value))
                self.board.flush()

    def append(self, step: int, kind: str, values: dict) -> None:
        """Anything JSON holds: to metrics.jsonl alone."""
        if self.write_rows:
            with self._writing(self.path, step):
                self.file.write(line({"step": step, "kind": kind, **values}))
                self.file.flush()

    def _event(self, step: int, **content) -> None:
        self.board.write_event(Event(wall_time=time.time(), step=step, **content))

    @contextlib.contextmanager
    def _writing(self, path: pathlib.Path, step: int):
        try:
            yield
        except OSError as e:
            raise folder.SaveError(
                f"{path} cannot be written at step {step}: {e.strerror}. Free some space: the "
                "checkpoints are whole, and the same command goes on from the newest"
            ) from e

    def close(self) -> None:
        if self.write_rows:
            for writer in (self.file, self.board):
                with contextlib.suppress(OSError):  # of a disk that is full, which was reported
                    writer.close()


class Meter:
    """Measures tokens per second between readings, without evaluation, saving and compilation."""

    def __init__(self):
        self.tokens, self.started = 0, time.monotonic()
        self.compiling = True
        self.readings: list[float] = []

    def count(self, tokens: int) -> None:
        self.tokens += tokens

    def read(self) -> float:
        """Tokens per second since the last reading or `restart`; call when the device is idle."""
        speed = self.tokens / (time.monotonic() - self.started)
        if not self.compiling:
            self.readings.append(speed)
        self.compiling = False
        self.restart()
        return speed

    def restart(self) -> None:
        self.tokens, self.started = 0, time.monotonic()

    def typical(self) -> float | None:
        """The median reading, without the first one, which includes compilation."""
        return statistics.median(self.readings) if self.readings else None
