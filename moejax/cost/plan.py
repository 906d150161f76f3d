"""`moejax plan`: what one model is, needs and costs, as tables."""

import dataclasses
import textwrap
import types
from typing import Any, cast

import numpy as np

from moejax.config import ConfigError, DataConfig, ExperimentConfig, ModelConfig, divisors_text
from moejax.cost import memory, roofline
from moejax.cost.architecture import Architecture, of_model
from moejax.cost.flops import flops_per_token, paper_flops
from moejax.cost.hardware import Device
from moejax.cost.memory import MeshSizes
from moejax.cost.params import counts
from moejax.cost.tables import (
    Table,
    bytes_text,
    count_text,
    flops_text,
    seconds_text,
    usd_text,
)


@dataclasses.dataclass(frozen=True)
class Run:
    """Where and how a model runs.

    Attributes:
      device, mesh: the hardware.
      batch: sequences per optimiser step, over all devices; served at once in inference.
      micro_batch: sequences per forward and backward pass.
      context: tokens in a sequence, or in the cache when decoding.
      tokens: training budget; None: no total is given.
      efficiency: part of the arithmetic peak that is reached.
    """

    device: Device
    mesh: MeshSizes = dataclasses.field(default_factory=MeshSizes)
    batch: int = 1
    micro_batch: int = 1
    context: int = 4096
    tokens: float | None = None
    efficiency: float = roofline.EFFICIENCY


def check_run(cfg: ModelConfig | None, run: Run) -> None:
    """Raises ConfigError for a run that cannot be: sizes that do not divide, an empty batch."""
    problems = []
    for key in ("batch", "micro_batch", "context"):
        if getattr(run, key) < 1:
            problems.append(f"{key}={getattr(run, key)} must be at least 1")
    if not 0 < run.efficiency <= 1:
        problems.append(f"efficiency={run.efficiency} must lie in (0, 1]")
    if run.tokens is not None and not run.tokens > 0:
        problems.append(f"tokens={run.tokens} must be positive")
    if not problems and run.batch % run.micro_batch:
        problems.append(f"batch={run.batch} must be a multiple of micro_batch={run.micro_batch}")
    if not problems and cfg is not None and run.mesh.devices > 1:
        # The rules of training themselves; they need jax, so only a real mesh pays for it.
        from moejax.sharding import Layout, layout_problems, parse_rules

        platform = "tpu" if run.device.name.startswith("tpu") else "gpu"
        device = types.SimpleNamespace(platform="cpu" if run.device.name == "cpu" else platform)
        shape = {a: getattr(run.mesh, a) for a in memory.AXES}
        mesh = cast(Any, types.SimpleNamespace(shape=shape, devices=np.array([device])))
        experiment = ExperimentConfig(model=cfg, data=DataConfig(batch_size=run.micro_batch))
        found = layout_problems(
            experiment, Layout(mesh, tuple(parse_rules(run.mesh.rules).items()))
        )
        key = "data.batch_size / train.accumulation"
        problems += [p.replace(key, "micro_batch") for p in found]
    if problems:
        raise ConfigError("this run does not work:\n" + "\n".join(f"  - {p}" for p in problems))


def check_counted(arch: Architecture, mesh: MeshSizes) -> None:
    """What `check_run` checks of a mesh, as far as it is known of a model that is only counted."""
    sizes = {"fsdp": arch.d_model, "tensor": arch.vocab_size}
    sizes |= {"expert": arch.experts[0]} if arch.experts else {}
    for axis, size in sizes.items():
        if size % getattr(mesh, axis):
            raise ConfigError(
                f"{arch.name}: {size} does not divide over mesh axis {axis} of size "
                f"{getattr(mesh, axis)}; {axis} may be {divisors_text(size)}"
            )


def plan(arch: Architecture, cfg: ModelConfig | None, run: Run, published: str = "") -> list[Table]:
    """All tables: the model (with a note on what was published), and (for a model that can run)
    training, and inference."""
    check_run(cfg, run)
    if cfg is None:
        check_counted(arch, run.mesh)
    out = [
        parameters_table(arch, published),
        flops_table(arch, cfg, run.context),
        cache_table(arch, run),
    ]
    if cfg is not None:
        out.append(training_table(cfg, run))
    out.append(inference_table(arch, run))
    return out


def parameters_table(arch: Architecture, published: str = "") -> Table:
    rows = [[p.name, count_text(p.total), count_text(p.active)] for p in arch.parts if p.total]
    rows += [[f"= {n}", count_text(c.total), count_text(c.active)] for n, c in counts(arch).items()]
    for name, parts in (("multi-token prediction", arch.mtp), ("", arch.apart)):
        if parts:
            label = f"+ {name or parts[0].name}"
            values = sum(p.total for p in parts), sum(p.active for p in parts)
            rows.append([label, count_text(values[0]), count_text(values[1]) if name else "-"])
    kind = "dense"
    if arch.experts:
        kind = f"{arch.experts[0]} routed experts, {arch.experts[1]} per token"
    title = f"{arch.name}: {arch.num_layers} layers of width {arch.d_model}, {kind}"
    missing = f"Not counted, shapes unpublished: {arch.missing}." if arch.missing else ""
    note = textwrap.fill(f"{published} {missing}".strip(), 98)
    return Table(title, ["parameters", "total", "active"], rows, note)


def flops_table(arch: Architecture, cfg: ModelConfig | None, context: int) -> Table:
    phases = [
        ("training", "train", True, False),
        ("training, no score left out", "train", False, False),
        *([("training, with multi-token prediction", "train", True, True)] if arch.mtp else []),
        ("prefill", "prefill", True, False),
        ("decode", "decode", True, False),
    ]
    rows = []
    for name, phase, causal, mtp in phases:
        f = flops_per_token(arch, phase, context, causal=causal, mtp=mtp)
        rows.append([name, flops_text(f.matmul), flops_text(f.attention), flops_text(f.total)])
    note = ""
    paper = paper_flops(cfg, context) if cfg is not None else None
    if paper is not None:
        note = (
            f"In the convention of 2401.06066: {flops_text(paper)} per {context} training tokens."
        )
    title = f"FLOPs per token at a context of {context}"
    return Table(title, ["phase", "matmuls", "attention", "total"], rows, note)


def cache_table(arch: Architecture, run: Run) -> Table:
    rows = []
    for length in dict.fromkeys((1, run.context, arch.max_seq_len)):
        rows.append([f"{length:,}", bytes_text(memory.cache_bytes(arch, length))])
    quantised = any(a.key_bytes for a in arch.attention or ())
    return Table(
        f"Key/value cache of one sequence, {'as published' if quantised else 'BF16'}",
        ["tokens", "bytes"],
        rows,
    )


def training_table(cfg: ModelConfig, run: Run) -> Table:
    """Memory and time of training, and what would fit if it does not."""
    d, mesh = run.device, run.mesh
    accumulate = run.micro_batch < run.batch
    held = memory.training(cfg, mesh, run.micro_batch, run.context, accumulate=accumulate)
    rows = [
        [f.name.replace("_", " "), bytes_text(getattr(held, f.name))]
        for f in dataclasses.fields(held)
        if getattr(held, f.name)
    ]
    room = d.memory * roofline.USABLE
    fits = held.total <= room
    rows.append(["= memory per device", f"{bytes_text(held.total)} of {bytes_text(room)} usable"])
    if not fits:
        rows += nearest_rows(cfg, run)
    e = roofline.training_step(
        cfg,
        d,
        mesh,
        run.batch,
        run.context,
        accumulation=run.batch // run.micro_batch,
        efficiency=run.efficiency,
    )
    rows += step_rows(e, d, cfg.dtype)
    if run.tokens is not None:
        hours = roofline.gpu_hours(run.tokens, e.tokens_per_second, mesh.devices)
        rows.append(
            [f"{count_text(run.tokens)} tokens take", seconds_text(hours / mesh.devices * 3600)]
        )
        rows.append(["device hours", f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"])
        rows.append(["money", _money(roofline.money(hours, d.price), d)])
    title = (
        f"Training on {mesh.devices} x {d.name} ({mesh})\n"
        f"{run.batch} x {run.context} tokens a step, {_some(run.micro_batch, 'sequence')} at a "
        f"time, {cfg.dtype}, remat {cfg.remat}"
    )
    note = f"Estimate: arithmetic at {run.efficiency:.0%} of peak (--efficiency), traffic at peak."
    return Table(title, ["per device", "value"], rows, note)


def step_rows(e: roofline.Estimate, d: Device, dtype: str) -> list[list[str]]:
    ridge = d.peak(dtype) / d.bandwidth
    times = ", ".join(
        f"{n} {seconds_text(getattr(e, n))}" for n in ("compute", "memory", "network")
    )
    return [
        ["seconds a step", seconds_text(e.seconds)],
        ["limit", f"{e.limit} ({times})"],
        ["FLOPs per byte", f"{e.intensity:.0f} (the device balances at {ridge:.0f})"],
        ["tokens/s, all devices", f"{e.tokens_per_second:,.0f}"],
    ]


def nearest_rows(cfg: ModelConfig, run: Run) -> list[list[str]]:
    fit = roofline.nearest_fit(cfg, run.device, run.mesh, run.batch, run.context)
    label = "does not fit; nearest that does"
    if fit is None:
        return [[label, "none up to 4096 devices: shorten the context, or take larger devices"]]
    how = f"{_some(fit.micro_batch, 'sequence')} at a time, remat {fit.remat}"
    return [
        [label, f"{_some(fit.mesh.devices, 'device')} ({fit.mesh})"],
        ["", f"{how}: {bytes_text(fit.bytes)}"],
    ]


def _some(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def inference_table(arch: Architecture, run: Run) -> Table:
    d, mesh = run.device, run.mesh
    held = memory.inference(arch, mesh, run.batch, run.context)
    rows = [[name, bytes_text(value)] for name, value in held.items()]
    known = [v for v in held.values() if v is not None]
    total, room = sum(known), d.memory * roofline.USABLE
    least = "" if len(known) == len(held) else "at least "
    rows.append(["= memory per device", f"{least}{bytes_text(total)} of {bytes_text(room)} usable"])
    if total > room:
        rows.append(["does not fit", _inference_advice(arch, run, room)])
    e = roofline.decode_step(arch, d, mesh, run.batch, run.context)
    if e is None:
        rows.append(["decoding", "unknown: attention is not published well enough"])
    else:
        rows += [["decoding: " + name, value] for name, value in step_rows(e, d, "bfloat16")]
        prompt = roofline.prefill_seconds(arch, d, mesh, run.context, efficiency=run.efficiency)
        rows.append([f"prefill of {run.context} tokens", seconds_text(prompt)])
    title = (
        f"Inference on {mesh.devices} x {d.name}, BF16, {_some(run.batch, 'sequence')} of "
        f"{run.context} tokens"
    )
    return Table(title, ["per device", "value"], rows)


def _inference_advice(arch: Architecture, run: Run, room: float) -> str:
    """The fewest devices that hold the model, its weights split evenly."""
    for n in (2**i for i in range(1, 13)):
        # Served sequences spread like the weights.
        whole = memory.inference(arch, MeshSizes(), max(1, -(-run.batch // n)), run.context)
        weights, cache, work = (whole[k] or 0.0 for k in ("weights", "cache", "working set"))
        if weights / n + cache + work <= room:
            return f"{n} devices would hold it, with the weights split over them"
    return "no number of devices up to 4096 holds it: shorten the context"


def _money(usd: float | None, d: Device) -> str:
    if usd is None:
        return f"unknown: no price for {d.name}; pass --price (USD per device hour)"
    return f"{usd_text(usd)} at ${d.price:g} an hour"


def of_experiment(cfg: ExperimentConfig, device: Device, devices: int) -> tuple[Architecture, Run]:
    """The architecture and run of an experiment; ConfigError if its mesh does not fit `devices`."""
    m = cfg.mesh
    sizes = {k: getattr(m, k) for k in ("data", "fsdp", "expert", "tensor")}
    fixed = 1
    for v in sizes.values():
        fixed *= v if v != -1 else 1
    free = [k for k, v in sizes.items() if v == -1]
    if (free and devices % fixed) or (not free and fixed > devices):
        raise ConfigError(
            f"mesh {sizes} does not fit {devices} devices: they must be a multiple of {fixed}"
        )
    if free:
        sizes[free[0]] = devices // fixed
    steps = cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
    return of_model(cfg.model, cfg.name), Run(
        device=device,
        mesh=MeshSizes(**sizes, rules=m.rules),
        batch=cfg.data.batch_size,
        micro_batch=cfg.data.batch_size // cfg.train.accumulation,
        context=cfg.data.seq_len,
        tokens=float(steps),
    )


def experiment_step(cfg: ExperimentConfig, run: Run) -> roofline.Estimate:
    """The estimate of one optimiser step of an experiment."""
    return roofline.training_step(
        cfg.model,
        run.device,
        run.mesh,
        run.batch,
        run.context,
        accumulation=run.batch // run.micro_batch,
        efficiency=run.efficiency,
    )
