"""Finds files by a pattern, decompresses them and cuts them into lines, always as a stream.

Nothing here holds more of a file than one line, and no line is longer than `MOST_RECORD_BYTES`.
"""

import bz2
import codecs
import glob
import gzip
import lzma
import os
import re
import zlib
from collections.abc import Iterator

import pyarrow as pa

from moejax.config import ConfigError

CHUNK = 1 << 20
# A longer record is a mistake (a file without line ends), or would not fit in memory when parsed.
MOST_RECORD_BYTES = 32 << 20
# By suffix. The content decides first.
COMPRESSIONS = {
    ".gz": "gzip", ".zst": "zstd", ".zstd": "zstd", ".bz2": "bz2", ".xz": "xz", ".lzma": "xz",
}  # fmt: skip
_MAGIC = re.compile(
    rb"(?P<gzip>\x1f\x8b)|(?P<zstd>\x28\xb5\x2f\xfd)|(?P<xz>\xfd7zXZ\x00)"
    rb"|(?P<bz2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))"
)
_LFS_POINTER = b"version https://git-lfs.github.com/spec/"


class DataError(ConfigError):
    """Data that cannot be used. The message names the source, file or record, and what would help."""


def find(pattern: str) -> list[str]:
    """The files that a glob matches (** for subfolders), sorted, each once by its real path.

    Raises DataError if no file matches, if a link is broken, or if a folder cannot be listed.
    """
    by_real_path: dict[str, str] = {}
    for file in sorted(_matches(os.path.expanduser(pattern))):
        if os.path.isfile(file):
            by_real_path.setdefault(os.path.realpath(file), file)
        elif os.path.islink(file) and not os.path.exists(file):
            raise DataError(
                f"{file}: a broken link (to {os.readlink(file)!r}); fetch that file, or remove the link"
            )
    if not by_real_path:
        raise DataError(f"data.sources: no file matches {pattern!r} (from {os.getcwd()})")
    return sorted(by_real_path.values())


def _matches(pattern: str) -> Iterator[str]:
    """Like glob.glob(recursive=True), but enters each folder once even if links lead back to it."""
    parts = re.split(r"(?:^|(?<=/))(?:\*\*/)*\*\*(?:/|$)", pattern, maxsplit=1)
    if len(parts) == 1:
        yield from glob.iglob(pattern)
        return
    head, tail = parts
    for root in sorted(glob.iglob(head)) if head else [""]:
        for folder in _folders(root, set()):
            yield from _matches(os.path.join(glob.escape(folder), tail or "*"))


def _folders(folder: str, seen: set[str]) -> Iterator[str]:
    """A folder and all folders below it, without hidden ones (like glob). Links come last."""
    real = os.path.realpath(folder)
    if real in seen or not os.path.isdir(folder or "."):
        return
    seen.add(real)
    yield folder
    try:
        with os.scandir(folder or ".") as entries:
            inner = [e for e in entries if not e.name.startswith(".") and e.is_dir()]
    except OSError as e:
        raise DataError(f"{folder}: cannot be listed ({e.strerror or e})") from e
    for entry in sorted(inner, key=lambda e: (e.is_symlink(), e.name)):
        yield from _folders(os.path.join(folder, entry.name), seen)


def inner_suffix(file: str) -> str:
    """The suffix that says what is in a file: '.jsonl' of 'x.JSONL.gz'; '' if there is none."""
    stem, suffix = os.path.splitext(os.path.basename(file).lower())
    return os.path.splitext(stem)[1] if suffix in COMPRESSIONS else suffix


def chunks(file: str, most: int = 0) -> Iterator[bytes]:
    """The bytes of a file, decompressed, without a byte-order mark; every chunk but the last is full.

    The content decides how it is decompressed. It is an error if a file with a suffix of `COMPRESSIONS` is not
    compressed, or if it holds more than `most` bytes (0: no limit).
    """
    try:
        with _open(file) as f:
            first, total = True, 0
            while chunk := f.read(CHUNK):
                total += len(chunk)
                if most and total > most:
                    raise DataError(
                        f"{file}: {most:,} bytes hold less text than data.max_bytes; leave the file out, "
                        "or increase data.max_bytes"
                    )
                if first and chunk.startswith(_LFS_POINTER):
                    raise DataError(
                        f"{file}: this is a Git LFS pointer, not the file; run git lfs pull"
                    )
                yield chunk.removeprefix(b"\xef\xbb\xbf") if first else chunk
                first = False
    except (zlib.error, EOFError, lzma.LZMAError, pa.ArrowException) as e:
        raise _broken(file, e) from e
    except OSError as e:  # gzip, bz2 and Arrow report broken data without an errno
        if e.errno is None:
            raise _broken(file, e) from e
        raise DataError(f"{file}: cannot be read ({e.strerror or e})") from e


def _broken(file: str, e: Exception) -> DataError:
    return DataError(f"{file}: broken compressed file ({e}); fetch or compress it again")


def _open(file: str):
    """Open a file as decompressed bytes. read(n) returns n bytes (fewer only at the end)."""
    with open(file, "rb") as f:
        head = f.read(10)
    sniffed = _MAGIC.match(head)
    kind = sniffed.lastgroup if sniffed else COMPRESSIONS.get(os.path.splitext(file.lower())[1])
    if kind and not head:
        raise EOFError("the file is empty")
    match kind:
        case "gzip":
            return gzip.open(file, "rb")
        case "bz2":
            return bz2.open(file, "rb")
        case "xz":
            return lzma.open(file, "rb")
        case "zstd":
            return pa.CompressedInputStream(pa.OSFile(file), "zstd")
    return open(file, "rb")


def lines(file: str, most: int = 0) -> Iterator[tuple[int, int, bytes | None]]:
    """(number from 1, byte offset, content) of each line that is not blank; '\\n' alone ends one.

    The content of a line longer than `MOST_RECORD_BYTES` is None. `most` is as for `chunks`.
    """
    number, offset, parts, size = 1, 0, [], 0
    for chunk in chunks(file, most):
        if not size and chunk[-1:] == b"\n" and not chunk.strip(b" \t\r\n"):  # a megabyte of them
            number, offset = number + chunk.count(b"\n"), offset + len(chunk)
            continue
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            if size <= MOST_RECORD_BYTES:  # else it has been reported
                yield from _line(number, offset, [*parts, end], size + len(end))
            number, offset, parts, size = number + 1, offset + size + len(end) + 1, [], 0
        if size <= MOST_RECORD_BYTES < size + len(rest):  # at once, not after a search for its end
            yield number, offset, None
        size += len(rest)
        parts = [*parts, rest] if 0 < size <= MOST_RECORD_BYTES else []
    if size <= MOST_RECORD_BYTES:
        yield from _line(number, offset, parts, size)


def _line(number, offset, parts, size) -> Iterator[tuple[int, int, bytes | None]]:
    if size > MOST_RECORD_BYTES:
        yield number, offset, None
    elif (line := b"".join(parts)).strip(b" \t\r"):
        yield number, offset, line


def decode(data: bytes, where: str, offset: int = 0, *, whole: bool = True) -> str:
    """UTF-8 bytes as text; `offset` is where they begin in the file. Raises DataError.

    If not `whole`, the bytes may end in the middle of a character, which is then dropped.
    """
    try:
        return codecs.utf_8_decode(data, "strict", whole)[0]
    except UnicodeDecodeError as e:
        wide = not offset and data[:2] in (b"\xff\xfe", b"\xfe\xff")
        raise DataError(
            f"{where}: not UTF-8 at byte offset {offset + e.start} (byte 0x{data[e.start]:02x}"
            f"{', the start of UTF-16' if wide else ''}); convert it to UTF-8, or leave it out"
        ) from e
