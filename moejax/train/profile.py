"""A trace of some steps for XProf or Perfetto, and a table of the time that each part of the model takes.

The parts are `jax.named_scope`s in the code. The compiled program says which scope an operation comes from, the
trace how long it took.
"""

import collections
import gzip
import json
import pathlib
import re
from collections.abc import Callable

import jax

from moejax.config import ConfigError
from moejax.runs import folder
from moejax.text import Table, render, seconds_text

SCOPES = ("attention", "ffn", "router", "dispatch", "experts", "shared", "head", "optimiser")
OTHER = "other"
_SCOPE = re.compile(rf"\b({'|'.join(SCOPES)})\b")
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%([^ ]+) = .*? ([a-z][a-z0-9-]*)\(")
_NAME = re.compile(r'op_name="([^"]*)"')
# They last as long as what they contain, which is counted by itself.
_CONTAINERS = ("while", "call", "conditional")


def steps_of(text: str, last: int) -> tuple[int, int]:
    """(first, last) step of 'FIRST:LAST', both included. Raises ConfigError."""
    parts = text.split(":")
    if len(parts) == 2 and all(p.isascii() and p.isdigit() for p in parts):
        begin, end = map(int, parts)
        if 1 <= begin <= end <= last:
            return begin, end
    raise ConfigError(
        f"--profile={text}: write FIRST:LAST, such as 10:13, of steps from 1 to train.steps={last}"
    )


class Profile:
    """Traces the steps `steps` of a run into its folder; `before` and `after` are called around every step."""

    def __init__(
        self, steps: tuple[int, int] | None, workdir: pathlib.Path, say: Callable[[str], None]
    ):
        self.steps, self.path, self.say = steps, workdir / folder.PROFILE, say
        self.program = ""
        self.running = False

    def before(self, step: int, step_fn, state, batch) -> None:
        """`step_fn(state, batch)` comes next."""
        if self.steps is None or step != self.steps[0]:
            return
        self.program = step_fn.lower(state, batch).compile().as_text()
        jax.block_until_ready(state)
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # small: what Python does is not asked
        jax.profiler.start_trace(str(self.path), profiler_options=options)
        self.running = True

    def after(self, step: int, results) -> None:
        """The step has returned `results`."""
        if self.running and self.steps is not None and step == self.steps[1]:
            jax.block_until_ready(results)
            self.stop()
            number = self.steps[1] - self.steps[0] + 1
            self.say(render([time_table(newest_trace(self.path), self.program, number)]))
            self.say(f"the trace is in {self.path}: see docs/runs.md")

    def stop(self) -> None:
        """End a trace that is running."""
        if self.running:
            self.running = False
            jax.profiler.stop_trace()


def newest_trace(path: pathlib.Path) -> pathlib.Path:
    """The file of the last trace in a folder."""
    return max(path.rglob("*.xplane.pb"), key=lambda p: p.stat().st_mtime)


def scopes_of(program: str) -> dict[str, tuple[str, bool]]:
    """Operation -> its scope, and whether it is of the backward pass, from a compiled program's text. Without
    those that contain others."""
    found = {}
    for line in program.splitlines():
        instruction = _INSTRUCTION.match(line)
        if instruction is None or instruction[2] in _CONTAINERS:
            continue
        name = _NAME.search(line)
        path = name[1] if name else ""
        scopes = _SCOPE.findall(path)
        found[instruction[1]] = (scopes[-1] if scopes else OTHER, "transpose(" in path)
    return found


def time_table(trace: pathlib.Path, program: str, steps: int) -> Table:
    """Time by scope. On several threads or devices it is the sum over them, so the shares are what counts."""
    scopes = scopes_of(program)
    module = program.split(",", 1)[0].removeprefix("HloModule ")
    spent: collections.Counter = collections.Counter()
    # What Perfetto opens. The parser of the other file aborts the process with JAX 0.12.
    [file] = trace.parent.glob("*.trace.json.gz")
    for event in json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]:
        stats = event.get("args") or {}
        if stats.get("hlo_module") == module and stats.get("hlo_op") in scopes:
            spent[scopes[stats["hlo_op"]]] += 1000 * event["dur"]
    total = sum(spent.values()) or 1
    rows = []
    for scope in (*SCOPES, OTHER):
        forward, backward = (spent[scope, b] / 1e9 / steps for b in (False, True))
        if forward or backward:
            share = (spent[scope, False] + spent[scope, True]) / total
            rows.append([scope, seconds_text(forward), seconds_text(backward), f"{share:.1%}"])
    rows.sort(key=lambda r: -float(r[-1].rstrip("%")))
    note = (
        "Summed over threads and devices, so that parts at the same time count twice. The head's gradient is "
        "computed with its loss, as forward."
    )
    return Table(
        f"Time by scope, of {steps} steps", ["scope", "forward", "backward", "share"], rows, note
    )
