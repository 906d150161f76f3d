"""Traces as files: JSON lines, Parquet and npz, written and read piece by piece. Format: docs/routes.md."""

import contextlib
import json
import os
import pathlib
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moejax.config import ConfigError
from moejax.evals.trace import Records

FORMATS = {".jsonl": "jsonl", ".parquet": "parquet", ".npz": "npz"}
HEADER = "moejax.routes"  # the key of Parquet's metadata
_DIGITS = 6  # of weights and margins in JSON lines


class Sink(Protocol):
    def __call__(self, records: Records) -> None: ...


def write(
    path: pathlib.Path, kind: str, header: dict, pieces: Iterable[Records], texts: list[str]
) -> int:
    """Write a trace; it has its name only once it is whole. Returns the number of tokens.

    Args:
      path: of the file.
      kind: a value of `FORMATS`.
      header: from `trace.header`.
      pieces: the records, one batch at a time.
      texts: of every vocabulary id, from `trace.token_texts`.
    """
    partial = path.with_name(f".{path.name}.partial")
    number = 0
    opened: Callable = {"jsonl": _jsonl, "parquet": _parquet, "npz": _npz}[kind]
    try:
        with opened(partial, header, texts) as sink:
            for records in pieces:
                sink(records)
                number += len(records.token_N)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return number


def json_lines(header: dict | None, records: Records, texts: list[str]) -> Iterator[str]:
    """The lines of some records, and before them that of the header."""
    if header is not None:
        yield json.dumps(header)
    for i, token in enumerate(records.token_N.tolist()):
        line: dict[str, Any] = {
            "row": int(records.row_N[i]),
            "document": int(records.document_N[i]),
            "token": token,
            "text": texts[token] if token < len(texts) else "",
            "experts": records.experts_NLK[i].tolist(),
        }
        if records.weights_NLK is not None:
            line["weights"] = _rounded(records.weights_NLK[i])
        if records.margin_NL is not None:
            margins = _rounded(records.margin_NL[i])
            line["margin"] = [None if m != m else m for m in margins]
        yield json.dumps(line, ensure_ascii=False)


def _rounded(values: np.ndarray) -> list:
    return np.round(values.astype(np.float64), _DIGITS).tolist()


@contextlib.contextmanager
def _jsonl(path: pathlib.Path, header: dict, texts: list[str]) -> Iterator[Sink]:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.write(json.dumps(header) + "\n")
        yield lambda records: file.writelines(f"{s}\n" for s in json_lines(None, records, texts))


@contextlib.contextmanager
def _parquet(path: pathlib.Path, header: dict, texts: list[str]) -> Iterator[Sink]:
    numbers = pa.list_(pa.list_(pa.float32()))
    schema = pa.schema(
        [
            ("row", pa.int64()),
            ("document", pa.int32()),
            ("token", pa.int32()),
            ("text", pa.string()),
            ("experts", pa.list_(pa.list_(pa.int32()))),
            ("weights", numbers),
            ("margin", pa.list_(pa.float32())),
        ],
        metadata={HEADER: json.dumps(header)},
    )

    def sink(records: Records) -> None:
        # A text beyond the tokenizer's: a model may have more rows than that.
        known = [texts[t] if t < len(texts) else "" for t in records.token_N.tolist()]
        columns = [
            records.row_N,
            records.document_N,
            records.token_N,
            known,
            _lists(records.experts_NLK),
            _lists(records.weights_NLK),
            _lists(records.margin_NL),
        ]
        arrays = [
            pa.nulls(len(known), field.type)
            if column is None
            else pa.array(column).cast(field.type)
            for column, field in zip(columns, schema)
        ]
        writer.write_batch(pa.record_batch(arrays, schema=schema))

    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        yield sink


def _lists(values: np.ndarray | None) -> pa.Array | None:
    """[N, L, ..] as nested lists, without a Python object for each number."""
    if values is None:
        return None
    out = pa.array(values.reshape(-1))
    for axis in range(values.ndim - 1, 0, -1):
        count = int(np.prod(values.shape[:axis]))
        ends = np.arange(count + 1, dtype=np.int32) * values.shape[axis]
        out = pa.ListArray.from_arrays(ends, out)
    return out


ARRAYS = {
    "row": np.int64,
    "document": np.int32,
    "token": np.int32,
    "experts": np.int32,
    "weights": np.float32,
    "margin": np.float32,
}


@contextlib.contextmanager
def _npz(path: pathlib.Path, header: dict, texts: list[str]) -> Iterator[Sink]:
    """A zip holds one member after the other, so each array waits in a file of its own until its length is
    known."""
    del texts
    with contextlib.ExitStack() as stack:
        near = path.parent
        parts = {n: stack.enter_context(tempfile.TemporaryFile(dir=near)) for n in ARRAYS}
        shapes: dict[str, tuple[int, ...]] = {}

        def sink(records: Records) -> None:
            for (name, dtype), values in zip(ARRAYS.items(), records):
                if values is not None:
                    parts[name].write(np.ascontiguousarray(values, dtype).tobytes())
                    shapes[name] = (shapes.get(name, (0,))[0] + len(values), *values.shape[1:])

        yield sink
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
            with out.open("header.npy", "w") as member:
                text = np.frombuffer(json.dumps(header).encode(), np.uint8)
                np.lib.format.write_array(member, text, allow_pickle=False)
            for name, shape in shapes.items():
                with out.open(f"{name}.npy", "w", force_zip64=True) as member:
                    kind = np.lib.format.dtype_to_descr(np.dtype(ARRAYS[name]))
                    about = {"descr": kind, "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(member, about)
                    parts[name].seek(0)
                    shutil.copyfileobj(parts[name], member, 1 << 20)


def format_of(kind: str | None, out: str | None, others: Iterable[str]) -> str:
    """The format that is asked for, or that the file's name says. ConfigError for neither."""
    known = [*others, *FORMATS.values()]
    if kind is None and out:
        ending = pathlib.Path(out).suffix
        kind = FORMATS.get(ending, ending.removeprefix("."))
        if kind not in known:
            raise ConfigError(
                f"--out={out}: the ending says no format; --format={' or '.join(known)} would"
            )
    kind = kind or "table"
    if kind not in known:
        raise ConfigError(f"--format={kind}: expected one of {', '.join(known)}")
    return kind
