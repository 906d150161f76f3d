"""Documents to tokens, once: in memory, or in a prepared folder that later starts read."""

import hashlib
import pathlib
import warnings
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from moejax.data import store, texts
from moejax.data.texts import Documents
from moejax.data.tokenizer import ByteTokenizer, Tokenizer

# Tokenise this many characters at a time, to bound the tokenizer's memory.
_CHUNK_CHARS = 4_000_000

Numbers = np.ndarray | store.StoredArray


class Tokens(NamedTuple):
    """The tokens of some documents, one after another, without separators.

    Attributes:
      ids: uint16 or uint32.
      ends: where each document ends in `ids`, int64.
      num_bytes: the bytes of each token of a document and of its end (`Counted.num_bytes`), int32: one more a
        document than `ids`. None if they were not asked for.
      made: when they were prepared by an earlier start, in seconds since the epoch; else None.
    """

    ids: Numbers
    ends: np.ndarray
    num_bytes: Numbers | None = None
    made: float | None = None


class _Piece(NamedTuple):
    """The tokens of a few documents, as in `Tokens`; `lengths` of the documents."""

    ids: np.ndarray
    lengths: np.ndarray
    num_bytes: np.ndarray | None
    unknown: int


def tokenize(
    documents: Documents,
    tokenizer: Tokenizer,
    name: str,
    cache: pathlib.Path | None = None,
    *,
    count_bytes: bool = False,
) -> Tokens:
    """The tokens of at least one document; with `count_bytes` also the bytes of each.

    With `cache`, they are kept in a folder there, and found again by the hash of the documents and of the
    tokenizer. Shows a progress bar after 2 s. Warns about bytes that the vocabulary cannot express.
    """
    if cache is None:
        pieces = list(_pieces(documents, tokenizer, name, count_bytes))
        ids = np.concatenate([p.ids for p in pieces])
        lengths = np.concatenate([p.lengths for p in pieces])
        counts = [p.num_bytes for p in pieces if p.num_bytes is not None]
        num_bytes = np.concatenate(counts) if count_bytes else None
        found = Tokens(ids, np.cumsum(lengths), num_bytes)
        unknown = sum(p.unknown for p in pieces)
    else:
        stored = _stored(documents, tokenizer, name, cache, count_bytes)
        made = stored.made if stored.found else None
        arrays = stored.arrays
        found = Tokens(arrays["ids"], arrays["ends"][:], arrays.get("num_bytes"), made)
        unknown = stored.meta["unknown"]
    if unknown:
        size = texts.num_bytes(documents)
        warnings.warn(
            f"the tokenizer has no tokens for {unknown:,} of the {size:,} bytes ({unknown / size:.2%}) of "
            f"{'the held-out' if count_bytes else 'the training'} documents of domain {name!r}: they are "
            "its unknown token, or dropped; data.tokenizer='bpe' or 'byte' knows every byte",
            stacklevel=3,
        )
    return found


def _stored(
    documents: Documents, tokenizer: Tokenizer, name: str, cache: pathlib.Path, count_bytes: bool
) -> store.Stored:
    source = {
        "tokenizer": tokenizer.fingerprint,
        "text": hashlib.sha256(texts.digests(documents).data).hexdigest(),
        "count_bytes": count_bytes,
    }

    def fill(writer: store.Writer) -> dict:
        end, unknown = 0, 0
        for piece in _pieces(documents, tokenizer, name, count_bytes):
            ends = end + np.cumsum(piece.lengths)
            end = int(ends[-1])
            writer.add("ids", piece.ids.dtype.str, piece.ids)
            writer.add("ends", "<i8", ends)
            if piece.num_bytes is not None:
                writer.add("num_bytes", "<i4", piece.num_bytes)
            unknown += piece.unknown
        return {"unknown": unknown}

    return store.prepare(cache, source, fill, f"the tokens of domain {name!r}")


def _pieces(
    documents: Documents, tokenizer: Tokenizer, name: str, count_bytes: bool
) -> Iterator[_Piece]:
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    total = texts.num_bytes(documents)
    with tqdm(total=total, unit="B", unit_scale=True, desc=f"tokenise {name}", delay=2) as bar:
        for chunk in _chunked(texts.texts(documents)):
            num_bytes, unknown = None, 0
            if count_bytes or not tokenizer.lossless:
                counted = tokenizer.encode_counted(chunk)
                ids = [np.array(c.ids, dtype) for c in counted]
                unknown = sum(c.unknown for c in counted)
                if count_bytes:
                    num_bytes = np.concatenate([c.num_bytes for c in counted])
            elif isinstance(tokenizer, ByteTokenizer):  # twenty times as fast as by lists
                ids = [np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in chunk]
            else:
                ids = [np.array(i, dtype) for i in tokenizer.encode_batch(chunk)]
            yield _Piece(np.concatenate(ids), np.array([len(i) for i in ids]), num_bytes, unknown)
            bar.update(sum(len(text.encode()) for text in chunk))


def _chunked(all_texts: Iterable[str]) -> Iterator[list[str]]:
    chunk, size = [], 0
    for text in all_texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
