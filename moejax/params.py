"""Parameters as specs: shape, logical axes and initialiser, apart from the values.

A model is described by a nested dict of `ParamSpec`; from it follow the values (`init_params`), their
abstract shapes (`abstract_params`), their shardings (`moejax.sharding`) and their count. Nothing is
allocated until `init_params` runs, so a 671B model can be described on a laptop.
"""

import dataclasses
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp

Tree = Any  # a nested dict of arrays or specs


@dataclasses.dataclass(frozen=True)
class ParamSpec:
    """One parameter array.

    Attributes:
      shape: global shape.
      axes: a logical axis name (or None) for each dimension, see `moejax.axes`.
      init: 'normal' (mean 0, deviation `std`), 'zeros' or 'ones'.
      std: standard deviation for 'normal'.
      dtype: storage dtype; master weights are float32.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    std: float = 0.006
    dtype: Any = jnp.float32

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
        if self.init not in ("normal", "zeros", "ones"):
            raise ValueError(f"init {self.init!r}: expected 'normal', 'zeros' or 'ones'")


def is_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def path_name(path) -> str:
    """'blocks/moe/experts/w_up' for a jax key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def map_specs(fn, specs: Tree) -> Tree:
    return jax.tree.map(fn, specs, is_leaf=is_spec)


def stack(specs: Tree, num_layers: int, axis_name: str = "layers") -> Tree:
    """The specs of `num_layers` equal layers, stacked on a new leading axis."""
    return map_specs(
        lambda s: dataclasses.replace(s, shape=(num_layers, *s.shape), axes=(axis_name, *s.axes)),
        specs,
    )


def _init_one(key: jax.Array, spec: ParamSpec) -> jax.Array:
    if spec.init == "normal":
        return spec.std * jax.random.normal(key, spec.shape, spec.dtype)
    return (jnp.zeros if spec.init == "zeros" else jnp.ones)(spec.shape, spec.dtype)


def init_params(specs: Tree, key: jax.Array) -> Tree:
    """Values for specs. A leaf's key depends on its path alone, so that adding a parameter changes no
    other parameter's initial value."""

    def one(path, spec):
        return _init_one(jax.random.fold_in(key, zlib.crc32(path_name(path).encode())), spec)

    return jax.tree_util.tree_map_with_path(one, specs, is_leaf=is_spec)


def abstract_params(specs: Tree) -> Tree:
    return map_specs(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype), specs)


def count(specs: Tree) -> int:
    """Number of scalars in a tree of specs or arrays."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_spec))
