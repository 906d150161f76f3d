"""The documents of a domain: a tuple in memory, or a prepared folder that is read piece by piece."""

import hashlib
import pathlib
import warnings
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
from tqdm import tqdm

from moejax.data import store
from moejax.data.sources import DataError, Document

Documents = Sequence[Document]
# Written to the disk at once: documents of about this many bytes.
_PIECE = 1 << 20


class Skipped:
    """Counts the bad records of a domain, and keeps what the first one said."""

    def __init__(self):
        self.count, self.first = 0, ""

    def add(self, error: DataError) -> None:
        self.first = self.first or str(error)
        self.count += 1

    def warn(self, domain: str) -> None:
        if self.count:
            warnings.warn(
                f"data.sources: {self.count} bad records of domain {domain!r} were skipped "
                f"(data.skip_bad_records); the first: {self.first}",
                stacklevel=3,
            )


class StoredTexts(Sequence[Document]):
    """Documents on disk, in UTF-8; `numbers` says which of the folder, in which order (None: all)."""

    def __init__(self, stored: store.Stored, ends: np.ndarray, numbers: np.ndarray | None = None):
        self._stored, self._ends = stored, ends
        self._numbers = np.arange(len(ends)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, i: int) -> Document:  # pyright: ignore[reportIncompatibleMethodOverride]
        n, arrays = int(self._numbers[i]), self._stored.arrays
        file = self._stored.meta["files"][int(arrays["file"][n : n + 1][0])]
        return Document(file, int(arrays["record"][n : n + 1][0]), self._text(n))

    def _text(self, n: int) -> str:
        begin = self._ends[n - 1] if n else 0
        return self._stored.arrays["text"][int(begin) : int(self._ends[n])].tobytes().decode()

    def texts(self) -> Iterator[str]:
        return (self._text(int(n)) for n in self._numbers)

    def select(self, which: np.ndarray) -> "StoredTexts":
        """Those at some positions, or where a mask is true."""
        return StoredTexts(self._stored, self._ends, self._numbers[which])

    def digests(self) -> np.ndarray:
        return self._stored.arrays["sha256"][:].reshape(-1, 32)[self._numbers]

    def sizes(self) -> np.ndarray:
        return np.diff(self._ends, prepend=0)[self._numbers]

    def by_file(self) -> Iterator[tuple[str, int, int]]:
        numbers = self._stored.arrays["file"][:][self._numbers]
        found, first, where = np.unique(numbers, return_index=True, return_inverse=True)
        documents = np.bincount(where)
        sizes = np.zeros(len(found), np.int64)
        np.add.at(sizes, where, self.sizes())
        for i in np.argsort(first):
            yield self._stored.meta["files"][found[i]], int(documents[i]), int(sizes[i])


def keep(
    documents: Iterable[tuple[Document, bytes]],
    cache: pathlib.Path,
    source: dict | None,
    domain: str,
    skipped: Skipped,
) -> Documents:
    """The documents, with their text as bytes, in a folder of `cache`; not read again if it is there.

    `source` and errors are as for `store.prepare`. `skipped` is complete when this returns.
    """

    def fill(writer: store.Writer) -> dict:
        files: dict[str, int] = {}
        end = 0
        with tqdm(unit="B", unit_scale=True, desc=f"read {domain}", delay=2) as bar:
            for piece in _pieces(documents):
                texts = [data for _, data in piece]
                ends = end + np.cumsum([len(data) for data in texts])
                bar.update(int(ends[-1]) - end)
                end = int(ends[-1])
                numbers = [files.setdefault(d.file, len(files)) for d, _ in piece]
                writer.add("text", "|u1", b"".join(texts))
                writer.add("sha256", "|u1", b"".join(hashlib.sha256(t).digest() for t in texts))
                writer.add("ends", "<i8", ends)
                writer.add("file", "<u4", numbers)
                writer.add("record", "<i8", [d.record for d, _ in piece])
        return {"files": list(files), "skipped": skipped.count, "first": skipped.first}

    stored = store.prepare(cache, source, fill, f"the text of domain {domain!r}")
    skipped.count, skipped.first = stored.meta["skipped"], stored.meta["first"]
    return StoredTexts(stored, stored.arrays["ends"][:])


def _pieces(documents: Iterable[tuple[Document, bytes]]) -> Iterator[list[tuple[Document, bytes]]]:
    piece, size = [], 0
    for item in documents:
        piece.append(item)
        size += len(item[1])
        if size >= _PIECE:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


def digest(document: Document) -> bytes:
    """The hash of a document's content. It decides whether the document is held out, and its order there."""
    return hashlib.sha256(document.text.encode()).digest()


def digests(documents: Documents) -> np.ndarray:
    """The hashes of n documents, shape (n, 32), bytes."""
    if isinstance(documents, StoredTexts):
        return documents.digests()
    return np.frombuffer(b"".join(map(digest, documents)), np.uint8).reshape(-1, 32)


def by_digest(documents: Documents) -> Documents:
    """Sorted by their hashes; equal ones stay in order."""
    words = digests(documents).view(">u8")
    return select(documents, np.lexsort(words.T[::-1]))


def select(documents: Documents, which: np.ndarray) -> Documents:
    """Those at some positions, or where a mask is true."""
    if isinstance(documents, StoredTexts):
        return documents.select(which)
    numbers = np.flatnonzero(which) if which.dtype == bool else which
    return tuple(documents[int(i)] for i in numbers)


def texts(documents: Documents) -> Iterator[str]:
    if isinstance(documents, StoredTexts):
        return documents.texts()
    return (document.text for document in documents)


def num_bytes(documents: Documents) -> int:
    if isinstance(documents, StoredTexts):
        return int(documents.sizes().sum())
    return sum(len(d.text.encode()) for d in documents)


def by_file(documents: Documents) -> Iterator[tuple[str, int, int]]:
    """(file, documents, bytes of text) of each file, in the order in which they first occur."""
    if isinstance(documents, StoredTexts):
        yield from documents.by_file()
        return
    for document in documents:
        yield document.file, 1, len(document.text.encode())
