"""Attention in blocks against all scores at once: time and memory as rows grow, and two long ones in a process.

    python -m benchmarks.attention                   # CPU, float32, about 10 minutes
    python -m benchmarks.attention --tiny            # seconds; the same code on toy sizes

One sequence, 8 heads of width 64. Times are medians measured in turns in one process. Up to 512 tokens moejax
computes all scores at once, so both sides of the first row are the same code. Peak memory is that of a
process of its own that reads a prompt, or takes a training step (AdamW), with a small dense transformer.
"""

import json
import resource
import subprocess
import sys

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import common
from moejax.attention.block_attention import Sight
from moejax.attention.core import attend
from moejax.config import (
    AttentionConfig,
    ComputeConfig,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
)
from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.models.cache import init_cache
from moejax.train.state import abstract_state, create_state
from moejax.train.step import compile_step

REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each function.")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the script.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")
ALONE = flags.DEFINE_enum("alone", "", ["", "prefill", "step"], "Run only this and print its peak.")

HEADS, WIDTH = 8, 64
# Tokens, and the goals of time in blocks / at once; None: no goal.
LENGTHS = {256: 1.05, 512: None, 1024: None, 2048: None, 4096: 1.0}
TOY_LENGTHS = {16: None, 32: None}
LONG = {"prefill": 32_768, "step": 16_384}
TOY_LONG = {"prefill": 1024, "step": 1024}
GIB = 2.0**30


def experiment(length: int, block: int = 0) -> ExperimentConfig:
    """The small model: 4 dense layers of width 256, 4 heads over 2 key heads."""
    return ExperimentConfig(
        model=ModelConfig(
            vocab_size=4096,
            d_model=256,
            num_layers=4,
            d_ff=1024,
            max_seq_len=length,
            attention=AttentionConfig(num_heads=4, num_kv_heads=2, head_dim=WIDTH),
            moe=MoEConfig(),
        ),
        compute=ComputeConfig(attention_block=block),
        data=DataConfig(seq_len=length, batch_size=1),
    )


def attention(length: int, block: int):
    """(value, value and gradients of q, k and v) of one sequence, compiled, and the latter's temporary bytes.
    `block`: 0, or the length, for all scores at once."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = (1, length, HEADS, WIDTH), (1, HEADS, length, WIDTH), (1, HEADS, length, WIDTH)
    args = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]
    at = jnp.arange(length)[None]

    def forward(q, k, v):
        return attend(q, k, v, Sight(at, at), WIDTH**-0.5, block=block)

    def loss(q, k, v):
        return jnp.mean(jnp.square(forward(q, k, v)))

    value = jax.jit(forward).lower(*args).compile()
    grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(*args).compile()
    temporary = grads.memory_analysis().temp_size_in_bytes
    return (lambda: value(*args)), (lambda: grads(*args)), temporary


def compare(length: int, goal: float | None, repeats: int) -> list[dict]:
    blocks, whole = attention(length, 0), attention(length, length)
    rows = []
    for what, i in (("value", 0), ("value and gradients", 1)):
        t = common.side_by_side({"blocks": blocks[i], "whole": whole[i]}, repeats)
        detail = (
            f"{1e3 * t['blocks'].wall:.1f} / {1e3 * t['whole'].wall:.1f} ms (CPU time x "
            f"{t['blocks'].cpu / t['whole'].cpu:.2f})"
        )
        name = f"attention, {length} tokens, {what}: time / all scores at once"
        rows.append(common.row(name, t["blocks"].wall / t["whole"].wall, goal, detail))
    name = f"attention, {length} tokens: temporary MB of value and gradients"
    limit = 200.0 if length == 4096 else None
    rows.append(common.row(name, blocks[2] / 1e6, limit, f"all at once {whole[2] / 1e6:.0f}"))
    return rows


def reader(cfg: ExperimentConfig):
    """Reading a prompt into a cache: the logits of its last token."""

    def read(params, tokens, cache):
        out = transformer.forward(
            params, {}, tokens, cfg.model, compute=cfg.compute, cache=cache, prefill=True
        )
        return transformer.logits(params, out.hidden_BSD[:, -1:]), out.cache

    return jax.jit(read, donate_argnums=2)


def alone(what: str, length: int) -> None:
    """Do it once in this process and print its peak memory in bytes."""
    cfg = experiment(length)
    batch = jax.tree.map(jnp.asarray, synthetic_batch(length, 1, cfg.model.vocab_size))
    if what == "prefill":
        params, _ = transformer.init_model(cfg.model, jax.random.key(0))
        cache = init_cache(cfg.model, 1, length)
        jax.block_until_ready(reader(cfg)(params, batch["tokens"], cache))
    else:
        state = create_state(cfg, jax.random.key(0), None)
        jax.block_until_ready(compile_step(cfg)(state, batch))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux
    print(json.dumps({"peak": peak}))


def planned_whole(what: str, length: int) -> int:
    """Temporary bytes of the same with all scores at once, by XLA's count: compiled, not run."""
    cfg = experiment(length, block=length)
    if what == "step":
        batch = synthetic_batch(length, 1, cfg.model.vocab_size)
        compiled = compile_step(cfg).lower(abstract_state(cfg), batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes
    params = jax.eval_shape(lambda: transformer.init_model(cfg.model, jax.random.key(0))[0])
    cache = jax.eval_shape(lambda: init_cache(cfg.model, 1, length))
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    compiled = reader(cfg).lower(params, tokens, cache).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def long_rows(lengths: dict[str, int], flags_of_child: list[str]) -> list[dict]:
    rows = []
    for what, length in lengths.items():
        command = [sys.executable, "-m", "benchmarks.attention", f"--alone={what}", *flags_of_child]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        peak = json.loads(done.stdout.splitlines()[-1])["peak"]
        name = {"prefill": "reading a prompt", "step": "a training step"}[what]
        detail = f"all scores at once: {planned_whole(what, length) / GIB:.3g} GiB of temporaries"
        row = common.row(
            f"{name} of {length} tokens: peak GiB of the process", peak / GIB, 4.0, detail
        )
        rows.append(row)
    return rows


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    common.select_platform("cpu")
    lengths, long = (TOY_LENGTHS, TOY_LONG) if TINY.value else (LENGTHS, LONG)
    if ALONE.value:
        alone(ALONE.value, long[ALONE.value])
        return
    rows = long_rows(long, ["--tiny"] if TINY.value else [])
    for length, goal in lengths.items():
        rows += compare(length, goal, REPEATS.value)
    common.report("Attention, float32", rows, OUTPUT.value)


if __name__ == "__main__":
    common.use_huge_pages()
    app.run(main)
