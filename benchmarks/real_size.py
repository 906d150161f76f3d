"""Decoding at real widths: DeepSeekMoE 16B (2401.06066), random weights, against how fast this machine reads.

    python -m benchmarks.real_size                             # a few layers, in every form of a weight
    python -m benchmarks.real_size --whole --quantize=int4     # all 28, from a run on disk
    python -m benchmarks.real_size --llama_python=PATH         # beside llama.cpp; PATH: a Python that has it
    python -m benchmarks.real_size --tiny                      # seconds; the same code on toy sizes

A few layers: bytes of the weights that a token uses over the time of a token, beside a plain read of memory in
the same run, by processor time too, for on a busy machine only that says something. A row reads its experts by
itself, so in a batch an expert counts once for every row.

All of them: makes a quantised checkpoint of random numbers (9.3 GB in int4, 17 GB in int8), and generates with
it, each in a process of its own; prints the peak of memory and the tokens per second.

llama.cpp (llama-cpp-python, and gguf to write its file) gets the same sizes in Q8_0 and Q4_0, and as many
threads. It rounds activations to 8 bits, which moejax does not.
"""

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import common
from benchmarks.random_weights import random_params
from moejax.config import ComputeConfig, DataConfig, ExperimentConfig, ModelConfig
from moejax.data import load_tokenizer
from moejax.evals.generate import Stats, generate, prepare
from moejax.models import transformer
from moejax.models.zoo import load_preset
from moejax.runs import folder as run_folder
from moejax.runs.checkpoint import Checkpoints
from moejax.weights import FORMATS

LAYERS = flags.DEFINE_integer("layers", 2, "One of them is dense; with --whole all, unless given.")
FORMS = flags.DEFINE_list("forms", ["float32", "bfloat16", *FORMATS], "Forms of the matrices.")
BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Rows.")
DTYPE = flags.DEFINE_string("dtype", "float32", "To compute in.")
WHOLE = flags.DEFINE_bool("whole", False, "All layers, through a checkpoint on disk.")
QUANTIZE = flags.DEFINE_enum("quantize", "int4", list(FORMATS), "Of --whole.")
FOLDER = flags.DEFINE_string("folder", "", "Of --whole; removed at the end [a temporary one].")
NEW = flags.DEFINE_integer("new", 16, "Tokens to time.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed calls of each.")
LLAMA = flags.DEFINE_string("llama_python", "", "A Python that has llama_cpp and gguf [without].")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the script.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")

# The part of the plain read's speed that each form is to reach.
GOALS = {"float32": 0.5, "bfloat16": 0.5, "int8": 0.4, "int4": 0.3}


def config() -> ModelConfig:
    """A few layers, with a vocabulary that does not matter beside them."""
    cfg = dataclasses.replace(
        load_preset("deepseek-moe-16b"), num_layers=LAYERS.value, vocab_size=512
    )
    if not TINY.value:
        return cfg
    moe = dataclasses.replace(cfg.moe, num_experts=8, d_expert=32)
    attention = dataclasses.replace(cfg.attention, num_heads=2, num_kv_heads=2, head_dim=32)
    return dataclasses.replace(cfg, d_model=64, d_ff=64, moe=moe, attention=attention)


def bytes_of_token(params: dict, cfg: ModelConfig) -> tuple[int, int]:
    """(bytes of the weights that every pass uses, of a row's experts in all layers)."""
    nbytes = lambda tree: sum(a.nbytes for a in jax.tree.leaves(tree))  # noqa: E731
    experts = nbytes(params["moe_blocks"]["moe"]["experts"])
    used = nbytes(params) - experts - nbytes(params["embed"])
    return used, experts * cfg.moe.experts_per_token // cfg.moe.num_experts


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def llama(cfg: ModelConfig, form: str, batches: list[int]) -> dict:
    """What `llama_peer` prints, for the sizes of `cfg`."""
    with tempfile.TemporaryDirectory(prefix="llama_") as folder:
        for write in (True, False):
            sizes = {
                "folder": folder,
                "write": write,
                "format": form,
                "batches": batches,
                "new": NEW.value,
                "repeats": REPEATS.value,
                "threads": len(os.sched_getaffinity(0)),
                "vocab": cfg.vocab_size,
                "layers": cfg.num_layers,
                "d_model": cfg.d_model,
                "d_ff": cfg.d_ff,
                "heads": cfg.attention.num_heads,
                "experts": cfg.moe.num_experts,
                "chosen": cfg.moe.experts_per_token,
                "shared": cfg.moe.shared_experts,
                "d_expert": cfg.moe.d_expert,
            }
            command = [LLAMA.value, "-m", "benchmarks.llama_peer", json.dumps(sizes)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return json.loads(said.splitlines()[-1])


def plain_read(size: int):
    """A call that reads `size` bytes of memory once."""
    a = jnp.ones((64, size // 256), jnp.float32)
    total = jax.jit(lambda a: jnp.dot(a, jnp.ones(a.shape[1])))
    return lambda: total(a)


def layers() -> list[dict]:
    cfg, rows, new = config(), [], NEW.value
    compute = ComputeConfig(dtype=DTYPE.value)
    size = 2**20 if TINY.value else 2**30
    read = plain_read(size)
    for form in FORMS.value:
        params = random_params(cfg, form)
        shared, of_row = bytes_of_token(params, cfg)
        ours: dict[int, float] = {}
        params, state = prepare(params, DTYPE.value), transformer.init_router_state(cfg)
        for batch in map(int, BATCHES.value):
            prompts = np.random.default_rng(1).integers(0, cfg.vocab_size, (batch, 8)).tolist()
            call = functools.partial(generate, params, state, cfg, prompts, compute=compute)
            functions = {"read": read, **{n: functools.partial(call, n) for n in (1, new + 1)}}
            t = common.side_by_side(functions, REPEATS.value)
            wall, cpu = ((a - b) / new for a, b in zip(t[new + 1], t[1]))
            used = shared + batch * of_row
            speed = [size / t["read"].wall, used / wall]
            by_cpu = (used / cpu) / (size / t["read"].cpu)
            detail = (
                f"{batch / wall:.1f} tokens/s, {used / 1e6:.0f} MB a pass at {speed[1] / 1e9:.1f} GB/s, "
                f"plain read {speed[0] / 1e9:.1f}; by processor time {by_cpu:.2f}"
            )
            goal = GOALS.get(form) if batch == 1 else None
            name = f"{form}, batch {batch}: speed of reading weights / plain read"
            rows.append(common.row(name, speed[1] / speed[0], goal, detail, least=True))
            print(rows[-1], flush=True)
            ours[batch] = batch / wall
        del params
        if LLAMA.value and form in FORMATS:
            peer = llama(cfg, form, list(ours))
            for batch, theirs in peer["tokens_per_second"].items():
                mine = ours[int(batch)]
                name = f"{form}, batch {batch}: tokens/s / llama.cpp"
                detail = f"{mine:.0f}, {theirs:.0f}; llama-cpp-python {peer['version']}"
                rows.append(common.row(name, mine / theirs, 1.0, detail, least=True))
                print(rows[-1], flush=True)
    return rows


# --------------------------------------------------------------------------------------------------
# All layers, through a checkpoint.


def _make(folder: str, cfg: ModelConfig, how: str) -> dict:
    """A run with random integers for weights: no array of floats of that size is ever made."""
    experiment = ExperimentConfig(
        model=cfg,
        data=DataConfig(tokenizer="byte"),
        compute=ComputeConfig(dtype="bfloat16"),
    )
    workdir = pathlib.Path(folder) / "run"
    checkpoints = Checkpoints(workdir, experiment, packed=False)
    checkpoints.save_model(random_params(cfg, how), transformer.init_router_state(cfg))
    checkpoints.close()
    run_folder.claim_workdir(workdir, experiment, load_tokenizer(experiment.data))
    return {}


def _generate(folder: str, new: int) -> dict:
    from moejax.evals.writer import Writer

    started = time.perf_counter()
    writer = Writer(pathlib.Path(folder) / "run", max_new=new, temperature=0.0)
    ready = time.perf_counter() - started
    prompt = list(range(1, 9))
    speeds = []
    for _ in range(2):  # the first one compiles
        writer.stats.__init__()
        cpu = time.process_time()
        writer.write_ids(prompt)
        stats: Stats = writer.stats
        speeds.append(((stats.new_tokens - 1) / stats.decode_seconds, time.process_time() - cpu))
    return {
        "seconds to open": round(ready),
        "tokens/s": f"{speeds[1][0]:.2f}",
        "processor s a token": f"{speeds[1][1] / stats.new_tokens:.2f}",
    }


def _child(function, args, out) -> None:
    """Runs it and reports its peak resident memory above what Python and JAX occupy."""
    import resource

    import moejax.evals.writer  # noqa: F401  (what is loaded does not count)

    jnp.zeros(1).block_until_ready()
    before, started = resident_bytes(), time.monotonic()
    found = function(*args)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    out.put(
        {
            "peak memory, GB": f"{(peak - before) / 1e9:.2f}",
            "seconds": f"{time.monotonic() - started:.0f}",
            **found,
        }
    )


def _in_child(function, *args) -> dict:
    context = multiprocessing.get_context("spawn")
    out = context.Queue()
    child = context.Process(target=_child, args=(function, args, out))
    child.start()
    child.join()
    if child.exitcode:
        raise RuntimeError(f"{function.__name__}: exit code {child.exitcode}")
    return out.get()


def whole() -> list[dict]:
    if FOLDER.value and pathlib.Path(FOLDER.value).exists():
        raise app.UsageError(f"{FOLDER.value} exists; it would be removed at the end")
    folder = pathlib.Path(FOLDER.value or tempfile.mkdtemp(prefix="real_size_"))
    cfg = config() if TINY.value else load_preset("deepseek-moe-16b")
    if LAYERS.present:
        cfg = dataclasses.replace(cfg, num_layers=LAYERS.value)
    rows = []
    try:
        for what, function, args in (
            (f"make the checkpoint in {QUANTIZE.value}", _make, (cfg, QUANTIZE.value)),
            ("generate, batch 1", _generate, (NEW.value,)),
        ):
            found = _in_child(function, str(folder), *args)
            rows.append({"what": what, **found})
            print(rows[-1], flush=True)
        on_disk = sum(f.stat().st_size for f in (folder / "run").rglob("*") if f.is_file())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if LLAMA.value:
        peer = llama(cfg, QUANTIZE.value, [1])
        speed, peak = peer["tokens_per_second"]["1"], f"{peer['peak'] / 1e9:.2f}"
        what = f"llama-cpp-python {peer['version']}"
        rows.append({"what": what, "peak memory, GB": peak, "tokens/s": f"{speed:.2f}"})
    for row in rows[:2]:
        row["on disk, GB"] = f"{on_disk / 1e9:.2f}"
    columns = dict.fromkeys(key for row in rows for key in row)
    return [{c: row.get(c, "") for c in columns} for row in rows]


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    common.select_platform("cpu")
    if WHOLE.value:
        common.report("DeepSeekMoE 16B, random weights", whole(), OUTPUT.value)
    else:
        title = f"Decoding with {LAYERS.value} layers of DeepSeekMoE 16B, computed in {DTYPE.value}"
        common.report(title, layers(), OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
