"""The MoE layer against a dense FFN of the same active FLOPs, against ragged_dot, and as experts
grow.

    python -m benchmarks.layer                     # CPU, float32, about 3 minutes
    python -m benchmarks.layer --platform=gpu      # one GPU, bfloat16: ms and TFLOP/s of each back end
    python -m benchmarks.layer --tiny              # seconds; the same code on toy sizes, CPU
    python -m benchmarks.layer --platform=gpu --tiny --on_cpu   # the GPU's code path on a CPU

Every ratio is of medians measured in turns in one process. The layer is the dropless dispatcher
with its experts: sort, gather, FFN, combine, and all gradients (tokens, weights, parameters).
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import common
from moejax.config import MoEConfig
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.experts import activation, expert_param_specs, ffn, ffn_param_specs
from moejax.params import init_params
from moejax.routers.contract import Routing

PLATFORM = flags.DEFINE_enum("platform", "cpu", ["cpu", "gpu"], "Which benchmark to run.")
REPEATS = flags.DEFINE_integer("repeats", 15, "Timed calls of each function.")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the script.")
ON_CPU = flags.DEFINE_bool("on_cpu", False, "Run the GPU benchmark on the CPU, to test the script.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes of a layer: T tokens, width D, E experts of width F, K of them per token."""

    tokens: int
    d_model: int
    d_expert: int
    num_experts: int
    top_k: int
    zipf: float = 0.0  # exponent of the experts' popularity; 0 = uniform

    @property
    def flops(self) -> float:
        """Of the forward pass; the backward pass has twice as many."""
        return 6.0 * self.tokens * self.top_k * self.d_model * self.d_expert

    def __str__(self):
        return (
            f"T {self.tokens}, D {self.d_model}, F {self.d_expert}, E {self.num_experts}, "
            f"K {self.top_k}"
        )


SMALL = Case(2048, 256, 128, 64, 6)
LARGE = dataclasses.replace(SMALL, d_model=512, d_expert=256)
SWIGLU = activation("swiglu", 0.0)
GPU_CASES = (Case(4096, 7168, 2048, 32, 8), Case(4096, 4096, 14336, 8, 2))
TOY = Case(64, 16, 8, 4, 2)


def draw_routing(case: Case) -> tuple[Routing, float]:
    """K different experts for every token, and the busiest expert's load over the mean.

    Gumbel noise on log popularity and the K best: sampling without replacement.
    """
    rng = np.random.default_rng(0)
    log_popularity = -case.zipf * np.log(np.arange(1, case.num_experts + 1))
    scores = log_popularity + rng.gumbel(size=(case.tokens, case.num_experts))
    index_TK = np.argsort(-scores, axis=1)[:, : case.top_k].astype(np.int32)
    weights_TK = rng.random((case.tokens, case.top_k), np.float32)
    load = np.bincount(index_TK.ravel(), minlength=case.num_experts)
    return Routing(jnp.asarray(index_TK), jnp.asarray(weights_TK)), load.max() / load.mean()


def layer(case: Case, dtype, implementation: str = "auto"):
    """(forward, forward and backward) of the MoE layer as functions of its arguments, and those."""
    moe = MoEConfig(
        num_experts=case.num_experts,
        experts_per_token=case.top_k,
        d_expert=case.d_expert,
    )
    specs = expert_param_specs(moe, case.d_model, std=case.d_model**-0.5)
    params = init_params(specs, jax.random.key(0))
    params = jax.tree.map(lambda p: p.astype(dtype), params)
    x_TD = jax.random.normal(jax.random.key(1), (case.tokens, case.d_model), dtype)
    routing, _ = draw_routing(case)

    def forward(params, x_TD, weights_TK, index_TK):
        routing = Routing(index_TK, weights_TK)
        return dropless(params, x_TD, routing, SWIGLU, implementation)[0]

    return forward, _with_gradients(forward, 3), (params, x_TD, routing[1], routing[0])


def dense(case: Case, dtype):
    """The same for a dense SwiGLU FFN of width K F."""
    specs = ffn_param_specs(
        case.d_model, case.top_k * case.d_expert, "swiglu", False, std=case.d_model**-0.5
    )
    params = jax.tree.map(lambda p: p.astype(dtype), init_params(specs, jax.random.key(0)))
    x_TD = jax.random.normal(jax.random.key(1), (case.tokens, case.d_model), dtype)

    def forward(params, x_TD):
        return ffn(params, x_TD, SWIGLU)

    return forward, _with_gradients(forward, 2), (params, x_TD)


def _with_gradients(forward, num_arguments):
    """Value and all gradients of the mean square of `forward`."""

    def loss(*args):
        return jnp.mean(jnp.square(forward(*args).astype(jnp.float32)))

    return jax.value_and_grad(loss, argnums=tuple(range(num_arguments)))


def _bound(function, args):
    compiled = jax.jit(function)
    return lambda: compiled(*args)


def run_cpu(small: Case, large: Case, experts: tuple[int, int], repeats: int) -> list[dict]:
    rows = []
    for case, goal in (
        (small, 1.5),
        (dataclasses.replace(small, zipf=1.3), 2.0),
        (large, 1.35),
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
    rows.append(common.row(what, t["many"].wall / t["few"].wall, 1.4, detail))

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


def run_gpu(cases: tuple[Case, ...], peak_size: int, repeats: int) -> list[dict]:
    """ms and TFLOP/s of each back end."""
    implementations = ["ragged"]
    if importlib.util.find_spec("tokamax"):
        implementations.append("tokamax")
    else:
        print("tokamax is not installed (pip install 'moejax[kernels]'): ragged_dot only")
    rows = []
    for case in cases:
        peak, peak_flops = common.matmul(peak_size, jnp.bfloat16)
        dense_forward, dense_step, dense_args = dense(case, jnp.bfloat16)
        functions = {
            "peak": peak,
            "dense forward": _bound(dense_forward, dense_args),
            "dense": _bound(dense_step, dense_args),
        }
        for implementation in implementations:
            forward, step, args = layer(case, jnp.bfloat16, implementation)
            functions[f"{implementation} forward"] = _bound(forward, args)
            functions[implementation] = _bound(step, args)
        t = {n: s.wall for n, s in common.side_by_side(functions, repeats).items()}
        peak_tflops = 1e-12 * peak_flops / t["peak"]
        for name in ("dense", *implementations):
            tflops = 3e-12 * case.flops / t[name]
            rows.append(
                {
                    "sizes": str(case),
                    "back end": name,
                    "forward ms": f"{1e3 * t[f'{name} forward']:.2f}",
                    "backward ms": f"{1e3 * (t[name] - t[f'{name} forward']):.2f}",
                    "TFLOP/s": f"{tflops:.3g}",
                    "of matmul peak": f"{tflops / peak_tflops:.1%} of {peak_tflops:.3g}",
                }
            )
    return rows


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    common.select_platform("cpu" if ON_CPU.value else PLATFORM.value)
    if PLATFORM.value == "gpu":
        cases, peak_size = ((TOY,), 128) if TINY.value else (GPU_CASES, 8192)
        rows = run_gpu(cases, peak_size, REPEATS.value)
        common.report("MoE layer, bfloat16", rows, OUTPUT.value)
        return
    if TINY.value:
        rows = run_cpu(TOY, TOY, (2, 8), REPEATS.value)
    else:
        rows = run_cpu(SMALL, LARGE, (8, 256), REPEATS.value)
    common.report("MoE layer, float32, forward and backward", rows, OUTPUT.value)


if __name__ == "__main__":
    common.use_huge_pages()
    app.run(main)
