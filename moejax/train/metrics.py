"""Writes the metrics of a run to its folder, and measures how fast it goes."""

import contextlib
import pathlib
import statistics
import time
from collections.abc import Sequence

import numpy as np

from moejax.config import ExperimentConfig
from moejax.runs import folder
from moejax.runs.metrics import cut, line
from moejax.train.writers import Guarded, OpenWriter, TensorBoard


def scalars(values: dict, domains) -> dict:
    """The scalar metrics of a step as floats, including the loss of each domain."""
    out = {k: float(v) for k, v in values.items() if np.ndim(v) == 0}
    for i, d in enumerate(domains):
        if values["domain_targets"][i]:
            out[f"loss/{d}"] = float(values["domain_nll"][i] / values["domain_targets"][i])
    return out


class Log:
    """metrics.jsonl, TensorBoard and other writers, written by process 0 alone (`write=False` in the others).

    Rows of metrics.jsonl have `step` and `kind`: 'train', 'validation', 'load' (routes per layer and
    expert of one step), 'router' (its other counts and its state), 'routing' (of the validation batches:
    routes by domain, logits by size), 'receipt'.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        begin: int,
        cfg: ExperimentConfig | None = None,
        writers: Sequence[OpenWriter] = (),
        *,
        write: bool = True,
    ):
        """`begin`: the first step that will be written; what an earlier part of the run wrote of it and of
        later ones, and lost with its state, is cut off. `cfg`: for writers that show it. Raises
        folder.SaveError, as all here do, for a full disk."""
        self.path, self.board_path = workdir / folder.METRICS, workdir / folder.TENSORBOARD
        self.write_rows = write
        if not write:
            return
        with self._writing(self.path, begin):
            cut(self.path, begin - 1)
            self.file = self.path.open("a")
        with self._writing(self.board_path, begin):
            self.board = TensorBoard(workdir, cfg, begin)
        self.others = [Guarded(w, workdir, cfg, begin) for w in writers]

    def write(self, step: int, kind: str, values: dict) -> None:
        """A row: anything JSON holds."""
        if not self.write_rows:
            return
        with self._writing(self.path, step):
            self.file.write(line({"step": step, "kind": kind, **values}))
            self.file.flush()
        with self._writing(self.board_path, step):
            self.board.write(step, kind, values)
        for writer in self.others:
            writer.write(step, kind, values)

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
            with contextlib.suppress(OSError):  # of a disk that is full, which was reported
                self.file.close()
            for writer in (self.board, *self.others):
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
