"""Writes the metrics of a run to its folder, and measures how fast it goes."""

import contextlib
import json
import pathlib
import statistics
import time

import numpy as np
from tensorboardX import SummaryWriter

from moejax.runs import folder


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

    def __init__(self, workdir: pathlib.Path, *, write: bool = True):
        self.path = workdir / folder.METRICS
        self.file = _open_at_line(self.path) if write else None
        self.board = SummaryWriter(str(workdir / folder.TENSORBOARD)) if write else None

    def write(self, step: int, kind: str, values: dict) -> None:
        """Write scalars to both."""
        # First the file, which reports a failed write; TensorBoard's thread would not.
        self.append(step, kind, values)
        if self.board is not None:
            for name, value in values.items():
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def append(self, step: int, kind: str, values: dict) -> None:
        """Write any JSON values to metrics.jsonl only. Raises folder.SaveError if the disk is full."""
        if self.file is None:
            return
        try:
            self.file.write(json.dumps({"step": step, "kind": kind, **values}) + "\n")
            self.file.flush()
        except OSError as e:
            raise folder.SaveError(
                f"{self.path} cannot be written at step {step}: {e.strerror}. Free some space: the "
                "checkpoints are intact, and the same command continues from the newest"
            ) from e

    def close(self) -> None:
        for writer in (self.file, self.board):
            with contextlib.suppress(OSError):  # the disk is full, and append has said so
                if writer is not None:
                    writer.close()


def _open_at_line(path: pathlib.Path):
    """Open a file to append. Ends a last line that a crash cut off, so that rows stay on their own lines."""
    file = path.open("ab+")
    file.seek(max(file.seek(0, 2) - 1, 0))
    if file.read() not in (b"", b"\n"):
        file.write(b"\n")
    file.close()
    return path.open("a")


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
