"""`moejax plan --verify`: the plan's predictions against XLA's analysis and a short real run."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ExperimentConfig
from moejax.cost import memory
from moejax.cost.architecture import of_model
from moejax.cost.flops import flops_per_token
from moejax.cost.hardware import total_peak
from moejax.cost.receipt import error_text, plan_run, receipt
from moejax.models import transformer
from moejax.models.loss import loss_fn
from moejax.params import abstract_params
from moejax.sharding import make_layout, place_whole
from moejax.text import Table, bytes_text, flops_text
from moejax.train.state import abstract_state, create_state, state_shardings
from moejax.train.step import compile_step

FIELDS = ("tokens", "targets", "segment_ids", "positions", "loss_mask", "domain")


def verify(cfg: ExperimentConfig, *, steps: int = 3) -> list[Table]:
    """Compiles the real step of `cfg` on this machine's devices, runs it `steps` times on random
    tokens, and compares FLOPs, memory and speed with the plan."""
    layout = make_layout(cfg)
    plan = plan_run(cfg, layout)
    compiled = _compile(cfg, layout)
    flops_rows = compare_flops(cfg)
    memory_rows = compare_memory(plan.memory, compiled.memory_analysis())
    seconds = measure(cfg, compiled, layout, steps)
    tokens = cfg.data.batch_size * cfg.data.seq_len
    peak = total_peak(cfg.model.dtype, plan.setup.mesh.devices)
    return [
        Table("XLA's FLOPs of loss and gradient", ["", "plan", "XLA", "error"], flops_rows),
        Table("XLA's bytes per device", ["", "plan", "XLA", "error"], memory_rows),
        receipt(cfg, tokens / seconds, peak, plan.step.tokens_per_second),
    ]


# --------------------------------------------------------------------------------------------------
# FLOPs.


def countable(cfg: ExperimentConfig) -> ExperimentConfig:
    """The same mathematics in a form whose FLOPs XLA can count.

    XLA counts the body of a loop once, so layers are unrolled and the loss is one chunk; grouped
    matmuls, which differ by platform, become the capacity dispatcher's batched ones, with exactly
    T K rows. Recomputation is left out: it is not part of the plan's model FLOPs.
    """
    model = cfg.model
    tokens = cfg.data.batch_size * cfg.data.seq_len
    moe = model.moe
    if model.num_moe_layers and moe.router == "token_choice":
        moe = dataclasses.replace(moe, dispatcher="capacity", capacity_factor=1.0)
    model = dataclasses.replace(
        model, scan_layers=False, remat="none", loss_chunk=tokens, dtype="float32", moe=moe
    )
    return dataclasses.replace(
        cfg, model=model, train=dataclasses.replace(cfg.train, accumulation=1)
    )


def xla_flops(cfg: ExperimentConfig, *, gradient: bool = True) -> float:
    """XLA's count for one batch's loss (and gradient) on one device."""
    cfg = countable(cfg)
    model = cfg.model
    params = abstract_params(transformer.param_specs(model))
    state = jax.eval_shape(lambda: transformer.init_router_state(model))

    def loss(p, s, b):
        return loss_fn(p, s, b, model)[0]

    f = jax.grad(loss) if gradient else loss
    compiled = jax.jit(f).lower(params, state, _abstract_batch(cfg)).compile()
    analysis: Any = compiled.cost_analysis()
    return analysis["flops"]


def compare_flops(cfg: ExperimentConfig) -> list[list[str]]:
    planned = predicted_flops(cfg)
    counted = xla_flops(cfg)
    return [
        ["FLOPs of a batch", flops_text(planned), flops_text(counted), error_text(planned, counted)]
    ]


def predicted_flops(cfg: ExperimentConfig, phase: str = "train") -> float:
    """The plan's count for one batch, every attention score computed, as our code does."""
    model, seq_len = cfg.model, cfg.data.seq_len
    f = flops_per_token(of_model(model), phase, seq_len, causal=False, mtp=model.mtp_depth > 0)
    assert f.total is not None
    return f.total * cfg.data.batch_size * seq_len


# --------------------------------------------------------------------------------------------------
# Memory.


def _abstract_batch(cfg: ExperimentConfig) -> dict:
    shape = jax.ShapeDtypeStruct((cfg.data.batch_size, cfg.data.seq_len), jnp.int32)
    return dict.fromkeys(FIELDS, shape)


def _compile(cfg: ExperimentConfig, layout):
    """The real training step, compiled for abstract arguments."""
    state, batch = abstract_state(cfg), _abstract_batch(cfg)
    shardings = None
    if layout is not None:
        shardings = state_shardings(cfg, layout)
        state = jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, shardings
        )
        rows = layout.batch
        batch = {k: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=rows) for k, a in batch.items()}
    step = compile_step(cfg, layout=layout, shardings=shardings)
    return step.lower(state, batch).compile()


def compare_memory(held: memory.TrainingMemory, xla: Any) -> list[list[str]]:
    """State (weights and moments, which live across steps) and what a step needs besides."""
    state = held.weights + held.optimizer
    rows = [("state", state, xla.argument_size_in_bytes)]
    rows.append(("working memory", held.total - state, xla.temp_size_in_bytes))
    rows.append(("both", held.total, xla.argument_size_in_bytes + xla.temp_size_in_bytes))
    return [[n, bytes_text(p), bytes_text(r), error_text(p, r)] for n, p, r in rows]


# --------------------------------------------------------------------------------------------------
# Speed.


def measure(cfg: ExperimentConfig, compiled, layout, steps: int) -> float:
    """Seconds of one step: the fastest of `steps`, after one to warm up."""
    state = create_state(cfg, jax.random.key(0), layout)
    batch = place_whole(random_batch(cfg), layout)
    state, metrics = compiled(state, batch)
    jax.block_until_ready(metrics["loss"])
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        state, metrics = compiled(state, batch)
        jax.block_until_ready(state)
        times.append(time.perf_counter() - start)
    return min(times)


def random_batch(cfg: ExperimentConfig) -> dict:
    """Uniform tokens, one document per row."""
    b, s = cfg.data.batch_size, cfg.data.seq_len
    text = np.random.default_rng(0).integers(0, cfg.model.vocab_size, (b, s + 1), np.int32)
    ones = np.ones((b, s), np.int32)
    return {
        "tokens": text[:, :-1],
        "targets": text[:, 1:],
        "segment_ids": ones,
        "positions": np.arange(s, dtype=np.int32)[None].repeat(b, axis=0),
        "loss_mask": ones,
        "domain": 0 * ones,
    }
