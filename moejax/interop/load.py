"""From a Hugging Face folder to parameters: streamed, sharded, every tensor accounted for."""

import collections
import functools
import math
import pathlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moejax.config import ModelConfig
from moejax.interop import mapping
from moejax.interop.files import InteropError
from moejax.interop.hf_folder import HfFolder, open_folder
from moejax.interop.mapping import Account, Bounds, Target
from moejax.interop.quantizer import Quantizer, takes
from moejax.models import transformer
from moejax.models.zoo import FAMILIES, config_from_hf
from moejax.models.zoo.names import Table
from moejax.params import Tree, path_name
from moejax.sharding import Layout
from moejax.weights import Quantized

# What is held on the host at a time: read, transformed, put on its device. Small against any model
# for which memory matters, large enough that the per-piece cost does not.
PIECE_BYTES = 128 * 2**20


def load_model(
    hf_dir: str | pathlib.Path, *, dtype=None, layout: Layout | None = None
) -> tuple[ModelConfig, Tree, Tree]:
    """Read a checkpoint in Hugging Face layout.

    Args:
      hf_dir: folder with config.json and safetensors, one file or sharded with an index.
      dtype: of the parameters; None keeps the file's (bfloat16 for FP8 and MXFP4).
      layout: each device gets only its shard; None puts everything on the default device.

    Returns:
      (config, params, router_state). The router state is float32 whatever `dtype` is.

    Raises:
      ConfigError: the config or a tensor is missing, unknown, unsupported or damaged; InteropError is
        one of its kinds. Nothing is allocated before every header has been checked.
    """
    cfg, params, router_state, _ = read_model(open_folder(pathlib.Path(hf_dir)), dtype, layout)
    return cfg, params, router_state


class Planned(NamedTuple):
    """What is to be read. Attributes: the config, the arrays by path, and where their tensors are."""

    cfg: ModelConfig
    wanted: dict[str, Target]
    account: Account

    def nbytes(self, quantizer: Quantizer | None) -> int:
        """Of the arrays, each in the dtype of its tensors or quantised."""
        total = 0
        for target in self.wanted.values():
            if quantizer is not None and takes(target.spec):
                total += quantizer.nbytes(target)
            else:
                total += math.prod(target.spec.shape) * _dtype(target, self.account).itemsize
        return total


def plan_model(opened: HfFolder, quantizer: Quantizer | None = None) -> Planned:
    """Match a folder's tensors with its model, from their headers; raises as `load_model`."""
    cfg = config_from_hf(opened.hf)
    model_type, count = opened.hf["model_type"], len(opened.tensors)
    if cfg.num_layers > count:  # before anything is said of each layer
        raise InteropError(
            f"{opened.folder}: config.json describes a model of {cfg.num_layers:,} layers, the files hold "
            f"{count:,} tensors: they do not belong together"
        )
    cfg = mapping.as_saved(cfg, model_type, opened.tensors)
    wanted = mapping.targets(cfg, model_type, opened.tensors)
    table = FAMILIES[model_type].NAMES
    account = mapping.account(cfg, table, wanted, opened.tensors, str(opened.folder))
    if quantizer is not None:
        quantizer.check(wanted, account)
    return Planned(cfg, wanted, account)


def read_model(
    opened: HfFolder,
    dtype=None,
    layout: Layout | None = None,
    *,
    quantizer: Quantizer | None = None,
    progress: bool = False,
) -> tuple[ModelConfig, Tree, Tree, Account]:
    """`load_model` of an opened folder, with the account of its tensors and a progress bar. With `quantizer`,
    on one device only."""
    cfg, wanted, account = plan_model(opened, quantizer)
    table = FAMILIES[opened.hf["model_type"]].NAMES
    for tensor, original in account.repeated:
        _check_equal(tensor, original)
    total = sum(math.prod(t.spec.shape) for t in wanted.values())
    arrays, fresh = {}, _fresh_state(cfg, wanted)
    with tqdm(
        total=total, desc="reading", unit="param", unit_scale=True, disable=not progress
    ) as bar:
        for path, target in wanted.items():
            kept = dtype
            if path.startswith(mapping.ROUTER_STATE):
                kept = target.spec.dtype
            read = functools.partial(_read, cfg, table, target, account, fresh.get(path))
            if quantizer is not None and takes(target.spec):
                arrays[path] = _place_quantized(
                    target, account, quantizer, layout, read, bar.update
                )
            else:
                arrays[path] = _place(target, account, kept, layout, read, bar.update)
    for path in fresh.keys() - arrays.keys():
        where = None if layout is None else layout.replicated
        arrays[path] = jax.device_put(fresh[path], where)
    return cfg, *mapping.as_trees(arrays, cfg), account


def _fresh_state(cfg: ModelConfig, wanted: dict[str, Target]) -> dict[str, np.ndarray]:
    """A new model's router state, by path, where files do not have all of it."""
    specs = mapping.array_specs(cfg)
    if all(path in wanted and all(wanted[path].held) for path in specs):
        return {}
    leaves = jax.tree_util.tree_leaves_with_path(transformer.init_router_state(cfg))
    return {f"{mapping.ROUTER_STATE}/{path_name(path)}": np.asarray(a) for path, a in leaves}


def _place(
    target: Target, account: Account, dtype, layout: Layout | None, read_part: Callable, done
) -> jax.Array:
    """The values of one array, on its devices. `read_part(bounds, dtype)` gives a part of them."""
    shape = target.spec.shape
    if dtype is None:
        dtype = _dtype(target, account)

    def read(bounds: Bounds) -> np.ndarray:
        return read_part(bounds, np.dtype(dtype))

    if layout is None:
        return _stream(tuple((0, n) for n in shape), dtype, [None], read, done)[0]
    sharding = layout.sharding(*target.spec.axes)
    holders: dict[Bounds, list] = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        bounds = tuple(s.indices(n)[:2] for s, n in zip(index or (), shape))
        holders[bounds].append(device)
    shards = [
        shard
        for bounds, devices in holders.items()
        for shard in _stream(bounds, dtype, devices, read, done)
    ]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _dtype(target: Target, account: Account) -> np.dtype:
    """That of the tensors of an array, or the one that holds all of theirs."""
    kinds = {account.tensors[target.name(at)].dtype for at in target.blocks()}
    return np.dtype(jnp.result_type(*kinds))


def _place_quantized(
    target: Target,
    account: Account,
    quantizer: Quantizer,
    layout: Layout | None,
    read_part: Callable,
    done,
) -> Quantized:
    """`_place` in fewer bits. A matrix is read as a whole: its scales are of all its inputs."""
    *leading, inputs, outputs = target.spec.shape
    dtype = _dtype(target, account)
    pieces = _pieces(tuple((0, n) for n in leading), inputs * outputs * dtype.itemsize)
    read = functools.partial(read_part, dtype=dtype)
    sharding = None if layout is None else layout.replicated
    return quantizer.place(target, pieces, read, sharding, done)


def _stream(
    bounds: Bounds,
    dtype,
    devices: list,
    read: Callable[[Bounds], np.ndarray],
    done: Callable[[int], object],
) -> list[jax.Array]:
    """The same part of an array on each of the devices; a large part is filled in piece by piece,
    in place, so that no more than a piece is ever held twice."""
    pieces = list(_pieces(bounds, np.dtype(dtype).itemsize))
    if len(pieces) == 1:
        value = read(bounds)
        done(value.size)
        return [jax.device_put(value, d) for d in devices]
    shape = tuple(stop - start for start, stop in bounds)
    out = [jnp.zeros(shape, dtype, device=d) for d in devices]
    for piece in pieces:
        value = read(piece)
        offset = tuple(p[0] - b[0] for p, b in zip(piece, bounds))
        out = [_fill(a, jax.device_put(value, d), offset) for a, d in zip(out, devices)]
        jax.block_until_ready(out)  # else pieces would queue up in memory
        done(value.size)
    return out


_fill = jax.jit(jax.lax.dynamic_update_slice, donate_argnums=0)


def _pieces(bounds: Bounds, itemsize: int) -> Iterator[Bounds]:
    """`bounds` cut along its leading axes into parts of at most PIECE_BYTES, or one element."""
    sizes = [stop - start for start, stop in bounds]
    if math.prod(sizes) * itemsize <= PIECE_BYTES or math.prod(sizes) == 1:
        yield bounds
        return
    axis = next(i for i, n in enumerate(sizes) if n > 1)
    row = math.prod(sizes) // sizes[axis] * itemsize
    step = max(1, PIECE_BYTES // row)
    start, stop = bounds[axis]
    for a in range(start, stop, step):
        part = (*bounds[:axis], (a, min(a + step, stop)), *bounds[axis + 1 :])
        yield from _pieces(part, itemsize)


def _read(
    cfg: ModelConfig,
    table: Table,
    target: Target,
    account: Account,
    fresh: np.ndarray | None,
    bounds: Bounds,
    dtype: np.dtype,
) -> np.ndarray:
    """A part of one array, from as many tensors of the file as it spans, and of a new model's array where there
    is no tensor."""
    leading, block = bounds[: target.leading], bounds[target.leading :]
    transform = target.row.transform
    index = mapping.file_index(block, target.block, transform)
    out = np.empty([stop - start for start, stop in bounds], dtype)
    for at in np.ndindex(*(stop - start for start, stop in leading)):
        here = tuple(i + start for i, (start, _) in zip(at, leading))
        if here and not target.held[here[0]]:
            assert fresh is not None
            out[at] = fresh[here][tuple(slice(*b) for b in block)]
            continue
        name = target.name(here)
        value = account.tensors[name].read(index)
        if problem := table.wrong(cfg, target.row.path, value):
            raise InteropError(f"{name} {problem}")
        with np.errstate(over="ignore"):  # a value too large for `dtype` becomes infinite
            out[at] = np.swapaxes(value, -1, -2) if transform.transpose else value
        if np.issubdtype(dtype, np.integer):
            continue
        if not _finite(out[at]):
            raise InteropError(f"{name} holds NaN, infinity or values too large for {dtype}")
    return out


def _finite(values: np.ndarray) -> bool:
    """No NaN, no infinity: by the bits of the exponent, for `np.isfinite` is slow in bfloat16."""
    bits = np.dtype(f"u{values.dtype.itemsize}")
    infinity = np.array(np.inf, values.dtype).view(bits)
    no_sign = bits.type(np.iinfo(bits).max >> 1)
    return not values.size or (values.view(bits) & no_sign).max() < infinity


def _check_equal(tensor, original) -> None:
    """A tensor that repeats another must be equal to it; the model has room for one only."""
    whole = tuple((0, n) for n in original.shape)
    same = tensor.shape == original.shape and tensor.dtype == original.dtype
    for bounds in _pieces(whole, original.dtype.itemsize) if same else ():
        index = tuple(slice(*b) for b in bounds)
        a, b = (t.read(index).view(np.uint8) for t in (tensor, original))
        if not np.array_equal(a, b):
            same = False
    if not same:
        raise InteropError(
            f"{tensor.name} differs from {original.name}, which it must repeat: the model has one "
            "array for both"
        )
