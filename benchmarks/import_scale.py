"""Importing at full width: peak memory of the process against the bytes of the parameters.

    python -m benchmarks.import_scale --layers=7

Writes a checkpoint in the layout of DeepSeekMoE 16B (2401.06066; random bfloat16, real widths, as many
layers as asked for, shards of 5 GB), then reads it in child processes and prints, for each way of reading,
the peak resident memory above what Python, JAX and moejax occupy before. The goal is parameters plus a
small constant. Needs the checkpoint's size on the disk twice; the folder is removed at the end.

Two CPU cores, 7 layers (4.03 billion parameters):

| way | parameters, GB | peak memory, GB |
|---|---|---|
| load_model, one device | 8.06 | 8.20 |
| load_model, 8 devices (some arrays are replicated) | 9.48 | 9.51 |
| moejax import, the run's checkpoint written | 8.06 | 8.37 |
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import tempfile
import time

import numpy as np
from absl import app, flags

from benchmarks.common import report
from moejax.interop import mapping
from moejax.interop.hf_folder import CONFIG, INDEX
from moejax.interop.safetensors_file import DTYPES, NewTensor, shards, write_file
from moejax.models.zoo import config_to_hf, load_preset
from moejax.weights import FORMATS, Format

LAYERS = flags.DEFINE_integer("layers", 8, "1.17 GB each, and 0.84 GB for embedding and head.")
FOLDER = flags.DEFINE_string("folder", "", "Written, and removed at the end [a temporary one].")
QUANTIZE = flags.DEFINE_enum("quantize", None, list(FORMATS), "Measure importing in it, alone.")
JSON = flags.DEFINE_string("json", "", "File for the results.")

SHARD_BYTES = 5 * 10**9
BLOCK = 2**24  # random numbers that are repeated: what is in them does not matter


def write_checkpoint(folder: pathlib.Path, layers: int) -> int:
    """A random checkpoint; returns the bytes of its tensors."""
    cfg = dataclasses.replace(load_preset("deepseek-moe-16b"), num_layers=layers)
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


def _held(params) -> int:
    """Bytes of all shards: an array that is replicated over two devices counts twice."""
    import jax

    return sum(s.data.nbytes for a in jax.tree.leaves(params) for s in a.addressable_shards)


def _plain(hf: str, work: str) -> int:
    from moejax.interop.load import load_model

    del work
    return _held(load_model(hf)[1])


def _sharded(hf: str, work: str) -> int:
    from moejax.config import ExperimentConfig, MeshConfig
    from moejax.interop.load import load_model
    from moejax.models.zoo import config_from_hf
    from moejax.sharding import make_layout

    del work
    cfg = config_from_hf(json.loads((pathlib.Path(hf) / CONFIG).read_text()))
    mesh = MeshConfig(data=1, fsdp=2, expert=2, tensor=2)
    return _held(load_model(hf, layout=make_layout(ExperimentConfig(model=cfg, mesh=mesh)))[1])


def _command(hf: str, work: str, how: Format | None = None) -> int:
    from moejax.interop.convert import import_run

    import_run(pathlib.Path(hf), pathlib.Path(work), quantize=how)
    # As many bytes as arrays are stored in.
    return sum(
        f.stat().st_size
        for f in (pathlib.Path(work) / "checkpoints/0/model").rglob("*")
        if f.is_file()
    )


WAYS = {
    "load_model, one device": (_plain, 1),
    "load_model, 8 devices (fsdp 2, expert 2, tensor 2)": (_sharded, 8),
    "moejax import (and the run's checkpoint written)": (_command, 1),
} | {
    f"moejax import --quantize={name}": (functools.partial(_command, how=how), 1)
    for name, how in FORMATS.items()
}


def measure(way: str, hf: str, work: str, out) -> None:
    """In a child process: bytes of the parameters, peak resident memory above the start, seconds."""
    import resource

    import jax
    import jax.numpy as jnp

    import moejax.interop.convert  # noqa: F401  (what is loaded does not count)

    jnp.zeros(1).block_until_ready()
    assert len(jax.devices()) == WAYS[way][1]
    before, start = resident_bytes(), time.monotonic()
    size = WAYS[way][0](hf, work)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux
    out.put((size, peak - before, time.monotonic() - start))


def main(argv):
    del argv
    if FOLDER.value and pathlib.Path(FOLDER.value).exists():
        raise app.UsageError(f"{FOLDER.value} exists; it would be removed at the end")
    folder = pathlib.Path(FOLDER.value or tempfile.mkdtemp(prefix="import_scale_"))
    rows = []
    try:
        written = write_checkpoint(folder / "hf", LAYERS.value)
        context = multiprocessing.get_context("spawn")
        for way, (_, devices) in WAYS.items():
            if ("quantize" in way) != (QUANTIZE.value is not None) or not way.endswith(
                QUANTIZE.value or ""
            ):
                continue
            os.environ["JAX_PLATFORMS"] = "cpu"
            os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices}"
            out = context.Queue()
            child = context.Process(
                target=measure, args=(way, str(folder / "hf"), str(folder / "run"), out)
            )
            child.start()
            child.join()
            if child.exitcode:
                raise RuntimeError(f"{way}: exit code {child.exitcode}")
            size, peak, seconds = out.get()
            rows.append(
                {
                    "way": way,
                    "parameters, GB": f"{size / 1e9:.2f}",
                    "peak memory, GB": f"{peak / 1e9:.2f}",
                    "above, GB": f"{(peak - size) / 1e9:.2f}",
                    "seconds": f"{seconds:.0f}",
                }
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    report(f"Import of {written / 1e9:.1f} GB in the 16B layout", rows, JSON.value)


if __name__ == "__main__":
    app.run(main)
