"""How far a run is, from its folder alone."""

import pathlib
from typing import NamedTuple

from moejax.runs import folder, lock, provenance
from moejax.runs.metrics import last_logged

ABSENT, PART, OCCUPIED, FINISHED, DIVERGED = "absent", "part", "occupied", "finished", "diverged"


class Progress(NamedTuple):
    """Attributes:
    state: 'absent' (no run is there), 'part' (begun, nobody goes on), 'occupied' (a process trains in it),
      'finished', 'diverged'.
    step: the last step in its log.
    text: of an occupied run, by whom.
    """

    state: str
    step: int
    text: str = ""


def progress(workdir: pathlib.Path, steps: int) -> Progress:
    """How far the run in `workdir` is, of `steps`."""
    if not (workdir / folder.CONFIG).is_file():
        return Progress(ABSENT, 0)
    step = last_logged(workdir)
    other = lock.writer(workdir)
    if other is not None:
        return Progress(OCCUPIED, step, other)
    rows = provenance.read(workdir)
    if not rows:  # of moejax 0.1.0
        return Progress(FINISHED if step >= steps else PART, step)
    why, end = rows[-1].get("why"), rows[-1].get("step")
    if why == "Diverged":
        return Progress(DIVERGED, step)
    done = why == "finished" and isinstance(end, int) and end >= steps
    return Progress(FINISHED if done else PART, step)
