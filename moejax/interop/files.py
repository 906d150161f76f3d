"""The folder of a checkpoint as untrusted input: only regular files inside it, and JSON of sane size."""

import collections
import contextlib
import fcntl
import json
import os
import pathlib
import re
import shutil
import stat
from collections.abc import Iterator
from typing import Any

from moejax.config import ConfigError
from moejax.text import MOST_SHOWN, cut, shown

# The largest published index (94,000 tensors) is 9 MB; the largest tokenizer.json about 30 MB.
MAX_JSON_BYTES = 200_000_000
# A value takes up to a hundred bytes of memory, and may take three in the file. The largest published
# tokenizer.json has 2 million.
MAX_JSON_VALUES = 5_000_000
MAX_DIGITS = 64  # of a whole number; a 31-digit one stands for "no limit" in published files


class InteropError(ConfigError):
    """A checkpoint that cannot be read or written; names the file or tensor and what would work."""


def checked_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file that lies in the folder; InteropError if it is anywhere else.

    Links may point within the folder, or from `snapshots/REVISION` of the Hugging Face cache into the
    `blobs` beside `snapshots`, which is how that cache is laid out.
    """
    if pathlib.PurePath(name).name != name or name in ("", ".", "..") or set(name) & {"\\", "\0"}:
        raise InteropError(f"{folder}: {shown(name)} is not the name of a file in this folder")
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        real = (home / name).resolve(strict=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: a loop of links
        raise InteropError(f"{folder}: missing file {cut(name, MOST_SHOWN)}") from e
    if not any(real.is_relative_to(h) for h in homes):
        raise InteropError(
            f"{folder / name} is a link to {real}, outside the folder; copy the file"
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise InteropError(f"{folder / name} is not a regular file")
    return real


def read_bytes(folder: pathlib.Path, name: str, most: int = MAX_JSON_BYTES) -> bytes:
    """The content of a file of the folder; InteropError if it has more than `most` bytes."""
    path = checked_file(folder, name)
    try:
        with path.open("rb") as f:
            data = f.read(most + 1)
    except OSError as e:
        raise InteropError(f"{path} cannot be read: {e.strerror}") from e
    if len(data) > most:
        raise InteropError(f"{path}: {path.stat().st_size:,} bytes; at most {most:,} are read")
    return data


def read_text(folder: pathlib.Path, name: str, most: int = MAX_JSON_BYTES) -> str:
    """`read_bytes` as text."""
    try:
        return read_bytes(folder, name, most).decode("utf-8")
    except UnicodeDecodeError as e:
        raise InteropError(f"{folder / name} is not text in UTF-8 ({e})") from e


def parse_json(data: bytes, what: str) -> dict:
    """A JSON object in UTF-8, without repeated keys, absurd numbers, or strings that are no Unicode."""

    def unique(pairs):
        out = dict(pairs)
        if len(out) < len(pairs):
            counts = collections.Counter(k for k, _ in pairs)
            twice = next(k for k, n in counts.items() if n > 1)
            raise InteropError(f"{what}: the key {shown(twice)} occurs twice")
        return out

    def whole(digits):
        if len(digits) > MAX_DIGITS:
            raise InteropError(f"{what}: a number of {len(digits):,} digits")
        return int(digits)

    if sum(data.count(c) for c in (b",", b"[", b"{")) > MAX_JSON_VALUES:
        raise InteropError(f"{what}: more than {MAX_JSON_VALUES:,} values")
    try:
        text = data.decode("utf-8-sig")
        value = json.loads(text, object_pairs_hook=unique, parse_int=whole)
        if re.search(r"\\u[dD][89a-fA-F]", text):  # half of a pair, unless the other follows
            json.dumps(value, ensure_ascii=False).encode()
    except InteropError:
        raise
    except (ValueError, RecursionError) as e:
        raise InteropError(f"{what}: not valid JSON ({e})") from e
    if not isinstance(value, dict):
        raise InteropError(f"{what}: expected a JSON object, found {type(value).__name__}")
    return value


def read_json(folder: pathlib.Path, name: str, most: int = MAX_JSON_BYTES) -> Any:
    return parse_json(read_bytes(folder, name, most), str(folder / name))


def exists(folder: pathlib.Path, name: str) -> bool:
    return os.path.lexists(folder / name)


@contextlib.contextmanager
def whole_folder(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new folder that appears at `path` whole, when the block ends, or not at all.

    Yields a folder beside it to write into; it is removed if the block raises (and so are parents that had
    to be made), and by the next call for the same path if the process was killed. It is locked: two processes
    cannot write one path.
    """
    path = path.absolute()
    partial = path.with_name(f".{path.name}.moejax-partial")
    new_parents: list[pathlib.Path] = []
    lock = None
    try:
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise InteropError(f"{path} exists already and is not an empty folder; choose another")
        new_parents = [p for p in path.parents if not p.exists()]
        partial.mkdir(parents=True, exist_ok=True)
        lock = _locked(partial)
        for left in partial.iterdir():  # by a process that was killed
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        yield partial
        os.rename(partial, path)  # replaces an empty folder, never a full one
    except BaseException as e:
        if lock is not None:
            shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(e, OSError):  # no space, no permission
            raise InteropError(
                f"{path} could not be written, and nothing is left of it: {e}"
            ) from e
        raise
    finally:
        if lock is not None:
            os.close(lock)


def _locked(folder: pathlib.Path) -> int:
    """A descriptor of the folder that holds its lock until it is closed, or the process ends."""
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # Another process may have finished, and moved it to its place, before the lock was free.
        if os.path.samestat(os.fstat(lock), os.stat(folder)):
            return lock
    except (BlockingIOError, FileNotFoundError):
        pass
    os.close(lock)
    raise InteropError(f"another process is writing {folder}; wait for it")


def need_space(folder: pathlib.Path, size: int) -> None:
    """InteropError if the disk of `folder` has not `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InteropError(f"{folder}: {size:,} bytes are needed, {free:,} are free")
