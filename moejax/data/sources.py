"""Where text comes from: a source string to a stream of documents.

    'builtin'       real text of the running Python installation, see `builtin.py`
    'domain=glob'   files, see below
    'domain=hf:path[:config[:split]]'
                    Hugging Face `datasets`: a hub name or a local folder; the split is 'train'
                    unless given

    .jsonl .jsonlines .ndjson    a document per line
    .json                        the same, or one array of records, or records over several lines
    .parquet                     a document per row
    .txt .text .md               one document
    any other, or none           decided by content: Parquet, JSON lines if the first line is JSON, else one
                                 document. Binary files and other table formats are refused

All of them except Parquet may be compressed (.gz .zst .bz2 .xz, or any name: the content decides). Only '\\n'
ends a line. A byte-order mark at the start of a file is dropped. A file is read once, even if several links
lead to it.

Anything that cannot be read raises a `DataError` that names the source, file, line or byte, and what would
work.
"""

import codecs
import dataclasses
import itertools
import json
import os
import re
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from moejax.data import files
from moejax.data.files import CHUNK, MOST_RECORD_BYTES, DataError

_SYNTAX = "expected 'builtin', 'domain=glob' or 'domain=hf:path[:config[:split]]'"
_LINES = (".jsonl", ".jsonlines", ".ndjson")
_TEXT = (".txt", ".text", ".md")
_REFUSED = {
    ".csv .tsv .arrow .feather .orc .avro": "convert it to .jsonl or .parquet",
    ".tar .tgz .zip .7z .rar": "unpack it",
    ".lz4 .br .sz .snappy .z .lz .lzo": "compress it as .gz, .zst, .bz2 or .xz",
    ".pdf .doc .docx .epub": "extract its text",
    ".warc .wet .wat": "extract its records to .jsonl",
}
_REMEDY = {suffix: remedy for group, remedy in _REFUSED.items() for suffix in group.split()}
# Parquet: rows to read at once (each may be as long as the longest), and the largest compression ratio of text.
_ROWS = 8
_MOST_EXPANSION, _SMALL = 200, 256 << 20
_JSON, _SPACE = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")


@dataclasses.dataclass(frozen=True)
class Document:
    """One text. `record` is its line, row or item, counted from 1; 0 for a whole file."""

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


def read_documents(
    target: str, text_field: str, max_bytes: int = 0
) -> Iterator[Document | DataError]:
    """Yield the documents of a source, files in sorted order. A bad record is yielded as its error.

    Args:
      target: a glob (** for subfolders), or 'hf:path[:config[:split]]'.
      text_field: the key or column that holds the text of a record.
      max_bytes: how much text is wanted (0: all). A file that is one document is read only that far. Records
        are yielded as they are read; the caller stops when it has enough.

    Raises:
      DataError: no file matches, or a file cannot be read to its end.
    """
    if target.startswith("hf:"):
        yield from _read_hugging_face(target, text_field)
        return
    # With a limit, refuse a file whose text is less than a hundredth of its bytes: it would take too long.
    most = _SMALL + 100 * max_bytes if max_bytes else 0
    for file in files.find(target):
        match kind_of(file):
            case "parquet":
                yield from _read_parquet(file, text_field)
            case "lines":
                yield from _documents(file, json_values(file, "lines", most), text_field)
            case "values":
                yield from _documents(file, json_values(file, "values", most), text_field)
            case _:
                yield _read_text(file, max_bytes)


def kind_of(file: str) -> str:
    """'parquet', 'lines' (JSON, one a line), 'values' (JSON, an array or any layout) or 'text'."""
    suffix = files.inner_suffix(file)
    outer = os.path.splitext(file.lower())[1]
    if remedy := _REMEDY.get(suffix):
        raise DataError(f"{file}: {suffix} files cannot be read; {remedy}")
    if suffix == ".parquet" and outer != suffix:
        raise DataError(f"{file}: Parquet compresses its own columns; decompress the file itself")
    known = {".parquet": "parquet"} | dict.fromkeys(_LINES, "lines") | dict.fromkeys(_TEXT, "text")
    if suffix in known:
        return known[suffix]
    head = next(files.chunks(file), b"")
    if head.startswith(b"PAR1") and outer not in files.COMPRESSIONS:
        return "parquet"
    first, newline, _ = head.lstrip(b" \t\r\n").partition(b"\n")
    long = not newline and len(head) >= CHUNK - 3  # the first line goes on; without a mark, 3 less
    if re.match(rb'\{\s*"', first) and (long or _is_object(first)):
        return "lines"
    if suffix == ".json":
        return "values"
    if re.match(rb'\s*\[\s*\{\s*"', head):
        return "values"
    if b"\0" in head:
        raise DataError(
            f"{file}: this is a binary file; text, .jsonl, .json and .parquet can be read"
        )
    return "text"


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _read_text(file: str, max_bytes: int) -> Document | DataError:
    parts, size, cut = [], 0, False
    for chunk in files.chunks(file):
        parts.append(chunk)
        size += len(chunk)
        if cut := bool(
            max_bytes and size > max_bytes + 3
        ):  # 3 bytes more: the cut may fall inside a character
            parts = [b"".join(parts)[: max_bytes + 3]]
            break
    try:
        return Document(file, 0, files.decode(b"".join(parts), file, whole=not cut))
    except DataError as e:
        return e


def json_values(file: str, kind: str, most: int = 0) -> Iterator[tuple[int, object | DataError]]:
    """Yield (line, or number from 1; value or its error) of a file of `kind` 'lines' or 'values'."""
    if kind == "values":
        yield from enumerate(_values(_Scanner(file, most)), 1)
        return
    for number, text in text_lines(file, most):
        try:
            yield number, text if isinstance(text, DataError) else _parse(text, f"{file}:{number}")
        except DataError as e:
            yield number, e


def text_lines(file: str, most: int = 0) -> Iterator[tuple[int, str | DataError]]:
    """Yield (number, text or its error) of each line that is not blank."""
    for number, offset, line in files.lines(file, most):
        where = f"{file}:{number}"
        if line is None:
            long = f"a line of more than {MOST_RECORD_BYTES:,} bytes; a line ends at '\\n'"
            yield number, DataError(f"{where}: {long}")
            continue
        try:
            # A file joined from several may hold a byte-order mark at each seam.
            yield number, files.decode(line, where, offset).removeprefix("\ufeff")
        except DataError as e:
            yield number, e


def _parse(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as e:
        raise _not_json(where, e) from e


def _not_json(where: str, e: Exception) -> DataError:
    if isinstance(e, json.JSONDecodeError):
        return DataError(f"{where}: not JSON ({e.msg} at column {e.colno})")
    deep = isinstance(e, RecursionError)
    return DataError(f"{where}: not JSON ({'too deeply nested' if deep else e})")


def _record_document(file: str, number: int, record: object, field: str) -> Document:
    where = f"{file}:{number}"
    if not isinstance(record, dict):
        raise DataError(f"{where}: a {type(record).__name__}, not a JSON object")
    if field not in record:
        raise DataError(
            f"{where}: no field data.text_field={field!r}; its fields are {_names(record)}"
        )
    if not isinstance(record[field], str):
        kind = type(record[field]).__name__
        raise DataError(f"{where}: field data.text_field={field!r} is a {kind}, not text")
    return Document(file, number, record[field])


def _names(fields) -> str:
    some = [repr(name[:40]) for name in list(fields)[:10]]
    return ", ".join(some + ["..."] * (len(fields) > 10)) or "none"


def _documents(file: str, records, field: str) -> Iterator[Document | DataError]:
    for number, record in records:
        try:
            if isinstance(record, DataError):
                raise record
            yield _record_document(file, number, record, field)
        except DataError as e:
            yield e


def _values(scan: "_Scanner") -> Iterator[object]:
    """The items of an array, or values one after another, whatever their line breaks."""
    array = scan.peek() == "["
    if array:
        scan.step()
    while scan.peek() != ("]" if array else ""):
        yield scan.value()
        if array and scan.peek() == ",":
            scan.step()
            if scan.peek() == "]":
                raise scan.error("an item is missing after the last comma")
        elif array and scan.peek() != "]":
            raise scan.error("the array does not end, or a comma is missing after this item")
    if array:
        scan.step()
        if scan.peek():
            raise scan.error("there is more after the array")


class _Scanner:
    """Reads JSON values from a file one by one; holds one value and one chunk."""

    def __init__(self, file: str, most: int):
        self._file, self._number = file, 0
        self._source = _decoded(file, most)
        self._text, self._at, self._ended = "", 0, False

    def error(self, what: str) -> DataError:
        return DataError(
            f"{self._file}:{self._number}: {what}; the file must hold JSON records or one array"
        )

    def peek(self) -> str:
        """The next character that is not a space; '' at the end."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # pyright: ignore
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._read()

    def step(self) -> None:
        self._at += 1

    def value(self) -> object:
        """The value that begins here. Raises DataError if it is broken or too long."""
        self._number += 1
        while True:
            try:
                value, end = _JSON.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # else a number may go on
                    self._at = end
                    return value
            except (ValueError, RecursionError) as e:
                if self._ended or isinstance(e, RecursionError):
                    raise _not_json(f"{self._file}:{self._number}", e) from e
            if len(self._text) - self._at > MOST_RECORD_BYTES:
                raise self.error(f"no whole JSON value within {MOST_RECORD_BYTES:,} characters")
            self._read()

    def _read(self) -> None:
        """Read at least as much again as is held, so that a long value is not parsed anew for every chunk."""
        parts = [self._text[self._at :]]
        held = size = len(parts[0])
        while not self._ended and size <= 2 * held:
            chunk = next(self._source, None)
            self._ended = chunk is None
            parts.append(chunk or "")
            size += len(parts[-1])
        self._text, self._at = "".join(parts), 0


def _decoded(file: str, most: int) -> Iterator[str]:
    utf8, offset = codecs.getincrementaldecoder("utf-8")(), 0
    for chunk in itertools.chain(files.chunks(file, most), [b""]):
        held = utf8.getstate()[0]
        try:
            yield utf8.decode(chunk, final=not chunk)
        except UnicodeDecodeError:
            files.decode(held + chunk, file, offset - len(held))  # raises
        offset += len(chunk)


def _read_parquet(file: str, field: str) -> Iterator[Document | DataError]:
    try:
        # Buffered: by default a whole column of a row group is read at once.
        with pq.ParquetFile(file, buffer_size=CHUNK) as table:
            _check_column(table, file, field)
            number = 0
            for batch in table.iter_batches(batch_size=_ROWS, columns=[field]):
                for value in batch.column(field):
                    number += 1
                    try:
                        yield _record_document(file, number, {field: value.as_py()}, field)
                    except UnicodeDecodeError:
                        yield DataError(
                            f"{file}:{number}: the column is text, but this row is not UTF-8"
                        )
                    except DataError as e:
                        yield e
    except (pa.ArrowException, OSError, MemoryError) as e:
        raise DataError(f"{file}: not a readable Parquet file ({e})") from e


def _check_column(table: pq.ParquetFile, file: str, field: str) -> None:
    schema = table.schema_arrow
    if schema.names.count(field) != 1:
        what = "no column" if field not in schema.names else "more than one column"
        raise DataError(
            f"{file}: {what} data.text_field={field!r}; its columns are {_names(schema.names)}"
        )
    kind = schema.field(field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(is_kind(kind) for is_kind in is_text):
        advice = "; cast it to string if it is UTF-8" if "binary" in str(kind) else ""
        raise DataError(f"{file}: column data.text_field={field!r} is {kind}, not text{advice}")
    paths = [table.schema.column(i).path for i in range(len(table.schema))]
    for group in range(table.num_row_groups):
        column = table.metadata.row_group(group).column(paths.index(field))
        size = column.total_uncompressed_size
        if size > max(_SMALL, _MOST_EXPANSION * column.total_compressed_size):
            raise DataError(
                f"{file}: {column.total_compressed_size:,} bytes of row group {group} expand to {size:,}, "
                f"more than {_MOST_EXPANSION} times as much: real text never does"
            )


def _read_hugging_face(target: str, field: str) -> Iterator[Document | DataError]:
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
    yield from _documents(target, enumerate(records, 1), field)
