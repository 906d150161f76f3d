"""The one table from logical axes to mesh axes, the sizes of a mesh, and whether a model fits it. No jax here:
a plan asks the same questions about devices that are not there.

Mesh axes: `data` (replicas), `fsdp` (batch and weights split over the same devices), `expert` (experts
split, and batch too), `tensor` (heads, FFN width and vocabulary split). The batch is split over the first
three. A config may replace rows of the table, e.g. `--config.mesh.rules="('expert=data',)"` lays the experts
over the devices that hold the batch.
"""

import dataclasses
import importlib.util
import math
from collections.abc import Iterable

from moejax import axes
from moejax.attention import kind_of
from moejax.config import ComputeConfig, ConfigError, ExperimentConfig, MeshConfig
from moejax.options import divisors_text

# Logical axis -> mesh axes. Two dimensions of one array must not meet on one mesh axis.
RULES: dict[str, tuple[str, ...]] = {
    axes.LAYERS: (),
    axes.EMBED: (axes.FSDP,),
    axes.VOCAB: (axes.TENSOR,),
    axes.HEADS: (axes.TENSOR,),
    axes.KV_HEADS: (axes.TENSOR,),
    axes.LATENT: (),
    axes.MLP: (axes.TENSOR,),
    axes.EXPERT: (axes.EXPERT_AXIS,),
    axes.EXPERT_EMBED: (axes.FSDP,),
    axes.EXPERT_MLP: (axes.TENSOR,),
    axes.BATCH: (axes.DATA, axes.FSDP, axes.EXPERT_AXIS),
    axes.SEQ: (),
    axes.ACT_EMBED: (),
}


# Logical axes that meet in one array: parameters, then activations.
TOGETHER = (
    (axes.VOCAB, axes.EMBED),
    (axes.EMBED, axes.HEADS),
    (axes.EMBED, axes.KV_HEADS),
    (axes.EMBED, axes.LATENT),
    (axes.LATENT, axes.HEADS),
    (axes.EMBED, axes.MLP),
    (axes.EXPERT, axes.EXPERT_EMBED, axes.EXPERT_MLP),
    (axes.BATCH, axes.SEQ, axes.ACT_EMBED),
)


def parse_rules(overrides: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """RULES with the rows of MeshConfig.rules replaced; ConfigError names a bad row."""
    rules = dict(RULES)
    for row in overrides:
        logical, sep, target = row.partition("=")
        mesh_axes = tuple(a for a in target.split("+") if a)
        if not sep or logical not in RULES:
            raise ConfigError(
                f"mesh.rules: {row!r} is not 'logical=mesh[+mesh]'; logical axes: {', '.join(RULES)}"
            )
        for a in mesh_axes:
            if a not in axes.MESH_AXES:
                raise ConfigError(
                    f"mesh.rules: {row!r} names mesh axis {a!r}; known: {', '.join(axes.MESH_AXES)}"
                )
        rules[logical] = mesh_axes
    return rules


@dataclasses.dataclass(frozen=True)
class MeshSizes:
    """Devices along each mesh axis, and the table (its items) that splits logical axes over them."""

    data: int = 1
    fsdp: int = 1
    expert: int = 1
    tensor: int = 1
    rules: tuple[tuple[str, tuple[str, ...]], ...] = tuple(RULES.items())

    @property
    def shape(self) -> dict[str, int]:
        return {a: getattr(self, a) for a in axes.MESH_AXES}

    @property
    def devices(self) -> int:
        return math.prod(self.shape.values())

    def mesh_axes(self, *logical: str | None) -> tuple[str, ...]:
        """Mesh axes that these logical axes are split over; of None: none."""
        table = dict(self.rules)
        return tuple(a for name in logical if name is not None for a in table[name])

    def product(self, mesh_axes: Iterable[str]) -> int:
        """Devices along these mesh axes, each counted once."""
        return math.prod(self.shape[a] for a in set(mesh_axes))

    def size(self, *logical: str) -> int:
        """Devices that an array with these logical axes is split over."""
        return self.product(self.mesh_axes(*logical))

    def used(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes of one logical axis that hold more than one device."""
        return tuple(a for a in self.mesh_axes(logical) if self.shape[a] > 1)

    def dividing(self, logical: str | None, size: int) -> tuple[str, ...]:
        """Of `used`, those over which a dimension of this size can be split evenly."""
        taken, shards = (), 1
        for a in self.used(logical):
            if size % (shards * self.shape[a]) == 0:
                taken, shards = (*taken, a), shards * self.shape[a]
        return taken

    def clash(self, *logical: str | None) -> str | None:
        """A sentence if two logical axes of one array claim the same mesh axis, else None."""
        owner: dict[str, str | None] = {}
        for name in logical:
            for axis in self.mesh_axes(name):
                if axis in owner:
                    return (
                        f"logical axes {owner[axis]!r} and {name!r} of one array both map to mesh axis "
                        f"{axis!r}: change one of the rows in mesh.rules"
                    )
                owner[axis] = name
        return None

    @property
    def peers(self) -> int:
        """Devices that split both the experts and the tokens, so that tokens travel."""
        return self.product({*self.mesh_axes(axes.EXPERT)} & {*self.mesh_axes(axes.BATCH)})

    def __str__(self):
        return ",".join(f"{a}={n}" for a, n in self.shape.items())


def mesh_sizes(cfg: MeshConfig, num_devices: int) -> MeshSizes:
    """The sizes of a config's mesh; an axis of -1 takes what is left of `num_devices`.

    Raises ConfigError if they do not match.
    """
    sizes = {a: getattr(cfg, a) for a in axes.MESH_AXES}
    fixed = math.prod(s for s in sizes.values() if s != -1)
    free = [a for a, s in sizes.items() if s == -1]
    text = ", ".join(f"{a}={s}" for a, s in sizes.items())
    if free:
        if num_devices % fixed:
            raise ConfigError(
                f"mesh ({text}): the fixed axes need a multiple of {fixed} devices, there are "
                f"{num_devices}; their product may be {divisors_text(num_devices)}"
            )
        sizes[free[0]] = num_devices // fixed
    elif fixed > num_devices:
        raise ConfigError(
            f"mesh ({text}) needs {fixed} devices, there are {num_devices}; "
            f"the product may be {divisors_text(num_devices)}, or set data=-1 to use what is left"
        )
    return MeshSizes(**sizes, rules=tuple(parse_rules(cfg.rules).items()))


def parse_mesh(text: str) -> MeshSizes:
    """'fsdp=8,expert=4' -> MeshSizes; ConfigError names a bad axis or size."""
    sizes = {}
    for item in filter(None, text.split(",")):
        axis, _, size = item.partition("=")
        if axis not in axes.MESH_AXES or not size.isdigit() or int(size) < 1:
            raise ConfigError(
                f"--mesh: {item!r} is not axis=size with axis one of {', '.join(axes.MESH_AXES)} and size "
                "at least 1; 'fsdp=8,expert=4' would work"
            )
        sizes[axis] = int(size)
    return MeshSizes(**sizes)


def check_layout(
    cfg: ExperimentConfig, mesh: MeshSizes, platform: str, *, vocabulary: bool = True
) -> None:
    """Raises ConfigError with all `layout_problems`: the axis, both numbers and what would work."""
    problems = layout_problems(cfg, mesh, platform, vocabulary=vocabulary)
    if problems:
        raise ConfigError(
            "the mesh does not fit the model:\n" + "\n".join(f"  - {p}" for p in problems)
        )


def layout_problems(
    cfg: ExperimentConfig, mesh: MeshSizes, platform: str, *, vocabulary: bool = True
) -> list[str]:
    """Why a model cannot be laid out on a mesh of `platform` ('cpu', 'gpu', 'tpu'), as sentences: above all
    every size that does not divide over its mesh axes. `vocabulary=False`: its size is not known yet."""
    m, a, moe = cfg.model, cfg.model.attention, cfg.model.moe
    micro = cfg.data.batch_size // cfg.train.accumulation
    sized = [
        (axes.BATCH, "data.batch_size / train.accumulation", micro),
        *([(axes.VOCAB, "model.vocab_size", m.vocab_size)] if vocabulary else []),
        (axes.EMBED, "model.d_model", m.d_model),
        (axes.HEADS, "model.attention.num_heads", a.num_heads),
    ]
    sized += kind_of(a).sizes(a)
    if m.num_moe_layers < m.num_layers:
        sized.append((axes.MLP, "model.d_ff", m.d_ff))
    if m.num_moe_layers:
        sized.append((axes.EXPERT, "model.moe.num_experts", moe.num_experts))
        sized.append((axes.EXPERT_MLP, "model.moe.d_expert", moe.d_expert))
        read = "model.moe.latent_dim" if moe.latent_dim else "model.d_model"
        sized.append((axes.EXPERT_EMBED, read, moe.expert_input(m.d_model)))
        if moe.latent_dim:
            sized.append((axes.LATENT, read, moe.latent_dim))
        if moe.shared_width:
            sized.append((axes.MLP, "the shared experts' width", moe.shared_width))
    problems = [clash for names in TOGETHER if (clash := mesh.clash(*names))]
    for logical, key, value in sized:
        shards = mesh.size(logical)
        if value % shards:
            where = " * ".join(f"{a}={mesh.shape[a]}" for a in mesh.mesh_axes(logical))
            problems.append(
                f"{key}={value} does not divide over {shards} devices (mesh axes {where}); "
                f"their product may be {divisors_text(value)}"
            )
    if m.router is not None and m.router.form == "token":
        problems += _strategy_problems(cfg.compute, mesh, platform)
    return problems


def _strategy_problems(compute: ComputeConfig, mesh: MeshSizes, platform: str) -> list[str]:
    """Why the expert-parallel strategy or its kernel cannot run on this mesh, as sentences."""
    problems = []
    batch, experts = mesh.used(axes.BATCH), mesh.used(axes.EXPERT)
    apart = [a for a in experts if a not in batch]
    if compute.expert_parallel == "all_to_all" and apart:
        problems.append(
            f"compute.expert_parallel='all_to_all' exchanges tokens between the devices that hold the "
            f"batch, but experts are split over mesh axis {apart[0]!r} of size "
            f"{mesh.shape[apart[0]]}, which holds no batch (batch={'+'.join(batch) or 'none'}): "
            f"'ring' would work, or mesh.rules=('batch={'+'.join((*batch, *apart))}',)"
        )
    if compute.grouped_matmul == "tokamax" and platform == "cpu":
        problems.append(
            "compute.grouped_matmul='tokamax' has no kernels for platform 'cpu': 'auto' would work"
        )
    elif compute.grouped_matmul == "tokamax" and importlib.util.find_spec("tokamax") is None:
        problems.append(
            "compute.grouped_matmul='tokamax' needs the package tokamax: pip install 'moejax[kernels]', "
            "or 'auto' would work"
        )
    elif (
        compute.grouped_matmul == "tokamax"
        and platform == "gpu"
        and math.prod(mesh.shape.values()) > 1
    ):
        problems.append(
            "compute.grouped_matmul='tokamax' works on one GPU only: its kernels cannot be split over a mesh; "
            "'auto' would work"
        )
    return problems
