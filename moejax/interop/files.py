"""The folder of a checkpoint as untrusted input: only regular files inside it, and JSON of sane size."""

import contextlib
import json
import os
import pathlib
import shutil
import stat
from collections.abc import Iterator
from typing import Any

from moejax.config import ConfigError

# The largest published index (94,000 tensors) is 9 MB; the largest tokenizer.json about 30 MB.
MAX_JSON_BYTES = 200_000_000


class InteropError(ConfigError):
    """A checkpoint that cannot be read or written; names the file or tensor and what would work."""


def checked_file(folder: pathlib.Path, name: str) -> pathlib.Path:
    """The path of a file that lies in the folder; InteropError if it is anywhere else.

    Links may point within the folder, or from `snapshots/REVISION` of the Hugging Face cache into the
    `blobs` beside `snapshots`, which is how that cache is laid out.
    """
    if pathlib.PurePath(name).name != name or name in ("", ".", "..") or "\\" in name:
        raise InteropError(f"{folder}: {name!r} is not the name of a file in this folder")
    home = folder.resolve()
    homes = [home, home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [home]
    try:
        real = (home / name).resolve(strict=True)
    except (OSError, RuntimeError) as e:  # RuntimeError: a loop of links
        raise InteropError(f"{folder}: missing file {name}") from e
    if not any(real.is_relative_to(h) for h in homes):
        raise InteropError(
            f"{folder / name} is a link to {real}, outside the folder; copy the file"
        )
    if not stat.S_ISREG(real.stat().st_mode):
        raise InteropError(f"{folder / name} is not a regular file")
    return real


def read_bytes(folder: pathlib.Path, name: str, most: int = MAX_JSON_BYTES) -> bytes:
    path = checked_file(folder, name)
    size = path.stat().st_size
    if size > most:
        raise InteropError(f"{path}: {size:,} bytes; at most {most:,} are read")
    return path.read_bytes()


def parse_json(data: bytes, what: str) -> dict:
    """A JSON object without repeated keys."""

    def unique(pairs):
        out = dict(pairs)
        if len(out) < len(pairs):
            keys = [k for k, _ in pairs]
            twice = next(k for k in keys if keys.count(k) > 1)
            raise InteropError(f"{what}: the key {twice!r} occurs twice")
        return out

    try:
        value = json.loads(data, object_pairs_hook=unique)
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
    to be made), and by the next call for the same path if the process was killed.
    """
    path = path.absolute()
    partial = path.with_name(f".{path.name}.moejax-partial")
    new_parents: list[pathlib.Path] = []
    try:
        if os.path.lexists(path) and not (path.is_dir() and not any(path.iterdir())):
            raise InteropError(f"{path} exists already and is not an empty folder; choose another")
        new_parents = [p for p in path.parents if not p.exists()]
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        os.rename(partial, path)  # replaces an empty folder, never a full one
    except BaseException as e:
        shutil.rmtree(partial, ignore_errors=True)
        for parent in new_parents:
            with contextlib.suppress(OSError):
                parent.rmdir()
        if isinstance(e, OSError):  # no space, no permission
            raise InteropError(
                f"{path} could not be written, and nothing is left of it: {e}"
            ) from e
        raise


def need_space(folder: pathlib.Path, size: int) -> None:
    """InteropError if the disk of `folder` has not `size` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise InteropError(f"{folder}: {size:,} bytes are needed, {free:,} are free")
