"""Varying types inside `jax.shard_map(check_vma=True)`: one type for arrays that meet.

JAX inserts these casts itself in front of ordinary operations; loop carries and custom gradients
have to state them. Outside shard_map all of this does nothing.
"""

from typing import Any

import jax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes over which any of `arrays` varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays))


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """`x` marked as varying over `axes` too. The gradient of the mark is a sum over the axes it
    adds."""
    missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def vary_together(*trees: Any) -> list:
    """All arrays of `trees`, each varying over every axis that one of them varies over."""
    leaves, structure = jax.tree.flatten(list(trees))
    axes = varying_axes(*leaves)
    return structure.unflatten([vary(a, axes) for a in leaves])
