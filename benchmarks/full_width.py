"""Decoding and prefill at full width against transformers, on models of the same sizes with random weights.

    python -m benchmarks.full_width --torch_python=PATH     # PATH: an interpreter with torch
    python -m benchmarks.full_width --tiny                  # seconds; the same code on toy sizes

A few layers of DeepSeek-V2-Lite and of Qwen1.5-MoE-A2.7B, as wide as they are published, with a small
vocabulary, in float32 and in bfloat16 (weights and computation, on both sides). Ratios are of medians measured
in turns: moejax, then transformers with each of its ways through the experts (a process of its own), and again;
the best of those counts. Decoding is the time of `--new` tokens less that of one.
"""

import dataclasses
import functools
import os
import sys

import jax
import numpy as np
from absl import app, flags

from benchmarks import common
from benchmarks.qwen2_moe import IMPLEMENTATIONS, Torch
from benchmarks.random_weights import random_params
from moejax.config import ComputeConfig, ModelConfig
from moejax.evals.generate import generate, prepare
from moejax.models import transformer
from moejax.models.zoo import config_to_hf, load_preset

PRESETS = flags.DEFINE_list("presets", ["deepseek-v2-lite", "qwen1.5-moe-a2.7b"], "Models.")
LAYERS = flags.DEFINE_integer("layers", 2, "Of each; DeepSeek's first one is dense.")
DTYPES = flags.DEFINE_list("dtypes", ["float32", "bfloat16"], "Of weights and computation.")
PROMPT = flags.DEFINE_integer("prompt", 512, "Tokens of the prompt; of a batch at most 32.")
NEW = flags.DEFINE_integer("new", 17, "Tokens to generate.")
TORCH = flags.DEFINE_string(
    "torch_python", sys.executable, "A Python that has torch and transformers."
)
REPEATS = flags.DEFINE_integer("repeats", 3, "Timed calls of each.")
TINY = flags.DEFINE_bool("tiny", False, "Toy sizes, to test the script.")
OUTPUT = flags.DEFINE_string("json", "", "Write the results as JSON to this file.")

GOALS = {
    1: (2.0, 1.2),
    8: (1.3, None),
}  # rows: tokens/s of decoding and of prefill beside the best of torch


def config(preset: str) -> ModelConfig:
    cfg = dataclasses.replace(load_preset(preset), num_layers=LAYERS.value, vocab_size=512)
    if not TINY.value:
        return cfg
    shared = 32 * cfg.moe.shared_experts
    moe = dataclasses.replace(
        cfg.moe, num_experts=8, d_expert=32, d_shared=shared, experts_per_token=2
    )
    return dataclasses.replace(cfg, d_model=64, d_ff=64, moe=moe)


def measure(preset: str, dtype: str) -> list[dict]:
    cfg = config(preset)
    family = "deepseek_v2" if preset.startswith("deepseek") else "qwen2_moe"
    hf = config_to_hf(cfg, family)
    params = prepare(random_params(cfg, dtype), dtype)
    state, compute = transformer.init_router_state(cfg), ComputeConfig(dtype=dtype)
    peer, new, rows = Torch(TORCH.value, {"hf": hf, "dtype": dtype}), NEW.value, []
    print(f"peer: {peer.versions}", flush=True)
    for batch, (decode_goal, prefill_goal) in GOALS.items():
        prompt = PROMPT.value if prefill_goal else min(PROMPT.value, 32)
        prompts = np.random.default_rng(0).integers(0, cfg.vocab_size, (batch, prompt)).tolist()
        ours = functools.partial(generate, params, state, cfg, prompts, compute=compute)
        functions = {("moejax", n): functools.partial(ours, n) for n in (1, new)} | {
            (i, n): peer.timer("generate", i, batch, prompt, n)
            for i in IMPLEMENTATIONS
            for n in ((0, 1, new) if prefill_goal else (1, new))
        }
        t = common.side_by_side(functions, REPEATS.value)
        decode = {i: common.less(t[i, new], t[i, 1]) for i in ("moejax", *IMPLEMENTATIONS)}
        where = f"{preset}, {dtype}, batch {batch}"
        rows.append(common.beside(f"decode, {where}", batch * (new - 1), decode, decode_goal))
        if prefill_goal:
            prefill = {"moejax": t["moejax", 1], **{i: t[i, 0] for i in IMPLEMENTATIONS}}
            rows.append(
                common.beside(f"prefill {prompt}, {where}", batch * prompt, prefill, prefill_goal)
            )
        print(*rows[-1 - bool(prefill_goal) :], sep="\n", flush=True)
    peer.close()
    del params
    return rows


def main(argv):
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {argv[1:]}")
    os.environ["JAX_PLATFORMS"] = "cpu"
    common.select_platform("cpu")
    rows = []
    for preset in PRESETS.value:
        for dtype in DTYPES.value:
            rows += measure(preset, dtype)
            jax.clear_caches()
    common.report(f"{LAYERS.value} layers at full width, beside transformers", rows, OUTPUT.value)


if __name__ == "__main__":
    common.use_huge_pages()
    app.run(main)
