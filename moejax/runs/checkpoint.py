"""Checkpoints: everything a run is, saved atomically by orbax.

A step's folder holds three items:

    model      {params, router_state}: all that evaluation, generation and export need
    training   what else the state of training holds (`moejax.train.state`); an imported model has none
    meta       JSON: the config, the position in the data (null for an imported model), shape, dtype and
               checksum of every array of the other two, and a sha256 of it all

Arrays are read straight onto the shards of the mesh at hand, whatever mesh and number of processes wrote
them (`moejax.runs.restore`). Nothing is pickled.
"""

import contextlib
import json
import pathlib
import sys
import warnings
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from moejax.config import ExperimentConfig
from moejax.config_io import to_json
from moejax.params import path_name
from moejax.runs import folder
from moejax.runs.checksums import checksums
from moejax.runs.restore import Restored, newest_model, newest_state, seal
from moejax.sharding import Layout

# Pieces of an array that is not packed.
PIECE_BYTES = 64 * 2**20
NOTE = "_CHECKPOINT_METADATA"  # orbax's own; all that moejax needs is in meta


class Checkpoints:
    """Saves in the background, for the one who holds the run's lock. Keeps the last `keep_last` good steps,
    every `keep_every`-th for good, and the newest."""

    def __init__(self, workdir: pathlib.Path, cfg: ExperimentConfig, *, packed: bool = True):
        """`packed` gathers arrays in few large files, of which orbax holds a copy while it writes;
        else each array is written in pieces of its own. Either kind can be read."""
        self.packed = packed
        self.workdir = workdir.resolve()
        self.folder = self.workdir / folder.CHECKPOINTS
        self.cfg = cfg
        self.bad_from = sys.maxsize  # steps from here on have the parameters that gave bad steps
        options = ocp.CheckpointManagerOptions(
            preservation_policy=self, create=True, cleanup_tmp_directories=True
        )
        handlers: dict[str, Any] = {
            "model": ocp.StandardCheckpointHandler(use_ocdbt=packed),
            "training": ocp.StandardCheckpointHandler(),
            "meta": ocp.JsonCheckpointHandler(),
        }
        how: dict[str, Any] = {"options": options, "item_handlers": handlers}
        try:
            self.manager = ocp.CheckpointManager(self.folder, **how)
        except Exception as e:
            # Of a note that is damaged orbax says only that something in it has another type.
            if isinstance(e, OSError) or not self._set_notes_aside():
                raise
            self.manager = ocp.CheckpointManager(self.folder, **how)

    def _set_notes_aside(self) -> bool:
        """Move orbax's notes on when it saved each step to damaged/: without them it asks the file system.
        Whether there was one."""
        notes = [p / NOTE for p in folder.steps(self.workdir) if (p / NOTE).exists()]
        for note in notes:
            aside = self.workdir / folder.DAMAGED
            aside.mkdir(exist_ok=True)
            note.replace(aside / f"{note.parent.name}{NOTE}")
        if notes:
            warnings.warn(
                f"orbax cannot read the {NOTE} of a step in {self.folder}; those of all steps were moved to "
                f"{folder.DAMAGED}/, and the checkpoints are read without",
                stacklevel=3,
            )
        return bool(notes)

    def save(
        self, step: int, model: dict, training: dict, data_state: dict, bad_in_a_row: int = 0
    ) -> None:
        """Begin to save a state of training; the arrays may be donated as soon as this returns.

        `bad_in_a_row` steps before this one left its parameters as they are. They do not push out what was
        saved before: of parameters that give only bad steps the first are bad, too.

        Raises folder.SaveError if this save, or the one before it, could not be written.
        """
        self.bad_from = step - bad_in_a_row if bad_in_a_row else sys.maxsize
        self._save(step, data_state, model=model, training=training)

    def save_model(self, params: dict, router_state: dict) -> None:
        """Save a model that was not trained here, as step 0, and wait until it is written."""
        self._save(0, None, model={"params": params, "router_state": router_state})
        self.wait()

    def _save(self, step: int, data_state: dict | None, **items) -> None:
        meta = {
            "config": json.loads(to_json(self.cfg)),
            "data": data_state,
            "checksums": {name: _described(item) for name, item in items.items()},
        }
        meta["sha256"] = seal(meta)
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

    def should_preserve(self, checkpoints, *, context) -> list[bool]:
        """Which steps to keep, as orbax asks for it."""
        del context
        steps = [c.step for c in checkpoints]
        every, last = self.cfg.train.keep_every, self.cfg.train.keep_last
        good = [s for s in steps if s < self.bad_from][-last:]
        return [s in good or s == steps[-1] or (bool(every) and s % every == 0) for s in steps]

    def forsake(self, first: int) -> int | None:
        """Move the steps from `first` on to damaged/: the run has diverged in them. The newest that is left."""
        self.wait()
        self._set_aside([s for s in self.manager.all_steps() if s >= first])
        return max(self.manager.all_steps(), default=None)

    def restore(self, training: dict, layout: Layout | None = None) -> Restored | None:
        """The newest checkpoint that can be read; None if there is none.

        A damaged one is passed over with a warning that names it and the one used instead, and is moved
        aside, so that its step can be saved again.

        Args:
          training: the shapes of that item, `placed`; not looked at for an imported model.
          layout: where the model goes; None: the first device.
        """
        found = newest_state(self.workdir, self.cfg, training, layout)
        if found is None:
            return None
        self._set_aside(found.damaged)
        return found.value

    def restore_model(self, layout: Layout | None = None) -> tuple[int, dict, dict] | None:
        """See `restore.newest_model`."""
        return newest_model(self.workdir, self.cfg, layout)

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


def _described(item: dict) -> dict[str, dict]:
    """Shape, dtype and checksum of every array of an item, by path."""
    sums = checksums(item)
    return {
        path_name(p): {"shape": a.shape, "dtype": str(a.dtype), "sum": sums[path_name(p)]}
        for p, a in jax.tree_util.tree_flatten_with_path(item)[0]
    }
