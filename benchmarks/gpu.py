"""Everything worth knowing of one GPU, in one short run.

    python -m benchmarks.gpu --json=gpu.json         # one H100 or like it, bfloat16
    python -m benchmarks.gpu --tiny --on_cpu         # toy sizes on a CPU, to test the script

Seven parts: the machine and its matmul peak; what the kernels compute, beside float32; the three grouped
products by every kernel that is here; the MoE layer beside a dense FFN of the same FLOPs; attention; the
training step of a slice of a 30B mixture, its tokens/s and share of the peak; decoding. Each part prints its
table when it is done, and the JSON is written again after each, so that a machine that is taken away leaves
what was measured. What fails is a line that says so, and the parts behind it still run. No part begins after
--minutes.

Goals: layer ≤ 1.5 of dense, step ≥ 28% of the matmul peak.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import common, gpu_checks
from benchmarks import moe_layer as layers
from benchmarks.training import moejax_step
from moejax.attention.contract import Call, Where
from moejax.attention.core import attend, seen
from moejax.config import (
    AttentionConfig,
    ComputeConfig,
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    MoEConfig,
)
from moejax.cost.receipt import model_flops_per_token
from moejax.evals.generate import Stats, generate, prepare
from moejax.models import transformer
from moejax.moe.grouped_matmul import here, ragged, tokamax_kernels
from moejax.moe.grouped_matmul.products import Products
from moejax.params import abstract_params

TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the script.")
ON_CPU = flags.DEFINE_bool("on_cpu", False, "Run on the CPU, to test the script.")
MINUTES = flags.DEFINE_float("minutes", 9.0, "Begin no part after so many minutes.")
REPEATS = flags.DEFINE_integer("repeats", 10, "Timed calls of each function.")
ONLY = flags.DEFINE_list("only", [], "Only these parts, each by the first word of its title.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of a grouped product: R rows of E experts, D -> F."""

    name: str
    rows: int
    experts: int
    d: int
    f: int

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.d * self.f

    @property
    def expanded(self) -> float:
        """Bytes of the larger operand as XLA expands it, every row for every expert."""
        return 2.0 * self.rows * self.experts * max(self.d, self.f)


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of every part."""

    peak: int
    shapes: tuple[Shape, ...]
    layers: tuple[layers.Case, ...]
    model: ModelConfig
    rows: int
    length: int
    decode: tuple[tuple[int, int, int], ...]  # batch, prompt, new tokens
    attention: tuple[int, ...]


def slice_of_30b(layers: int) -> ModelConfig:
    """Layers of a mixture as wide as Qwen3-30B-A3B, all of them MoE, with a small vocabulary."""
    return ModelConfig(
        vocab_size=32_768,
        d_model=2048,
        num_layers=layers,
        num_dense_layers=0,
        attention=AttentionConfig(num_heads=32, num_kv_heads=4, head_dim=128, qk_norm="head"),
        moe=MoEConfig(num_experts=128, experts_per_token=8, d_expert=768),
        max_seq_len=8192,
    )


REAL = Sizes(
    peak=8192,
    shapes=(
        Shape("30B up", 131_072, 128, 2048, 768),
        Shape("30B down", 131_072, 128, 768, 2048),
        Shape("V3 split", 32_768, 256, 7168, 1024),
        Shape("small", 8192, 32, 1024, 512),
    ),
    layers=(layers.Case(16_384, 2048, 768, 128, 8), layers.Case(16_384, 2048, 768, 128, 8, 1.0)),
    model=slice_of_30b(4),
    rows=4,
    length=4096,
    decode=((1, 128, 65), (32, 128, 65)),
    attention=(4096, 16_384),
)
TOY = Sizes(
    peak=64,
    shapes=(Shape("toy", 64, 4, 16, 8),),
    layers=(layers.TOY,),
    model=ModelConfig(
        vocab_size=64,
        d_model=32,
        num_layers=2,
        num_dense_layers=0,
        attention=AttentionConfig(num_heads=2, num_kv_heads=1, head_dim=16),
        moe=MoEConfig(num_experts=4, experts_per_token=2, d_expert=16),
        max_seq_len=64,
    ),
    rows=2,
    length=16,
    decode=((1, 4, 5),),
    attention=(32,),
)

# --------------------------------------------------------------------------------------------------
# The parts: each yields lines as it has them.


def machine(s: Sizes) -> Iterator[dict]:
    for package in ("jax", "jaxlib", "tokamax", "triton", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12"):
        try:
            yield {"what": package, "is": importlib.metadata.version(package)}
        except importlib.metadata.PackageNotFoundError:
            yield {"what": package, "is": "not installed"}
    yield {"what": f"bfloat16 matmul {s.peak}", "is": f"{1e-12 * peak_of(s):.4g} TFLOP/s"}


@functools.cache
def peak_of(s: Sizes) -> float:
    """FLOP/s of a square matmul in bfloat16."""
    product, flops = common.matmul(s.peak, jnp.bfloat16)
    return flops / common.side_by_side({"peak": product}, REPEATS.value)["peak"].wall


def kernels() -> dict[str, Products]:
    """The three products by each kernel that is here."""
    out = {"XLA ragged_dot": ragged.PRODUCTS}
    if importlib.util.find_spec("tokamax"):
        for kernel in ("mosaic", "triton"):
            by = dict.fromkeys(tokamax_kernels.ON_GPU, (kernel,))
            out[f"tokamax {kernel}"] = tokamax_kernels.products_by(by)
    return out


def checks(s: Sizes) -> Iterator[dict]:
    """What the kernels compute, with gradients, beside float32."""
    del s
    for line, error, args in gpu_checks.cases():
        yield line | tried(error, *args)


def products(s: Sizes) -> Iterator[dict]:
    """TFLOP/s of each product, and how far it is from float32 on rows of every group."""
    for shape in s.shapes:
        for zipf in (0.0, 1.0):
            sizes_E = group_sizes(shape, zipf)
            keys = jax.random.split(jax.random.key(0), 3)
            x_RD = jax.random.normal(keys[0], (shape.rows, shape.d), jnp.bfloat16)
            w_EDF = jax.random.normal(keys[1], (shape.experts, shape.d, shape.f), jnp.bfloat16)
            y_RF = jax.random.normal(keys[2], (shape.rows, shape.f), jnp.bfloat16)
            load = "Zipf, some empty" if zipf else "even"
            for name, three in kernels().items():
                if name.startswith("XLA") and shape.expanded > 8e9:
                    continue
                args = {"forward": (x_RD, w_EDF), "dx": (y_RF, w_EDF), "dW": (x_RD, y_RF)}
                for (what, (a, b)), product in zip(args.items(), three):
                    line = {"shape": shape.name, "groups": load, "product": what, "kernel": name}
                    yield line | tried(timed_product, product, a, b, sizes_E, shape, what)


def timed_product(product, a, b, sizes_E, shape: Shape, what: str) -> dict:
    run = jax.jit(product)
    error = product_error(run(a, b, sizes_E), a, b, sizes_E, what)
    wall = common.side_by_side({"it": lambda: run(a, b, sizes_E)}, REPEATS.value)["it"].wall
    tflops = f"{1e-12 * shape.flops / wall:.4g}"
    return {"ms": f"{1e3 * wall:.3f}", "TFLOP/s": tflops, "relative error": f"{error:.1e}"}


def group_sizes(shape: Shape, zipf: float) -> jax.Array:
    """Rows of each expert: even, or falling as 1/n with every eighth expert empty."""
    share_E = np.arange(1, shape.experts + 1) ** -zipf
    if zipf:
        share_E[3::8] = 0
    sizes_E = np.floor(share_E / share_E.sum() * shape.rows).astype(np.int32)
    sizes_E[-1] += shape.rows - sizes_E.sum()
    return jnp.asarray(sizes_E)


def product_error(out, a, b, sizes_E, what: str) -> float:
    """The largest difference to float32 over the largest value: of 64 rows, or of four experts' gradients."""
    ends_E = np.cumsum(np.asarray(sizes_E))
    if what == "dW":
        chosen, want = [0, 1, len(ends_E) // 2, len(ends_E) - 1], []
        for e in chosen:
            rows = slice(int(ends_E[e] - sizes_E[e]), int(ends_E[e]))
            want.append(np.asarray(a[rows], np.float32).T @ np.asarray(b[rows], np.float32))
        got, want = np.asarray(out[np.array(chosen)], np.float32), np.stack(want)
    else:
        rows = np.unique(np.linspace(0, len(a) - 1, 64).astype(int))
        expert = np.searchsorted(ends_E, rows, side="right")
        w = np.asarray(b[expert], np.float32)
        w = w if what == "forward" else w.swapaxes(1, 2)
        want = np.einsum("ri,rio->ro", np.asarray(a[rows], np.float32), w)
        got = np.asarray(out[rows], np.float32)
    return float(np.abs(got - want).max() / max(np.abs(want).max(), 1e-30))


def layer(s: Sizes) -> Iterator[dict]:
    """The layer with all gradients, as 'auto' computes it."""
    for case in s.layers:
        _, dense_step, dense_args = layers.dense(case, jnp.bfloat16)
        _, step, args = layers.layer(case, jnp.bfloat16)
        line = {"sizes": f"{case}, {'Zipf' if case.zipf else 'uniform'}", "kernel": here()}
        yield line | tried(timed_layer, step, args, dense_step, dense_args, case)


def timed_layer(step, args, dense_step, dense_args, case: layers.Case) -> dict:
    step, dense_step = jax.jit(step), jax.jit(dense_step)
    functions = {"layer": lambda: step(*args), "dense": lambda: dense_step(*dense_args)}
    t = common.side_by_side(functions, REPEATS.value)
    ratio = t["layer"].wall / t["dense"].wall
    return {
        "ms": f"{1e3 * t['layer'].wall:.2f}",
        "TFLOP/s": f"{3e-12 * case.flops / t['layer'].wall:.3g}",
        "time / dense": f"{ratio:.2f} {'ok' if ratio <= 1.5 else 'missed (1.5)'}",
    }


def step(s: Sizes) -> Iterator[dict]:
    """The whole training step, AdamW and balance loss included."""
    cfg = ExperimentConfig(
        model=s.model,
        compute=ComputeConfig(dtype="bfloat16"),
        data=DataConfig(batch_size=s.rows, seq_len=s.length),
    )
    yield {"tokens": s.rows * s.length} | tried(timed_step, cfg, s)


def timed_step(cfg: ExperimentConfig, s: Sizes) -> dict:
    tokens = np.random.default_rng(0).integers(
        0, s.model.vocab_size, (s.rows, s.length + 1), np.int32
    )
    t = common.side_by_side({"step": moejax_step(cfg, tokens)}, REPEATS.value)["step"]
    speed = s.rows * s.length / t.wall
    share = speed * model_flops_per_token(cfg) / peak_of(s)
    return {
        "ms": f"{1e3 * t.wall:.1f}",
        "tokens/s": f"{speed:,.0f}",
        "of the matmul peak": f"{share:.1%} {'ok' if share >= 0.28 else 'missed (28%)'}",
        "peak GiB": peak_memory(),
    }


def peak_memory() -> str:
    stats = jax.devices()[0].memory_stats() or {}
    return f"{stats['peak_bytes_in_use'] / 2**30:.1f}" if "peak_bytes_in_use" in stats else "-"


def decode(s: Sizes) -> Iterator[dict]:
    """Greedy decoding with random weights in bfloat16."""
    # Drawn in bfloat16: float32 ones would not fit beside them.
    leaves, structure = jax.tree.flatten(abstract_params(transformer.param_specs(s.model)))
    keys = list(jax.random.split(jax.random.key(0), len(leaves)))
    draw = jax.jit(
        lambda k, shape: 0.02 * jax.random.normal(k, shape, jnp.bfloat16), static_argnums=1
    )
    drawn = structure.unflatten([draw(k, a.shape) for k, a in zip(keys, leaves)])
    params = prepare(drawn, "bfloat16")
    state = transformer.init_router_state(s.model)
    for batch, prompt, new in s.decode:
        line = {"batch": batch, "prompt": prompt, "new tokens": new}
        yield line | tried(timed_decode, params, state, s.model, batch, prompt, new)


def timed_decode(params, state, cfg: ModelConfig, batch: int, prompt: int, new: int) -> dict:
    prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, prompt)).tolist()
    call = functools.partial(
        generate, params, state, cfg, prompts, new, compute=ComputeConfig(dtype="bfloat16")
    )
    call()  # compiles
    stats = Stats()
    call(stats=stats)
    speed = (stats.new_tokens - stats.first_tokens) / stats.decode_seconds
    return {
        "prefill tokens/s": f"{stats.prompt_tokens / stats.prefill_seconds:,.0f}",
        "tokens/s": f"{speed:,.0f}",
        "ms a token of a row": f"{1e3 * batch / speed:.2f}",
    }


def attentions(s: Sizes) -> Iterator[dict]:
    """One sequence, 32 query heads on 4 key heads of 128, with gradients."""
    for length in s.attention:
        shape = (1, length, 32, 128) if not TINY.value else (1, length, 4, 8)
        q = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
        k, v = (
            jax.random.normal(jax.random.key(i), (1, 4, length, shape[-1]), q.dtype) for i in (1, 2)
        )
        at = jnp.arange(length)[None]

        def ours(q, k, v, at=at, block=0):
            sight = seen({"k": k, "v": v}, Call(Where(at, None, None))).sight
            return attend(q, k, v, sight, q.shape[-1] ** -0.5, block=block)

        def theirs(q, k, v, kernel):
            k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
            return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=kernel)

        candidates = {
            "moejax": ours,
            "moejax in blocks": functools.partial(ours, block=16 if TINY.value else 1024),
            "XLA, all scores": functools.partial(theirs, kernel="xla"),
            "cuDNN": functools.partial(theirs, kernel="cudnn"),
        }
        for name, function in candidates.items():
            yield {"tokens": length, "attention": name} | tried(timed_attention, function, q, k, v)


def timed_attention(function, q, k, v) -> dict:
    loss = lambda *a: jnp.mean(jnp.square(function(*a).astype(jnp.float32)))  # noqa: E731
    grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
    wall = common.side_by_side({"it": lambda: grads(q, k, v)}, REPEATS.value)["it"].wall
    flops = 7.0 * q.shape[1] ** 2 * q.shape[2] * q.shape[3]  # 2 + 5 products, half of them masked
    return {"ms": f"{1e3 * wall:.2f}", "TFLOP/s": f"{1e-12 * flops / wall:.3g}"}


PARTS: dict[str, Callable[[Sizes], Iterator[dict]]] = {
    "Machine": machine,
    "Checks": checks,
    "Grouped products": products,
    "Layer of experts with gradients": layer,
    "Attention with gradients": attentions,
    "Training step": step,
    "Decoding": decode,
}


def tried(measure: Callable[..., dict], *args: Any) -> dict:
    """What `measure` gives; or, if a kernel does not take these sizes or this device, why."""
    try:
        return measure(*args)
    except Exception as e:  # one kernel that fails must not end the others
        return failure(e)


def tried_part(part: Callable[[Sizes], Iterator[dict]], sizes: Sizes) -> list[dict]:
    """The lines of a part, up to where it fails."""
    rows = []
    try:
        rows.extend(part(sizes))  # keeps what came before an error
    except Exception as e:
        rows.append(failure(e))
    return rows


def failure(e: Exception) -> dict:
    return {"failed": f"{type(e).__name__}: {e}"[:160].replace("\n", " ")}


def run(sizes: Sizes, minutes: float, output: str) -> list[dict]:
    """All parts as tables: title, machine, rows."""
    tables, start = [], time.monotonic()
    unknown = set(ONLY.value) - {title.split()[0] for title in PARTS}
    if unknown:
        raise app.UsageError(f"--only={','.join(unknown)}: the titles are {', '.join(PARTS)}")
    for title, part in PARTS.items():
        if ONLY.value and title.split()[0] not in ONLY.value:
            continue
        if time.monotonic() - start > 60 * minutes:
            print(f"\n{title}: left out, --minutes={minutes:g} are over")
            continue
        rows = tried_part(part, sizes)
        columns = list(dict.fromkeys(c for r in rows for c in r))
        rows = [{c: r.get(c, "") for c in columns} for r in rows]
        common.report(f"{title}, bfloat16", rows, "")
        tables.append({"title": title, "machine": common.describe_machine(), "rows": rows})
        if output:
            common.write_json(output, tables)
    return tables


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    common.select_platform("cpu" if ON_CPU.value else "gpu")
    run(TOY if TINY.value else REAL, MINUTES.value, OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
