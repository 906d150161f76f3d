"""Runs jobs of a sweep, each as a process of `moejax train`, one by one or some at a time."""

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
import time

from tqdm import tqdm

from moejax.config import ConfigError
from moejax.runs.metrics import last_logged, read_metrics
from moejax.runs.progress import ABSENT, DIVERGED, FINISHED, OCCUPIED, progress
from moejax.text import plain, seconds_text

COMMAND = (sys.executable, "-m", "moejax", "train", "--noreport")
LOOK_SECONDS = 0.2


@dataclasses.dataclass(frozen=True)
class Job:
    """Attributes:
    name: VARIANT/seed_SEED.
    workdir, log: the folder of the run, and the file that keeps what its process prints.
    flags: of `moejax train`.
    steps: after which the run is finished.
    """

    name: str
    workdir: pathlib.Path
    log: pathlib.Path
    flags: tuple[str, ...]
    steps: int


@dataclasses.dataclass
class Running:
    job: Job
    process: subprocess.Popen
    bar: tqdm
    started: float


def run_jobs(jobs: list[Job], at_once: int) -> int:
    """Run what is missing, `at_once` at a time. Returns the exit status: 0, 2 if a run failed, 130 if stopped.

    Ctrl-C, SIGTERM and SIGHUP stop the runs after their current step, which they save; a second one ends them
    at once.
    """
    waiting, running, failed = list(jobs), {}, False
    with _Stop(running) as stop:
        while running or (waiting and not stop.asked):
            free = [slot for slot in range(at_once) if slot not in running]
            if waiting and free and not stop.asked:
                job = waiting.pop(0)
                if _wanted(job):
                    running[free[0]] = _start(job, free[0], at_once)
                continue
            time.sleep(LOOK_SECONDS)
            for slot, one in list(running.items()):
                one.bar.update(min(last_logged(one.job.workdir), one.job.steps) - one.bar.n)
                if one.process.poll() is not None:
                    del running[slot]
                    one.bar.close()
                    failed |= not _ended(one, stop.asked)
    if stop.asked:
        _say(f"stopped; {len(waiting)} runs were not begun. The same command goes on")
        return 130
    return 2 if failed else 0


class _Stop:
    """Hands signals on to the processes that are running."""

    def __init__(self, running: dict[int, Running]):
        self.running, self.asked = running, False

    def __enter__(self):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        self.before = {n: signal.signal(n, self._handle) for n in numbers}
        return self

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        del number, frame
        self.asked = True
        for one in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                one.process.send_signal(signal.SIGTERM)


def _wanted(job: Job) -> bool:
    """Whether a run is to be begun or gone on with; says why not."""
    at = progress(job.workdir, job.steps)
    match at.state:
        case "finished":
            _say(f"{job.name}: finished already, {_result(job)}")
        case "diverged":
            _say(f"{job.name}: diverged at step {at.step}; remove {job.workdir} to try it again")
        case "occupied":
            _say(f"{job.name}: left alone, {at.text}")
        case state:
            begins = (
                "starts" if state == ABSENT else f"goes on from step {at.step} or a little before"
            )
            _say(f"{job.name}: {begins}")
            return True
    return False


def _start(job: Job, slot: int, at_once: int) -> Running:
    job.log.parent.mkdir(parents=True, exist_ok=True)
    env = dict(os.environ)
    if at_once > 1:  # else the first takes most of an accelerator's memory
        env.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / at_once:.2f}")
    with job.log.open("ab") as log, _some_cores(slot, at_once):
        process = subprocess.Popen(
            [*COMMAND, *job.flags],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=env,
            start_new_session=True,  # Ctrl-C is handed on, once
        )
    bar = tqdm(
        total=job.steps, desc=job.name, unit="step", leave=False, position=slot, disable=None
    )
    return Running(job, process, bar, time.monotonic())


@contextlib.contextmanager
def _some_cores(slot: int, at_once: int):
    """Processes that begin inside have their share of the cores, so that runs side by side are equally fast."""
    every = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    if at_once == 1 or len(every) < at_once:
        yield
        return
    os.sched_setaffinity(0, every[slot::at_once])
    try:
        yield
    finally:
        os.sched_setaffinity(0, every)


def _ended(one: Running, asked: bool) -> bool:
    """Say how a run ended; False if it failed."""
    job, at = one.job, progress(one.job.workdir, one.job.steps)
    took = seconds_text(time.monotonic() - one.started)
    if at.state == FINISHED:
        _say(f"{job.name}: finished in {took}, {_result(job)}")
    elif at.state == DIVERGED:
        _say(f"{job.name}: diverged at step {at.step}; its log is {job.log}")
    elif at.state == OCCUPIED:
        _say(f"{job.name}: left alone, {at.text}")
    elif asked:
        _say(f"{job.name}: stopped at step {at.step}")
    else:
        _say(
            f"{job.name}: failed with status {one.process.returncode}: {_last_line(job)} ({job.log})"
        )
        return False
    return True


def _result(job: Job) -> str:
    try:
        row = list(read_metrics(job.workdir)["validation"].values())[-1]
    except ConfigError as e:
        return str(e)
    return f"validation loss {row.get('loss', float('nan')):.4f}"


def _last_line(job: Job) -> str:
    lines = job.log.read_text("utf-8", "replace")[-4000:].strip().splitlines()
    return plain(lines[-1])[:300] if lines else "it printed nothing"


def _say(text: str) -> None:
    tqdm.write(text)
    sys.stdout.flush()
