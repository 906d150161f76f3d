"""`moejax plan`: what one model is, needs and costs, as tables."""

import dataclasses
import textwrap

from moejax.config import ExperimentConfig
from moejax.cost import memory, roofline
from moejax.cost.architecture import Architecture, counts
from moejax.cost.flops import flops_per_token, paper_flops
from moejax.cost.hardware import Device
from moejax.cost.setup import Setup, check_counted, check_setup
from moejax.mesh import MeshSizes
from moejax.text import (
    Number,
    Table,
    bytes_text,
    count_text,
    flops_text,
    seconds_text,
    usd_text,
)


def plan(
    arch: Architecture, cfg: ExperimentConfig | None, setup: Setup, published: str = ""
) -> list[Table]:
    """All tables: the model (with a note on what was published), and (for a model that can run)
    training, and inference."""
    check_setup(cfg, setup)
    if cfg is None:
        check_counted(arch, setup.mesh)
    out = [
        parameters_table(arch, published),
        flops_table(arch, cfg, setup.context),
        cache_table(arch, setup),
    ]
    if cfg is not None:
        out.append(training_table(cfg, setup))
    out.append(inference_table(arch, setup))
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
        kind = f"{arch.experts[0]} routed experts, {arch.experts[1]:g} per token"
    title = f"{arch.name}: {arch.num_layers} layers of width {arch.d_model}, {kind}"
    missing = f"Not counted, shapes unpublished: {arch.missing}." if arch.missing else ""
    note = textwrap.fill(f"{published} {missing}".strip(), 98)
    return Table(title, ["parameters", "total", "active"], rows, note)


def flops_table(arch: Architecture, cfg: ExperimentConfig | None, context: int) -> Table:
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
    paper = paper_flops(cfg.model, context) if cfg is not None else None
    if paper is not None:
        note = (
            f"In the convention of 2401.06066: {flops_text(paper)} per {context} training tokens."
        )
    title = f"FLOPs per token at a context of {context}"
    return Table(title, ["phase", "matmuls", "attention", "total"], rows, note)


def cache_table(arch: Architecture, setup: Setup) -> Table:
    rows = []
    for length in dict.fromkeys((1, setup.context, arch.max_seq_len)):
        rows.append([Number(f"{length:,}", length), bytes_text(memory.cache_bytes(arch, length))])
    quantised = any(a.key_bytes for a in arch.attention or ())
    return Table(
        f"Key/value cache of one sequence, {'as published' if quantised else 'BF16'}",
        ["tokens", "bytes"],
        rows,
    )


def training_table(cfg: ExperimentConfig, setup: Setup) -> Table:
    """Memory and time of training, and what would fit if it does not."""
    d, mesh = setup.device, setup.mesh
    held = setup.memory(cfg)
    rows = [
        [f.name.replace("_", " "), bytes_text(getattr(held, f.name))]
        for f in dataclasses.fields(held)
        if getattr(held, f.name)
    ]
    room = d.memory * roofline.USABLE
    fits = held.total <= room
    rows.append(["= memory per device", _of(held.total, room)])
    if mesh.peers > 1 and cfg.model.num_moe_layers and not cfg.compute.buffer_factor:
        # Dropless buffers hold every route that peers might send.
        compute = dataclasses.replace(cfg.compute, buffer_factor=2.0)
        bounded = setup.memory(dataclasses.replace(cfg, compute=compute))
        rows.append(["  with compute.buffer_factor=2", bytes_text(bounded.total)])
    if not fits:
        rows += nearest_rows(cfg, setup)
    e = setup.step(cfg)
    rows += step_rows(e, d, cfg.compute.dtype)
    if setup.tokens is not None:
        hours = roofline.gpu_hours(setup.tokens, e.tokens_per_second, mesh.devices)
        rows.append(
            [f"{count_text(setup.tokens)} tokens take", seconds_text(hours / mesh.devices * 3600)]
        )
        text = f"{hours:,.0f}" if hours >= 100 else f"{hours:.3g}"
        rows.append(["device hours", Number(text, hours)])
        rows.append(["money", _money(roofline.money(hours, d.price), d)])
    title = (
        f"Training on {mesh.devices} x {d.name} ({mesh})\n"
        f"{setup.batch} x {setup.context} tokens a step, {_some(setup.micro_batch, 'sequence')} at a "
        f"time, {memory.compute_text(cfg.compute)}"
    )
    note = (
        f"Estimate: arithmetic at {setup.efficiency:.0%} of peak (--efficiency), memory and network at "
        "peak, all\ndevices as near as neighbours."
    )
    return Table(title, ["per device", "value"], rows, note)


def step_rows(e: roofline.Estimate, d: Device, dtype: str) -> list[list[str]]:
    ridge = d.peak(dtype) / d.bandwidth
    times = ", ".join(
        f"{n} {seconds_text(getattr(e, n))}" for n in ("compute", "memory", "network")
    )
    return [
        ["seconds a step", seconds_text(e.seconds)],
        ["limit", f"{e.limit} ({times})"],
        [
            "FLOPs per byte",
            Number(f"{e.intensity:.0f} (the device balances at {ridge:.0f})", e.intensity),
        ],
        ["tokens/s, all devices", Number(f"{e.tokens_per_second:,.0f}", e.tokens_per_second)],
    ]


def nearest_rows(cfg: ExperimentConfig, setup: Setup) -> list[list[str]]:
    fit = roofline.nearest_fit(cfg, setup.device, setup.mesh, setup.batch, setup.context)
    label = "does not fit; nearest that does"
    if fit is None:
        return [[label, "none up to 4096 devices: shorten the context, or take larger devices"]]
    how = f"{_some(fit.micro_batch, 'sequence')} at a time, {memory.compute_text(fit.compute)}"
    return [
        [label, f"{_some(fit.mesh.devices, 'device')} ({fit.mesh})"],
        ["", f"{how}: {bytes_text(fit.bytes)}"],
    ]


def _some(n: int, noun: str) -> str:
    return f"{n} {noun}{'s' * (n != 1)}"


def inference_table(arch: Architecture, setup: Setup) -> Table:
    d, mesh = setup.device, setup.mesh
    held = memory.inference(arch, mesh, setup.batch, setup.context)
    rows = [[name, bytes_text(value)] for name, value in held.items()]
    known = [v for v in held.values() if v is not None]
    total, room = sum(known), d.memory * roofline.USABLE
    least = "" if len(known) == len(held) else "at least "
    rows.append(["= memory per device", _of(total, room, least)])
    if total > room:
        rows.append(["does not fit", _inference_advice(arch, setup, room)])
    e = roofline.decode_step(arch, d, mesh, setup.batch, setup.context)
    if e is None:
        rows.append(["decoding", "unknown: attention is not published well enough"])
    else:
        rows += [["decoding: " + name, value] for name, value in step_rows(e, d, "bfloat16")]
        prompt = roofline.prefill_seconds(arch, d, mesh, setup.context, efficiency=setup.efficiency)
        rows.append([f"prefill of {setup.context} tokens", seconds_text(prompt)])
    title = (
        f"Inference on {mesh.devices} x {d.name}, BF16, {_some(setup.batch, 'sequence')} of "
        f"{setup.context} tokens"
    )
    return Table(title, ["per device", "value"], rows)


def _inference_advice(arch: Architecture, setup: Setup, room: float) -> str:
    """The fewest devices that hold the model, its weights split evenly."""
    for n in (2**i for i in range(1, 13)):
        # Served sequences spread like the weights.
        whole = memory.inference(arch, MeshSizes(), max(1, -(-setup.batch // n)), setup.context)
        weights, cache, work = (whole[k] or 0.0 for k in ("weights", "cache", "working set"))
        if weights / n + cache + work <= room:
            return f"{n} devices would hold it, with the weights split over them"
    return "no number of devices up to 4096 holds it: shorten the context"


def _money(usd: float | None, d: Device) -> str:
    if usd is None:
        return f"unknown: no price for {d.name}; pass --price (USD per device hour)"
    return Number(f"{usd_text(usd)} at ${d.price:g} an hour", usd)


def _of(used: float, room: float, least: str = "") -> str:
    return Number(f"{least}{bytes_text(used)} of {bytes_text(room)} usable", used)
