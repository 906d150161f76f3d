"""Where the numbers of a run come from: one line for the start of each of its parts, one for its end.

A part that was killed has no end. Times are in UTC.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping

import jax

from moejax import cpu_kernels
from moejax.runs import folder
from moejax.runs.metrics import append_line
from moejax.text import Table

PACKAGES = ("moejax", "jax", "jaxlib", "optax", "orbax-checkpoint", "numpy")


def start(workdir: pathlib.Path, step: int, origin: Mapping[str, str]) -> None:
    """Write down that this process trains from `step` on. `origin`: what the run begins from (`base`, and the
    sha256 of its arrays, `base_sha256`), if it does. Raises folder.SaveError."""
    commit, changed = code_version()
    device = jax.devices()[0]
    row = {
        "kind": "start",
        "time": _now(),
        "step": step,
        "command": shlex.join(sys.argv),
        "folder": os.getcwd(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
        "commit": commit,
        "changed": changed,
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "processes": jax.process_count(),
        "cpu_kernels": cpu_kernels.here(),
        **origin,
    }
    append_line(workdir / folder.PROVENANCE, row)


def end(workdir: pathlib.Path, step: int, seconds: float, why: str) -> None:
    """Write down that this part ended. `why`: 'finished', 'stopped', or what went wrong."""
    row = {"kind": "end", "time": _now(), "step": step, "seconds": round(seconds, 3), "why": why}
    append_line(workdir / folder.PROVENANCE, row)


def code_version() -> tuple[str | None, bool | None]:
    """(git's commit of this code, whether files of it were changed since); None where git does not know it."""
    here = pathlib.Path(__file__).parents[1]

    def git(*args: str) -> str:
        command = ["git", "-C", str(here), *args]
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
        return run.stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # else the repository around is another's
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return None, None


def read(workdir: pathlib.Path) -> list[dict]:
    """The lines, oldest first; none of a run of moejax 0.1.0."""
    try:
        text = (workdir / folder.PROVENANCE).read_text("utf-8", "replace")
    except FileNotFoundError:
        return []
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except ValueError:  # cut off by a crash
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def origin(workdir: pathlib.Path) -> str | None:
    """What the run began from, as text; None if that was nothing. The last start counts that saw the base."""
    rows = [row for row in read(workdir) if "base" in row]
    if not rows:
        return None
    return f"{rows[-1]['base']} (sha256 of its weights {str(rows[-1].get('base_sha256'))[:16]})"


def table(workdir: pathlib.Path) -> Table | None:
    """One row for each part of the run, from what it started at to how it ended; None if nothing is known."""
    rows = read(workdir)
    body = []
    for row, after in zip(rows, [*rows[1:], {}]):
        if row.get("kind") != "start":
            continue
        ended = after if after.get("kind") == "end" else {}
        code = str(row.get("commit") or f"moejax {row.get('moejax')}")[:12]
        versions = ", ".join(f"{n} {row.get(n)}" for n in ("jax", "jaxlib", "optax"))
        kernels = " with compiled kernels" if row.get("cpu_kernels") else ""
        devices = f"{row.get('devices')} x {row.get('device')}{kernels}"
        body.append(
            (
                str(row.get("time")),
                f"{row.get('step')} to {ended.get('step', '?')}",
                f"{ended['seconds']:.0f} s" if "seconds" in ended else "unknown",
                str(ended.get("why", "killed or going on")),
                code + (" (changed)" if row.get("changed") else ""),
                versions,
                f"{devices}, {row.get('host')}",
                str(row.get("command")),
            )
        )
    head = ("started (UTC)", "steps", "wall time", "end", "code", "versions", "devices", "command")
    return Table("", head, body) if body else None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
