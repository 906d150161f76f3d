"""What the arrays of a checkpoint's model must be, and where they belong."""

import pathlib
from collections.abc import Collection
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, SingleDeviceSharding

from moejax.config import ConfigError, ModelConfig
from moejax.models import transformer
from moejax.params import abstract_params, path_name
from moejax.sharding import Layout
from moejax.weights import Quantized, partition


class Damaged(ValueError):
    """A checkpoint does not hold what was saved."""


def fit(ours: dict, path: pathlib.Path, meta: dict, stored_dtype: bool) -> dict:
    """`ours` (abstract, placed) if the item 'model' has the same arrays, in the dtype stored if asked for.

    Raises Damaged naming the first arrays that differ: the config, which agrees, says what they are.
    ConfigError if some are quantised and it is not asked for what is stored, or the mesh does not divide them.
    """
    there = stored(path, meta)
    ours = _quantized(ours, there, path, stored_dtype)
    here = {path_name(p): a for p, a in jax.tree_util.tree_flatten_with_path(ours)[0]}
    names = sorted(there.keys() | here.keys())
    differ = [n for n in names if n not in here or tuple(here[n].shape) != there.get(n, (None,))[0]]
    if differ:
        n = differ[0]
        now = tuple(here[n].shape) if n in here else "absent"
        was = there[n][0] if n in there else "absent"
        raise Damaged(
            f"{n} and {len(differ) - 1} more are not as its config says: {was} there, {now} now"
        )
    if not stored_dtype:
        return ours

    def one(path, a):
        return jax.ShapeDtypeStruct(a.shape, there[path_name(path)][1], sharding=a.sharding)

    return jax.tree_util.tree_map_with_path(one, ours)


def _quantized(ours: dict, there: dict[str, tuple], path: pathlib.Path, wanted: bool) -> dict:
    """`ours` with a `Quantized` in place of each matrix that is stored as one."""
    few = quantized_names(there)

    def one(key, a):
        name = path_name(key)
        if name not in few:
            return a
        if not wanted:
            raise ConfigError(not_trainable(path))
        parts = (jax.ShapeDtypeStruct(*there[f"{name}/{part}"]) for part in ("q", "scale"))
        found = Quantized(*parts)
        return laid_out(found, a.sharding, name) if found.fits(a.shape) else a

    return jax.tree_util.tree_map_with_path(one, ours)


def quantized_names(there: Collection[str]) -> set[str]:
    """Of the names of stored arrays, what is a `Quantized`."""
    matrices = (n.removesuffix("/q") for n in there if n.endswith("/q"))
    return {n for n in matrices if f"{n}/scale" in there}


def not_trainable(path: pathlib.Path) -> str:
    return (
        f"the weights in {path} are quantised, so they cannot be trained. A run that was imported "
        "without --quantize can be"
    )


def laid_out(w: Quantized, sharding, name: str) -> Quantized:
    """Shapes with the shardings of a matrix that lies as `sharding` says."""
    if not isinstance(sharding, NamedSharding):
        return placed(w, Quantized(sharding, sharding))
    parts = partition(w, sharding.spec)
    shardings = jax.tree.map(lambda p: NamedSharding(sharding.mesh, p), parts)
    for a, s in zip((w.q, w.scale), (shardings.q, shardings.scale)):
        try:
            s.shard_shape(a.shape)
        except ValueError:
            raise ConfigError(
                f"{name} is quantised in blocks of {w.block} of its {w.shape[-2]} inputs, which cannot be "
                f"split as the mesh asks for ({s.spec}); a mesh that splits them fewer times would work"
            ) from None
    return placed(w, shardings)


def stored(path: pathlib.Path, meta: dict) -> dict[str, tuple[tuple, Any]]:
    """Shape and dtype of each stored array of the model."""
    saved = meta["checksums"]["model"]
    if isinstance(saved, dict):
        return {n: (tuple(a["shape"]), jax.numpy.dtype(a["dtype"])) for n, a in saved.items()}
    handler = ocp.StandardCheckpointHandler()
    tree = handler.metadata(path / "model").tree
    handler.close()
    flat = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(p): (tuple(a.shape), a.dtype) for p, a in flat}


def abstract_model(cfg: ModelConfig, layout: Layout | None) -> dict:
    """{params, router_state} as shapes that say on which devices they belong; without a layout, all on
    the first device. Parameters in their master dtype."""
    specs = transformer.param_specs(cfg)
    shapes = {
        "params": abstract_params(specs),
        "router_state": transformer.abstract_router_state(cfg),
    }
    whole = SingleDeviceSharding(jax.devices()[0]) if layout is None else layout.replicated
    shardings = jax.tree.map(lambda _: whole, shapes)
    if layout is not None:
        shardings["params"] = layout.of_specs(specs)
    return placed(shapes, shardings)


def placed(shapes, shardings):
    """Shapes, each with its sharding: what orbax is to read, and where to."""
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), shapes, shardings
    )
