"""Where text comes from: a source string to a stream of documents.

    'builtin'       real text of the running Python installation, see `builtin.py`
    'domain=glob'   text files, one document each; *.jsonl and *.parquet hold one document per
                    record; .gz and .zst are decompressed
    'domain=hf:path[:config[:split]]'
                    Hugging Face `datasets`: a hub name or a local folder; the split is 'train'
                    unless given

Whatever cannot be read is a `DataError` that names the source, file, line or byte and what would
work.
"""

import dataclasses
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from moejax.config import ConfigError

_CHUNK = 1 << 20
_SYNTAX = "expected 'builtin', 'domain=glob' or 'domain=hf:path[:config[:split]]'"


class DataError(ConfigError):
    """Data that cannot be used; the message names the source, file or record, and the remedy."""


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. `record` is its line (JSONL) or row, counted from 1, or 0 if it is a whole file."""

    file: str
    record: int
    text: str

    @property
    def id(self) -> str:
        return f"{self.file}:{self.record}" if self.record else self.file


def parse_source(source: str) -> tuple[str, str]:
    """('domain', 'target') of 'domain=target'."""
    name, equals, target = source.partition("=")
    if not equals or not target or not re.fullmatch(r"[\w.-]+", name):
        raise DataError(
            f"data.sources: {source!r}: {_SYNTAX}; a domain name has letters, digits, '_', '-', '.'"
        )
    return name, target


def read_documents(target: str, text_field: str) -> Iterator[Document]:
    """Documents of the right-hand side of a source, files in sorted order.

    Args:
      target: a glob (** for subfolders), or 'hf:path[:config[:split]]'.
      text_field: the key or column that holds the text of a record.
    """
    if target.startswith("hf:"):
        yield from _read_hugging_face(target, text_field)
        return
    files = sorted(
        f for f in glob.glob(os.path.expanduser(target), recursive=True) if os.path.isfile(f)
    )
    if not files:
        raise DataError(f"data.sources: no file matches {target!r} (from {os.getcwd()})")
    for file in files:
        inner = file.lower().removesuffix(".gz").removesuffix(".zst")
        if inner.endswith(".jsonl"):
            yield from _read_jsonl(file, text_field)
        elif inner.endswith(".parquet"):
            yield from _read_parquet(file, text_field)
        else:
            yield Document(file, 0, _decode(b"".join(_chunks(file)), file))


def _chunks(file: str) -> Iterator[bytes]:
    """The bytes of a file, decompressed by its suffix."""
    try:
        if file.lower().endswith(".zst"):
            yield from _zstd_chunks(file)
        else:
            opener = gzip.open if file.lower().endswith(".gz") else open
            with opener(file, "rb") as f:
                while chunk := f.read(_CHUNK):
                    yield chunk  # pyright: ignore[reportReturnType]
    except (gzip.BadGzipFile, zlib.error, zstandard.ZstdError, EOFError) as e:
        raise DataError(f"{file}: broken compressed file ({e}); fetch or compress it again") from e
    except OSError as e:
        raise DataError(f"{file}: cannot be read ({e.strerror or e})") from e


def _zstd_chunks(file: str) -> Iterator[bytes]:
    """Frame by frame, because zstandard's stream reader takes a truncated file for a short one."""
    frame = zstandard.ZstdDecompressor().decompressobj()
    with open(file, "rb") as f:
        while data := f.read(_CHUNK):
            while data:
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
    if not frame.eof:
        raise EOFError("the last zstd frame is truncated")


def _decode(data: bytes, file: str, offset: int = 0) -> str:
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{file}: not UTF-8 at byte offset {offset + e.start} (byte 0x{data[e.start]:02x}); "
            "convert the file to UTF-8, or leave it out of data.sources"
        ) from e


def _lines(file: str) -> Iterator[bytes]:
    """Lines with their line ends, at '\\n' only (str.splitlines would split at U+2028 too)."""
    rest = b""
    for chunk in _chunks(file):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            yield line + b"\n"
    if rest:
        yield rest


def _read_jsonl(file: str, field: str) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(_lines(file), 1):
        text = _decode(line, f"{file}:{number}", offset)
        offset += len(line)
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as e:
            raise DataError(f"{file}:{number}: not JSON ({e.msg} at column {e.colno})") from e
        if not isinstance(record, dict):
            raise DataError(f"{file}:{number}: a {type(record).__name__}, not a JSON object")
        yield _record_document(file, number, record, field)


def _record_document(file: str, number: int, record: dict, field: str) -> Document:
    where = f"{file}:{number}"
    if field not in record:
        known = ", ".join(map(repr, record)) or "none"
        raise DataError(f"{where}: no field data.text_field={field!r}; its fields are {known}")
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise DataError(f"{where}: field data.text_field={field!r} is a {kind}, not text")
    return Document(file, number, record[field])


def _read_parquet(file: str, field: str) -> Iterator[Document]:
    try:
        with pq.ParquetFile(file) as table:
            schema = table.schema_arrow
            if field not in schema.names:
                raise DataError(
                    f"{file}: no column data.text_field={field!r}; its columns are "
                    + ", ".join(map(repr, schema.names))
                )
            kind = schema.field(field).type
            if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
                raise DataError(f"{file}: column data.text_field={field!r} is {kind}, not text")
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield _record_document(file, number, {field: text}, field)
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{file}: not a readable Parquet file ({e})") from e


def _read_hugging_face(target: str, field: str) -> Iterator[Document]:
    # At most three parts: a split may hold colons itself, as in 'train[:10%]'.
    path, *rest = target.removeprefix("hf:").split(":", 2)
    if not path:
        raise DataError(f"data.sources: {target!r}: expected 'hf:path[:config[:split]]'")
    try:
        import datasets
    except ImportError as e:
        raise DataError(
            f"data.sources: {target!r} needs the package `datasets`: pip install 'moejax[hf]', "
            "or pip install datasets"
        ) from e
    config = rest[0] if rest and rest[0] else None
    split = rest[1] if len(rest) > 1 and rest[1] else "train"
    try:
        records = datasets.load_dataset(path, config, split=split)
    except (OSError, ValueError) as e:  # no such data set, configuration or split; no network
        raise DataError(f"data.sources: {target!r} cannot be loaded: {e}") from e
    for number, record in enumerate(records, 1):
        yield _record_document(target, number, record, field)  # pyright: ignore[reportArgumentType]
