"""Parameters as specs: shape, logical axes and initialiser, apart from the values.

A model is described by a nested dict of `ParamSpec`; from it follow the values (`init_params`), their
abstract shapes (`abstract_params`), their shardings (`moejax.sharding`) and their count. Nothing is
allocated until `init_params` runs, so a 671B model can be described on a laptop.
"""

import dataclasses
import math
import zlib
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from moejax.axes import EXPERT, LAYERS, ROLES, VOCAB
from moejax.weights import is_weight

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
      role: what it is, one of `axes.ROLES`. Leading axes of layers and experts count instances; of the
        dimensions behind them, two are a 'matrix', fewer a 'vector' (norm scales, biases, sinks). A matrix with
        the vocabulary on its input side is an 'embedding', on its output side the 'head'. What follows from
        shape and axes need not be given; 'router' (what gives scores or gates) and learned positions are.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    init: str = "normal"
    std: float = 0.006
    dtype: Any = jnp.float32
    role: str = ""

    def __post_init__(self):
        if len(self.shape) != len(self.axes):
            raise ValueError(f"shape {self.shape} and axes {self.axes} differ in length")
        if self.init not in ("normal", "zeros", "ones"):
            raise ValueError(f"init {self.init!r}: expected 'normal', 'zeros' or 'ones'")
        if not self.role:
            object.__setattr__(self, "role", self._role())
        if self.role not in ROLES:
            raise ValueError(f"role {self.role!r}: expected one of {', '.join(ROLES)}")

    def _role(self) -> str:
        if len(self.shape) - self.batch_dims < 2:
            return "vector"
        ends = self.axes[self.batch_dims], self.axes[-1]
        return "embedding" if ends[0] == VOCAB else "head" if ends[1] == VOCAB else "matrix"

    @property
    def batch_dims(self) -> int:
        """Leading axes that count layers and experts: each of them has an array of its own."""
        return next(
            (i for i, a in enumerate(self.axes) if a not in (LAYERS, EXPERT)), len(self.axes)
        )

    @property
    def matrix_dims(self) -> tuple[int, int]:
        """(contracted with the input, running over the output) of each instance, from the end. ValueError if
        it is not a matrix."""
        if len(self.shape) - self.batch_dims != 2:
            raise ValueError(f"axes {self.axes} are no matrix behind layers and experts")
        return -2, -1


def is_spec(x) -> bool:
    return isinstance(x, ParamSpec)


def path_name(path) -> str:
    """'blocks/moe/experts/w_up' for a jax key path."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path)


def map_specs(fn, specs: Tree, *trees: Tree) -> Tree:
    """`fn` of each spec, and of what `trees` have in its place."""
    return jax.tree.map(fn, specs, *trees, is_leaf=is_spec)


def router_specs(specs: Tree) -> Tree:
    """`specs` of a router: what would be a matrix gets the role 'router'."""
    return map_specs(
        lambda s: dataclasses.replace(s, role="router") if s.role == "matrix" else s, specs
    )


def by_path(specs: Tree) -> dict[str, ParamSpec]:
    leaves = jax.tree_util.tree_flatten_with_path(specs, is_leaf=is_spec)[0]
    return {path_name(path): spec for path, spec in leaves}


def roles(specs: Tree) -> dict[str, str]:
    """Path -> role of every parameter."""
    return {path: spec.role for path, spec in by_path(specs).items()}


def select(tree: dict, paths: Collection[str], prefix: str = "") -> dict:
    """The part of a nested dict that lies at `paths`; dicts left empty are dropped."""
    out = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            value = select(value, paths, f"{prefix}{key}/")
            if value:
                out[key] = value
        elif prefix + key in paths:
            out[key] = value
    return out


def merge(one: dict, other: dict) -> dict:
    """The nested dict of which `one` and `other` are parts (see `select`)."""
    both = one.keys() & other.keys()
    return {**one, **other, **{key: merge(one[key], other[key]) for key in both}}


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
    """Number of scalars in a tree of specs or weights, quantised or not."""
    return sum(math.prod(s.shape) for s in jax.tree.leaves(specs, is_leaf=is_weight))
