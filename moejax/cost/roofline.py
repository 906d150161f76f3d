"""How long and how dear: roofline estimates of training and inference, and what fits.

A step takes as long as the slowest of three things that overlap: arithmetic, memory traffic, and
traffic between devices. Arithmetic runs at `efficiency` of the peak; the other two at their peaks,
so the result is what a well-tuned implementation could reach, not a promise.
"""

import dataclasses
from collections.abc import Iterator

from moejax.attention.block_attention import block_size
from moejax.axes import BATCH
from moejax.config import ComputeConfig, DataConfig, ExperimentConfig, ModelConfig
from moejax.cost import memory
from moejax.cost.architecture import Architecture, of_model
from moejax.cost.flops import flops_per_token
from moejax.cost.hardware import Device
from moejax.cost.memory import BYTES
from moejax.mesh import MeshSizes, layout_problems

# DeepSeek-V3's pre-training reached 39% of the H800's dense BF16 peak: 250.4 GFLOPs per token,
# 14.8T tokens, 2.664M H800 hours (2412.19437 Table 1).
EFFICIENCY = 0.4

# Part of a device's memory that the runtime, fragmentation and collectives leave.
USABLE = 0.9


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds that each limit alone would take.

    Attributes:
      compute, memory, network: seconds.
      tokens: tokens processed in that time, over all devices.
      flops, bytes: per device.
    """

    compute: float
    memory: float
    network: float
    tokens: float
    flops: float
    bytes: float

    @property
    def seconds(self) -> float:
        return max(self.compute, self.memory, self.network)

    @property
    def limit(self) -> str:
        """Which of them binds."""
        return max(("compute", "memory", "network"), key=lambda k: getattr(self, k))

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds

    @property
    def intensity(self) -> float:
        """FLOPs per byte of memory traffic."""
        return self.flops / self.bytes


def gpu_hours(tokens: float, tokens_per_second: float, devices: int) -> float:
    """Device hours to process `tokens`."""
    return tokens / tokens_per_second * devices / 3600


def money(hours: float, price: float | None) -> float | None:
    """USD for that many device hours; None where the price is unknown."""
    return None if price is None else hours * price


def training_step(
    cfg: ExperimentConfig,
    device: Device,
    mesh: MeshSizes,
    batch: int,
    seq_len: int,
    *,
    accumulation: int = 1,
    efficiency: float = EFFICIENCY,
) -> Estimate:
    """One optimiser step of `batch` sequences over all devices, in `accumulation` micro-batches."""
    arch, compute, router = of_model(cfg.model), cfg.compute, cfg.model.router
    tokens = batch * seq_len
    # Attention computes every score and masks half; in blocks it leaves them out, and computes a score again
    # where its gradient is needed: one product more than six.
    blocks = block_size(seq_len, compute.attention_block) > 0
    model = flops_per_token(arch, "train", seq_len, causal=blocks, mtp=bool(arch.mtp))
    assert model.total is not None and model.attention is not None
    again = memory.recomputed(compute, model.total, model.attention)
    again += model.attention / 6 if blocks else 0.0
    static = cfg.model.router_config(cfg.objective)
    if accumulation > 1 and router is not None and not router.linear_losses(static):
        again += model.total / 3  # a forward pass first counts the stats of the whole batch
    flops = tokens * (model.total + again) / mesh.devices
    b = BYTES[compute.dtype]
    parts = (*arch.parts, *arch.mtp)
    local = sum(p.total / p.shards(mesh) for p in parts)
    used = sum(p.total / p.shards(mesh) * p.gathers(mesh) for p in parts)
    passes = memory.passes(compute)
    held = memory.training(cfg, mesh, batch, seq_len)
    # Weights in every pass; master weights and both moments read and written, gradients too;
    # activations written and read.
    traffic = (
        accumulation * passes * b * used + 8 * 4 * local + 2 * (held.activations + held.in_flight)
    )
    return Estimate(
        compute=flops / (device.peak(compute.dtype) * efficiency),
        memory=traffic / device.bandwidth,
        network=_network(cfg, arch, mesh, tokens, accumulation) / device.link
        if device.link
        else 0.0,
        tokens=tokens,
        flops=flops,
        bytes=traffic,
    )


def _network(
    cfg: ExperimentConfig, arch: Architecture, mesh: MeshSizes, tokens: float, accumulation: int
) -> float:
    """Bytes one device sends in a training step."""
    b, d, layers = BYTES[cfg.compute.dtype], arch.d_model, cfg.model.num_moe_layers
    passes = memory.passes(cfg.compute)
    weights = 0.0
    for p in (*arch.parts, *arch.mtp):
        local, ways = p.total / p.shards(mesh), p.gathers(mesh)
        # Weights gathered for every pass, gradients scattered back in float32.
        weights += (ways - 1) * local * (passes * b + 4) * accumulation
        # Gradients summed over the devices that split the batch and hold the same weights.
        copies = mesh.product({*mesh.mesh_axes(BATCH)} - p.mesh_axes(mesh))
        weights += 2 * (copies - 1) / copies * 4 * local
    per_device = tokens / mesh.size(BATCH)
    experts = 0.0
    if mesh.peers > 1 and layers:
        e = mesh.peers
        ring = cfg.compute.expert_parallel == "ring"
        rows = per_device * (e - 1 if ring else cfg.model.experts_used * (e - 1) / e)
        width = cfg.model.moe.expert_input(d)
        experts = 2 * passes * rows * width * b * layers  # there and back
    tensor = 0.0
    if mesh.tensor > 1:
        share = 2 * (mesh.tensor - 1) / mesh.tensor
        tensor = 2 * passes * share * per_device * d * b * arch.num_layers
    return weights + experts + tensor


def decode_step(
    arch: Architecture,
    device: Device,
    mesh: MeshSizes,
    batch: int,
    context: int,
    *,
    bytes_per: float = 2,
) -> Estimate | None:
    """One token for each of `batch` sequences that hold `context`; None where attention is unknown.

    Every weight that some token of the batch uses is read once: E (1 - (1 - K/E)^batch) experts if
    routes are spread evenly.
    """
    flops = flops_per_token(arch, "decode", context).total
    cache = memory.cache_bytes(arch, context, bytes_per)
    if flops is None or cache is None:
        return None
    read = 0.0
    for p in arch.parts:
        if p.name == "embedding":
            continue
        share = 1.0
        if p.experts and arch.experts:
            experts, chosen = arch.experts
            share = 1 - (1 - chosen / experts) ** batch
        read += bytes_per * p.total * share / p.shards(mesh)
    rows = batch / mesh.size(BATCH)
    work = rows * flops / mesh.tensor
    traffic = read + rows * cache
    return Estimate(
        compute=work / device.peak("bfloat16" if bytes_per == 2 else "float32"),
        memory=traffic / device.bandwidth,
        network=0.0,
        tokens=batch,
        flops=work,
        bytes=traffic,
    )


def prefill_seconds(
    arch: Architecture,
    device: Device,
    mesh: MeshSizes,
    prompt: int,
    *,
    efficiency: float = EFFICIENCY,
) -> float | None:
    """Seconds to read one prompt of `prompt` tokens on one replica, compute-bound."""
    flops = flops_per_token(arch, "prefill", prompt).total
    if flops is None:
        return None
    devices = mesh.tensor * mesh.expert
    return prompt * flops / (device.peak("bfloat16") * efficiency * devices)


# --------------------------------------------------------------------------------------------------
# What fits.


def smallest_devices(bytes_needed: float, devices: list[Device]) -> Device | None:
    """The device with the least memory that holds so many bytes; None if none does."""
    able = [d for d in devices if d.memory * USABLE >= bytes_needed]
    return min(able, key=lambda d: d.memory, default=None)


@dataclasses.dataclass(frozen=True)
class Fit:
    """A way to train that fits: mesh, sequences per micro-batch, how it is computed, bytes on each device."""

    mesh: MeshSizes
    micro_batch: int
    compute: ComputeConfig
    bytes: float


def meshes(cfg: ModelConfig, devices: int) -> Iterator[MeshSizes]:
    """Meshes of so many devices that divide the model, from plain data parallelism on."""
    for tensor in (1, 2, 4, 8):
        for expert in _divisors(devices // tensor):
            for fsdp in _divisors(devices // (tensor * expert)):
                mesh = MeshSizes(devices // (tensor * expert * fsdp), fsdp, expert, tensor)
                experiment = ExperimentConfig(
                    model=cfg, data=DataConfig(batch_size=mesh.size(BATCH))
                )
                wasted = mesh.devices < devices or (expert > 1 and not cfg.num_moe_layers)
                if not wasted and not layout_problems(experiment, mesh, "gpu"):
                    yield mesh


def _divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def nearest_fit(
    cfg: ExperimentConfig,
    device: Device,
    mesh: MeshSizes,
    batch: int,
    seq_len: int,
    *,
    max_devices: int = 4096,
) -> Fit | None:
    """The nearest way that fits, changing as little as possible, or None.

    In this order: smaller micro-batches on the same mesh, full rematerialisation, another mesh of
    the same devices, then twice the devices, and so on up to `max_devices`.
    """
    limit = device.memory * USABLE
    devices = mesh.devices
    while devices <= max_devices:
        options = list(meshes(cfg.model, devices))
        if devices == mesh.devices:
            options = [mesh, *(m for m in options if m != mesh)]
        for option in options:
            for compute in memory.sparing(cfg.compute):
                changed = dataclasses.replace(cfg, compute=compute)
                for micro in _micro_batches(batch, option.size(BATCH)):
                    held = memory.training(
                        changed, option, micro, seq_len, accumulate=micro < batch
                    )
                    if held.total <= limit:
                        return Fit(option, micro, compute, held.total)
        devices *= 2
    return None


def _micro_batches(batch: int, ways: int) -> list[int]:
    """Divisors of the batch that spread over so many devices, largest first; a batch that is too
    small for them grows to a sequence on each."""
    if batch < ways:
        return [ways]
    return [batch // n for n in range(1, batch + 1) if batch % n == 0 and batch // n % ways == 0]
