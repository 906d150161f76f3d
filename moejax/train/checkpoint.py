"""Checkpoints: everything a run is, saved atomically by orbax, restored from the newest whole one.

A step's folder holds three items:

    model      {params, router_state}: all that evaluation, generation and export need
    training   {step, opt_state, skipped, bad_in_a_row}; an imported model has none
    meta       JSON: the config, the position in the data (null for an imported model), and a checksum of
               each of the other two

Arrays are read straight onto the shards of the mesh at hand, whatever mesh and number of processes wrote
them. Nothing is pickled.
"""

import contextlib
import json
import pathlib
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moejax.config import ConfigError, ExperimentConfig, to_json
from moejax.params import path_name
from moejax.sharding import Layout
from moejax.train.state import TrainState, abstract_state, state_of_model, state_shardings

CONFIG = "config.json"

# What orbax and tensorstore raise for files that are cut, emptied or gone; a bare Exception too.
UNREADABLE = (ValueError, OSError, KeyError)

# Pieces of an array that is not packed.
PIECE_BYTES = 64 * 2**20


class SaveError(OSError):
    """A checkpoint could not be written; those before it are whole."""


class Checkpoints:
    """Saves in the background; keeps the last `keep_last` steps, and every `keep_every`-th for good."""

    def __init__(self, workdir: pathlib.Path, cfg: ExperimentConfig, *, packed: bool = True):
        """`packed` gathers arrays in few large files, of which orbax holds a copy while it writes;
        else each array is written in pieces of its own. Either kind can be read."""
        self.packed = packed
        self.workdir = workdir.resolve()
        self.folder = self.workdir / "checkpoints"
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

    def save(self, state: TrainState, data_state: dict) -> None:
        """Begin to save a state of training; the arrays may be donated as soon as this returns.

        Raises SaveError if this save, or the one before it, could not be written.
        """
        model, training = _split(state)
        self._save(int(state.step), data_state, model=model, training=training)

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
            raise SaveError(
                f"saving a checkpoint in {self.folder} failed: {reason}; {whole}. Free some space (or "
                "lower train.keep_last), and the same command goes on from there"
            ) from e

    def restore(self, layout: Layout | None = None) -> tuple[TrainState, dict | None] | None:
        """The newest state that can be read, and its position in the data; None if there is none.

        A model without training (an import) gets a fresh optimiser, float32 master weights and no
        position. A damaged checkpoint is passed over with a warning that names it and the one used
        instead, and is moved aside, so that its step can be saved again.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        found = self._newest(steps, lambda step: self._read_state(step, layout))
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

    def _read_state(self, step: int, layout: Layout | None) -> tuple[TrainState, dict | None]:
        meta = self._read_meta(step)
        data_state = meta["data"]
        params, router_state = self._read_model(step, meta, layout)
        if data_state is None:
            return state_of_model(self.cfg, params, router_state, layout), None
        _, training = _split(self._abstract(layout))
        args = ocp.args.Composite(training=ocp.args.StandardRestore(training))
        training = self.manager.restore(step, args=args)["training"]
        _verify(training, meta, "training")
        return TrainState(params=params, router_state=router_state, **training), data_state

    def _read_model(
        self, step: int, meta: dict, layout: Layout | None, *, stored_dtype: bool = False
    ) -> tuple[dict, dict]:
        model, _ = _split(self._abstract(layout))
        stored = self.manager.item_metadata(step)["model"]
        if stored is None:
            raise ValueError("its model has no metadata")
        model = _fit(model, stored.tree, self.folder / str(step), stored_dtype)
        args = ocp.args.Composite(model=ocp.args.StandardRestore(model))
        out = self.manager.restore(step, args=args)["model"]
        _verify(out, meta, "model")
        return out["params"], out["router_state"]

    def _read_meta(self, step: int) -> dict:
        args = ocp.args.Composite(meta=ocp.args.JsonRestore())
        return self.manager.restore(step, args=args)["meta"]

    def _abstract(self, layout: Layout | None) -> TrainState:
        return jax.tree.map(
            lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
            abstract_state(self.cfg),
            state_shardings(self.cfg, layout),
        )

    def _set_aside(self, damaged: list[int]) -> None:
        """Move damaged steps out of orbax's way: it never saves a step older than its newest."""
        if not damaged:
            return
        if jax.process_index() == 0:
            aside = self.workdir / "damaged"
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
        """Until everything is written; raises SaveError if something could not be."""
        with self._writing():
            self.manager.wait_until_finished()

    def close(self) -> None:
        self.wait()
        self.manager.close()


def _split(state: TrainState) -> tuple[dict, dict]:
    """The items 'model' and 'training' of a state."""
    fields = state._asdict()
    return {name: fields.pop(name) for name in ("params", "router_state")}, fields


def checksum(tree) -> int:
    """The sum of all 32-bit words modulo 2^32: the same on any mesh, and changed by any damaged word.

    bfloat16 counts as the float32 that it is, so that a model read in float32 has the checksum with which
    it was saved in bfloat16. Each shard is read once, on the host, where it lies.
    """
    total = 0
    for array in jax.tree.leaves(tree):
        for shard in array.addressable_shards:
            if shard.replica_id == 0:
                total += _sum_of_words(np.asarray(shard.data).reshape(-1))
    if jax.process_count() > 1:
        total = multihost_utils.process_allgather(np.uint32(total % 2**32)).sum(dtype=np.uint64)
    return int(total) % 2**32


def _sum_of_words(a: np.ndarray) -> int:
    if a.dtype == jnp.bfloat16:
        return int(a.view(np.uint16).sum(dtype=np.uint64)) << 16
    a = a.astype(np.float32) if a.dtype == np.float16 else a
    return int(a.view(np.uint32).sum(dtype=np.uint64))


def _verify(tree, meta: dict, item: str) -> None:
    """ValueError if arrays are not those that were saved (as far as checksums were saved with them)."""
    saved = meta.get("checksums", {}).get(item)
    if saved is not None and checksum(tree) != saved:
        raise ValueError(f"checksum of its {item} differs: damaged data")


def _reason(e: Exception) -> str:
    """The kind of an error and the first words of what it says."""
    lines = str(e).strip().splitlines() or [""]
    return f"{type(e).__name__}: {lines[0][:100]}"


def _fit(ours: dict, stored: dict, folder: pathlib.Path, stored_dtype: bool) -> dict:
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
            f"{folder} holds another model than the config describes:\n"
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


# How a model is computed, and on what; none of it changes what a checkpoint means.
FREE = (
    "name",
    "train",
    "mesh",
    "model.scan_layers",
    "model.remat",
    "model.loss_chunk",
    "model.moe.grouped_matmul",
    "model.moe.expert_parallel",
    "model.moe.buffer_factor",
)

# How an imported model goes on to be trained is a choice of the one who trains it.
FREE_ONCE_IMPORTED = (
    "data",
    "optimizer",
    "model.dtype",
    "model.mtp_loss_weight",
    "model.moe.bias_update",
    "model.moe.bias_rate",
    "model.moe.balance_groups",
    "model.moe.expert_loss",
    "model.moe.sequence_loss",
    "model.moe.device_loss",
    "model.moe.communication_loss",
    "model.moe.z_loss",
)


def check_workdir(workdir: pathlib.Path, cfg: ExperimentConfig) -> None:
    """Raises ConfigError naming the keys in which the run of this workdir, if any, has another config.

    What is in FREE may differ: a run can be prolonged, and go on on other devices. An imported model that
    was not trained here yet may be trained on any data in any way.
    """
    if not (workdir / CONFIG).exists():
        return
    free = FREE + (FREE_ONCE_IMPORTED if _only_imported(workdir) else ())
    theirs = read_config_values(workdir)
    lines = _differences(theirs, json.loads(to_json(cfg)), "", free)
    if lines:
        raise ConfigError(
            f"{workdir} belongs to a run with another config:\n"
            + "\n".join(f"  - {line}" for line in lines)
            + "\nuse another --workdir, or the same config"
        )


def read_config_values(workdir: pathlib.Path) -> dict:
    """What config.json of a run holds. Raises ConfigError if there is none, or it is damaged."""
    path = workdir / CONFIG
    if not path.exists():
        raise ConfigError(f"{workdir} is not the folder of a run: it has no {CONFIG}")
    try:
        values = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise ConfigError(f"{path} is not JSON: {e}; restore it, or use another --workdir") from e
    if not isinstance(values, dict) or not values.keys() >= {"model", "data"}:
        raise ConfigError(
            f"{path} is not the config of a run; restore it, or use another --workdir"
        )
    return values


def claim_workdir(
    workdir: pathlib.Path, cfg: ExperimentConfig, files: Mapping[str, str] | None = None
) -> None:
    """Write the config, and what else belongs to a run (name -> text), after `check_workdir`."""
    check_workdir(workdir, cfg)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        for name, text in {CONFIG: to_json(cfg), **(files or {})}.items():
            part = workdir / f"{name}.part"  # a killed run must not leave half a file
            part.write_text(text, "utf-8")
            part.replace(workdir / name)
    except OSError as e:
        raise ConfigError(f"--workdir={workdir} cannot be written: {e.strerror}") from e


def is_trained(workdir: pathlib.Path) -> bool:
    """Whether there is a checkpoint of training: an imported model is step 0, which training never saves."""
    return any(p.name != "0" for p in _steps(workdir))


def _only_imported(workdir: pathlib.Path) -> bool:
    return bool(_steps(workdir)) and not is_trained(workdir)


def _steps(workdir: pathlib.Path) -> list[pathlib.Path]:
    return list(workdir.glob("checkpoints/[0-9]*"))


def _differences(old, new, key: str, free: tuple[str, ...]) -> list[str]:
    if key in free:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        prefix = key + "." if key else ""
        return [
            line
            for k in sorted(old.keys() | new.keys())
            for line in _differences(old.get(k), new.get(k), prefix + k, free)
        ]
    return [] if old == new else [f"{key}: {old!r} there, {new!r} now"]
