"""The MoE layer against a dense FFN of the same active FLOPs, against ragged_dot, and as experts
grow.

    python -m benchmarks.layer                     # CPU, float32, about 3 minutes
    python -m benchmarks.layer --tiny              # seconds; the same code on toy sizes, CPU

Every ratio is of medians measured in turns in one process. The layer is the dropless dispatcher
with its experts: sort, gather, FFN, combine, and all gradients (tokens, weights, parameters).
"""

import dataclasses

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import common
from benchmarks.moe_layer import TOY, Case, dense, draw_routing, layer

REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each function.")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the script.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")


SMALL = Case(2048, 256, 128, 64, 6)
LARGE = dataclasses.replace(SMALL, d_model=512, d_expert=256)


def _bound(function, args):
    compiled = jax.jit(function)
    return lambda: compiled(*args)


def run_cpu(small: Case, large: Case, experts: tuple[int, int], repeats: int) -> list[dict]:
    rows = []
    for case, goal in (
        (small, 1.25),
        (dataclasses.replace(small, zipf=1.3), 1.25),
        (large, 1.25),
    ):
        _, moe_step, moe_args = layer(case, jnp.float32)
        _, dense_step, dense_args = dense(case, jnp.float32)
        peak, peak_flops = common.matmul(2048, jnp.float32)
        t = common.side_by_side(
            {
                "moe": _bound(moe_step, moe_args),
                "dense": _bound(dense_step, dense_args),
                "peak": peak,
            },
            repeats,
        )
        kind = f"Zipf, busiest {draw_routing(case)[1]:.1f} x mean" if case.zipf else "uniform"
        detail = (
            f"{1e3 * t['moe'].wall:.1f} / {1e3 * t['dense'].wall:.1f} ms (CPU time x "
            f"{t['moe'].cpu / t['dense'].cpu:.2f}); {3e-9 * case.flops / t['moe'].wall:.0f} / "
            f"{3e-9 * case.flops / t['dense'].wall:.0f} GFLOP/s, "
            f"matmul {1e-9 * peak_flops / t['peak'].wall:.0f}"
        )
        what = f"dropless layer / dense FFN, {kind} ({case})"
        rows.append(common.row(what, t["moe"].wall / t["dense"].wall, goal, detail))

    memory = [
        common.temporary_bytes(step, *args)
        for _, step, args in (layer(small, jnp.float32), dense(small, jnp.float32))
    ]
    detail = f"{memory[0] / 1e6:.0f} / {memory[1] / 1e6:.0f} MB"
    what = "temporary memory of the layer / dense FFN's"
    rows.append(common.row(what, memory[0] / memory[1], 3.0, detail))

    few, many = (
        _bound(*layer(dataclasses.replace(small, num_experts=e), jnp.float32)[1:]) for e in experts
    )
    t = common.side_by_side({"few": few, "many": many}, repeats)
    detail = (
        f"{1e3 * t['many'].wall:.1f} / {1e3 * t['few'].wall:.1f} ms (CPU time x "
        f"{t['many'].cpu / t['few'].cpu:.2f})"
    )
    what = f"layer with {experts[1]} experts / {experts[0]}, K F fixed"
    rows.append(common.row(what, t["many"].wall / t["few"].wall, 1.3, detail))

    t = common.side_by_side(
        {
            implementation: _bound(*layer(small, jnp.float32, implementation)[1:])
            for implementation in ("ragged", "auto")
        },
        max(repeats // 5, 1),  # ragged_dot takes seconds
    )
    detail = f"{1e3 * t['ragged'].wall:.0f} / {1e3 * t['auto'].wall:.1f} ms"
    ratio = t["ragged"].wall / t["auto"].wall
    rows.append(common.row("layer on ragged_dot / dropless", ratio, 40.0, detail, least=True))
    return rows


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    common.select_platform("cpu")
    if TINY.value:
        rows = run_cpu(TOY, TOY, (2, 8), REPEATS.value)
    else:
        rows = run_cpu(SMALL, LARGE, (8, 256), REPEATS.value)
    common.report("MoE layer, float32, forward and backward", rows, OUTPUT.value)


if __name__ == "__main__":
    common.use_huge_pages()
    app.run(main)
