"""Matrices in fewer bits as they are read: each is quantised piece by piece, and never held whole in more."""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np

from moejax.interop.files import InteropError
from moejax.interop.mapping import Account, Bounds, Target
from moejax.interop.safetensors_file import FileTensor
from moejax.params import ParamSpec
from moejax.weights import FORMATS, MIN_BLOCK, Format, Quantized, quantize, quantized_like


class Quantizer:
    """Quantises the matrices of layers and experts. Routers, norms, biases, embeddings and head stay whole.

    Attributes:
      how: the format.
      errors: |w - w'| / |w| of every matrix (layer, expert) of each array, by path.
      smaller: path -> block, of arrays for which the format's is too large.
    """

    def __init__(self, how: Format):
        self.how = how
        self.errors: dict[str, np.ndarray] = {}
        self.smaller: dict[str, int] = {}

    def check(self, wanted: dict[str, Target], account: Account) -> None:
        """InteropError if a matrix has no fitting block, or is stored in fewer bits already."""
        twice = [t.name for t in account.tensors.values() if not isinstance(t, FileTensor)]
        if twice:
            raise InteropError(
                f"--quantize: {twice[0]} and {len(twice) - 1} more are stored in 8 bits or fewer, and would "
                "be rounded twice; leave --quantize out, and they are read as bfloat16"
            )
        for path, target in wanted.items():
            if not takes(target.spec):
                continue
            inputs = target.spec.shape[-2]
            fitting = self.how.of(inputs)
            if fitting is None:
                raise InteropError(
                    f"--quantize: {path} has {inputs} inputs, which no block of {MIN_BLOCK} to "
                    f"{self.how.block} divides; --quantize=int8 would work, which has no blocks"
                )
            if fitting.block < self.how.block:
                self.smaller[path] = fitting.block

    def nbytes(self, target: Target) -> int:
        how = self.how.of(target.spec.shape[-2])
        assert how is not None  # `check`
        return how.nbytes(target.spec.shape)

    def place(
        self,
        target: Target,
        pieces: Iterable[Bounds],
        read: Callable[[Bounds], np.ndarray],
        sharding,
        done: Callable[[int], object],
    ) -> Quantized:
        """The array of `target`, filled in piece by piece. `pieces`: (layers, experts) to read at a time."""
        shape, how = target.spec.shape, self.how.of(target.spec.shape[-2])
        assert how is not None
        out = quantized_like(shape, how, functools.partial(jnp.zeros, device=sharding))
        matrix = tuple((0, n) for n in shape[-2:])
        errors = np.empty(shape[:-2])
        for piece in pieces:
            value = jax.device_put(read((*piece, *matrix)), sharding)
            start = (*(a for a, _ in piece), 0, 0)
            out, error = _fill(out, value, start, how)
            errors[tuple(slice(*b) for b in piece)] = error
            done(value.size)
        self.errors[target.row.path] = errors
        return out

    def table(self) -> str:
        """How far matrices moved, a line for each array: the mean over layers, and the worst of these."""
        lines = [f"{'quantised':40} {'bits':>4} {'block':>5}  error |w - w'| / |w|, worst layer"]
        for path, errors in self.errors.items():
            mean_L = errors.reshape(len(errors), -1).mean(axis=1)
            block = self.smaller.get(path, self.how.block) or "-"
            worst = f"{mean_L.max():.2%} (layer {mean_L.argmax()})"
            lines.append(f"  {path:38} {self.how.bits:4} {block:>5}  {mean_L.mean():.2%}, {worst}")
        if self.smaller:
            fewer = (
                f"blocks of {self.how.block} do not divide the inputs of {len(self.smaller)} arrays"
            )
            lines.append(f"{fewer}; they have the next smaller that do")
        return "\n".join(lines)


def takes(spec: ParamSpec) -> bool:
    """Whether a parameter is quantised: the matrices of blocks, but those that mix a residual's streams."""
    return spec.role == "matrix" and any(spec.axes[-2:])


def format_of(name: str, block: int) -> Format:
    """The format of --quantize and --block; InteropError for a block that there is not."""
    how = FORMATS[name]
    if not block or how.bits == 8:
        if block:
            raise InteropError("--block is of int4; int8 has one scale per output")
        return how
    return how._replace(block=block)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _fill(out: Quantized, value: jax.Array, start: tuple, how: Format):
    """`out` with a piece quantised into it, and the relative error of each of its matrices."""
    piece = quantize(value, how)
    wide = value.astype(jnp.float32)
    norm = lambda a: jnp.sqrt(jnp.sum(a**2, axis=(-2, -1)))  # noqa: E731
    error = norm(wide - piece.astype(jnp.float32)) / jnp.maximum(norm(wide), 1e-30)
    put = lambda a, b: jax.lax.dynamic_update_slice(a, b, start)  # noqa: E731
    return jax.tree.map(put, out, piece), error
