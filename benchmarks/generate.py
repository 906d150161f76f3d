"""Prefill and greedy decoding against transformers' `generate`, and speculative decoding against plain.

    python -m benchmarks.generate --torch_python=PATH     # CPU, float32; PATH: an interpreter with torch
    python -m benchmarks.generate --tiny                  # seconds; the same code on toy sizes

Ratios are of medians measured in turns: moejax, then each expert implementation of transformers (a process
of its own), and again. Decoding is the time of `--new` tokens less that of one token, on both sides.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags

from benchmarks import common
from benchmarks.qwen2_moe import IMPLEMENTATIONS, SIZES, TOY, Torch, model_config
from moejax.config import ModelConfig, ObjectiveConfig
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


def against_torch(sizes: dict, prompt: int, new: int, batches, repeats: int) -> list[dict]:
    cfg = model_config(sizes)
    params = prepare(init_params(transformer.param_specs(cfg), jax.random.key(0)))
    state = transformer.init_router_state(cfg)
    peer = Torch(TORCH_PYTHON.value, sizes)
    print(f"peer: {peer.versions}", flush=True)
    rng = np.random.default_rng(0)
    rows = []
    for batch, decode_goal, prefill_goal in batches:
        prompts = rng.integers(0, cfg.vocab_size, (batch, prompt)).tolist()
        ours = functools.partial(generate, params, state, cfg, prompts)
        functions = {("moejax", n): functools.partial(ours, n) for n in (1, new)} | {
            (i, n): peer.timer("generate", i, batch, prompt, n)
            for i in IMPLEMENTATIONS
            for n in (0, 1, new)
        }
        t = common.side_by_side(functions, repeats)
        prefill = {"moejax": t["moejax", 1], **{i: t[i, 0] for i in IMPLEMENTATIONS}}
        decode = {i: common.less(t[i, new], t[i, 1]) for i in ("moejax", *IMPLEMENTATIONS)}
        where = f"batch {batch}, prompt {prompt}"
        rows.append(
            common.beside(
                f"decode {new - 1} tokens, {where}", batch * (new - 1), decode, decode_goal
            )
        )
        if prefill_goal:
            rows.append(common.beside(f"prefill, {where}", batch * prompt, prefill, prefill_goal))
    peer.close()
    return rows


def speculation(sizes: dict, new: int, steps: int, repeats: int) -> list[dict]:
    """Plain and speculative greedy decoding of a model that learned to count."""
    cfg = model_config(sizes, mtp_depth=1)
    params, state = learn_to_count(cfg, steps)
    params = prepare(params)
    prompt = [(7 * i) % cfg.vocab_size for i in range(1, 9)]
    out = []
    for batch in (1, 8):
        stats = Stats()
        call = functools.partial(generate, params, state, cfg, [prompt] * batch)
        assert call(new) == call(new, speculative_decoding=True, stats=stats)
        fast = functools.partial(call, speculative_decoding=True)
        functions = {
            (name, n): functools.partial(f, n)
            for name, f in (("plain", call), ("moejax", fast))
            for n in (1, new)
        }
        t = common.side_by_side(functions, repeats)
        spent = {name: common.less(t[name, new], t[name, 1]) for name in ("moejax", "plain")}
        accepted = f"{stats.accepted / stats.passes:.0%} accepted"
        what = f"speculative / plain decoding, batch {batch}, {accepted}"
        out.append(common.beside(what, batch * (new - 1), spent, 1.0))
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
        loss = lambda p: loss_fn(p, state, batch, cfg, objective=ObjectiveConfig())[0]  # noqa: E731
        grads = jax.grad(loss)(params)
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
