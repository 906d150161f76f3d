"""The mesh, and layouts: arrays on it by the table of `moejax.mesh`, checked before compilation."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from moejax import axes
from moejax.config import ConfigError, ExperimentConfig, MeshConfig
from moejax.mesh import MeshSizes, check_layout, mesh_sizes
from moejax.params import Tree, map_specs


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh and the table that maps logical axes onto it; passed as an argument, never global."""

    mesh: Mesh
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    @property
    def sizes(self) -> MeshSizes:
        return MeshSizes(**self.mesh.shape, rules=self.rules)

    def size(self, logical: str) -> int:
        """Number of shards of one logical axis."""
        return self.sizes.size(logical)

    def used(self, logical: str | None) -> tuple[str, ...]:
        """Mesh axes of one logical axis that hold more than one device."""
        return self.sizes.used(logical)

    def dividing(self, logical: str | None, size: int) -> tuple[str, ...]:
        """Of `used`, those over which a dimension of this size can be split evenly."""
        return self.sizes.dividing(logical, size)

    def spec(self, *logical: str | None) -> PartitionSpec:
        """PartitionSpec of an array with these logical axes; ConfigError if two claim one mesh axis."""
        sizes = self.sizes
        if clash := sizes.clash(*logical):
            raise ConfigError(clash)
        parts = [sizes.mesh_axes(name) for name in logical]
        return PartitionSpec(*(p if len(p) > 1 else (p[0] if p else None) for p in parts))

    def sharding(self, *logical: str | None) -> NamedSharding:
        return NamedSharding(self.mesh, self.spec(*logical))

    def constrain(self, x: jax.Array, *logical: str | None) -> jax.Array:
        """`x` laid out by the table. A dimension stays whole over an axis that does not divide it: a few
        rows when generating (sizes of training are checked by `make_layout`)."""
        parts = [self.dividing(name, n) or None for name, n in zip(logical, x.shape, strict=True)]
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*parts)))

    def of_specs(self, specs: Tree) -> Tree:
        """Shardings of a tree of ParamSpec."""
        return map_specs(lambda s: self.sharding(*s.axes), specs)

    @property
    def batch(self) -> NamedSharding:
        """Of a batch's arrays, which begin with BS."""
        return self.sharding(axes.BATCH, axes.SEQ)

    @property
    def replicated(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec())


def make_mesh(cfg: MeshConfig, devices=None) -> Mesh:
    """The mesh of a config over `devices` (default: all); an axis of -1 takes what is left.

    Raises ConfigError, before anything is compiled, if the sizes do not match the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(cfg, len(devices))
    grid = np.asarray(devices[: sizes.devices]).reshape(tuple(sizes.shape.values()))
    # Auto axes: the compiler propagates shardings; collectives are explicit only inside shard_map.
    return Mesh(grid, axes.MESH_AXES, axis_types=(AxisType.Auto,) * len(axes.MESH_AXES))


def make_layout(cfg: ExperimentConfig, devices=None) -> Layout | None:
    """The layout of an experiment, checked; None on a single device.

    Raises ConfigError naming the axis, both numbers and what would work, before compilation.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_sizes(cfg.mesh, len(devices))
    check_layout(cfg, sizes, devices[0].platform)
    return None if sizes.devices == 1 else Layout(make_mesh(cfg.mesh, devices), sizes.rules)


# --------------------------------------------------------------------------------------------------
# Batches. The global batch does not depend on the number of processes.


def rows_here(layout: Layout | None, batch_size: int, seq_len: int) -> tuple[int, int]:
    """(index, count): this process loads the index-th of count equal parts of every batch.

    Processes whose devices hold the same rows (tensor parallelism across hosts) load the same part.
    """
    if layout is None:
        return 0, 1
    sharding = layout.batch
    where = sharding.addressable_devices_indices_map((batch_size, seq_len))
    ranges = {index[0].indices(batch_size)[:2] for index in where.values()}
    low, high = min(a for a, _ in ranges), max(b for _, b in ranges)
    held = sum(b - a for a, b in ranges)
    if held != high - low or batch_size % held or low % held:
        raise ConfigError(
            "mesh: the rows of a batch that this process holds do not lie side by side; leave the "
            "'batch' row of mesh.rules in the order data, fsdp, expert"
        )
    return low // held, batch_size // held


def place_rows(rows: dict[str, np.ndarray], layout: Layout | None, batch_size: int) -> dict:
    """A global batch from this process's part of it."""
    if layout is None:
        return rows
    sharding = layout.batch
    return {
        name: jax.make_array_from_process_local_data(sharding, a, (batch_size, *a.shape[1:]))
        for name, a in rows.items()
    }


def place_whole(batch: dict[str, np.ndarray], layout: Layout | None) -> dict:
    """A global batch that every process holds whole: each device takes its rows."""
    if layout is None:
        return batch
    sharding = layout.batch
    return {
        name: jax.make_array_from_callback(a.shape, sharding, lambda index, a=a: a[index])
        for name, a in batch.items()
    }
