"""The mesh, and layouts: arrays on it by the table of `moejax.mesh_rules`, checked before compilation."""

import dataclasses
import math

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax import axes
from moejax.config import ConfigError, ExperimentConfig, MeshConfig, MoEConfig
from moejax.config_checks import divisors_text
from moejax.mesh_rules import mesh_sizes, parse_rules
from moejax.params import Tree, map_specs

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


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the table that maps logical axes onto it; passed as an argument, never global."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def mesh_axes(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes of one logical axis."""
        return () if logical is None else dict(self.rules)[logical]

    def size(self, logical: str) -> int:
        """Number of shards of one logical axis."""
        return math.prod(self.mesh.shape[a] for a in self.mesh_axes(logical))

    def used(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes of one logical axis that hold more than one device."""
        return tuple(a for a in self.mesh_axes(logical) if self.mesh.shape[a] > 1)

    def dividing(self, logical: str | None, size: int) -> tuple[str, ...]:
        """Of `used`, those over which a dimension of this size can be split evenly."""
        taken, shards = (), 1
        for a in self.used(logical):
            if size % (shards * self.mesh.shape[a]) == 0:
                taken, shards = (*taken, a), shards * self.mesh.shape[a]
        return taken

    def spec(self, *logical: str | None) -> PartitionSpec:
        """PartitionSpec of an array with these logical axes; raises if two claim one mesh axis."""
        owner: dict[str, str | None] = {}
        for name in logical:
            for axis in self.mesh_axes(name):
                if axis in owner:
                    raise ConfigError(
                        f"logical axes {owner[axis]!r} and {name!r} of one array both map to mesh axis "
                        f"{axis!r}: change one of the rows in mesh.rules"
                    )
                owner[axis] = name
        parts = [self.mesh_axes(name) for name in logical]
        return PartitionSpec(*(p if len(p) > 1 else (p[0] if p else None) for p in parts))

    def sharding(self, *logical: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*logical))

    def constrain(self, x: jax.Array, *logical: str | None) -> jax.Array:
        """`x` laid out by the table. A dimension stays whole over an axis that does not divide it: a few
        rows when generating (sizes of training are checked by `layout_problems`)."""
        parts = [self.dividing(name, n) or None for name, n in zip(logical, x.shape, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*parts)))

    def of_specs(self, specs: Tree) -> Tree:
        """Shardings of a tree of ParamSpec."""
        return map_specs(lambda s: self.sharding(*s.axes), specs)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """The mesh of a config over `devices` (default: all); an axis of -1 takes what is left.

    Raises ConfigError, before anything is compiled, if the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(cfg, len(devices))
    need = math.prod(sizes.values())
    grid = np.asarray(devices[:need]).reshape(tuple(sizes.values()))
    # Auto axes: the compiler propagates shardings; collectives are explicit only inside shard_map.
    return Mesh(grid, axes.MESH_AXES, axis_types=(AxisType.Auto,) * len(axes.MESH_AXES))


def make_layout(cfg: ExperimentConfig, devices=None) -> Layout | None:
    """The layout of an experiment, checked; None on a single device.

    Raises ConfigError naming the axis, both numbers and what would work, before compilation.
    """
    devices = jax.devices() if devices is None else devices
    mesh = make_mesh(cfg.mesh, devices)
    layout = Layout(mesh, tuple(parse_rules(cfg.mesh.rules).items()))
    problems = layout_problems(cfg, layout)
    if problems:
        raise ConfigError(
            "the mesh does not fit the model:\n" + "\n".join(f"  - {p}" for p in problems)
        )
    return None if mesh.size == 1 else layout


def layout_problems(cfg: ExperimentConfig, layout: Layout) -> list[str]:
    """Every size that does not divide over its mesh axes, as sentences."""
    m, a, moe = cfg.model, cfg.model.attention, cfg.model.moe
    micro = cfg.data.batch_size // cfg.train.accumulation
    sized = [
        (axes.BATCH, "data.batch_size / train.accumulation", micro),
        (axes.VOCAB, "model.vocab_size", m.vocab_size),
        (axes.EMBED, "model.d_model", m.d_model),
        (axes.HEADS, "model.attention.num_heads", a.num_heads),
    ]
    if a.kind == "mha":
        sized.append((axes.KV_HEADS, "model.attention.num_kv_heads", a.num_kv_heads))
    else:
        latent = a.kv_lora_rank + a.qk_rope_head_dim
        sized += [
            (axes.LATENT, "model.attention.q_lora_rank", a.q_lora_rank),
            (axes.LATENT, "model.attention.kv_lora_rank", a.kv_lora_rank),
            (axes.LATENT, "model.attention.kv_lora_rank + qk_rope_head_dim", latent),
        ]
    if m.num_moe_layers < m.num_layers:
        sized.append((axes.MLP, "model.d_ff", m.d_ff))
    if m.num_moe_layers:
        sized.append((axes.EXPERT, "model.moe.num_experts", moe.num_experts))
        sized.append((axes.EXPERT_MLP, "model.moe.d_expert", moe.d_expert))
        sized.append((axes.EXPERT_EMBED, "model.d_model", m.d_model))
        if moe.shared_width:
            sized.append((axes.MLP, "the shared experts' width", moe.shared_width))
    problems = []
    for names in TOGETHER:
        try:
            layout.spec(*names)
        except ConfigError as e:
            problems.append(str(e))
    for logical, key, value in sized:
        shards = layout.size(logical)
        if value % shards:
            where = " * ".join(f"{a}={layout.mesh.shape[a]}" for a in layout.mesh_axes(logical))
            problems.append(
                f"{key}={value} does not divide over {shards} devices (mesh axes {where}); "
                f"their product may be {divisors_text(value)}"
            )
    if m.num_moe_layers and moe.dispatcher == "dropless":
        problems += _strategy_problems(moe, layout)
    return problems


def _strategy_problems(moe: MoEConfig, layout: Layout) -> list[str]:
    """Why the expert-parallel strategy or its kernel cannot run on this mesh, as sentences."""
    problems = []
    batch, experts = layout.used(axes.BATCH), layout.used(axes.EXPERT)
    apart = [a for a in experts if a not in batch]
    if moe.expert_parallel == "all_to_all" and apart:
        problems.append(
            f"model.moe.expert_parallel='all_to_all' exchanges tokens between the devices that hold the "
            f"batch, but experts are split over mesh axis {apart[0]!r} of size "
            f"{layout.mesh.shape[apart[0]]}, which holds no batch (batch={'+'.join(batch) or 'none'}): "
            f"'ring' would work, or mesh.rules=('batch={'+'.join((*batch, *apart))}',)"
        )
    platform = layout.mesh.devices.flat[0].platform
    if moe.grouped_matmul == "tokamax" and platform == "cpu":
        problems.append(
            "model.moe.grouped_matmul='tokamax' has no kernels for platform 'cpu': "
            "'auto' or 'blocked' would work"
        )
    return problems
