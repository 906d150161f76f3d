"""Tensors that are stored in fewer bits, read as bfloat16. Recognised by the names beside them.

FP8 (DeepSeek-V3, 2412.19437 section 3.3): E4M3 weights with one float32 scale per 128x128 block,
`X_scale_inv` beside `X`. In spite of its name the scale is *multiplied*. Blocks at the lower and right
border may be cut off (576 rows have 5 blocks). DeepSeek-V4 (2606.19348) has powers of two, E8M0, in `X.scale`
beside `X.weight`, and its experts in FP4: bytes of two E2M1 values each, low nibble first, [out, in/2], whose
scales are [out, in/32].

MXFP4 (OCP Microscaling v1.0; gpt-oss, 2508.10925): 32 E2M1 values share one power of two, `X_blocks`
(16 bytes of two values each, low nibble first) and `X_scales` (exponent + 127) in place of `X`. The
file has [.., out, in]; `X` is [.., in, out], as unquantised gpt-oss files have it.
"""

import dataclasses
import math

import jax.numpy as jnp
import numpy as np

from moejax.interop.files import InteropError
from moejax.interop.safetensors_file import FileTensor, Index

BFLOAT16 = np.dtype(jnp.bfloat16)
E4M3 = np.dtype(jnp.float8_e4m3fn)
E8M0 = np.dtype(jnp.float8_e8m0fnu)  # 2^(byte - 127), 255 is NaN
SCALE_SUFFIX, BLOCKS_SUFFIX, SCALES_SUFFIX = "_scale_inv", "_blocks", "_scales"
WEIGHT, WEIGHT_SCALE = ".weight", ".scale"
# E2M1: the sign bit, two bits of exponent, one of mantissa.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1 = np.concatenate([E2M1, -E2M1])
GROUP = 32  # FP4 values of a scale


@dataclasses.dataclass(frozen=True)
class Fp8Tensor:
    """weight[i, j] * scale[i // block, j // block] as bfloat16."""

    weight: FileTensor
    scale: FileTensor
    block: tuple[int, int]
    dtype: np.dtype = BFLOAT16

    def __post_init__(self):
        w, s = self.weight, self.scale
        if len(w.shape) != 2 or w.dtype != E4M3:
            raise InteropError(
                f"{w.path}: {w.name} has the scale {s.name} and must be a F8_E4M3 matrix, not "
                f"{w.dtype} of shape {list(w.shape)}"
            )
        want = tuple(math.ceil(n / b) for n, b in zip(w.shape, self.block))
        if s.shape != want or s.dtype not in (np.float32, E8M0):
            raise InteropError(
                f"{s.path}: {s.name} must be F32 or F8_E8M0 of shape {list(want)} (blocks of "
                f"{list(self.block)}), not {s.dtype} of shape {list(s.shape)}"
            )

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return self.weight.shape

    def read(self, index: Index | None = None) -> np.ndarray:
        index = index or (slice(None),) * 2
        rows, cols = (np.arange(n)[i] // b for n, i, b in zip(self.shape, index, self.block))
        scale = self.scale.read().astype(np.float32)
        value = self.weight.read(index).astype(np.float32)
        value *= scale[rows[:, None], cols[None]]
        return value.astype(BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Mxfp4Tensor:
    """ldexp(E2M1 value, scale - 127) as bfloat16, [.., out, in] seen as [.., in, out]."""

    blocks: FileTensor
    scales: FileTensor
    dtype: np.dtype = BFLOAT16

    def __post_init__(self):
        b, s = self.blocks, self.scales
        if b.dtype != np.uint8 or len(b.shape) < 3 or b.shape[-1] != GROUP // 2:
            raise InteropError(
                f"{b.path}: {b.name} must be U8 of shape [.., out, in/{GROUP}, {GROUP // 2}], not "
                f"{b.dtype} of shape {list(b.shape)}"
            )
        if s.dtype != np.uint8 or s.shape != b.shape[:-1]:
            raise InteropError(
                f"{s.path}: {s.name} must be U8 of shape {list(b.shape[:-1])}, not {s.dtype} of "
                f"shape {list(s.shape)}"
            )

    @property
    def name(self) -> str:
        return self.blocks.name.removesuffix(BLOCKS_SUFFIX)

    @property
    def shape(self) -> tuple[int, ...]:
        *leading, out, groups, _ = self.blocks.shape
        return (*leading, groups * GROUP, out)

    def read(self, index: Index | None = None) -> np.ndarray:
        *leading, inner, outer = index or (slice(None),) * len(self.shape)
        groups, within = _groups(inner, self.shape[-2])
        packed = self.blocks.read((*leading, outer, groups, slice(None)))
        exponent = self.scales.read((*leading, outer, groups)).astype(np.int32) - 127
        value = np.ldexp(_e2m1(packed), exponent[..., None, None])
        value = value.reshape(*value.shape[:-3], -1)[..., within]
        return np.swapaxes(value, -1, -2).astype(BFLOAT16)


@dataclasses.dataclass(frozen=True)
class Fp4Tensor:
    """E2M1 value * scale as bfloat16, [out, in]."""

    weight: FileTensor
    scale: FileTensor
    dtype: np.dtype = BFLOAT16

    def __post_init__(self):
        w, s = self.weight, self.scale
        if len(w.shape) != 2 or w.shape[1] % (GROUP // 2):
            raise InteropError(
                f"{w.path}: {w.name} must be I8 of shape [out, in/2] with whole groups of {GROUP} values, "
                f"not of shape {list(w.shape)}"
            )
        want = (w.shape[0], w.shape[1] // (GROUP // 2))
        if s.shape != want or s.dtype != E8M0:
            raise InteropError(
                f"{s.path}: {s.name} must be F8_E8M0 of shape {list(want)}, not {s.dtype} of shape "
                f"{list(s.shape)}"
            )

    @property
    def name(self) -> str:
        return self.weight.name

    @property
    def shape(self) -> tuple[int, ...]:
        return (self.weight.shape[0], 2 * self.weight.shape[1])

    def read(self, index: Index | None = None) -> np.ndarray:
        rows, inner = index or (slice(None),) * 2
        groups, within = _groups(inner, self.shape[1])
        bytes_ = slice(groups.start * GROUP // 2, groups.stop * GROUP // 2)
        value = _e2m1(self.weight.read((rows, bytes_)).view(np.uint8))
        value = value.reshape(len(value), -1, GROUP)
        with np.errstate(over="ignore"):  # whoever loads it refuses what is not finite
            value *= self.scale.read((rows, groups)).astype(np.float32)[..., None]
        return value.reshape(len(value), -1)[:, within].astype(BFLOAT16)


def _groups(inner: slice, inputs: int) -> tuple[slice, slice]:
    """The groups that these inputs lie in, and where they are among the values of those groups."""
    first, last, step = inner.indices(inputs)
    groups = slice(first // GROUP, math.ceil(last / GROUP))
    skip = groups.start * GROUP
    return groups, slice(first - skip, last - skip, step)


def _e2m1(packed: np.ndarray) -> np.ndarray:
    """The two values of every byte, low nibble first: [.., n] as [.., n, 2]."""
    return E2M1[np.stack([packed & 0x0F, packed >> 4], axis=-1)]


Tensor = FileTensor | Fp8Tensor | Mxfp4Tensor | Fp4Tensor


def unpack(tensors: dict[str, FileTensor], block: tuple[int, int]) -> dict[str, Tensor]:
    """The tensors with every quantised group as the one tensor that it stands for."""
    out: dict[str, Tensor] = dict(tensors)
    for name, tensor in tensors.items():
        if name.endswith(SCALE_SUFFIX):
            base = name.removesuffix(SCALE_SUFFIX)
            if base in tensors:
                del out[name]
                out[base] = Fp8Tensor(tensors[base], tensor, block)
        elif name.endswith(WEIGHT_SCALE):
            base = name.removesuffix(WEIGHT_SCALE) + WEIGHT
            if base in tensors:
                del out[name]
                fp4 = tensors[base].dtype == np.int8
                out[base] = (
                    Fp4Tensor(tensors[base], tensor)
                    if fp4
                    else Fp8Tensor(tensors[base], tensor, block)
                )
        elif name.endswith(BLOCKS_SUFFIX):
            base = name.removesuffix(BLOCKS_SUFFIX)
            if base + SCALES_SUFFIX in tensors and base not in tensors:
                del out[name], out[base + SCALES_SUFFIX]
                out[base] = Mxfp4Tensor(tensor, tensors[base + SCALES_SUFFIX])
    return out
