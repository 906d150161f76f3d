"""`moejax plan --verify`: compares a plan with XLA's own analysis and with a short real run."""

import dataclasses
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ComputeConfig, ExperimentConfig
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
    """Compile the real step of `cfg` for this machine's devices, run it `steps` times on random tokens, and
    compare FLOPs, memory and speed with the plan."""
    layout = make_layout(cfg)
    plan = plan_run(cfg, layout)
    compiled = _compile(cfg, layout)
    flops_rows = compare_flops(cfg)
    memory_rows = compare_memory(plan.memory, compiled.memory_analysis())
    seconds = measure(cfg, compiled, layout, steps)
    tokens = cfg.data.batch_size * cfg.data.seq_len
    peak = total_peak(cfg.compute.dtype, plan.setup.mesh.devices)
    return [
        Table("XLA's FLOPs of loss and gradient", ["", "plan", "XLA", "error"], flops_rows),
        Table("XLA's bytes per device", ["", "plan", "XLA", "error"], memory_rows),
        receipt(cfg, tokens / seconds, peak, plan.step.tokens_per_second),
    ]


# --------------------------------------------------------------------------------------------------
# FLOPs.


def countable(cfg: ExperimentConfig) -> ExperimentConfig:
    """The same mathematics in a form whose FLOPs XLA can count.

    XLA counts the body of a loop once, so layers are unrolled, the loss is one chunk and attention one block.
    Grouped matmuls differ by platform, so they are replaced by batched ones with a capacity of exactly T K
    rows. Nothing is recomputed, because the plan's model FLOPs do not count that.
    """
    tokens = cfg.data.batch_size * cfg.data.seq_len
    router, objective = cfg.model.router, cfg.objective
    if router is not None and router.form == "token":
        objective = dataclasses.replace(objective, capacity_factor=1.0)
    return dataclasses.replace(
        cfg,
        objective=objective,
        compute=ComputeConfig(
            scan_layers=False, loss_chunk=tokens, attention_block=cfg.data.seq_len
        ),
        train=dataclasses.replace(cfg.train, accumulation=1),
    )


def xla_flops(cfg: ExperimentConfig, *, gradient: bool = True) -> float:
    """XLA's count for one batch's loss (and gradient) on one device."""
    cfg = countable(cfg)
    model = cfg.model
    params = abstract_params(transformer.param_specs(model))
    state = transformer.abstract_router_state(model)

    def loss(p, s, b):
        return loss_fn(p, s, b, model, objective=cfg.objective, compute=cfg.compute)[0]

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
    """The plan's count for one batch. As in `countable`, every attention score counts."""
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
    """Compare the state (weights and moments) and the working memory of a step with XLA's numbers."""
    state = held.weights + held.optimizer
    rows = [("state", state, xla.argument_size_in_bytes)]
    rows.append(("working memory", held.total - state, xla.temp_size_in_bytes))
    rows.append(("both", held.total, xla.argument_size_in_bytes + xla.temp_size_in_bytes))
    return [[n, bytes_text(p), bytes_text(r), error_text(p, r)] for n, p, r in rows]


# --------------------------------------------------------------------------------------------------
# Speed.


def measure(cfg: ExperimentConfig, compiled, layout, steps: int) -> float:
    """Seconds of one step: the fastest of `steps`, after a warm-up step."""
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
