"""A checkpoint in the layout of DeepSeekMoE 16B (2401.06066), as published but with random numbers in it."""

import dataclasses
import json
import os
import pathlib

import numpy as np

from moejax.config import ModelConfig
from moejax.interop import mapping
from moejax.interop.hf_folder import CONFIG, INDEX
from moejax.interop.safetensors_file import DTYPES, NewTensor, shards, write_file
from moejax.models.zoo import config_to_hf, load_preset

SHARD_BYTES = 5 * 10**9
BLOCK = 2**24  # random numbers that are repeated: what is in them does not matter


def write_checkpoint(folder: pathlib.Path, layers: int, cfg: ModelConfig | None = None) -> int:
    """A random checkpoint in the 16B layout, or that of `cfg`; returns the bytes of its tensors."""
    cfg = dataclasses.replace(cfg or load_preset("deepseek-moe-16b"), num_layers=layers)
    # Exponents below 2^1: finite numbers, of both signs.
    noise = np.random.default_rng(0).integers(0, 2**16, BLOCK, np.uint16) & 0xBFFF

    def values(shape):
        return np.resize(noise, shape).view(DTYPES["BF16"])

    tensors = [
        NewTensor(t.name(at), DTYPES["BF16"], t.file_shape, lambda s=t.file_shape: values(s))
        for t in mapping.targets(cfg, "deepseek").values()
        for at in t.blocks()
    ]
    groups = shards(tensors, SHARD_BYTES)
    folder.mkdir(parents=True)
    weight_map = {}
    for i, group in enumerate(groups):
        name = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        with (folder / name).open("wb") as f:
            write_file(f, group, lambda n: None)
        weight_map |= {t.name: name for t in group}
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (folder / CONFIG).write_text(json.dumps(config_to_hf(cfg, "deepseek")))
    (folder / "tokenizer.json").write_text(_tokenizer())
    return sum(t.nbytes for t in tensors)


def _tokenizer() -> str:
    import tokenizers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    return tokenizer.to_str()


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
