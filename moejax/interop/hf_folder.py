"""A folder with config.json and *.safetensors as one dict of tensors; nothing but headers is read."""

import dataclasses
import pathlib
from collections.abc import Collection

from moejax.interop.files import InteropError, checked_file, exists, read_json
from moejax.interop.quantized import Tensor, unpack
from moejax.interop.safetensors_file import FileTensor, read_header
from moejax.text import MOST_SHOWN, cut, shown

CONFIG = "config.json"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# Values of quantization_config.quant_method whose tensors `quantized` unpacks.
QUANTIZATIONS = ("fp8", "mxfp4")
FP8_BLOCK = (128, 128)


@dataclasses.dataclass(frozen=True)
class HfFolder:
    """Attributes:
    folder: its path.
    hf: the parsed config.json.
    tensors: by name, quantised ones as what they stand for.
    """

    folder: pathlib.Path
    hf: dict
    tensors: dict[str, Tensor]


def open_folder(folder: pathlib.Path, ignore_keys: Collection[str] = ()) -> HfFolder:
    """Read config.json without `ignore_keys`, the index and every header; InteropError for whatever is
    not as it must be."""
    if not folder.is_dir():
        raise InteropError(
            f"{folder} is not a folder; expected one with {CONFIG} and *.safetensors"
        )
    hf = {k: v for k, v in read_json(folder, CONFIG).items() if k not in ignore_keys}
    block = _quantization(hf, folder)
    if exists(folder, SINGLE):  # first, as `transformers` does
        tensors = read_header(checked_file(folder, SINGLE))
    elif exists(folder, INDEX):
        tensors = _from_index(folder)
    else:
        raise InteropError(_nothing(folder))
    return HfFolder(folder, hf, unpack(tensors, block))


def _nothing(folder: pathlib.Path) -> str:
    pickles = sorted(p.name for pattern in PICKLES for p in folder.glob(pattern))
    if pickles:
        return (
            f"{folder} holds {pickles[0]} and no {SINGLE} or {INDEX}. Pickled weights can run code "
            "and are never read; save the model again with safe_serialization=True"
        )
    return f"{folder} has neither {SINGLE} nor {INDEX}"


def _quantization(hf: dict, folder: pathlib.Path) -> tuple[int, int]:
    """The FP8 block size of a config.json; InteropError for a quantisation we do not read."""
    config = hf.get("quantization_config")
    if config is None:
        return FP8_BLOCK
    where = f"{folder / CONFIG}: quantization_config"
    if not isinstance(config, dict):
        raise InteropError(f"{where}={shown(config)} must be an object")
    method = config.get("quant_method")
    if method not in QUANTIZATIONS:
        raise InteropError(
            f"{where}.quant_method={shown(method)} is not supported; {' and '.join(QUANTIZATIONS)} are, "
            "and unquantised checkpoints"
        )
    block = config.get("weight_block_size") or FP8_BLOCK
    if (
        not isinstance(block, list | tuple)
        or len(block) != 2
        or not all(type(b) is int and 0 < b <= 2**20 for b in block)
    ):
        raise InteropError(
            f"{where}.weight_block_size={shown(block)} must be two positive integers such as [128, 128]"
        )
    return (block[0], block[1])


def _from_index(folder: pathlib.Path) -> dict[str, FileTensor]:
    """The tensors of a sharded checkpoint; the index and the shards must agree."""
    where = folder / INDEX
    weight_map = read_json(folder, INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InteropError(f"{where}: no weight_map, which names the file of every tensor")
    bad = [f for f in weight_map.values() if not isinstance(f, str) or not _is_shard(f)]
    if bad:
        raise InteropError(
            f"{where}: {shown(bad[0])} is not the name of a .safetensors file in this folder"
        )
    tensors: dict[str, FileTensor] = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in read_header(checked_file(folder, file)).items():
            if name in tensors:
                raise InteropError(
                    f"{where}: {name} is in two shards, {tensors[name].path.name} and {file}"
                )
            if weight_map.get(name) != file:
                raise InteropError(
                    f"{where}: {name} is in {file}, but the index says {shown(weight_map.get(name))}; "
                    "the index belongs to other shards"
                )
            tensors[name] = tensor
    absent = [name for name in weight_map if name not in tensors]
    if absent:
        raise InteropError(
            f"{where}: {cut(absent[0], MOST_SHOWN)} is not in {weight_map[absent[0]]}"
            + (f", nor are {len(absent) - 1} others where the index says" if absent[1:] else "")
        )
    return tensors


def _is_shard(file: str) -> bool:
    return (
        file.endswith(".safetensors") and pathlib.PurePath(file).name == file and "\\" not in file
    )
