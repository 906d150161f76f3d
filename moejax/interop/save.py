"""From parameters to a folder in Hugging Face layout: the tables of `load` read the other way."""

import json
import math
import pathlib
from collections.abc import Collection, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from moejax.config import ModelConfig
from moejax.interop import mapping
from moejax.interop.files import InteropError, need_space, whole_folder
from moejax.interop.hf_folder import CONFIG, INDEX, SINGLE
from moejax.interop.mapping import Target
from moejax.interop.safetensors_file import NAMES, NewTensor, shards, write_file
from moejax.models.zoo import FAMILIES, config_to_hf
from moejax.params import Tree, path_name
from moejax.weights import Weight, is_weight

MAX_SHARD_BYTES = 5 * 10**9


def write_folder(
    path: str | pathlib.Path,
    cfg: ModelConfig,
    params: Tree,
    router_state: Tree,
    model_type: str,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    extra_files: Mapping[str, bytes] | None = None,
    progress: bool = False,
) -> None:
    """Write config.json and safetensors that `transformers` loads; every array in its own dtype, quantised ones
    in bfloat16.

    One tensor at a time is held on the host. The folder appears whole or not at all.

    Args:
      path: a folder that does not exist yet, or is empty.
      cfg: the model's config.
      params, router_state: its values, on any devices that this process can address.
      model_type: of the family to write, a key of `moejax.models.zoo.FAMILIES`.
      max_shard_bytes: a file is not larger, unless one tensor is.
      extra_files: name -> content; a "config.json" among them replaces the one made from `cfg`.
      progress: show a bar.

    Raises:
      ConfigError: the family cannot express the model, an array does not fit the config, `path` is taken
        or the disk is full.
    """
    tensors = model_tensors(cfg, params, router_state, model_type)
    extra = dict(extra_files or {})
    weights = jax.tree.leaves(params, is_leaf=is_weight)
    dtype = jnp.result_type(*(w.dtype for w in weights)).name  # `transformers` knows one
    config = {**config_to_hf(cfg, model_type), "torch_dtype": dtype}
    extra.setdefault(CONFIG, (json.dumps(config, indent=2) + "\n").encode())
    files = shards(tensors, max_shard_bytes)
    names = [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    names = [SINGLE] if len(files) == 1 else names
    total = sum(t.nbytes for t in tensors)
    with whole_folder(pathlib.Path(path)) as folder:
        need_space(folder, total + sum(map(len, extra.values())))
        for name, content in extra.items():
            (folder / name).write_bytes(content)
        bar = tqdm(total=total, desc="writing", unit="B", unit_scale=True, disable=not progress)
        with bar:
            for name, group in zip(names, files):
                with (folder / name).open("wb") as f:
                    write_file(f, group, bar.update)
        if len(files) > 1:
            weight_map = {t.name: name for name, group in zip(names, files) for t in group}
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def model_tensors(
    cfg: ModelConfig, params: Tree, router_state: Tree, model_type: str
) -> list[NewTensor]:
    """Every tensor of the file, in the order of the layers; values are fetched when they are written."""
    if model_type not in FAMILIES:
        raise InteropError(f"unknown model_type {model_type!r}; known: {', '.join(FAMILIES)}")
    arrays = _arrays(params, router_state)
    wanted = mapping.targets(cfg, model_type)
    _check(arrays, wanted, mapping.array_specs(cfg))
    # Name in the file -> where its parts are; and its place in the order.
    parts: dict[str, list[tuple[Target, tuple[int, ...]]]] = {}
    order: dict[str, tuple[int, int]] = {}
    for path, target in wanted.items():
        for at in target.blocks():
            name = target.name(at)
            parts.setdefault(name, []).append((target, at))
            place = (0 if path.startswith("embed/") else 2, 0)
            order[name] = (1, target.layers[at[0]]) if at else place
    for name, of, rule in list(mapping.duplicates(cfg, FAMILIES[model_type].NAMES, parts)):
        if rule.written:
            parts[name], order[name] = parts[of], (1, cfg.num_layers)
    return [_tensor(name, parts[name], arrays) for name in sorted(parts, key=order.__getitem__)]


def _arrays(params: Tree, router_state: Tree) -> dict[str, Weight]:
    tree = {**params, mapping.ROUTER_STATE: router_state}
    flat = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_weight)[0]
    return {path_name(p): a for p, a in flat}


def _check(arrays: dict[str, Weight], wanted: dict[str, Target], known: Collection[str]) -> None:
    problems = [f"no array {path}" for path in wanted if path not in arrays]
    problems += [f"{path} is not in the model" for path in arrays if path not in known]
    for path in wanted.keys() & arrays.keys():
        array, shape = arrays[path], wanted[path].spec.shape
        if array.shape != shape:
            problems.append(f"{path} has shape {list(array.shape)}, not {list(shape)}")
        elif np.dtype(array.dtype) not in NAMES:
            problems.append(f"{path} has dtype {array.dtype}, which safetensors does not support")
        elif isinstance(array, jax.Array) and not array.is_fully_addressable:
            problems.append(f"{path} lies on devices of other processes; export from one process")
    if problems:
        raise InteropError(
            "the arrays do not fit the config:\n" + "\n".join(f"  - {p}" for p in problems)
        )


def _tensor(name: str, parts: list, arrays: dict[str, Weight]) -> NewTensor:
    """A tensor of the file from the one array, or the several, that it holds a part of."""
    values = [(arrays[target.row.path], target, at) for target, at in parts]
    dtype = np.dtype(values[0][0].dtype)
    shape = parts[0][0].file_shape
    held = sum(math.prod(target.block) for target, _ in parts)
    if held != math.prod(shape) or any(array.dtype != dtype for array, *_ in values):
        paths = ", ".join(target.row.path for target, _ in parts)
        raise InteropError(f"{name} is made of {paths}: all of them are needed, in one dtype")

    def value() -> np.ndarray:
        out = np.empty(shape, dtype)
        for array, target, at in values:
            block = np.asarray(array[at].astype(dtype))
            whole = tuple((0, n) for n in target.block)
            index = mapping.file_index(whole, target.block, target.row.transform)
            out[index] = np.swapaxes(block, -1, -2) if target.row.transform.transpose else block
        return out

    return NewTensor(name, dtype, shape, value)
