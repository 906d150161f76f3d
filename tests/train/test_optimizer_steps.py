"""Whole steps with each optimiser: how they are computed changes nothing; where the state lies; resuming."""

import dataclasses
from typing import Any

import chex
import jax
import numpy as np
import pytest
from every_parameter import BIASED, leaves, options

from moejax.config import (
    ComputeConfig,
    DataConfig,
    ExperimentConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    TrainConfig,
)
from moejax.cost import memory
from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.params import abstract_params, by_path, path_name
from moejax.runs.checkpoint import Checkpoints
from moejax.sharding import make_layout
from moejax.train.optimizer import OPTIMIZERS
from moejax.train.state import (
    abstract_state,
    create_state,
    restore_state,
    save_state,
    state_shardings,
)
from moejax.train.step import compile_step

NAMES = pytest.mark.parametrize("name", OPTIMIZERS)
SMALL = dataclasses.replace(BIASED, num_layers=2, num_dense_layers=1, positions="rope")


def experiment(name: str, model: ModelConfig = SMALL, **changes) -> ExperimentConfig:
    return ExperimentConfig(
        model=model,
        data=DataConfig(seq_len=8, batch_size=8),
        optimizer=options(name=name),
        **{"train": TrainConfig(steps=10), "mesh": MeshConfig(data=1), **changes},
    )


def one_step(cfg: ExperimentConfig, sizes: dict | None = None):
    """What a step adds to each parameter, in units of the learning rate."""
    layout = make_layout(cfg, jax.devices()[:8]) if sizes else None
    state = create_state(cfg, jax.random.key(0), layout)
    before = jax.device_get(state.params)
    batch = synthetic_batch(8, 8, 32)
    if layout is not None:
        batch = jax.device_put(batch, layout.sharding("batch", "seq"))
    shardings = state_shardings(cfg, layout) if layout else None
    state, metrics = compile_step(cfg, layout=layout, shardings=shardings)(state, batch)
    assert int(metrics["skipped"]) == 0
    return jax.tree.map(lambda a, b: (np.asarray(a) - b) / 0.1, state.params, before)


@pytest.mark.product
def test_how_a_step_is_computed_does_not_change_muon():
    """Two layers of each kind, all ways against one device. Gradients differ by float32 roundings, about 1e-6
    of a matrix's norm; Newton-Schulz multiplies those by up to 500 where a singular value is small (see above),
    Adam's first step those of gradients that are nearly zero: hence a tolerance for all but a few entries.
    A norm of a shard instead of the matrix, or experts taken together, would move all entries by about 0.1."""
    model = dataclasses.replace(SMALL, num_layers=4, num_dense_layers=2)
    want = leaves(one_step(experiment("muon", model)))
    sizes: Any = dict(data=2, fsdp=2, expert=2)
    ways = {
        "accumulated, unrolled": one_step(
            experiment(
                "muon",
                model,
                train=TrainConfig(steps=10, accumulation=2),
                compute=ComputeConfig(scan_layers=False),
            )
        ),
        "mesh": one_step(experiment("muon", model, mesh=MeshConfig(**sizes)), sizes),
    }
    for way, tree in ways.items():
        for path, got in leaves(tree).items():
            off = np.abs(got - want[path]) > 3e-3
            assert off.mean() < 0.01, (way, path, off.mean())


@NAMES
def test_the_state_is_split_as_its_parameters(name):
    """Every moment has a sharding that fits its shape, and those of experts lie with them."""
    sizes: Any = dict(fsdp=2, expert=2, data=2)
    model = dataclasses.replace(BIASED, d_model=128, moe=MoEConfig(num_experts=4, d_expert=128))
    cfg = experiment(name, model, mesh=MeshConfig(**sizes))
    shardings = state_shardings(cfg, make_layout(cfg, jax.devices()[:8]))
    held = abstract_state(cfg).opt_state
    shapes = jax.tree.map(lambda a, s: s.shard_shape(a.shape), held, shardings.opt_state)
    whole = dict(jax.tree_util.tree_leaves_with_path(held))
    split = 0
    for path, shape in jax.tree_util.tree_leaves_with_path(
        shapes, is_leaf=lambda x: type(x) is tuple and all(isinstance(i, int) for i in x)
    ):
        if "/moe_blocks/moe/experts/w_up" in path_name(path) and whole[path].ndim > 2:
            assert np.prod(shape) <= np.prod(whole[path].shape) / 2, path_name(path)
            split += 1
    assert split == {"adamw": 2, "muon": 1, "lion": 1, "adafactor": 3}[name]


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("muon", ("path=* frozen", "path=*/experts/* trained")),
        *(pytest.param(n, (), marks=pytest.mark.product) for n in OPTIMIZERS),
    ],
)
def test_resuming_changes_nothing(tmp_path, name, groups):
    model = dataclasses.replace(SMALL, num_layers=1, num_dense_layers=0, mtp_depth=0)
    cfg = experiment(name, model)
    cfg = dataclasses.replace(cfg, optimizer=dataclasses.replace(cfg.optimizer, groups=groups))
    step = compile_step(cfg)
    state = create_state(cfg, jax.random.key(0), None)
    batches = [synthetic_batch(8, 8, 32, seed=i) for i in range(4)]
    for i, batch in enumerate(batches):
        if i == 2:
            checkpoints = Checkpoints(tmp_path, cfg)
            save_state(checkpoints, state, {})
            checkpoints.close()
        state, _ = step(state, batch)
    checkpoints = Checkpoints(tmp_path, cfg)
    restored = restore_state(checkpoints)
    checkpoints.close()
    assert restored is not None
    again, _ = restored
    assert by_path_shapes(again.params) == by_path_shapes(
        abstract_params(transformer.param_specs(cfg.model))
    )
    for batch in batches[2:]:
        again, _ = step(again, batch)
    chex.assert_trees_all_equal(again, state)


def by_path_shapes(tree) -> dict:
    return {path_name(p): a.shape for p, a in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("groups", [(), ("role=embedding frozen", "path=*/experts/* frozen")])
@NAMES
def test_the_plan_knows_the_moments(name, groups):
    """Against the optimiser's own state; 2% for counters, coefficients and adafactor's empty places (a few
    numbers an array)."""
    moe = MoEConfig(num_experts=4, d_expert=128)
    model = dataclasses.replace(BIASED, vocab_size=512, d_model=128, d_ff=256, moe=moe)
    cfg = experiment(name, model)
    optimizer = dataclasses.replace(cfg.optimizer, groups=groups)
    state = abstract_state(dataclasses.replace(cfg, optimizer=optimizer))
    real = sum(a.size for a in jax.tree.leaves(state.opt_state))
    specs = by_path(transformer.param_specs(model))
    sizes = {
        e: sum(np.prod(s.shape) for s in specs.values() if ("expert" in s.axes) == e)
        for e in (True, False)
    }
    keeps = memory.kept(model, optimizer)
    assert sum(keeps[e].moments * sizes[e] for e in sizes) == pytest.approx(real, rel=0.02)
    assert (keeps[True].trained == 0) == bool(groups)
