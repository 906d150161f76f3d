"""Prefill and greedy decoding against transformers' `generate`, and speculative decoding against plain.

    python benchmarks/generate.py --torch_python=PATH     # CPU, float32; PATH: an interpreter with torch
    python benchmarks/generate.py --tiny                  # seconds; the same code on toy sizes

Ratios are of medians measured in turns: moejax, then each expert implementation of transformers (a process
of its own), and again. Decoding is the time of `--new` tokens less that of one token, on both sides.
"""

import dataclasses
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import time

import common
import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from moejax.config import AttentionConfig, ModelConfig, MoEConfig
from moejax.evals.generate import Stats, generate, prepare
from moejax.models import transformer
from moejax.models.loss import loss_fn
from moejax.params import init_params

TORCH_PYTHON = flags.DEFINE_string(
    "torch_python", sys.executable, "Interpreter that has torch and transformers."
)
REPEATS = flags.DEFINE_integer("repeats", 5, "Timed calls of each.")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the script.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")

SIZES = dict(
    vocab_size=4096,
    d_model=256,
    num_layers=6,
    num_dense_layers=1,
    d_ff=1024,
    num_heads=8,
    num_experts=64,
    experts_per_token=6,
    d_expert=128,
    d_shared=256,
    max_seq_len=1024,
)
TOY = SIZES | dict(
    vocab_size=64, d_model=32, num_layers=2, d_ff=64, num_heads=2, num_experts=4, d_expert=16
)
TOY |= dict(experts_per_token=2, d_shared=32, max_seq_len=64)
IMPLEMENTATIONS = ("grouped_mm", "eager")


def model_config(sizes: dict) -> ModelConfig:
    """The architecture of Qwen2-MoE: biases on queries, keys and values, a gate on the shared expert."""
    s = dict(sizes)
    heads, width = s.pop("num_heads"), s["d_model"]
    moe = MoEConfig(
        num_experts=s.pop("num_experts"),
        experts_per_token=s.pop("experts_per_token"),
        d_expert=s.pop("d_expert"),
        shared_experts=1,
        d_shared=s.pop("d_shared"),
        shared_gate=True,
    )
    attention = AttentionConfig(
        num_heads=heads, num_kv_heads=heads, head_dim=width // heads, qkv_bias=True
    )
    return ModelConfig(**s, init_std=0.02, attention=attention, moe=moe)


class Torch:
    """The peer's process; called with (implementation, rows, prompt, new) it answers (wall, cpu)."""

    def __init__(self, sizes: dict):
        script = pathlib.Path(__file__).with_name("torch_generate.py")
        threads = str(len(os.sched_getaffinity(0)))
        self.process = subprocess.Popen(
            [TORCH_PYTHON.value, str(script), "--sizes", json.dumps(sizes), "--threads", threads],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = self._line()

    def _line(self) -> str:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(
                f"{TORCH_PYTHON.value} does not run torch_generate.py; --torch_python=PATH names an "
                "interpreter with the packages of requirements-parity.txt"
            )
        return line.strip()

    def __call__(self, *request) -> tuple[float, float]:
        self.process.stdin.write(" ".join(map(str, request)) + "\n")
        self.process.stdin.flush()
        wall, cpu = self._line().split()
        return float(wall), float(cpu)


def timed(function) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def in_turns(functions: dict, repeats: int) -> dict[str, tuple[float, float]]:
    """Median (wall, cpu) seconds of functions that answer with theirs; the first call is not counted."""
    seen: dict[str, list] = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            result = function()
            if turn:
                seen[name].append(result)
    return {
        name: tuple(statistics.median(part) for part in zip(*results))
        for name, results in seen.items()
    }


def against_torch(sizes: dict, prompt: int, new: int, batches, repeats: int) -> list[dict]:
    cfg = model_config(sizes)
    params = prepare(init_params(transformer.param_specs(cfg), jax.random.key(0)), cfg)
    state = transformer.init_router_state(cfg)
    peer = Torch(sizes)
    print(f"peer: {peer.name}", flush=True)
    rng = np.random.default_rng(0)
    rows = []
    for batch, decode_goal, prefill_goal in batches:
        prompts = rng.integers(0, cfg.vocab_size, (batch, prompt)).tolist()

        def ours(tokens, prompts=prompts):
            return timed(lambda: generate(params, state, cfg, prompts, tokens))

        functions = {("moejax", n): functools.partial(ours, n) for n in (1, new)} | {
            (name, n): functools.partial(peer, name, batch, prompt, n)
            for name in IMPLEMENTATIONS
            for n in (0, 1, new)
        }
        t = in_turns(functions, repeats)
        prefill = {"moejax": t["moejax", 1], **{i: t[i, 0] for i in IMPLEMENTATIONS}}
        decode = {
            i: tuple(long - short for long, short in zip(t[i, new], t[i, 1]))
            for i in ("moejax", *IMPLEMENTATIONS)
        }
        where = f"batch {batch}, prompt {prompt}"
        rows.append(
            row(f"decode {new - 1} tokens, {where}", batch * (new - 1), decode, decode_goal)
        )
        if prefill_goal:
            rows.append(row(f"prefill, {where}", batch * prompt, prefill, prefill_goal))
    return rows


def row(what: str, tokens: int, seconds: dict, goal: float) -> dict:
    """Against the faster implementation of the peer, by wall clock and by processor time."""
    wall, cpu = (min(seconds[i][k] for i in IMPLEMENTATIONS) / seconds["moejax"][k] for k in (0, 1))
    speeds = ", ".join(f"{i} {tokens / seconds[i][0]:.0f}" for i in seconds)
    return {
        "benchmark": what,
        "goal": f"≥ {goal:g}",
        "measured": f"{wall:.2f}",
        "by processor time": f"{cpu:.2f}",
        "result": "ok" if wall >= goal else "missed",
        "tokens/s": speeds,
    }


def speculation(sizes: dict, new: int, steps: int, repeats: int) -> list[dict]:
    """Plain and speculative greedy decoding of a model that learned to count."""
    cfg = dataclasses.replace(model_config(sizes), mtp_depth=1)
    params, state = learn_to_count(cfg, steps)
    params = prepare(params, cfg)
    prompt = [(7 * i) % cfg.vocab_size for i in range(1, 9)]
    out = []
    for batch in (1, 8):
        stats = Stats()
        call = functools.partial(generate, params, state, cfg, [prompt] * batch)
        assert call(new) == call(new, speculative_decoding=True, stats=stats)
        fast = functools.partial(call, speculative_decoding=True)
        t = in_turns(
            {
                (name, n): functools.partial(timed, functools.partial(f, n))
                for name, f in (("plain", call), ("speculative", fast))
                for n in (1, new)
            },
            repeats,
        )
        spent = {
            name: [t[name, new][k] - t[name, 1][k] for k in (0, 1)]
            for name in ("plain", "speculative")
        }
        wall, cpu = (spent["plain"][k] / spent["speculative"][k] for k in (0, 1))
        out.append(
            {
                "benchmark": f"speculative / plain decoding, batch {batch}",
                "goal": "> 1",
                "measured": f"{wall:.2f}",
                "by processor time": f"{cpu:.2f}",
                "result": "ok" if wall > 1 else "missed",
                "tokens/s": ", ".join(
                    f"{name} {batch * (new - 1) / s[0]:.0f}" for name, s in spent.items()
                )
                + f"; {stats.accepted / stats.passes:.0%} accepted",
            }
        )
    return out


def learn_to_count(cfg: ModelConfig, steps: int):
    """t, t + 7, t + 14, ... modulo the vocabulary: a few steps teach it to trunk and MTP head."""
    params = init_params(transformer.param_specs(cfg), jax.random.key(0))
    state = transformer.init_router_state(cfg)
    ones = jnp.ones((16, 64), jnp.int32)
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, opt_state, key):
        start = jax.random.randint(key, (16, 1), 0, cfg.vocab_size)
        text = (start + 7 * jnp.arange(65)[None]) % cfg.vocab_size
        batch = {
            "tokens": text[:, :-1],
            "targets": text[:, 1:],
            "segment_ids": ones,
            "positions": jnp.broadcast_to(jnp.arange(64)[None], (16, 64)),
            "loss_mask": ones,
        }
        grads = jax.grad(lambda p: loss_fn(p, state, batch, cfg)[0])(params)
        updates, opt_state = optimizer.update(grads, opt_state)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    for i in range(steps):
        params, opt_state = step(params, opt_state, jax.random.key(i))
    return params, state


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    common.select_platform("cpu")
    if TINY.value:
        rows = against_torch(TOY, 16, 8, ((1, 2.5, 1.2), (2, 1.7, None)), REPEATS.value)
        rows += speculation(TOY, 16, 20, REPEATS.value)
    else:
        rows = against_torch(SIZES, 512, 64, ((1, 2.5, 1.2), (8, 1.7, None)), REPEATS.value)
        # A small vocabulary learns to count in a minute; the layers are those of the table above.
        rows += speculation(SIZES | {"vocab_size": 256}, 64, 150, REPEATS.value)
    common.report("Generation, float32", rows, OUTPUT.value)


if __name__ == "__main__":
    common.use_huge_pages()
    app.run(main)
