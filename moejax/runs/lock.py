"""One writer per run: a lock in its folder that ends with the process, however it ends."""

import contextlib
import errno
import fcntl
import os
import pathlib
import socket
import time
import warnings

from moejax.config import ConfigError
from moejax.runs import folder

# What a file system without locks says (some network mounts).
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
# A reader that looks whether there is a writer holds the lock for a moment.
_WAIT_SECONDS = 1.0


@contextlib.contextmanager
def writing(workdir: pathlib.Path):
    """Be the one that writes into `workdir`, which is made. ConfigError, naming the other, if there is one.

    Works between hosts where the file system passes locks on (NFS 4, Lustre with -o flock); where it has none,
    a warning says so.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        opened = (workdir / folder.LOCK).open("a+")
    except OSError as e:
        raise ConfigError(f"--workdir={workdir} cannot be written: {e.strerror}") from e
    with opened as file:
        if not _take(file):
            raise ConfigError(f"{workdir} is in use: {_text(file)}. Wait for its end, or stop it")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} writes since {_now()}\n")
        with contextlib.suppress(OSError):  # of a full disk: the text is for people
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                file.truncate(0)


def writer(workdir: pathlib.Path) -> str | None:
    """Who writes into `workdir` now, as text; None if nobody does, or it cannot be known."""
    with contextlib.suppress(OSError), (workdir / folder.LOCK).open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return _text(file)
    return None


def _take(file) -> bool:
    deadline = time.monotonic() + _WAIT_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        except OSError as e:
            if e.errno not in _NO_LOCKS:
                raise
            warnings.warn(
                f"{file.name}: this file system has no locks ({e.strerror}); make sure that no other "
                "process trains in this folder",
                stacklevel=4,
            )
            return True


def _text(file) -> str:
    file.seek(0)
    return file.read(200).strip() or "another process writes"


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")
