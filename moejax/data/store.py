"""Raw arrays on disk, made once: `prepare` fills a folder, or finds it whole, and gives its arrays.

    CACHE/KEY/NAME.bin     the numbers of an array, one after another, little-endian
    CACHE/KEY/index.json   what the folder was made of, dtype and length of every array, the crc32 of each block
    CACHE/KEY.lock         held while the folder is being made
    CACHE/KEY.HOST.*.tmp/  a folder that is being made

KEY is a hash, so no path leads out of CACHE. A folder gets its name when it is whole. Arrays are read by
position (`pread`), not mapped: a mapping that somebody cuts short kills the process, and its pages count as the
process's memory. Every block is checked when it is first read, so that a start need not read everything, and
no damaged number is used.
"""

import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pathlib
import shutil
import socket
import sys
import tempfile
import time
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping

import numpy as np

from moejax.data.files import DataError

FORMAT = 1
BLOCK = 1 << 17  # bytes
INDEX = "index.json"
UNUSED_DAYS = 30  # then a folder is deleted when another is made
_DTYPES = ("|u1", "<u2", "<i4", "<u4", "<i8")


class StoredArray:
    """A one-dimensional array on disk; `a[i:j]` reads numbers into memory.

    Raises DataError, and makes the next start prepare it again, if a block is not what was written.
    """

    def __init__(self, path: pathlib.Path, dtype: np.dtype, size: int, sums: list[int]):
        self._path, self.dtype, self._size, self._sums = path, dtype, size, sums
        self._file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        weakref.finalize(self, os.close, self._file)
        self._good = np.zeros(len(sums), bool)
        whole = len(sums) == -(-self.nbytes // BLOCK)
        if not whole or os.fstat(self._file).st_size != self.nbytes:
            raise OSError(errno.EIO, "has another length", str(path))

    def __len__(self) -> int:
        return self._size

    @property
    def nbytes(self) -> int:
        return self._size * self.dtype.itemsize

    def __getitem__(self, at: slice) -> np.ndarray:
        begin, end, _ = at.indices(self._size)
        begin, end = begin * self.dtype.itemsize, max(begin, end) * self.dtype.itemsize
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            if not self._good[block]:
                self._check(block)
        return np.frombuffer(self._read(begin, end), self.dtype)

    def _read(self, begin: int, end: int) -> bytes:
        parts = []
        while begin < end:  # one call reads at most 2 GiB
            try:
                part = os.pread(self._file, end - begin, begin)
            except OSError as e:
                raise self._damaged(e.strerror) from e
            if not part:
                raise self._damaged("it has become shorter")
            parts.append(part)
            begin += len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _check(self, block: int) -> None:
        begin = block * BLOCK
        if zlib.crc32(self._read(begin, min(begin + BLOCK, self.nbytes))) != self._sums[block]:
            raise self._damaged("its checksum is wrong")
        self._good[block] = True

    def _damaged(self, why: str | None) -> DataError:
        with contextlib.suppress(OSError):
            self._path.with_name(INDEX).unlink()
        return DataError(
            f"{self._path}: the prepared text is damaged ({why}); the same command prepares it again"
        )


@dataclasses.dataclass(frozen=True)
class Stored:
    """A prepared folder. `made`: seconds since the epoch; `found`: it was there before."""

    arrays: Mapping[str, StoredArray]
    meta: dict
    made: float
    found: bool


class Writer:
    """Adds to the arrays of a folder, each by its name."""

    def __init__(self, folder: pathlib.Path):
        self._folder, self._files, self._about, self._tails = folder, {}, {}, {}

    def add(self, name: str, dtype: str, numbers) -> None:
        """Append numbers (or, to '|u1', bytes) to the array `name`, which this begins if need be."""
        if name not in self._files:
            self._files[name] = (self._folder / f"{name}.bin").open("wb", BLOCK)
            self._about[name] = {"dtype": dtype, "size": 0, "crc32": []}
            self._tails[name] = (0, 0)  # bytes and checksum of the block that is not yet full
        data = memoryview(
            numbers if isinstance(numbers, bytes) else np.asarray(numbers, dtype).tobytes()
        )
        about, (used, crc) = self._about[name], self._tails[name]
        about["size"] += len(data) // np.dtype(dtype).itemsize
        self._files[name].write(data)
        while used + len(data) >= BLOCK:
            about["crc32"].append(zlib.crc32(data[: BLOCK - used], crc))
            data, used, crc = data[BLOCK - used :], 0, 0
        self._tails[name] = (used + len(data), zlib.crc32(data, crc))

    def finish(self, index: dict) -> None:
        for name, file in self._files.items():
            file.close()
            if self._tails[name][0]:
                self._about[name]["crc32"].append(self._tails[name][1])
        body = json.dumps({**index, "arrays": self._about})
        # The checksum of the line stands on the line after it.
        (self._folder / INDEX).write_text(f"{body}\n{zlib.crc32(body.encode())}\n", "utf-8")

    def close(self) -> None:
        """Close what is still open. A full disk is no news here."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()


def prepare(
    cache: pathlib.Path, source: dict | None, fill: Callable[[Writer], dict], what: str
) -> Stored:
    """The arrays that `fill` makes of `source`, from the folder of an earlier call if there is one.

    Args:
      cache: the folder of all such folders.
      source: everything that the arrays depend on, as JSON. None: nothing can say it. They are then made anew
        in a folder that has no name, and end with the process.
      fill: writes the arrays and returns `meta`, as JSON.
      what: what is prepared, for messages.

    Of several processes that call this at once, one prepares and the others wait for it.

    Raises DataError if the disk is full or fails; what `fill` raises goes through. No half a folder is left.
    """
    named = {"format": FORMAT, "source": source}
    key = hashlib.sha256(
        os.urandom(16) if source is None else json.dumps(named, sort_keys=True).encode()
    ).hexdigest()[:40]
    target = cache / key
    try:
        if source is not None and (found := _open(target, named, found=True)):
            return found
        with _locked(cache, key, what) as held:
            if source is not None and (found := _open(target, named, found=True)):
                return found
            _clean(cache, key, held)
            made = _make(target, named, fill)
        if source is None:
            shutil.rmtree(target)  # open files stay
            (cache / f"{key}.lock").unlink()
        return made
    except OSError as e:
        full = e.errno in (errno.ENOSPC, errno.EDQUOT)
        advice = (
            "make room, or name a folder on a larger disk by XDG_CACHE_HOME"
            if full
            else "name another folder by XDG_CACHE_HOME"
        )
        raise DataError(
            f"{cache}: {what} cannot be prepared there ({e.strerror or e}); {advice}. MOEJAX_CACHE=off "
            "holds it in memory"
        ) from e


def _make(target: pathlib.Path, named: dict, fill: Callable[[Writer], dict]) -> Stored:
    part = pathlib.Path(tempfile.mkdtemp(".tmp", f"{target.name}.{_host()}.", target.parent))
    writer = Writer(part)
    try:
        meta = fill(writer)
        writer.finish({**named, "meta": meta, "made": time.time()})
        if (first := _open(target, named, found=False)) is not None:  # without locks another's
            return first
        if target.is_symlink() or target.is_file():
            target.unlink()
        elif target.exists():  # damaged, or of nobody
            shutil.rmtree(target)
        try:
            part.rename(target)
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # another was first, at this moment
                raise
    finally:
        writer.close()
        shutil.rmtree(part, ignore_errors=True)
    made = _open(target, named, found=False)
    if made is None:
        raise OSError(errno.EIO, "what was written cannot be read")
    return made


def _open(folder: pathlib.Path, named: dict, *, found: bool) -> Stored | None:
    """The arrays of a whole folder; None if it is not there, not whole, or made of something else."""
    path = folder / INDEX
    try:
        if folder.is_symlink():
            return None
        body, crc, end = path.read_text("utf-8").split("\n")
        if end or crc != str(zlib.crc32(body.encode())):
            return None
        index = json.loads(body)
        if {k: index[k] for k in named} != named or not all(map(str.isidentifier, index["arrays"])):
            return None
        arrays = {
            name: StoredArray(folder / f"{name}.bin", _dtype(a["dtype"]), a["size"], a["crc32"])
            for name, a in index["arrays"].items()
        }
        with contextlib.suppress(OSError):
            os.utime(path)  # it was used
        return Stored(arrays, index["meta"], index["made"], found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        if isinstance(e, OSError) and e.errno in (errno.EMFILE, errno.ENFILE):
            raise DataError(
                f"{folder}: too many open files; ten for each domain are needed (ulimit -n 4096)"
            ) from e
        return None


def _dtype(name: str) -> np.dtype:
    if name not in _DTYPES:
        raise ValueError(name)
    return np.dtype(name)


def _host() -> str:
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


@contextlib.contextmanager
def _locked(cache: pathlib.Path, key: str, wait_for: str = "") -> Iterator[bool]:
    """Hold the lock of a key; gives whether it is held. Waits if it is said for what. Where the file system has
    no locks, nobody waits."""
    with (cache / f"{key}.lock").open("a") as file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait_for:
                    raise
                print(f"waiting for another process that prepares {wait_for}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _clean(cache: pathlib.Path, mine: str, held: bool) -> None:
    """Delete what killed processes began, and what was not used for a month. `held`: whether this process
    holds the lock of its own key."""
    for part in cache.glob(f"*.{_host()}.*.tmp"):  # hosts may not see each other's locks
        owner = part.name.split(".")[0]
        own = contextlib.nullcontext(held) if owner == mine else _locked(cache, owner)
        with own as dead:
            if dead:
                shutil.rmtree(part, ignore_errors=True)
    oldest = time.time() - UNUSED_DAYS * 86400
    for path in cache.iterdir():
        with contextlib.suppress(OSError):
            index = path / INDEX
            if (index if index.exists() else path).stat().st_mtime > oldest:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink()
