"""The whole training step (forward, backward, clipping, AdamW) against torch, plain dense JAX and the
machine's peak.

    python -m benchmarks.step --torch_python=PATH    # CPU, float32; PATH has torch and transformers
    python -m benchmarks.step --tiny                 # toy sizes, to test the script

The architecture is that of Qwen2-MoE: vocabulary 4096, D 256, 6 layers of which the first is dense, E 64,
K 6, F 128, a gated shared expert of 256; 8 sequences of 256 tokens. moejax computes its balance loss and its
metrics too. The plain dense transformer (`plain_dense.py`) has FFNs of width K F + shared: the same active
FLOPs. The torch side (`torch_peer.py`) runs in a child process; all take turns.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import common, plain_dense
from benchmarks.qwen2_moe import IMPLEMENTATIONS, SIZES, TOY, Torch, model_config
from benchmarks.training import moejax_step
from moejax.config import ComputeConfig, DataConfig, ExperimentConfig, ObjectiveConfig

TORCH = flags.DEFINE_string(
    "torch_python", sys.executable, "A Python that has torch and transformers; '' leaves them out."
)
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed steps of each.")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the script.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")

ROWS, LENGTH = 8, 256
TOY_ROWS, TOY_LENGTH = 2, 16


def experiment(
    s: dict, rows: int, length: int, scan_layers: bool = False, **compute
) -> ExperimentConfig:
    """moejax's config of Qwen2-MoE with these sizes; `compute` replaces fields of that group.

    Six layers are few enough to unroll, as the plain transformer's loop does.
    """
    return ExperimentConfig(
        model=model_config(s),
        objective=ObjectiveConfig(expert_loss=0.01),
        compute=ComputeConfig(scan_layers=scan_layers, **compute),
        data=DataConfig(seq_len=length, batch_size=rows),
    )


def flops(s: dict, tokens: int) -> float:
    """Useful FLOPs of a step: 6 per token and active weight of a matrix; attention's two products of
    activations are left out."""
    d, moe_layers = s["d_model"], s["num_layers"] - s["num_dense_layers"]
    width = s["experts_per_token"] * s["d_expert"] + s["d_shared"]
    weights = s["num_layers"] * 4 * d * d + d * s["vocab_size"]
    weights += s["num_dense_layers"] * 3 * d * s["d_ff"]
    weights += moe_layers * (3 * d * width + d * s["num_experts"])
    return 6.0 * weights * tokens


def random_tokens(s: dict, rows: int, length: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, s["vocab_size"], (rows, length + 1), np.int32)


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


def dense_twin(s: dict, rows: int, length: int, **compute) -> ExperimentConfig:
    dense = dict(s, num_dense_layers=s["num_layers"], num_experts=0)
    return experiment(dense, rows, length, **compute)


def run_cpu(
    s: dict, rows: int, length: int, peak_size: int, torch_python: str, repeats: int
) -> list[dict]:
    tokens = random_tokens(s, rows, length)
    peak, peak_flops = common.matmul(peak_size, jnp.float32)
    functions = {
        "moejax": moejax_step(experiment(s, rows, length), tokens),
        "plain dense": dense_step(s, tokens),
        "dense twin": moejax_step(dense_twin(s, rows, length), tokens),
        "peak": peak,
    }
    if torch_python:
        torch = Torch(torch_python, s)
        functions |= {i: torch.timer("step", i, rows, length) for i in IMPLEMENTATIONS}
        t = common.side_by_side(functions, repeats)
        torch.close()
    else:
        t = common.side_by_side(functions, repeats)

    count = rows * length
    speed = {n: f"{count / x.wall:.0f} tokens/s ({x.cpu:.2f} CPU s)" for n, x in t.items()}
    table = []
    if torch_python:
        ratio = min(t["grouped_mm"].wall, t["eager"].wall) / t["moejax"].wall
        detail = (
            f"{speed['moejax']}; grouped_mm {speed['grouped_mm']}; eager {speed['eager']}; "
            f"{torch.versions}"
        )
        table.append(common.row("step: tokens/s / best of torch", ratio, 1.5, detail, least=True))
    else:
        print("torch was left out (--torch_python=)")
    for name, goal in (("plain dense", 1.3), ("dense twin", 1.25)):
        ratio = t["moejax"].wall / t[name].wall
        detail = f"{speed['moejax']}; {speed[name]}"
        what = {"plain dense": "plain dense JAX", "dense twin": "moejax's dense twin"}[name]
        table.append(common.row(f"step: time / {what}", ratio, goal, detail))
    achieved, best = flops(s, count) / t["moejax"].wall, peak_flops / t["peak"].wall
    detail = (
        f"{1e-9 * achieved:.0f} of {1e-9 * best:.0f} GFLOP/s, {1e-9 * flops(s, count):.1f} GFLOP"
    )
    what = f"step: useful FLOP/s / matmul {peak_size}"
    table.append(common.row(what, achieved / best, 0.5, detail, least=True))
    return table


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    common.select_platform("cpu")
    case = (TOY, TOY_ROWS, TOY_LENGTH) if TINY.value else (SIZES, ROWS, LENGTH)
    rows = run_cpu(*case, 128 if TINY.value else 2048, TORCH.value, REPEATS.value)
    common.report("Training step, float32", rows, OUTPUT.value)


if __name__ == "__main__":
    common.use_huge_pages()
    app.run(main)
