"""Runs a small program on what strangers wrote, in a process of its own, with limits on time and memory.

A chat template is a program, and a tokenizer.json can make its library allocate, loop or abort: only limits
on a process hold against that.
"""

import os
import subprocess
import sys

from moejax import limited_start
from moejax.config import ConfigError


def run(program: str, data: bytes, what: str, *, seconds: int, megabytes: int) -> bytes:
    """What the Python file `program` writes when it reads `data`.

    Args:
      what: in errors, what it works on: "the chat template in models/x".
      seconds: of CPU time; twice as many may pass.
      megabytes: of address space.

    Raises:
      ConfigError: it fails (the last line of its stderr says how), crashes, or takes more than it may.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-P", limited_start.__file__, program, str(seconds), str(megabytes)],
            input=data,
            capture_output=True,
            timeout=2 * seconds,
            check=False,
            # One thread, for each reserves address space; no pages of backtrace.
            env={**os.environ, "RAYON_NUM_THREADS": "1", "RUST_BACKTRACE": "0"},
        )
    except subprocess.TimeoutExpired as e:
        raise ConfigError(f"{what} did not end in {2 * seconds} seconds") from e
    if done.returncode < 0:
        raise ConfigError(
            f"{what} took more than {seconds} seconds or {megabytes} MiB, or crashed, and was ended"
        )
    if done.returncode:
        lines = done.stderr[-4000:].decode("utf-8", "replace").strip().splitlines()
        raise ConfigError(f"{what} failed: {lines[-1] if lines else '?'}")
    return done.stdout
