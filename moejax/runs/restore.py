"""Reading checkpoints: the newest that every process can read, proven whole by its checksums.

Reading changes nothing in a run's folder and needs no lock. See `moejax.runs.checkpoint` for what is in there.
"""

import errno
import hashlib
import json
import os
import pathlib
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp

from moejax.config import ConfigError, ExperimentConfig
from moejax.runs import agree, folder, hush, lock
from moejax.runs.arrays import Damaged, abstract_model, fit, not_trainable, quantized_names
from moejax.runs.checksums import add_up, local_sums
from moejax.sharding import Layout

META_FILE = "meta/metadata"
ITEMS = ("model", "training")

# Seconds before each further try; what is damaged is so at the second one too, a network mount comes back.
PAUSES = (0.0,)
PAUSES_OF_THE_SYSTEM = (0.0, 1.0, 3.0)
# How often a reader looks again at a folder in which a writer has deleted what it was about to read.
LOOKS = 5

# Errors of a disk or a network, not of a file: what they hide may be whole.
_PASSING = (
    "EIO ESTALE ETIMEDOUT EACCES EPERM ENOLCK EHOSTDOWN EHOSTUNREACH ENOTCONN ECONNRESET ECONNREFUSED "
    "EREMOTEIO EMFILE ENFILE EAGAIN ENODEV ENXIO"
)
PASSING = {getattr(errno, name) for name in _PASSING.split() if hasattr(errno, name)}
_OURS = str(pathlib.Path(__file__).parents[1])
_BUGS = (TypeError, AttributeError, NameError, IndexError, AssertionError, NotImplementedError)


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


class Newest(NamedTuple):
    """Attributes:
    step: the newest that can be read.
    value: what was read.
    damaged: newer steps, which cannot.
    """

    step: int
    value: Any
    damaged: list[int]


def newest_state(
    workdir: pathlib.Path, cfg: ExperimentConfig, training: dict, layout: Layout | None
) -> Newest | None:
    """The newest `Restored`; None if there is no checkpoint. `training`: the shapes of that item, `placed`."""

    def read(path: pathlib.Path, meta: dict) -> dict:
        items = {"model": fit(abstract_model(cfg.model, layout), path, meta, False)}
        if meta["data"] is not None:
            items["training"] = training
        return items

    found = _newest(workdir, cfg, read)
    if found is None:
        return None
    (meta, items), model = found.value, found.value[1]["model"]
    restored = Restored(**model, training=items.get("training"), data_state=meta["data"])
    return found._replace(value=restored)


def newest_model(
    workdir: pathlib.Path, cfg: ExperimentConfig, layout: Layout | None = None
) -> tuple[int, dict, dict] | None:
    """(step, params, router_state) of the newest checkpoint, in the dtype in which it is stored; None if there
    is none."""

    def read(path: pathlib.Path, meta: dict) -> dict:
        return {"model": fit(abstract_model(cfg.model, layout), path, meta, True)}

    found = _newest(workdir, cfg, read)
    if found is None:
        return None
    model = found.value[1]["model"]
    return found.step, model["params"], model["router_state"]


def model_at(
    workdir: pathlib.Path,
    cfg: ExperimentConfig,
    step: int,
    layout: Layout | None,
    *,
    stored_dtype: bool = False,
) -> tuple[dict, dict]:
    """(params, router_state) of one step, in the master dtype or as stored. ConfigError if it is not there or
    cannot be read."""
    check_step(workdir, step)

    def read(path: pathlib.Path, meta: dict) -> dict:
        return {"model": fit(abstract_model(cfg.model, layout), path, meta, stored_dtype)}

    path = (workdir / folder.CHECKPOINTS / str(step)).resolve()
    value, error = _together(path, cfg, read)
    if value is None:
        raise ConfigError(f"checkpoint {path} cannot be read ({error})")
    model = value[1]["model"]
    return model["params"], model["router_state"]


def check_trainable(workdir: pathlib.Path, step: int) -> None:
    """ConfigError if the weights of that step are quantised. What cannot be read is said when it is read."""
    path = workdir / folder.CHECKPOINTS / str(step)
    try:
        there = read_meta(path)["checksums"]["model"]
    except (Damaged, OSError):
        return
    if isinstance(there, dict) and quantized_names(
        there
    ):  # 0.1.0, which had a number here, had none
        raise ConfigError(not_trainable(path))


def check_step(workdir: pathlib.Path, step: int | None) -> None:
    """ConfigError if there is no checkpoint of that step; None: the newest is meant. Reads no checkpoint."""
    steps = [] if step is None else _steps(workdir)
    if step is not None and step not in steps:
        raise ConfigError(f"{workdir} has no checkpoint of step {step}; {steps_text(steps)}")


def newest_meta(workdir: pathlib.Path) -> tuple[int, dict] | None:
    """(step, meta) of the newest checkpoint whose meta can be read; None if there is none."""
    for path in sorted(folder.steps(workdir), key=lambda p: -int(p.name)):
        try:
            return int(path.name), read_meta(path)
        except (Damaged, OSError):
            continue
    return None


def _steps(workdir: pathlib.Path) -> list[int]:
    """The steps that are there, newest first; the same in every process."""
    names = [p.name for p in folder.steps(workdir)]
    return agree.of_first(sorted(map(int, names), reverse=True))


def steps_text(steps: Sequence[int]) -> str:
    """Which checkpoints a run has, for an error."""
    if not steps:
        return "it has none yet; moejax train writes one"
    return f"it has {', '.join(map(str, sorted(steps)))}"


# ---------------------------------------------------------------------------------------------------
# Which one: every process tries the same step, and goes on to an older one only if another does.


def _newest(workdir: pathlib.Path, cfg: ExperimentConfig, read: Callable) -> Newest | None:
    where, failed = (workdir / folder.CHECKPOINTS).resolve(), {}
    for look in range(LOOKS):
        time.sleep(0.3 * look)
        steps = [s for s in _steps(workdir) if s not in failed]
        for step in steps:
            value, error = _together(where / str(step), cfg, read)
            if error is None:
                damaged = [s for s in failed if s > step]
                for s in damaged:
                    _warn(where / str(s), failed[s], f"falling back to step {step}")
                return Newest(step, value, damaged)
            if (where / str(step)).exists():  # else a writer has deleted it: it keeps newer ones
                failed[step] = error
        if not steps:
            break
    if not failed:
        return None
    for step, error in failed.items():
        _warn(where / str(step), error, "none is left")
    writer = lock.writer(workdir)
    advice = f"{writer}: try again in a minute" if writer else "use another --workdir"
    raise ConfigError(f"no checkpoint in {where} can be read; {advice}")


def _warn(path: pathlib.Path, error: str, rest: str) -> None:
    warnings.warn(f"checkpoint {path} cannot be read ({error}); {rest}", stacklevel=5)


def _together(path: pathlib.Path, cfg: ExperimentConfig, read: Callable):
    """(value, None) if every process could read its part and the parts add up, else (None, why not).

    Raises ConfigError for a checkpoint of another config and where the system, not the file, is at fault.
    """
    meta, items, sums, error = {}, {}, {}, None
    try:
        meta, items, sums = _tried(path, cfg, read)
    except ConfigError as e:
        agree.raise_together(e)
    except Exception as e:
        if is_no_damage(e):
            raise
        error = e
        if passing(e):
            where = getattr(e, "filename", None) or path
            error = ConfigError(
                f"checkpoint {path} cannot be read: {_reason(e)} ({where}). That is an error of the system, "
                "which can pass, so nothing was moved. Try again; if it stays, move the folder of this step "
                "out of checkpoints/, and an older one is used"
            )
            agree.raise_together(error)
    why = agree.first_error(error and Damaged(_reason(error)))
    if why is None:
        wrong = [n for item in items for n in _wrong(add_up(sums[item]), meta, item)]
        why = f"checksum of {', '.join(wrong[:3])} differs: damaged data" if wrong else None
    return ((meta, items), None) if why is None else (None, why)


def _tried(path: pathlib.Path, cfg: ExperimentConfig, read: Callable):
    """Meta, arrays and local checksums; tries again before it gives up. Talks to no other process."""
    tries = 0
    while True:
        try:
            meta = read_meta(path)
            folder.check_same(meta["config"], cfg, path)
            items = {
                name: jax.block_until_ready(_read(path / name, shapes))
                for name, shapes in read(path, meta).items()
            }
            mixed = isinstance(meta["checksums"]["model"], dict)
            sums = {name: local_sums(item, mixed=mixed) for name, item in items.items()}
            if jax.process_count() == 1 and tries < len(PAUSES):
                for name in items:
                    if wrong := _wrong(sums[name], meta, name):
                        raise Damaged(f"checksum of {wrong[0]} differs")  # once more
            return meta, items, sums
        except ConfigError:
            raise
        except Exception as e:
            pauses = PAUSES_OF_THE_SYSTEM if passing(e) else PAUSES
            if is_no_damage(e) or tries >= len(pauses) or not path.exists():
                raise
            time.sleep(pauses[tries])
            tries += 1


def _wrong(sums: dict[str, int], meta: dict, item: str) -> list[str]:
    """The arrays of an item that are not what was saved."""
    saved = meta["checksums"][item]
    if isinstance(saved, int):  # of moejax 0.1.0: one for the whole item
        return [] if sum(sums.values()) % 2**32 == saved else [f"its {item}"]
    names = sorted(sums.keys() | saved.keys())
    return [n for n in names if n not in sums or sums[n] != saved.get(n, {}).get("sum")]


def is_no_damage(e: Exception) -> bool:
    """Whether an error says nothing of the files: no memory, or a mistake in moejax."""
    if isinstance(e, MemoryError) or "RESOURCE_EXHAUSTED" in str(e):
        return True
    last = traceback.extract_tb(e.__traceback__)[-1:]
    return isinstance(e, _BUGS) and bool(last) and last[0].filename.startswith(_OURS)


def passing(e: Exception) -> bool:
    """Whether an error is one of the system; tensorstore gives them as text."""
    if isinstance(e, OSError) and e.errno is not None:
        return e.errno in PASSING
    return any(f"{os.strerror(number)}" in str(e) for number in PASSING)


def _reason(e: Exception) -> str:
    """What an error says, without the specs and places in source that tensorstore adds."""
    text = " ".join(str(e).split("[tensorstore_spec=")[0].split("[source locations=")[0].split())
    return f"{type(e).__name__}: {text[:160]}" if not isinstance(e, Damaged) else text[:300]


# ---------------------------------------------------------------------------------------------------
# The parts of one checkpoint.


def seal(meta: dict) -> str:
    """A checksum of everything in `meta` but itself."""
    rest = {k: v for k, v in meta.items() if k != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def read_meta(path: pathlib.Path) -> dict:
    """The item 'meta' of the checkpoint in `path`. Raises Damaged or OSError."""
    try:
        meta = json.loads((path / META_FILE).read_bytes())
    except (ValueError, RecursionError) as e:
        raise Damaged(f"its meta is not JSON: {str(e)[:100]}") from e
    if not isinstance(meta, dict) or not meta.keys() >= {"config", "data", "checksums"}:
        raise Damaged("its meta is incomplete")
    sums, needed = meta["checksums"], ITEMS[: 1 if meta["data"] is None else 2]
    if not isinstance(sums, dict) or not sums.keys() >= set(needed):
        raise Damaged("its meta lacks a checksum")
    # moejax 0.1.0 stored one number for each item, and no checksum of meta.
    old = "sha256" not in meta and all(type(sums[name]) is int for name in needed)
    if not old and meta.get("sha256") != seal(meta):
        raise Damaged("checksum of its meta differs: damaged data")
    if not isinstance(meta["config"], dict) or not isinstance(meta["data"], dict | None):
        raise Damaged("its meta is incomplete")
    return meta


def _read(path: pathlib.Path, shapes: dict) -> dict:
    """An item's arrays. orbax's handler by itself has no barrier at which processes could wait in vain."""
    handler = ocp.StandardCheckpointHandler()
    hush.threads()
    try:
        return handler.restore(path, args=ocp.args.StandardRestore(shapes))
    except Exception:
        hush.readers()
        raise
    finally:
        handler.close()
