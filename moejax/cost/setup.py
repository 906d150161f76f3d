"""What a model runs on, and how much of it at once: of an experiment, and checked."""

import dataclasses

from moejax.config import ConfigError, DataConfig, ExperimentConfig, TrainConfig
from moejax.cost import memory, roofline
from moejax.cost.architecture import Architecture, of_model
from moejax.cost.hardware import Device
from moejax.mesh import MeshSizes, layout_problems, mesh_sizes
from moejax.options import divisors_text


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a model runs on, and how much of it at once.

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

    def step(self, cfg: ExperimentConfig) -> roofline.Estimate:
        """The estimate of one optimiser step."""
        return roofline.training_step(
            cfg,
            self.device,
            self.mesh,
            self.batch,
            self.context,
            accumulation=self.batch // self.micro_batch,
            efficiency=self.efficiency,
        )

    def memory(self, cfg: ExperimentConfig) -> memory.TrainingMemory:
        """Bytes on each device in training."""
        accumulate = self.micro_batch < self.batch
        return memory.training(
            cfg,
            self.mesh,
            self.micro_batch,
            self.context,
            accumulate=accumulate,
        )


def check_setup(cfg: ExperimentConfig | None, setup: Setup) -> None:
    """Raises ConfigError for a setup that cannot be: sizes that do not divide, an empty batch."""
    problems = []
    for key in ("batch", "micro_batch", "context"):
        if getattr(setup, key) < 1:
            problems.append(f"{key}={getattr(setup, key)} must be at least 1")
    if not 0 < setup.efficiency <= 1:
        problems.append(f"efficiency={setup.efficiency} must lie in (0, 1]")
    if setup.tokens is not None and not setup.tokens > 0:
        problems.append(f"tokens={setup.tokens} must be positive")
    if not problems and setup.batch % setup.micro_batch:
        problems.append(
            f"batch={setup.batch} must be a multiple of micro_batch={setup.micro_batch}"
        )
    if not problems and cfg is not None and setup.mesh.devices > 1:
        rows = DataConfig(batch_size=setup.micro_batch)
        experiment = dataclasses.replace(cfg, data=rows, train=TrainConfig())
        found = layout_problems(experiment, setup.mesh, setup.device.platform)
        key = "data.batch_size / train.accumulation"
        problems += [p.replace(key, "micro_batch") for p in found]
    if problems:
        raise ConfigError("this run does not work:\n" + "\n".join(f"  - {p}" for p in problems))


def check_counted(arch: Architecture, mesh: MeshSizes) -> None:
    """What `check_setup` checks of a mesh, as far as it is known of a model that is only counted."""
    sizes = {"fsdp": arch.d_model, "tensor": arch.vocab_size}
    sizes |= {"expert": arch.experts[0]} if arch.experts else {}
    for axis, size in sizes.items():
        if size % getattr(mesh, axis):
            raise ConfigError(
                f"{arch.name}: {size} does not divide over mesh axis {axis} of size "
                f"{getattr(mesh, axis)}; {axis} may be {divisors_text(size)}"
            )


def of_experiment(
    cfg: ExperimentConfig, device: Device, devices: int
) -> tuple[Architecture, Setup]:
    """The architecture and setup of an experiment; ConfigError if its mesh does not fit `devices`."""
    steps = cfg.train.steps * cfg.data.batch_size * cfg.data.seq_len
    return of_model(cfg.model, cfg.name), Setup(
        device=device,
        mesh=mesh_sizes(cfg.mesh, devices),
        batch=cfg.data.batch_size,
        micro_batch=cfg.data.batch_size // cfg.train.accumulation,
        context=cfg.data.seq_len,
        tokens=float(steps),
    )
