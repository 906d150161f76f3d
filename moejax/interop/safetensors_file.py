"""The safetensors format: 8 bytes of header length, a JSON header, the tensors' bytes. Read by slices.

The header is checked against the file before anything else is believed: every tensor's bytes must
lie in the file, match its dtype and shape, and tile the data without overlap or gap, as the format
demands (github.com/huggingface/safetensors, "Format"). Reading maps one tensor at a time, so neither
memory nor mappings grow with the checkpoint.
"""

import dataclasses
import json
import math
import mmap
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

from moejax.interop.files import InteropError, parse_json
from moejax.text import shown

# Of the format's dtypes, those that occur in checkpoints of language models.
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E8M0": np.dtype(jnp.float8_e8m0fnu),
    "BF16": np.dtype(jnp.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000  # the format's own bound
MAX_DIMS, MAX_DIM, MAX_NAME = 16, 2**63, 256

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class FileTensor:
    """A tensor in a file: nothing is read until `read`.

    Attributes:
      name: in the file.
      path: of the file.
      dtype, shape: as the header says.
      start: its first byte, from the start of the file.
    """

    name: str
    path: pathlib.Path
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, index: Index | None = None) -> np.ndarray:
        """A copy of `tensor[index]` (all of it if None)."""
        count = math.prod(self.shape)
        if count == 0:
            return np.zeros(self.shape, self.dtype)[index or ()]
        first = self.start - self.start % mmap.ALLOCATIONGRANULARITY
        size = self.start + count * self.dtype.itemsize - first
        with (
            self.path.open("rb") as f,
            mmap.mmap(f.fileno(), size, offset=first, access=mmap.ACCESS_READ) as mapped,
        ):
            flat = np.frombuffer(mapped, self.dtype, count, self.start - first)
            out = np.array(flat.reshape(self.shape)[index or ()], order="C")
            del flat  # else the mapping could not be closed
        return out


def read_header(path: pathlib.Path) -> dict[str, FileTensor]:
    """Every tensor of a file, by name; InteropError if the header and the file disagree."""
    size = path.stat().st_size
    with path.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise InteropError(
                f"{path}: not a whole safetensors file: a header of {length:,} bytes in a file of "
                f"{size:,}; download it again"
            )
        header = parse_json(f.read(length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise InteropError(f"{path}: header: __metadata__ must be an object")
    begin = 8 + length
    tensors = {name: _tensor(path, name, entry, begin) for name, entry in header.items()}
    at = begin
    for t in sorted(tensors.values(), key=lambda t: (t.start, math.prod(t.shape))):
        if t.start != at:
            raise InteropError(
                f"{path}: {t.name} starts at byte {t.start:,} where {at:,} was expected: tensors "
                f"{'overlap' if t.start < at else 'leave a gap'}, so the header is wrong"
            )
        at += math.prod(t.shape) * t.dtype.itemsize
    if at != size:
        raise InteropError(
            f"{path}: the header describes {at:,} bytes, the file has {size:,}: it is "
            f"{'truncated' if size < at else 'damaged'}; download it again"
        )
    return tensors


def _tensor(path: pathlib.Path, name: str, entry: Any, begin: int) -> FileTensor:
    """One checked entry of a header."""

    def whole(values, length=None):
        return (
            isinstance(values, list)
            and length in (None, len(values))
            and len(values) <= MAX_DIMS
            and all(type(v) is int and 0 <= v < MAX_DIM for v in values)
        )

    if not name.isprintable() or len(name) > MAX_NAME:
        raise InteropError(f"{path}: {shown(name)} is no name of a tensor")
    where = f"{path}: {name}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise InteropError(f"{where}: expected dtype, shape and data_offsets, found {shown(entry)}")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise InteropError(
            f"{where}: dtype {shown(dtype)} is not supported; {', '.join(DTYPES)} are"
        )
    if not whole(shape) or not whole(offsets, 2):
        raise InteropError(f"{where}: bad shape {shown(shape)} or data_offsets {shown(offsets)}")
    want = math.prod(shape) * DTYPES[dtype].itemsize
    if offsets[1] - offsets[0] != want:
        raise InteropError(
            f"{where}: {dtype} of shape {shape} takes {want:,} bytes, data_offsets "
            f"{offsets} span {offsets[1] - offsets[0]:,}"
        )
    return FileTensor(name, path, DTYPES[dtype], tuple(shape), begin + offsets[0])


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to be written; `value` is called once, when its turn comes."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    value: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def write_file(f: BinaryIO, tensors: list[NewTensor], done: Callable[[int], Any]) -> None:
    """Write a safetensors file, one tensor in memory at a time; `done(bytes)` after each."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # `transformers` wants to see it
    at = 0
    for t in tensors:
        header[t.name] = {
            "dtype": NAMES[t.dtype],
            "shape": list(t.shape),
            "data_offsets": [at, at := at + t.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    f.write(len(text).to_bytes(8, "little") + text)
    for t in tensors:
        value = np.ascontiguousarray(t.value())
        if (value.dtype, value.shape) != (t.dtype, t.shape):
            raise InteropError(
                f"{t.name}: {value.dtype}{list(value.shape)} instead of {t.dtype}{list(t.shape)}"
            )
        f.write(value.view(np.uint8).reshape(-1).data)
        done(t.nbytes)


def shards(tensors: Iterable[NewTensor], max_bytes: int) -> list[list[NewTensor]]:
    """The tensors in their order, cut into lists of at most `max_bytes` (or one larger tensor)."""
    out: list[list[NewTensor]] = []
    room = -1
    for t in tensors:
        if not out or t.nbytes > room:
            out.append([])
            room = max_bytes
        out[-1].append(t)
        room -= t.nbytes
    return out
