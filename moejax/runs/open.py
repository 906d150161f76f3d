"""A trained (or imported) run, opened for use: its config, model and tokenizer, without the optimiser."""

import dataclasses
import pathlib
from typing import NamedTuple

from moejax.config import ConfigError, ExperimentConfig
from moejax.config_io import from_stored
from moejax.data import Tokenizer, load_tokenizer
from moejax.runs import folder
from moejax.runs.restore import model_at, newest_model
from moejax.sharding import Layout


class OpenRun(NamedTuple):
    """Attributes:
    cfg: the config of the run, vocabulary included.
    params, router_state: those of `step`, in the dtype in which they are stored.
    tokenizer: the run's own.
    step: optimiser steps behind them; 0 for an imported model.
    """

    cfg: ExperimentConfig
    params: dict
    router_state: dict
    tokenizer: Tokenizer
    step: int


def read_config(workdir: pathlib.Path) -> ExperimentConfig:
    """The config of the run in `workdir`; ConfigError if that is not the folder of a run."""
    values = folder.read_config_values(workdir)
    try:
        return from_stored(values)
    except ConfigError as e:
        raise ConfigError(f"{workdir / folder.CONFIG}: {e}") from e


def load_run(
    workdir: pathlib.Path,
    layout: Layout | None = None,
    step: int | None = None,
    dtype: str | None = None,
) -> OpenRun:
    """Open the run in `workdir`, its arrays on the devices of `layout` (None: one device).

    `step`: of the checkpoint to read; None: the newest that can be read. `dtype`: to compute in, instead of the
    run's.

    Raises ConfigError if there is no run, no checkpoint of that step, or none that can be read.
    """
    cfg = read_config(workdir)
    if dtype is not None:
        cfg = dataclasses.replace(cfg, compute=dataclasses.replace(cfg.compute, dtype=dtype))
    folder.check_path(workdir)
    if step is None:
        restored = newest_model(workdir, cfg, layout)
        if restored is None:
            raise ConfigError(f"{workdir} has no checkpoint yet; moejax train writes one")
        step, params, router_state = restored
    else:
        params, router_state = model_at(workdir, cfg, step, layout, stored_dtype=True)
    tokenizer = load_tokenizer(cfg.data, None, workdir / folder.TOKENIZER)
    return OpenRun(cfg, params, router_state, tokenizer, step)
