"""The training state: everything that a step reads and changes, as one pytree, created sharded."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moejax.config import ConfigError, ExperimentConfig
from moejax.models import transformer
from moejax.params import by_path, init_params, path_name
from moejax.runs.arrays import placed
from moejax.runs.checkpoint import Checkpoints
from moejax.sharding import Layout
from moejax.train.optimizer import optimizer_of, split_trained


class TrainState(NamedTuple):
    """Attributes:
    step: optimiser steps so far, int32, including skipped ones (so it is also the position in the data).
    params: float32 master weights.
    opt_state: optax's state for the trained parameters.
    router_state: updated by the routers' rules, without gradients or decay.
    skipped: steps whose update was not finite, so that it was not applied.
    bad_in_a_row: the number of skipped steps since the last good one.
    """

    step: jax.Array
    params: dict
    opt_state: tuple
    router_state: dict
    skipped: jax.Array
    bad_in_a_row: jax.Array


def init_state(cfg: ExperimentConfig, key: jax.Array) -> TrainState:
    """A fresh state. Pure: jit it with `state_shardings` as out_shardings to create it sharded."""
    params = init_params(transformer.param_specs(cfg.model), key)
    return _fresh(cfg, params, transformer.init_router_state(cfg.model))


def _fresh(cfg: ExperimentConfig, params: dict, router_state: dict) -> TrainState:
    opt_state = optimizer_of(cfg).init(split_trained(params, cfg)[0])
    return TrainState(_zero(), params, opt_state, router_state, _zero(), _zero())


def _zero() -> jax.Array:
    return jnp.zeros(
        (), jnp.int32
    )  # a separate buffer for each counter, because the state is donated


def abstract_state(cfg: ExperimentConfig) -> TrainState:
    return jax.eval_shape(lambda: init_state(cfg, jax.random.key(0)))


def state_shardings(cfg: ExperimentConfig, layout: Layout | None) -> TrainState:
    """A sharding for every array of the state: parameters by their logical axes, the optimiser's moments
    like the parameter whose path they contain, everything else replicated. A moment of another shape (a row or
    column of each matrix) is split over layers and experts only, like its parameter.
    Without a layout, everything is on the first device."""
    abstract = abstract_state(cfg)
    if layout is None:
        return jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), abstract)
    specs = by_path(transformer.param_specs(cfg.model))

    def one(path, leaf):
        name = f"/{path_name(path)}/"
        owner = max((p for p in specs if f"/{p}/" in name), key=len, default=None)
        if owner is None:
            return layout.replicated
        spec = specs[owner]
        same = leaf.shape == spec.shape
        axes = spec.axes if same else spec.axes[: min(spec.batch_dims, leaf.ndim)]
        return layout.sharding(*axes)

    return jax.tree_util.tree_map_with_path(one, abstract)


def create_state(cfg: ExperimentConfig, key: jax.Array, layout: Layout | None) -> TrainState:
    """A fresh state on its devices; no device ever holds more than its shard."""
    shardings = None if layout is None else state_shardings(cfg, layout)
    return jax.jit(lambda k: init_state(cfg, k), out_shardings=shardings)(key)


def state_of_model(
    cfg: ExperimentConfig, params: dict, router_state: dict, layout: Layout | None
) -> TrainState:
    """The state at step 0 of a model that exists, with a fresh optimiser."""
    shardings = None if layout is None else state_shardings(cfg, layout)
    fresh = functools.partial(_fresh, cfg)
    return jax.jit(fresh, out_shardings=shardings)(params, router_state)


def save_state(checkpoints: Checkpoints, state: TrainState, data_state: dict) -> None:
    """See `Checkpoints.save`; `data_state` is the position in the data."""
    step, bad = int(state.step), int(state.bad_in_a_row)
    checkpoints.save(step, *_items(state), data_state, bad)


def restore_state(
    checkpoints: Checkpoints, layout: Layout | None = None
) -> tuple[TrainState, dict] | None:
    """The newest state that can be read, and its position in the data; None if there is none.

    See `Checkpoints.restore` for what happens to damaged checkpoints.
    """
    cfg = checkpoints.cfg
    _, training = _items(placed(abstract_state(cfg), state_shardings(cfg, layout)))
    found = checkpoints.restore(training, layout)
    if found is None:
        return None
    if found.training is None:
        raise ConfigError(
            f"{checkpoints.workdir}: only the imported model that this run began from can be read; begin from "
            f"it in another --workdir, with --config.train.init_from={checkpoints.workdir}"
        )
    state = TrainState(params=found.params, router_state=found.router_state, **found.training)
    assert found.data_state is not None  # as there was something of training
    return state, found.data_state


def _items(state: TrainState) -> tuple[dict, dict]:
    """The items 'model' and 'training' of a checkpoint."""
    fields = state._asdict()
    return {name: fields.pop(name) for name in ("params", "router_state")}, fields
