"""The whole training step (forward, backward, clipping, AdamW) against torch, plain dense JAX and the
machine's peak.

    python -m benchmarks.step --torch_python=PATH    # CPU, float32; PATH has torch and transformers
    python -m benchmarks.step --platform=gpu         # one GPU, bfloat16: tokens/s of each back end
    python -m benchmarks.step --tiny                 # toy sizes, to test the script

The architecture is that of Qwen2-MoE: vocabulary 4096, D 256, 6 layers of which the first is dense, E 64,
K 6, F 128, a gated shared expert of 256; 8 sequences of 256 tokens. moejax computes its balance loss and its
metrics too. The plain dense transformer (`plain_dense.py`) has FFNs of width K F + shared: the same active
FLOPs. The torch side (`torch_step.py`) runs in a child process; all take turns.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import common, plain_dense
from moejax.config import AttentionConfig, DataConfig, ExperimentConfig, ModelConfig, MoEConfig
from moejax.train.state import create_state
from moejax.train.step import compile_step

PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "Which benchmark to run.")
TORCH = flags.DEFINE_string(
    "torch_python", sys.executable, "A Python that has torch and transformers; '' leaves them out."
)
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed steps of each.")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the script.")
ON_CPU = flags.DEFINE_bool("on_cpu", False, "Run the GPU benchmark on the CPU, to test the script.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")

SIZES = dict(
    vocab_size=4096,
    d_model=256,
    num_layers=6,
    num_dense_layers=1,
    d_ff=1024,
    num_heads=4,
    num_experts=64,
    experts_per_token=6,
    d_expert=128,
    d_shared=256,
    seq_len=256,
    batch_size=8,
)
TOY = dict(
    vocab_size=64,
    d_model=32,
    num_layers=3,
    num_dense_layers=1,
    d_ff=48,
    num_heads=2,
    num_experts=8,
    experts_per_token=2,
    d_expert=16,
    d_shared=16,
    seq_len=16,
    batch_size=2,
)


def experiment(
    s: dict, dtype: str = "float32", scan_layers: bool = False, **moe
) -> ExperimentConfig:
    """moejax's config of Qwen2-MoE with these sizes, or of its dense twin with num_experts=0.

    Six layers are few enough to unroll, as the plain transformer's loop does: about 4% faster than the scan,
    which copies what the backward pass needs into stacks.
    """
    model = ModelConfig(
        vocab_size=s["vocab_size"],
        d_model=s["d_model"],
        num_layers=s["num_layers"],
        num_dense_layers=s["num_dense_layers"],
        d_ff=s["d_ff"],
        init_std=0.02,
        max_seq_len=s["seq_len"],
        dtype=dtype,
        scan_layers=scan_layers,
        attention=AttentionConfig(
            num_heads=s["num_heads"],
            num_kv_heads=s["num_heads"],
            head_dim=s["d_model"] // s["num_heads"],
            qkv_bias=True,
        ),
        moe=MoEConfig(
            num_experts=s["num_experts"],
            experts_per_token=s["experts_per_token"],
            d_expert=s["d_expert"],
            shared_experts=1,
            d_shared=s["d_shared"],
            shared_gate=True,
            expert_loss=0.01,
        ),
    )
    model = dataclasses.replace(model, moe=dataclasses.replace(model.moe, **moe))
    data = DataConfig(seq_len=s["seq_len"], batch_size=s["batch_size"])
    return ExperimentConfig(model=model, data=data)


def flops(s: dict) -> float:
    """Useful FLOPs of a step: 6 per token and active weight of a matrix; attention's two products of
    activations are left out."""
    d, moe_layers = s["d_model"], s["num_layers"] - s["num_dense_layers"]
    width = s["experts_per_token"] * s["d_expert"] + s["d_shared"]
    weights = s["num_layers"] * 4 * d * d + d * s["vocab_size"]
    weights += s["num_dense_layers"] * 3 * d * s["d_ff"]
    weights += moe_layers * (3 * d * width + d * s["num_experts"])
    return 6.0 * weights * s["batch_size"] * s["seq_len"]


def random_tokens(s: dict) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.integers(0, s["vocab_size"], (s["batch_size"], s["seq_len"] + 1), np.int32)


def moejax_step(cfg: ExperimentConfig, tokens: np.ndarray):
    ones = np.ones_like(tokens[:, 1:])
    positions = np.broadcast_to(np.arange(ones.shape[1], dtype=np.int32), ones.shape)
    batch = dict(
        tokens=tokens[:, :-1],
        targets=tokens[:, 1:],
        segment_ids=ones,
        positions=positions,
        loss_mask=ones,
        domain=np.zeros_like(ones),
    )
    batch = jax.tree.map(jnp.asarray, batch)
    state = create_state(cfg, jax.random.key(0), None)
    step = compile_step(cfg)

    def run():
        nonlocal state
        state, metrics = step(state, batch)
        return metrics["loss"]

    return run


def dense_step(s: dict, tokens: np.ndarray):
    params = plain_dense.init(
        jax.random.key(0),
        s["vocab_size"],
        s["d_model"],
        s["num_layers"],
        s["num_heads"],
        s["experts_per_token"] * s["d_expert"] + s["d_shared"],
    )
    state = plain_dense.OPTIMIZER.init(params)
    step = jax.jit(plain_dense.step, donate_argnums=(0, 1))
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])

    def run():
        nonlocal params, state
        params, state, loss = step(params, state, inputs, targets)
        return loss

    return run


class TorchSteps:
    """The child process with torch's models; `timer(name)` is a step of one of them."""

    def __init__(self, python: str, s: dict):
        script = os.path.join(os.path.dirname(__file__), "torch_step.py")
        threads = str(len(os.sched_getaffinity(0)))
        command = [python, script, f"--sizes={json.dumps(s)}", f"--threads={threads}"]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.versions = self.child.stdout.readline().strip()
        if not self.versions:
            raise SystemExit(
                f"{python} could not run benchmarks/torch_step.py (see above): give the path of a "
                "Python that has torch and transformers with --torch_python=PATH, or leave them out "
                "with --torch_python="
            )

    def timer(self, name: str) -> common.Timer:
        def run():
            print(name, file=self.child.stdin, flush=True)
            wall, cpu = map(float, self.child.stdout.readline().split())
            time.sleep(0.1)  # let the child's threads go to sleep before the next one's turn
            return wall, cpu

        return common.Timer(run)

    def close(self):
        self.child.stdin.close()
        self.child.wait()


def run_cpu(s: dict, peak_size: int, torch_python: str, repeats: int) -> list[dict]:
    tokens = random_tokens(s)
    dense_twin = experiment(dict(s, num_dense_layers=s["num_layers"]), num_experts=0)
    peak, peak_flops = common.matmul(peak_size, jnp.float32)
    functions = {
        "moejax": moejax_step(experiment(s), tokens),
        "plain dense": dense_step(s, tokens),
        "dense twin": moejax_step(dense_twin, tokens),
        "peak": peak,
    }
    if torch_python:
        torch = TorchSteps(torch_python, s)
        functions |= {name: torch.timer(name) for name in ("grouped_mm", "eager")}
        t = common.side_by_side(functions, repeats)
        torch.close()
    else:
        t = common.side_by_side(functions, repeats)

    count = s["batch_size"] * s["seq_len"]
    speed = {n: f"{count / x.wall:.0f} tokens/s ({x.cpu:.2f} CPU s)" for n, x in t.items()}
    rows = []
    if torch_python:
        ratio = min(t["grouped_mm"].wall, t["eager"].wall) / t["moejax"].wall
        detail = (
            f"{speed['moejax']}; grouped_mm {speed['grouped_mm']}; eager {speed['eager']}; "
            f"{torch.versions}"
        )
        rows.append(common.row("step: tokens/s / best of torch", ratio, 1.3, detail, least=True))
    else:
        print("torch was left out (--torch_python=)")
    for name, goal in (("plain dense", 1.3), ("dense twin", None)):
        ratio = t["moejax"].wall / t[name].wall
        detail = f"{speed['moejax']}; {speed[name]}"
        what = {"plain dense": "plain dense JAX", "dense twin": "moejax's dense twin"}[name]
        rows.append(common.row(f"step: time / {what}", ratio, goal, detail))
    achieved, best = flops(s) / t["moejax"].wall, peak_flops / t["peak"].wall
    detail = f"{1e-9 * achieved:.0f} of {1e-9 * best:.0f} GFLOP/s, {1e-9 * flops(s):.1f} GFLOP"
    what = f"step: useful FLOP/s / matmul {peak_size}"
    rows.append(common.row(what, achieved / best, 0.5, detail, least=True))
    return rows


def run_gpu(s: dict, peak_size: int, repeats: int) -> list[dict]:
    """Tokens/s of the step with each back end, in bfloat16."""
    tokens = random_tokens(s)
    peak, peak_flops = common.matmul(peak_size, jnp.bfloat16)
    names = ["ragged", *(["tokamax"] if importlib.util.find_spec("tokamax") else [])]
    functions = {n: moejax_step(experiment(s, "bfloat16", grouped_matmul=n), tokens) for n in names}
    twin = experiment(dict(s, num_dense_layers=s["num_layers"]), "bfloat16", num_experts=0)
    functions |= {"moejax's dense twin": moejax_step(twin, tokens), "peak": peak}
    t = common.side_by_side(functions, repeats)
    rows = []
    for name in (*names, "moejax's dense twin"):
        achieved = flops(s) / t[name].wall
        rows.append(
            {
                "step": name,
                "ms": f"{1e3 * t[name].wall:.2f}",
                "tokens/s": f"{s['batch_size'] * s['seq_len'] / t[name].wall:.0f}",
                "TFLOP/s": f"{1e-12 * achieved:.3g}",
                "of matmul peak": f"{achieved * t['peak'].wall / peak_flops:.1%}",
            }
        )
    return rows


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    common.select_platform("cpu" if ON_CPU.value else PLATFORM.value)
    sizes = TOY if TINY.value else SIZES
    if PLATFORM.value == "gpu":
        rows = run_gpu(sizes, 128 if TINY.value else 8192, REPEATS.value)
        common.report("Training step, bfloat16", rows, OUTPUT.value)
    else:
        rows = run_cpu(sizes, 128 if TINY.value else 2048, TORCH.value, REPEATS.value)
        common.report("Training step, float32", rows, OUTPUT.value)


if __name__ == "__main__":
    common.use_huge_pages()
    app.run(main)
