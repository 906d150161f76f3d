"""Reads traces, also of other engines and of strangers: row by row, every size checked before it is used."""

import contextlib
import itertools
import json
import pathlib
import zipfile
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from moejax.config import ConfigError
from moejax.evals.trace import FORMAT, VERSION
from moejax.evals.trace_files import FORMATS, HEADER
from moejax.text import shown

MOST_HEADER = 1 << 20  # bytes
MOST_LINE = 1 << 24
MOST_GROUP = 1 << 30  # of a row group of Parquet, as it says itself
AT_ONCE = 4096  # tokens
_NEEDED = {"num_experts": 1 << 24, "experts_per_token": 1 << 24}  # and the most that is believed


class Row(NamedTuple):
    """A row of text: its number, the ids of its tokens [n], and their experts [n, L, K]."""

    number: int
    token_n: np.ndarray
    experts_nLK: np.ndarray


class Trace(NamedTuple):
    """A trace file: its header, checked, and where it is."""

    path: pathlib.Path
    kind: str
    header: dict[str, Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(L, K) of every token."""
        return len(self.header["layers"]), self.header["experts_per_token"]


def open_trace(path: pathlib.Path) -> Trace:
    """Reads the header alone. ConfigError for a file that is no trace."""
    kind = FORMATS.get(path.suffix)
    if kind is None:
        raise ConfigError(f"{path}: a trace is called {' or '.join('*' + s for s in FORMATS)}")
    with _readable(path):
        text = {"jsonl": _jsonl_header, "parquet": _parquet_header, "npz": _npz_header}[kind](path)
        if len(text) > MOST_HEADER:
            raise ConfigError(f"{path}: a header of {len(text):,} bytes; at most {MOST_HEADER:,}")
        header = json.loads(text)
    _check_header(path, header)
    return Trace(path, kind, header)


def rows(trace: Trace, most: int) -> Iterator[Row]:
    """The rows of a trace in order. ConfigError for anything else than the header says, or a row of more than
    `most` tokens."""
    number, tokens, experts, held = None, [], [], 0
    read = {"jsonl": _jsonl, "parquet": _parquet, "npz": _npz}[trace.kind]
    with _readable(trace.path):
        for row_N, token_N, experts_NLK in read(trace):
            cuts = [0, *(np.flatnonzero(np.diff(row_N)) + 1).tolist(), len(row_N)]
            for start, end in itertools.pairwise(cuts):
                here = int(row_N[start])
                if number is not None and here != number:
                    yield Row(number, np.concatenate(tokens), np.concatenate(experts))
                    tokens, experts, held = [], [], 0
                    if here < number:
                        raise ConfigError(f"{trace.path}: row {here} comes after row {number}")
                number = here
                held += end - start
                if held > most:
                    raise ConfigError(
                        f"{trace.path}: row {here} has more than the {most} tokens of a row of this text"
                    )
                tokens.append(token_N[start:end])
                experts.append(experts_NLK[start:end])
        if number is not None:
            yield Row(number, np.concatenate(tokens), np.concatenate(experts))


@contextlib.contextmanager
def _readable(path: pathlib.Path) -> Iterator[None]:
    """Whatever a library says of a bad file, as a ConfigError."""
    try:
        yield
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, RecursionError, EOFError, MemoryError) as e:
        raise ConfigError(f"{path} cannot be read as a trace: {shown(str(e))}") from e
    except (
        pa.ArrowException,
        zipfile.BadZipFile,
        zlib.error,
        NotImplementedError,
        RuntimeError,
    ) as e:
        raise ConfigError(f"{path} cannot be read as a trace: {shown(str(e))}") from e


def _check_header(path: pathlib.Path, header: Any) -> None:
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ConfigError(f'{path}: no trace: its header must say "format": "{FORMAT}"')
    if header.get("version") != VERSION:
        raise ConfigError(
            f"{path}: version {shown(header.get('version'))} of the format; {VERSION} can be read"
        )
    for name, most in _NEEDED.items():
        value = header.get(name)
        if type(value) is not int or not 1 <= value <= most:
            raise ConfigError(f"{path}: {name} of the header must be a number from 1 to {most}")
    layers = header.get("layers")
    if (
        not isinstance(layers, list)
        or not 1 <= len(layers) <= 10_000
        or any(type(i) is not int or i < 0 for i in layers)
    ):
        raise ConfigError(f"{path}: layers of the header must be a list of numbers: [0, 1]")


def _integers(trace: Trace, values: Any, what: str, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:  # lists of unequal lengths
        array = np.empty(0)
    if array.dtype.kind not in "iu" or array.shape != shape:
        raise ConfigError(f"{trace.path}: {what} must be integers of shape {list(shape)}")
    return array.astype(np.int64)


# --------------------------------------------------------------------------------------------------
# JSON lines.


def _jsonl_header(path: pathlib.Path) -> bytes:
    with path.open("rb") as file:
        return file.readline(MOST_HEADER + 1)


def _jsonl(trace: Trace) -> Iterator[tuple]:
    with trace.path.open("rb") as file:
        file.readline(MOST_HEADER + 1)
        number, piece = 1, []
        while line := file.readline(MOST_LINE + 1):
            number += 1
            if len(line) > MOST_LINE:
                raise ConfigError(f"{trace.path}:{number}: a line of more than {MOST_LINE:,} bytes")
            piece.append(_token_line(trace, number, line))
            if len(piece) == AT_ONCE:
                yield tuple(np.stack(column) for column in zip(*piece))
                piece = []
        if piece:
            yield tuple(np.stack(column) for column in zip(*piece))


def _token_line(trace: Trace, number: int, line: bytes) -> tuple:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise ConfigError(f"{trace.path}:{number}: not JSON ({shown(str(e))})") from e
    if not isinstance(value, dict):
        raise ConfigError(f"{trace.path}:{number}: expected an object with row, token and experts")
    pair = [value.get("row"), value.get("token")]
    row, token = _integers(trace, pair, f"row and token of line {number}", (2,))
    experts_LK = _integers(trace, value.get("experts"), f"experts of line {number}", trace.shape)
    return row, token, experts_LK


# --------------------------------------------------------------------------------------------------
# Parquet.


def _parquet_header(path: pathlib.Path) -> bytes:
    with pq.ParquetFile(path) as file:
        return (file.schema_arrow.metadata or {}).get(HEADER.encode(), b"null")


def _parquet(trace: Trace) -> Iterator[tuple]:
    columns = ["row", "token", "experts"]
    layers, k = trace.shape
    with pq.ParquetFile(trace.path, buffer_size=1 << 20) as file:
        for name in columns:
            if file.schema_arrow.names.count(name) != 1:
                raise ConfigError(f"{trace.path}: no column {name!r}")
        for group in range(file.num_row_groups):
            if file.metadata.row_group(group).total_byte_size > MOST_GROUP:
                raise ConfigError(f"{trace.path}: row group {group} is above {MOST_GROUP:,} bytes")
        for batch in file.iter_batches(batch_size=AT_ONCE, columns=columns):
            row, token, experts = (batch.column(name) for name in columns)
            n = len(row)
            for size, what in ((layers, "layers"), (k, "experts")):
                kind = experts.type
                if not pa.types.is_list(kind) or experts.null_count:
                    raise ConfigError(f"{trace.path}: experts must be lists of lists of integers")
                if not (np.diff(experts.offsets.to_numpy()) == size).all():
                    raise ConfigError(
                        f"{trace.path}: a token has not {size} {what}, as the header says"
                    )
                experts = experts.flatten()
            arrays = [_plain(trace, a) for a in (row, token, experts)]
            yield (
                _integers(trace, arrays[0], "row", (n,)),
                _integers(trace, arrays[1], "token", (n,)),
                _integers(trace, arrays[2].reshape(n, layers, k), "experts", (n, layers, k)),
            )


def _plain(trace: Trace, column: pa.Array) -> np.ndarray:
    if not pa.types.is_integer(column.type) or column.null_count:
        raise ConfigError(f"{trace.path}: row, token and experts must be integers, none missing")
    return column.to_numpy(zero_copy_only=False)


# --------------------------------------------------------------------------------------------------
# npz: members of a zip, read side by side.


def _npz_header(path: pathlib.Path) -> bytes:
    with zipfile.ZipFile(path) as archive, archive.open("header.npy") as member:
        shape, kind = _npy(path, member, "header")
        if kind != np.uint8 or len(shape) != 1 or shape[0] > MOST_HEADER:
            raise ConfigError(f"{path}: header must be the bytes of a JSON object, as uint8")
        return _exactly(path, member, shape[0])


def _npy(path: pathlib.Path, member, name: str) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of an array, which is read no further."""
    version = np.lib.format.read_magic(member)
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    if version not in read:
        raise ConfigError(f"{path}: {name}.npy is of version {version}; 1.0 and 2.0 can be read")
    shape, fortran, kind = read[version](member)
    if fortran and len(shape) > 1:
        raise ConfigError(f"{path}: {name} is in Fortran's order; np.ascontiguousarray turns it")
    if kind.kind not in "iu" or min(shape, default=0) < 0:
        raise ConfigError(f"{path}: {name} is {kind}; it must be integers")
    return shape, kind


def _exactly(path: pathlib.Path, member, size: int) -> bytes:
    data = member.read(size)
    if len(data) < size:
        raise ConfigError(f"{path}: it ends too early")
    return data


def _npz(trace: Trace) -> Iterator[tuple]:
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(trace.path))
        members, kinds, lengths = [], [], set()
        for name, rest in (("row", ()), ("token", ()), ("experts", trace.shape)):
            member = stack.enter_context(archive.open(f"{name}.npy"))
            shape, kind = _npy(trace.path, member, name)
            if not shape or shape[1:] != rest:
                want = ", ".join(["N", *map(str, rest)])
                raise ConfigError(
                    f"{trace.path}: {name} has shape {list(shape)}; the header says [{want}]"
                )
            members.append((member, rest))
            kinds.append(kind)
            lengths.add(shape[0])
        if len(lengths) > 1:
            raise ConfigError(
                f"{trace.path}: row, token and experts differ in length: {sorted(lengths)}"
            )
        total = lengths.pop()
        for start in range(0, total, AT_ONCE):
            n = min(AT_ONCE, total - start)
            piece = []
            for (member, rest), kind in zip(members, kinds):
                size = n * int(np.prod(rest, dtype=np.int64)) * kind.itemsize
                data = _exactly(trace.path, member, size)
                piece.append(np.frombuffer(data, kind).reshape(n, *rest).astype(np.int64))
            yield tuple(piece)
