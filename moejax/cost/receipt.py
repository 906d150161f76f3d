"""A training run's plan, printed at its start, and its receipt, printed at its end.

plan = plan_run(cfg, layout)
print(plan.headline())
...
print(plan.receipt(tokens_per_second))
"""

import dataclasses
from typing import Any

import jax

from moejax.config import ExperimentConfig
from moejax.cost import memory, roofline
from moejax.cost.architecture import Architecture, counts, of_model
from moejax.cost.flops import flops_per_token
from moejax.cost.hardware import Device, this_device, total_peak
from moejax.cost.setup import Setup, of_experiment
from moejax.text import (
    Table,
    bytes_text,
    count_text,
    flops_text,
    render,
    seconds_text,
)


@dataclasses.dataclass(frozen=True)
class RunPlan:
    """What a run is planned to need on the devices it runs on.

    Attributes:
      cfg, arch, setup: the experiment, its architecture, and what it runs on.
      step: the estimate of one optimiser step.
      memory: bytes on each device.
    """

    cfg: ExperimentConfig
    arch: Architecture
    setup: Setup
    step: roofline.Estimate
    memory: memory.TrainingMemory

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs: the useful ones, so neither recomputation nor masked scores."""
        return model_flops_per_token(self.cfg)

    def headline(self) -> str:
        """Two lines for the head of a log."""
        c, rate = counts(self.arch)["with embeddings"], self.step.tokens_per_second
        device, tokens = self.setup.device, self.setup.tokens
        return (
            f"plan: {count_text(c.total)} parameters ({count_text(c.active)} active), "
            f"{bytes_text(self.memory.total)} per device of {bytes_text(device.memory)}\n"
            f"plan: about {rate:,.0f} tokens/s on {self.setup.mesh.devices} x {device.name}, bound by "
            f"{self.step.limit}; {count_text(tokens)} tokens in {seconds_text((tokens or 0) / rate)}"
        )

    def problem(self, at_once: int = 1) -> str:
        """Why its memory does not suffice for `at_once` such runs, and the nearest that fits; '' if it does."""
        device = self.setup.device
        device = dataclasses.replace(device, memory=device.memory / at_once)
        room = device.memory * roofline.USABLE
        if self.memory.total <= room:
            return ""
        share = f", a share of {at_once} at once" if at_once > 1 else ""
        return (
            f"it needs about {bytes_text(self.memory.total)} on each device ({device.name}), of whose memory "
            f"{bytes_text(room)} are free{share}. {_nearest(self.cfg, self.setup, device)}"
        )

    def receipt(self, tokens_per_second: float) -> str:
        """What was measured beside what was planned, as a table of a few lines."""
        peak = total_peak(self.cfg.compute.dtype, self.setup.mesh.devices)
        table = receipt(self.cfg, tokens_per_second, peak, self.step.tokens_per_second)
        stats = jax.local_devices()[0].memory_stats() or {}
        used = stats.get("peak_bytes_in_use")  # accelerators say; the CPU does not
        if used:
            row = ["memory per device", *_pair(self.memory.total, used, bytes_text)]
            table = dataclasses.replace(table, rows=[*table.rows, row])
        return render([table])


def plan_run(cfg: ExperimentConfig, layout: Any) -> RunPlan:
    """The plan of `cfg` on this process's kind of devices; `layout` None: one device."""
    devices = layout.mesh.size if layout else 1
    arch, setup = of_experiment(cfg, this_device(cfg.compute.dtype), devices)
    return RunPlan(cfg, arch, setup, setup.step(cfg), setup.memory(cfg))


def model_flops_per_token(cfg: ExperimentConfig) -> float:
    """FLOPs of training per token that are useful: no recomputation, no masked score."""
    f = flops_per_token(
        of_model(cfg.model), "train", cfg.data.seq_len, mtp=cfg.model.mtp_depth > 0
    ).total
    assert f is not None
    return f


def receipt(
    cfg: ExperimentConfig, tokens_per_second: float, peak: float, planned: float | None = None
) -> Table:
    """What a run achieved, beside the planned tokens/s and a measured matmul peak (FLOP/s over all
    its devices)."""
    f = model_flops_per_token(cfg)
    tokens = cfg.data.batch_size * cfg.data.seq_len
    step, planned_step = tokens / tokens_per_second, planned and tokens / planned
    return Table(
        "Receipt",
        ["", "planned", "measured", "error of the plan"],
        [
            ["tokens/s", *_pair(planned, tokens_per_second, lambda n: f"{n:,.0f}")],
            ["seconds a step", *_pair(planned_step, step, seconds_text)],
            ["model FLOP/s", *_pair(planned and f * planned, f * tokens_per_second, flops_text)],
            ["of the matmul peak", "", f"{f * tokens_per_second / peak:.1%}", ""],
            ["matmul peak", "", flops_text(peak), ""],
        ],
    )


def _pair(planned: float | None, measured: float, text) -> list[str]:
    error = error_text(planned, measured) if planned else ""
    return [text(planned) if planned else "", text(measured), error]


def error_text(predicted: float, real: float) -> str:
    """'+12.0%': the prediction is that much above what is real."""
    return f"{predicted / real - 1:+.1%}" if real else "-"


def _nearest(cfg: ExperimentConfig, setup: Setup, device: Device) -> str:
    """The nearest way to train that fits the device, as flags. Virtual devices of a CPU share its memory."""
    most = setup.mesh.devices if device.platform == "cpu" else 4096
    fit = roofline.nearest_fit(
        cfg, device, setup.mesh, setup.batch, setup.context, max_devices=most
    )
    if fit is None:
        return (
            "Nothing near it fits: take a smaller model, a shorter data.seq_len, or larger devices"
        )
    changes = {f"mesh.{a}": n for a, n in fit.mesh.shape.items() if n != setup.mesh.shape[a]}
    changes |= {
        f"compute.{f.name}": value
        for f in dataclasses.fields(fit.compute)
        if (value := getattr(fit.compute, f.name)) != getattr(cfg.compute, f.name)
    }
    batch = max(setup.batch, fit.micro_batch)
    if batch != setup.batch:
        changes["data.batch_size"] = batch
    if batch // fit.micro_batch != cfg.train.accumulation:
        changes["train.accumulation"] = batch // fit.micro_batch
    flags = " ".join(f"--config.{key}={value}" for key, value in changes.items())
    where = f" on {fit.mesh.devices} devices" if fit.mesh.devices != setup.mesh.devices else ""
    return f"The nearest that fits{where}: {flags} ({bytes_text(fit.bytes)})"
