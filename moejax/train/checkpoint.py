"""Checkpoints: everything a run is, saved atomically by orbax, restored from the newest whole one.

A step's folder holds the state (parameters, optimiser, router state) and `meta` as JSON: the config and the
position in the data. Nothing is pickled.
"""

import json
import pathlib
import warnings

import jax
import orbax.checkpoint as ocp

from moejax.config import ConfigError, ExperimentConfig, to_json
from moejax.train.state import TrainState


class Checkpoints:
    """Saves in the background; keeps the last `keep_last` steps, and every `keep_every`-th for good."""

    def __init__(self, workdir: pathlib.Path, cfg: ExperimentConfig):
        self.folder = workdir.resolve() / "checkpoints"
        self.cfg = cfg
        options = ocp.CheckpointManagerOptions(
            max_to_keep=cfg.train.keep_last,
            keep_period=cfg.train.keep_every or None,
            create=True,
        )
        self.manager = ocp.CheckpointManager(self.folder, options=options)

    def save(self, state: TrainState, data_state: dict) -> None:
        meta = {"config": json.loads(to_json(self.cfg)), "data": data_state}
        args = ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta))
        self.manager.save(int(state.step), args=args)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict] | None:
        """The newest state that can be read, and the position in the data; None if there is none.

        A damaged checkpoint is passed over with a warning that names it and the one used instead.
        """
        steps = sorted(self.manager.all_steps(), reverse=True)
        for i, step in enumerate(steps):
            args = ocp.args.Composite(
                state=ocp.args.StandardRestore(abstract), meta=ocp.args.JsonRestore()
            )
            try:
                out = self.manager.restore(step, args=args)
                state, meta = out["state"], out["meta"]
                jax.block_until_ready(state)
            except (ValueError, OSError, KeyError, json.JSONDecodeError) as e:
                rest = (
                    f"falling back to step {steps[i + 1]}" if i + 1 < len(steps) else "none is left"
                )
                warnings.warn(
                    f"checkpoint {self.folder / str(step)} cannot be read ({type(e).__name__}); {rest}",
                    stacklevel=2,
                )
                continue
            return state, meta["data"]
        if steps:
            raise ConfigError(
                f"no checkpoint in {self.folder} can be read; use another --workdir, or remove the folder "
                "to start again"
            )
        return None

    def close(self) -> None:
        self.manager.wait_until_finished()
        self.manager.close()


def claim_workdir(workdir: pathlib.Path, cfg: ExperimentConfig) -> None:
    """Write the config into the workdir, or check that the run there has the same one.

    Only `train` may differ: a run can be prolonged. Raises ConfigError naming the keys that differ.
    """
    path = workdir / "config.json"
    ours = json.loads(to_json(cfg))
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        path.write_text(to_json(cfg))
        return
    theirs = json.loads(path.read_text())
    differing = [k for k in ours if k not in ("train", "name")]
    lines = [line for k in differing for line in _differences(theirs.get(k), ours[k], k)]
    if lines:
        raise ConfigError(
            f"{workdir} belongs to a run with another config:\n"
            + "\n".join(f"  - {line}" for line in lines)
            + "\nuse another --workdir, or the same config"
        )
    path.write_text(to_json(cfg))


def _differences(old, new, key):
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            d
            for k in sorted(old.keys() | new.keys())
            for d in _differences(old.get(k), new.get(k), f"{key}.{k}")
        ]
    return [] if old == new else [f"{key}: {old!r} there, {new!r} now"]
