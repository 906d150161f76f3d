"""One global batch, one small model with every kind of loss, and its step computed in any way.

All in float64: two correct ways to sum differ by about 1e-15 times the number of terms, so the
tolerance TOLERANCE leaves no room for a wrong term, a wrong factor or a term counted twice, and
no argument is needed about how float32 rounds.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ExperimentConfig, MeshConfig
from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.sharding import Layout, make_layout
from moejax.train.step import loss_and_grads
from tests.flat import change, experiment

# Gradients and losses here are of order 1e-4 to 10, sums have up to a few thousand terms.
TOLERANCE = {"rtol": 1e-9, "atol": 1e-12}

CFG = experiment(
    num_experts=8,
    experts_per_token=2,
    d_expert=4,
    shared_experts=1,
    score="sigmoid",
    normalize_weights=True,
    routed_scaling=1.5,
    router_bias=True,
    expert_bias=True,
    bias_update="sign",
    bias_rate=0.1,
    balance_groups=4,
    expert_loss=0.1,
    sequence_loss=0.1,
    device_loss=0.1,
    communication_loss=0.1,
    z_loss=0.01,
    moe_ffn_bias=True,
    vocab_size=32,
    d_model=8,
    num_layers=2,
    num_dense_layers=0,
    d_ff=8,
    init_std=0.3,
    dtype="float64",
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    seq_len=4,
    batch_size=16,
    warmup_steps=1,
    learning_rate=0.01,
    steps=10,
)
MODEL, MOE = CFG.model, CFG.model.moe
# C = T K / E * 4 = T: an expert holds every token, nothing is dropped.
ALL_SLOTS = 4.0


def config(*, mesh=None, mtp=0, scan=True, **how) -> ExperimentConfig:
    """CFG with one way of computing it. `mesh`: sizes by axis and `rules`; `how`: see `flat.change`."""
    cfg = change(CFG, mtp_depth=mtp, scan_layers=scan, **how)
    return dataclasses.replace(cfg, mesh=dataclasses.replace(MeshConfig(data=1), **(mesh or {})))


def layout_of(cfg: ExperimentConfig) -> Layout | None:
    m = cfg.mesh
    return make_layout(cfg, jax.devices()[: m.data * m.fsdp * m.expert * m.tensor])


def make_batch(distinct: bool = False) -> dict:
    """Row 1 is all padding, row 2 ends in padding, rows hold several documents, tokens differ. `distinct`: no
    token twice (64 of them), so that none ties with another for a place."""
    # Rows of 16 cut in four: in rows of 4 every token would be a document of its own, and its separator.
    rows = synthetic_batch(16, 4, 32, seed=3)
    batch = {k: np.array(v).reshape(16, 4) for k, v in rows.items()}
    assert len(np.unique(batch["tokens"])) > 16
    for a in batch.values():
        a[1], a[2, 3:] = 0, 0
    assert (batch["segment_ids"].max(axis=1) > 1).any()
    if distinct:
        ids = 1 + np.random.default_rng(0).permutation(64).reshape(16, 4)
        batch["tokens"] = np.where(batch["segment_ids"] > 0, ids, 0).astype(np.int32)
    return batch


def make_inputs(cfg: ExperimentConfig, skewed: bool, distinct: bool = False):
    """Parameters, router state and batch. `skewed`: every token prefers experts 0 and 1, which one
    device holds."""
    params, state = transformer.init_model(cfg.model, jax.random.key(0))
    params = jax.tree.map(lambda a: a.astype(cfg.compute.dtype), params)
    # Biases start at zero, where a bias added twice would not show.
    params = jax.tree_util.tree_map_with_path(_shake, params)
    if skewed:
        state = jax.tree.map(lambda a: a.at[..., :2].set(10.0), state)
    return params, state, jax.tree.map(jnp.asarray, make_batch(distinct))


def _shake(path, a):
    noise = jax.random.normal(jax.random.key(len(str(path))), a.shape, "float32")  # in any dtype
    return a + 0.1 * noise.astype(a.dtype)


# Compiled for little effort: the program runs once.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.partial(jax.jit, static_argnames=("cfg", "layout"), compiler_options=QUICK)
def step(params, state, batch, cfg, layout):
    loss, parts, grads = loss_and_grads(params, state, batch, cfg, layout)
    stats = {n: a.stats for n, a in parts.aux.items()}
    return {
        "loss": loss,
        "cross_entropy": parts.cross_entropy,
        "mtp": parts.mtp,
        "balance": parts.balance,
        "nll_BS": parts.nll_BS,
        "stats": stats,
        "router_state": transformer.update_router_state(state, stats, cfg.model, cfg.objective),
        "grads": grads,
    }


def run(*, skewed=False, distinct=False, **how) -> dict:
    """Everything that must not depend on `how` (see `config`), as NumPy arrays."""
    cfg = config(**how)
    with jax.enable_x64(cfg.compute.dtype == "float64"):
        layout = layout_of(cfg)
        params, state, batch = make_inputs(cfg, skewed, distinct)
        if layout is not None:
            params = jax.device_put(params, layout.of_specs(transformer.param_specs(cfg.model)))
            state = jax.device_put(state, layout.replicated)
            batch = jax.device_put(batch, layout.sharding("batch", "seq"))
        return jax.device_get(step(params, state, batch, cfg, layout))


def oracle(**how) -> dict:
    """Every expert computes every token, on one device, the batch in one piece, layers unrolled."""
    return run(dispatcher="dense", scan=False, **how)


def assert_same(got: dict, want: dict, tolerance: dict = TOLERANCE):
    def one(path, a, b):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, tolerance["rtol"], tolerance["atol"], err_msg=name)

    jax.tree_util.tree_map_with_path(one, got, want)
