"""What one more token costs behind a long context, by the cost model and by the compiled program.

    python -m benchmarks.context --plot=docs/images/context.png

Draws published models from 1k to 1M tokens, and beside them toy models of each kind of attention, with dots:
the FLOPs of all matrix products in a decoding step as moejax runs it, and the bytes of the cache that it fills.
Prints how far dots and curves are apart, at the longest context and at each. Nothing is timed, so it may run
beside other work.
"""

import dataclasses
import functools
import math
import sys

import jax
import jax.extend
import jax.numpy as jnp
from absl import app, flags
from matplotlib.figure import Figure

from benchmarks import common
from moejax.config import AttentionConfig, ComputeConfig, ModelConfig, RopeConfig
from moejax.cost import context_plot
from moejax.cost.architecture import of_model
from moejax.cost.models import load_architecture
from moejax.models import transformer
from moejax.models.cache import init_layers
from moejax.params import abstract_params

PLOT = flags.DEFINE_string("plot", "", "Draw the curves into this file (.png, .svg, ..).")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")

PUBLISHED = ("llama-2-70b", "deepseek-v2", "deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash")
CONTEXTS = tuple(2**n for n in range(8, 15))
LATENT = AttentionConfig(
    kind="mla",
    q_lora_rank=48,
    kv_lora_rank=32,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=16,
)
ATTENTIONS = {
    "multi-head": AttentionConfig(),
    "grouped-query": AttentionConfig(num_kv_heads=1),
    "latent": LATENT,
    "latent, indexed": dataclasses.replace(
        LATENT, kind="dsa", index_heads=4, index_head_dim=32, index_topk=128
    ),
    "compressed": AttentionConfig(
        kind="compressed",
        num_heads=4,
        num_kv_heads=1,
        head_dim=32,
        layer_kinds=("sliding", "csa", "hca", "csa"),
        sliding_window=64,
        csa_rate=4,
        hca_rate=32,
        q_lora_rank=48,
        qk_rope_head_dim=8,
        o_groups=2,
        o_lora_rank=16,
        index_heads=4,
        index_head_dim=16,
        index_topk=64,
        rope=RopeConfig(interleaved=True),
    ),
}


def toy(attention: AttentionConfig) -> ModelConfig:
    """A dense model with this attention."""
    return ModelConfig(vocab_size=256, d_ff=256, max_seq_len=CONTEXTS[-1], attention=attention)


def measured(cfg: ModelConfig, context: int) -> tuple[float, float]:
    """(FLOPs of one decoded token behind `context` others, bytes of the cache in BF16): the first of the
    products in the traced program, the second of the arrays."""
    caches = jax.eval_shape(functools.partial(init_layers, cfg, 1, context, dtype=jnp.bfloat16))
    params = jax.eval_shape(transformer.unstack, abstract_params(transformer.param_specs(cfg)))

    def step(params, caches, token_BS, position_BS):
        out = transformer.forward(
            params,
            {},
            token_BS,
            cfg,
            compute=ComputeConfig(scan_layers=False),
            positions_BS=position_BS,
            cache=caches,
        )
        return transformer.logits(params, out.hidden_BSD), out.cache

    one = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    flops = product_flops(jax.make_jaxpr(step)(params, caches, one, one).jaxpr)
    sizes = [math.prod(a.shape) * a.dtype.itemsize for a in jax.tree.leaves(caches)]
    return flops, float(sum(sizes))


def product_flops(jaxpr) -> float:
    """FLOPs of the matrix products of a program without loops: 2 for a multiply-add."""
    total = 0.0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            lengths = [eqn.invars[0].aval.shape[d] for d in contracted]
            total += 2 * math.prod(lengths) * math.prod(eqn.outvars[0].aval.shape)
        for inner in jax.extend.core.jaxprs_in_params(eqn.params):
            total += product_flops(inner)
    return total


def run(contexts: tuple[int, ...], path: str) -> list[dict]:
    models = {name: of_model(toy(a), name) for name, a in ATTENTIONS.items()}
    points = {n: {c: measured(toy(ATTENTIONS[n]), c) for c in contexts} for n in models}
    rows = []
    for name, at in points.items():
        for panel, what in enumerate(("FLOPs of a decoded token", "bytes of the cache")):
            ratios = [
                at[c][panel] / (context_plot.decoded(models[name], c)[panel] or math.nan)
                for c in contexts
            ]
            detail = ", ".join(f"{c}: {r:.3f}" for c, r in zip(contexts, ratios))
            rows.append(
                common.row(f"{name}, {what}: counted / cost model", ratios[-1], 1.05, detail)
            )
    if path:
        figure = Figure(figsize=(11, 8.4), layout="constrained")
        above, below = figure.subplots(2, 2)
        context_plot.draw(
            above, {n: load_architecture(n) for n in PUBLISHED}, context_plot.CONTEXTS
        )
        context_plot.draw(below, models, contexts, points)
        for axes in below:
            axes.set_title(f"toy models: {axes.get_title(loc='left')}", loc="left", fontsize=10)
        figure.savefig(path, dpi=110, facecolor="white")
        print(f"wrote {path}", file=sys.stderr)
    return rows


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    common.select_platform("cpu")
    common.report("A longer context", run(CONTEXTS, PLOT.value), OUTPUT.value)


if __name__ == "__main__":
    app.run(main)
