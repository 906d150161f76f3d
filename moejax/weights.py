"""Weights as values: a matrix is an array, or integers that stand for one.

    Weight = jax.Array | Quantized

`Quantized` is a pytree of arrays that share the leading axes of layers and experts with the matrix, so whatever
slices, scans or stacks parameters does so with them too. Wherever a whole matrix is wanted, `w.astype(dtype)`
gives it, of either kind; `dot` multiplies by one without writing it out first.

    int8     w = q scale              one scale per output
    int4     w = (q - 8) scale        one scale per output and block of inputs; two values in a byte
    uint16   bfloat16 as its bits     for programs on CPU (`as_bits`); never stored

Here: G blocks of inputs, C inputs of a block.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from moejax import cpu_kernels

_BITS = {"int8": 8, "uint8": 4, "uint16": 16}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A matrix (.., D, F) in 8 or 4 bits: D inputs, F outputs.

    Attributes:
      q: int8 (.., D, F); or uint8 (.., D / 2, F), where byte j of a block holds its inputs j (low half) and
        j + C / 2; or uint16 (.., D, F).
      scale: (.., G, F); float32 with G = 1 for int8, bfloat16 for int4, None for bits of bfloat16.
    """

    q: Any
    scale: Any

    @property
    def bits(self) -> int:
        return _BITS[str(self.q.dtype)]

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, rows, outputs = self.q.shape
        return (*leading, rows * 2 if self.bits == 4 else rows, outputs)

    @property
    def ndim(self) -> int:
        return self.q.ndim

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def dtype(self) -> Any:
        """What it is written as where nothing else is asked for."""
        return jnp.dtype(jnp.bfloat16)

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.shape[-2] // self.scale.shape[-2]

    @property
    def nbytes(self) -> int:
        return sum(math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(self))

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Whether its arrays can be those of a matrix of this shape."""
        kinds = (str(self.q.dtype), str(self.scale.dtype))
        if kinds not in (("int8", "float32"), ("uint8", "bfloat16")) or self.shape != tuple(shape):
            return False
        *leading, groups, outputs = self.scale.shape
        return (*leading, groups * self.block, outputs) == self.shape

    def __getitem__(self, at) -> "Quantized":
        """A layer's or an expert's; `at` indexes leading axes only."""
        return jax.tree.map(lambda a: a[at], self)

    def astype(self, dtype) -> jax.Array:
        """The matrix, computed in float32."""
        if self.bits == 16:
            return jax.lax.bitcast_convert_type(self.q, jnp.bfloat16).astype(dtype)
        *leading, groups, outputs = self.scale.shape
        q = self.q.reshape(*leading, groups, -1, outputs)
        if self.bits == 4:
            q = jnp.concatenate([q & 15, q >> 4], axis=-2).astype(jnp.int8) - 8
        w = q.astype(jnp.float32) * self.scale.astype(jnp.float32)[..., None, :]
        return w.reshape(self.shape).astype(dtype)


Weight = jax.Array | Quantized


class Format(NamedTuple):
    """How to quantise. Attributes: bits, 8 or 4; block, inputs that share a scale where bits is 4."""

    bits: int
    block: int = 0

    def of(self, inputs: int) -> "Format | None":
        """The format of a matrix with so many inputs: with this block, or the next smaller one that divides
        them; None if that would be less than MIN_BLOCK."""
        if self.bits == 8:
            return self
        block = math.gcd(inputs, self.block)
        return Format(4, block) if block >= min(MIN_BLOCK, self.block) else None

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Of a matrix in this format."""
        size = math.prod(shape)
        if self.bits == 8:
            return size + size // shape[-2] * 4
        return size // 2 + size // self.block * 2


MIN_BLOCK = 8
FORMATS = {"int8": Format(8), "int4": Format(4, 32)}


def is_quantized(w: Any) -> bool:
    return isinstance(w, Quantized)


def is_weight(w: Any) -> bool:
    """What counts as one where a tree is flattened: of arrays, of specs, and of shapes."""
    return hasattr(w, "shape")


def quantize(w: jax.Array, how: Format) -> Quantized:
    """(.., D, F), rounded to the nearest that `how` can say.

    int4 takes the value of the largest magnitude to -8, so that of the 16 values one more is used.
    `how.block` must divide D.
    """
    *leading, inputs, outputs = w.shape
    w = w.astype(jnp.float32)
    if how.bits == 8:
        scale = jnp.abs(w).max(axis=-2, keepdims=True) / 127
        return Quantized(jnp.round(w / _no_zero(scale)).astype(jnp.int8), scale)
    w = w.reshape(*leading, inputs // how.block, how.block, outputs)
    low, high = w.min(axis=-2), w.max(axis=-2)
    scale = (jnp.where(-low > high, low, high) / -8).astype(jnp.bfloat16)
    q = jnp.round(w / _no_zero(scale.astype(jnp.float32))[..., None, :]) + 8
    q = jnp.clip(q, 0, 15).astype(jnp.uint8)
    first, second = jnp.split(q, 2, axis=-2)
    return Quantized((first | second << 4).reshape(*leading, inputs // 2, outputs), scale)


def _no_zero(scale):
    return jnp.where(scale == 0, 1, scale)


def quantized_like(shape: tuple[int, ...], how: Format, make) -> Quantized:
    """Its two arrays by `make(shape, dtype)`."""
    *leading, inputs, outputs = shape
    if how.bits == 8:
        return Quantized(make(shape, jnp.int8), make((*leading, 1, outputs), jnp.float32))
    return Quantized(
        make((*leading, inputs // 2, outputs), jnp.uint8),
        make((*leading, inputs // how.block, outputs), jnp.bfloat16),
    )


def as_bits(w: jax.Array) -> Quantized:
    """A bfloat16 matrix as its bits. XLA:CPU computes nothing in bfloat16: of a stack in it, it widens the
    whole in front of every slice."""
    return Quantized(jax.lax.bitcast_convert_type(w, jnp.uint16), None)


def partition(w: Weight, spec: PartitionSpec) -> Any:
    """The partition of a weight whose matrix has the partition `spec`: scales lie where their inputs do."""
    if not is_quantized(w):
        return spec
    spec = PartitionSpec(*spec, *[None] * (w.ndim - len(spec)))
    if w.scale is None:
        return Quantized(spec, None)
    of_outputs = PartitionSpec(*spec[:-2], None, spec[-1])
    return Quantized(spec, of_outputs if w.bits == 8 else spec)


# --------------------------------------------------------------------------------------------------
# Products.

# Rows up to which a quantised matrix is read piece by piece, on CPU.
FEW_ROWS = 2
# Products that are added up in one expression.
AT_ONCE = 8
# Outputs whose sums stay in cache: a matrix with more (a head) is read in so many columns at a time.
COLUMNS = 4096


def dot(x_TD: jax.Array, w: Weight) -> jax.Array:
    """x @ w in x's dtype, (T, F). For a few rows on CPU a quantised matrix is never written out."""
    plain = lambda x_TD, w: jnp.dot(x_TD, w.astype(x_TD.dtype))  # noqa: E731
    in_bits = is_quantized(w) or x_TD.dtype == jnp.bfloat16
    if in_bits and cpu_kernels.serve(x_TD, w):
        return jax.lax.platform_dependent(x_TD, w, cpu=cpu_kernels.dot, default=plain)
    if not is_quantized(w) or x_TD.shape[0] > FEW_ROWS:
        return plain(x_TD, w)
    stack = jax.tree.map(lambda a: a[None], w)
    few = lambda x_TD, stack: dot_of_few(x_TD, stack, 0)  # noqa: E731
    return jax.lax.platform_dependent(
        x_TD, stack, cpu=few, default=lambda x_TD, stack: plain(x_TD, stack[0])
    )


def dot_of_few(x_TD: jax.Array, stack: Weight, at: jax.Array | int) -> jax.Array:
    """`dot` with stack[at] as one pass over it, in float32 or better: sums of AT_ONCE products (of int4, of a
    block's) side by side, then the sum of these.

    XLA:CPU makes one vectorised loop of each, which reads the matrix where it lies. The operand of a `jnp.dot`
    is first written down, out of the stack and in x's dtype. Each row is sliced out of the whole stack, for
    slices of a slice would be made of a copy.
    """
    outputs = stack.shape[-1]
    if not is_quantized(stack) and stack.dtype.itemsize < 4:  # see `as_bits`
        w = jax.lax.dynamic_index_in_dim(stack, at, keepdims=False)
        return jnp.dot(x_TD, w.astype(x_TD.dtype))
    whole = outputs // COLUMNS
    if not whole:
        return _columns(x_TD, stack, at, 0, outputs)
    # One after the other: side by side, the sums of all columns would be held at once.
    of = lambda i: _columns(x_TD, stack, at, i * COLUMNS, COLUMNS)  # noqa: E731
    y_TF = jnp.moveaxis(jax.lax.map(of, jnp.arange(whole)), 0, 1).reshape(x_TD.shape[0], -1)
    if rest := outputs % COLUMNS:
        last = _columns(x_TD, stack, at, whole * COLUMNS, rest)
        y_TF = jnp.concatenate([y_TF, last], axis=1)
    return y_TF


def _columns(x_TD: jax.Array, stack: Weight, at, start, width: int) -> jax.Array:
    """`dot_of_few` for `width` outputs from `start` on."""
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    x, scale_1GF = x_TD.astype(dtype), None
    if is_quantized(stack) and stack.scale is not None:
        groups = stack.scale.shape[1]
        scale_1GF = _slice(stack.scale, at, 0, start, (groups, width)).astype(dtype)
    if is_quantized(stack) and stack.bits == 4:
        x_TGC = x.reshape(x.shape[0], -1, stack.block)
        sums_TGF = sum(_products_of_nibbles(x_TGC, stack, at, start, width))
        sums_TGF = (sums_TGF - 8 * x_TGC.sum(axis=2, keepdims=True)) * scale_1GF
    else:
        rows, read = _reader(stack, dtype)
        x_TCG = x.reshape(x.shape[0], math.gcd(x.shape[1], AT_ONCE), -1)
        count, groups = x_TCG.shape[1:]
        slices = (_slice(rows, at, c * groups, start, (groups, width)) for c in range(count))
        sums_TGF = sum(x_TCG[:, c, :, None] * read(s) for c, s in enumerate(slices))
    # Not a sum: that would be fused with all before it, into one slow loop.
    y_TF = jnp.einsum("G,TGF->TF", jnp.ones(sums_TGF.shape[1], dtype), sums_TGF)
    if is_quantized(stack) and stack.bits == 8:
        assert scale_1GF is not None
        y_TF = y_TF * scale_1GF[:, 0]
    return y_TF.astype(x_TD.dtype)


def _slice(a, at, row: int, column, shape: tuple[int, int]) -> jax.Array:
    """(1, *shape) of a[at]. All indices have one dtype, also where ints are 64 bits."""
    start = (jnp.asarray(i, jnp.int32) for i in (at, row, column))
    return jax.lax.dynamic_slice(a, tuple(start), (1, *shape))


def _reader(stack: Weight, dtype) -> tuple[jax.Array, Callable[[jax.Array], jax.Array]]:
    """The rows of a stack with one value in each element, and how a slice of them becomes values."""
    if not is_quantized(stack):
        return stack, lambda a: a.astype(dtype)
    if stack.bits == 8:
        return stack.q, lambda a: a.astype(dtype)

    def widen(a):
        bits = a.astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)

    return stack.q, widen


def _products_of_nibbles(x_TGC, stack: Quantized, at, start, width: int):
    """x times each value of a block, (T, G, F) each, with 8 too much in every value."""
    groups, outputs = stack.scale.shape[1:]
    half = stack.block // 2
    bytes_eGCF = stack.q.reshape(-1, groups, half, outputs)
    for c in range(half):
        where = (jnp.asarray(i, jnp.int32) for i in (at, 0, c, start))
        part = jax.lax.dynamic_slice(bytes_eGCF, tuple(where), (1, groups, 1, width))[:, :, 0]
        yield x_TGC[:, :, c, None] * (part & 15).astype(x_TGC.dtype)
        yield x_TGC[:, :, c + half, None] * (part >> 4).astype(x_TGC.dtype)
