"""Keeps compiled programs in the user's cache folder, so that the same command begins at once the next time.

JAX reads the environment when it is imported, which is after this. Its own variables decide if they are set;
MOEJAX_CACHE=off sets none.
"""

import contextlib
import hashlib
import os
import pathlib
import platform

from moejax import user_cache

OFF, DIRECTORY = user_cache.SWITCH, "JAX_COMPILATION_CACHE_DIR"
MOST_BYTES = 4 * 2**30  # JAX itself deletes nothing


def turn_on() -> None:
    """Name the folder to JAX, unless the environment names one, or says 'off'."""
    if DIRECTORY in os.environ or (path := folder()) is None:
        return
    prune(path, MOST_BYTES)
    os.environ[DIRECTORY] = str(path)


def folder() -> pathlib.Path | None:
    """~/.cache/moejax/compiled/KIND, KIND of processor: programs for one may not run on another that shares the
    home folder. None if nothing is to be kept."""
    kind = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        kind += next((line for line in file if line.startswith(("flags", "Features"))), "")
    return user_cache.place(f"compiled/{hashlib.sha256(kind.encode()).hexdigest()[:8]}")


def prune(path: pathlib.Path, most: int) -> None:
    """Delete the oldest files beyond `most` bytes."""
    files = []
    for file in path.iterdir():
        with contextlib.suppress(OSError):  # another process deletes, too
            stat = file.stat()
            files.append((stat.st_mtime, stat.st_size, file))
    for _, size, file in sorted(files, reverse=True):
        most -= size
        if most < 0:
            with contextlib.suppress(OSError):
                file.unlink()
