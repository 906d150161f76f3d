"""Checkpoints: everything a run is, saved atomically by orbax, restored from the newest whole one.

A step's folder holds three items:

    model      {params, router_state}: all that evaluation, generation and export need
    training   what else the state of training holds (`moejax.train.state`); an imported model has none
    meta       JSON: the config, the position in the data (null for an imported model), and a checksum of
               each of the other two

Arrays are read straight onto the shards of the mesh at hand, whatever mesh and number of processes wrote
them. Nothing is pickled.
"""

import contextlib
import json
import pathlib
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding

from moejax.config import ConfigError, ExperimentConfig, ModelConfig
from moejax.config_io import to_json
from moejax.models import transformer
from moejax.params import abstract_params, path_name
from moejax.runs import folder
from moejax.runs.checksums import checksum, verify
from moejax.sharding import Layout

# What orbax and tensorstore raise for files that are cut, emptied or gone; a bare Exception too.
UNREADABLE = (ValueError, OSError, KeyError)

# Pieces of an array that is not packed.
PIECE_BYTES = 64 * 2**20


class Restored(NamedTuple):
    """Attributes:
    params, router_state: the model, in its master dtype.
    training: the item of that name; None for an imported model.
    data_state: the position in the data; None for an imported model.
    """

    params: dict
    router_state: dict
    training: dict | None
    data_state: dict | None


class Checkpoints:
    """Saves in the background; keeps the last `keep_last` steps, and every `keep_every`-th for good."""

    def __init__(self, workdir: pathlib.Path, cfg: ExperimentConfig, *, packed: bool = True):
        """`packed` gathers arrays in few large files, of which orbax holds a copy while it writes;
        else each array is written in pieces of its own. Either kind can be read."""
        self.packed = packed
        self.workdir = workdir.resolve()
        self.folder = self.workdir / folder.CHECKPOINTS
        self.cfg = cfg
        options = ocp.CheckpointManagerOptions(
            max_to_keep=cfg.train.keep_last,
            keep_period=cfg.train.keep_every or None,
            create=True,
        )
        handlers: dict[str, Any] = {
            "model": ocp.StandardCheckpointHandler(use_ocdbt=packed),
            "training": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=handlers)

    def save(self, step: int, model: dict, training: dict, data_state: dict) -> None:
        """Begin to save a state of training; the arrays may be donated as soon as this returns.

        Raises folder.SaveError if this save, or the one before it, could not be written.
        """
        self._save(step, data_state, model=model, training=training)

    def save_model(self, params: dict, router_state: dict) -> None:
        """Save a model that was not trained here, as step 0, and wait until it is written."""
        self._save(0, None, model={"params": params, "router_state": router_state})
        self.wait()

    def _save(self, step: int, data_state: dict | None, **items) -> None:
        meta = {
            "config": json.loads(to_json(self.cfg)),
            "data": data_state,
            "checksums": {name: checksum(item) for name, item in items.items()},
        }
        piece = ocp.SaveArgs(chunk_byte_size=None if self.packed else PIECE_BYTES)
        args = {
            name: ocp.args.StandardSave(item, save_args=jax.tree.map(lambda _: piece, item))
            for name, item in items.items()
        }
        with self._writing():
            self.manager.save(step, args=ocp.args.Composite(**args, meta=ocp.args.JsonSave(meta)))

    @contextlib.contextmanager
    def _writing(self):
        try:
            yield
        except (ValueError, OSError) as e:  # tensorstore reports errors of the system as ValueError
            reason = str(e).rpartition(": ")[2]
            self.manager.reload()
            steps = self.manager.all_steps()
            whole = f"step {max(steps)} is the last whole one" if steps else "none is there yet"
            raise folder.SaveError(
                f"saving a checkpoint in {self.folder} failed: {reason}; {whole}. Free some space (or "
                "lower train.keep_last), and the same command goes on from there"
            ) from e

    def restore(self, training: dict, layout: Layout | None = None) -> Restored | None:
        """The newest checkpoint that can be read; None if there is none.

        A damaged one is passed over with a warning that names it and the one used instead, and is moved
        aside, so that its step can be saved again.

        Args:
          training: the shapes of that item, `placed`; not looked at for an imported model.
          layout: where the model goes; None: the first device.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        found = self._newest(steps, lambda step: self._read_all(step, training, layout))
        if found is None:
            return None
        self._set_aside([s for s in steps if s > found[0]])
        return found[1]

    def restore_model(self, layout: Layout | None = None) -> tuple[int, dict, dict] | None:
        """(step, params, router_state) of the newest checkpoint that can be read, in the dtype in
        which it is stored; None if there is none."""
        steps = sorted(self.manager.all_steps(), reverse=True)

        def read(step):
            return self._read_model(step, self._read_meta(step), layout, stored_dtype=True)

        found = self._newest(steps, read)
        return None if found is None else (found[0], *found[1])

    def _newest(self, steps: list[int], read: Callable) -> tuple[int, Any] | None:
        for i, step in enumerate(steps):
            try:
                return step, jax.block_until_ready(read(step))
            except ConfigError:
                raise
            except Exception as e:
                if not isinstance(e, UNREADABLE) and type(e) is not Exception:
                    raise  # no memory, say: not the file's fault
                rest = (
                    f"falling back to step {steps[i + 1]}" if i + 1 < len(steps) else "none is left"
                )
                warnings.warn(
                    f"checkpoint {self.folder / str(step)} cannot be read ({_reason(e)}); {rest}",
                    stacklevel=3,
                )
        if steps:
            raise ConfigError(
                f"no checkpoint in {self.folder} can be read; use another --workdir, or remove the folder "
                "to start again"
            )
        return None

    def _read_all(self, step: int, training: dict, layout: Layout | None) -> Restored:
        meta = self._read_meta(step)
        params, router_state = self._read_model(step, meta, layout)
        if meta["data"] is None:
            return Restored(params, router_state, None, None)
        args = ocp.args.Composite(training=ocp.args.StandardRestore(training))
        training = self.manager.restore(step, args=args)["training"]
        verify(training, meta, "training")
        return Restored(params, router_state, training, meta["data"])

    def _read_model(
        self, step: int, meta: dict, layout: Layout | None, *, stored_dtype: bool = False
    ) -> tuple[dict, dict]:
        model = abstract_model(self.cfg.model, layout)
        stored = self.manager.item_metadata(step)["model"]
        if stored is None:
            raise ValueError("its model has no metadata")
        model = _fit(model, stored.tree, self.folder / str(step), stored_dtype)
        args = ocp.args.Composite(model=ocp.args.StandardRestore(model))
        out = self.manager.restore(step, args=args)["model"]
        verify(out, meta, "model")
        return out["params"], out["router_state"]

    def _read_meta(self, step: int) -> dict:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self.manager.restore(step, args=args)["meta"]

    def _set_aside(self, damaged: list[int]) -> None:
        """Move damaged steps out of orbax's way: it never saves a step older than its newest."""
        if not damaged:
            return
        if jax.process_index() == 0:
            aside = self.workdir / folder.DAMAGED
            aside.mkdir(exist_ok=True)
            for step in damaged:
                target, n = aside / str(step), 1
                while target.exists():
                    target, n = aside / f"{step}.{n}", n + 1
                (self.folder / str(step)).rename(target)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints set aside")
        self.manager.reload()

    def wait(self) -> None:
        """Until everything is written; raises folder.SaveError if something could not be."""
        with self._writing():
            self.manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self.manager.close()


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


def _reason(e: Exception) -> str:
    """The kind of an error and the first words of what it says."""
    lines = str(e).strip().splitlines() or [""]
    return f"{type(e).__name__}: {lines[0][:100]}"


def _fit(ours: dict, stored: dict, where: pathlib.Path, stored_dtype: bool) -> dict:
    """`ours` (abstract, placed) if `stored` has the same arrays, in the dtype stored if asked for.

    Raises ConfigError naming the first arrays that differ.
    """
    there, here = _by_path(stored), _by_path(ours)
    lines = [
        f"{name}: {_shape(there.get(name))} there, {_shape(here.get(name))} now"
        for name in sorted(there.keys() | here.keys())
        if _shape(there.get(name)) != _shape(here.get(name))
    ]
    if lines:
        more = [f"and {len(lines) - 5} more"] if len(lines) > 5 else []
        raise ConfigError(
            f"{where} holds another model than the config describes:\n"
            + "\n".join(f"  - {line}" for line in [*lines[:5], *more])
            + "\nuse the config that it was saved with, or another --workdir"
        )
    if not stored_dtype:
        return ours

    def one(path, a):
        return jax.ShapeDtypeStruct(a.shape, there[path_name(path)].dtype, sharding=a.sharding)

    return jax.tree_util.tree_map_with_path(one, ours)


def _by_path(tree: dict) -> dict:
    return {path_name(p): a for p, a in jax.tree_util.tree_flatten_with_path(tree)[0]}


def _shape(a) -> str:
    return "absent" if a is None else str(tuple(a.shape))
