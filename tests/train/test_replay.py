"""A batch that brings its routes: a step takes them, weighs them by the scores, and trains the router."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ComputeConfig, ConfigError, MeshConfig
from moejax.data import synthetic_batch
from moejax.evals.routes import routes_of
from moejax.models import transformer
from moejax.models.loss import loss_fn
from moejax.models.mtp import mtp_targets
from moejax.models.replay import field_of, with_routes
from moejax.sharding import make_layout, place_whole
from moejax.train.step import loss_and_grads
from tests.flat import change, experiment

# With a loss that counts first under accumulation, and a loss that does not.
CFG = experiment(
    num_experts=4,
    experts_per_token=2,
    d_expert=4,
    score="sigmoid",
    normalize_weights=True,
    expert_loss=0.1,
    z_loss=0.01,
    vocab_size=32,
    d_model=8,
    num_layers=2,
    num_dense_layers=0,
    init_std=0.3,
    num_heads=2,
    num_kv_heads=2,
    head_dim=4,
    mtp_depth=1,
    seq_len=4,
    batch_size=8,
)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@functools.cache
def inputs():
    """Parameters, router state, and rows of several documents, one of them all padding."""
    batch = {k: np.array(v).reshape(8, 4) for k, v in synthetic_batch(16, 2, 32, seed=3).items()}
    for a in batch.values():
        a[1], a[2, 3:] = 0, 0
    return *transformer.init_model(CFG.model, jax.random.key(0)), batch


@functools.cache
def own_routes() -> np.ndarray:
    """The routes of a step, as it reports them."""
    params, state, batch = inputs()

    @functools.partial(jax.jit, compiler_options=QUICK)
    def record(batch):
        _, parts = loss_fn(params, state, batch, CFG.model, objective=CFG.objective)
        each = [parts.aux[name].routing.expert_index_TK for name in ("moe_blocks", "mtp")]
        return field_of(jnp.concatenate(each), 8)

    return np.asarray(record(batch))


def step(cfg, batch, layout):
    params, state, _ = inputs()
    if layout is not None:
        params = jax.device_put(params, layout.of_specs(transformer.param_specs(cfg.model)))
    batch = place_whole(batch, layout)

    @functools.partial(jax.jit, compiler_options=QUICK)
    def one(params, state, batch):
        loss, parts, grads = loss_and_grads(params, state, batch, cfg, layout)
        return loss, grads, {n: a.stats for n, a in parts.aux.items()}

    return jax.device_get(one(params, state, batch))


ACCUMULATED = dict(accumulation=2, remat="full", mesh=MeshConfig(data=2, expert=2))


@pytest.mark.parametrize(
    "how", [{}, pytest.param(ACCUMULATED, marks=pytest.mark.product)], ids=["plain", "accumulated"]
)
def test_a_step_on_its_own_routes_is_the_same_bit_for_bit(how):
    """Also counted first, in two micro-batches, computed again in the backward pass, on four devices."""
    cfg = change(CFG, **{"mesh": MeshConfig(data=1), **how})
    layout = make_layout(cfg, jax.devices()[: cfg.mesh.data * cfg.mesh.expert])
    batch = inputs()[2]
    plain = step(cfg, batch, layout)
    again = step(cfg, with_routes(batch, own_routes(), cfg.model), layout)
    jax.tree.map(np.testing.assert_array_equal, again, plain)
    assert abs(plain[1]["mtp"]["block"]["moe"]["router"]["kernel"]).max() > 0


def test_other_routes_are_taken_and_train_the_router():
    """The load is that of the routes asked for. Under fixed routes the loss is smooth in the router's matrix:
    its gradient, in float64, is that of finite differences."""
    cfg = change(CFG, dtype="float64", accumulation=2)
    params, state, batch = inputs()
    drawn = np.argsort(np.random.default_rng(0).random((8, 4, 3, 4)), axis=-1)[..., :2]
    routes = np.where(np.random.default_rng(1).random(drawn.shape) < 0.2, -1, drawn)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda a: a.astype("float64"), params)
        batch = with_routes(batch, routes, cfg.model)

        @functools.partial(jax.jit, compiler_options=QUICK)
        def one(params):
            loss, parts, grads = loss_and_grads(params, state, batch, cfg)
            return loss, grads, {name: aux.stats["load"] for name, aux in parts.aux.items()}

        _, grads, load = one(params)
        # The depth of MTP routes the positions that have a target.
        routed = [batch["segment_ids"] > 0] * 2 + [np.asarray(mtp_targets(batch, 1).real_BS) > 0]
        asked = [routes[real_BS][:, i] for i, real_BS in enumerate(routed)]
        want = [np.bincount(a[a >= 0], minlength=4) for a in asked]
        np.testing.assert_array_equal(np.concatenate([load["moe_blocks"], load["mtp"]]), want)
        for where in (("moe_blocks", "moe"), ("mtp", "block", "moe")):
            at = lambda tree, w=where: functools.reduce(lambda t, k: t[k], w, tree)["router"]  # noqa: E731
            direction = np.random.default_rng(2).normal(size=at(params)["kernel"].shape)
            moved = []
            for by in (1e-5, -1e-5):
                bent = jax.tree.map(lambda a: a, params)
                at(bent)["kernel"] = at(bent)["kernel"] + by * direction
                moved.append(float(one(bent)[0]))
            # A central difference is off by about 1e-10 (h^2) and 1e-11 (rounding over h).
            got = (at(grads)["kernel"] * direction).sum()
            np.testing.assert_allclose(got, (moved[0] - moved[1]) / 2e-5, rtol=1e-6, atol=1e-9)
            assert abs(got) > 1e-4


def test_routes_of_a_batch_that_brings_them():
    params, state, batch = inputs()
    rolled = np.where(own_routes() >= 0, (own_routes() + 1) % 4, -1)
    batch = with_routes(batch, rolled[:, :, :2], CFG.model)  # evaluation computes no depth
    compute = ComputeConfig(dispatcher="dense")
    seen = jax.jit(lambda b: routes_of(params, state, b, CFG.model, compute))(batch)
    np.testing.assert_array_equal(field_of(seen.expert_LTK, 8), rolled[:, :, :2])


def test_routes_that_cannot_be():
    batch, routes = inputs()[2], own_routes()

    def refused(text, routes, **fields):
        with pytest.raises(ConfigError, match=text):
            with_routes(batch, routes, change(CFG, **fields).model)

    refused("has shape", routes[..., :1])
    refused(
        re.escape("[B, S, L', K] = (8, 4, 2, 2) or (8, 4, 3, 2), the depths of MTP"), routes[:4]
    )
    refused("must hold integers", routes / 2)
    twice = routes.copy()
    twice[3, 2, 1] = 2
    refused(r"names expert 2 twice \(row 3, position 2, MoE layer 1\)", twice)
    twice[3, 2, 1] = [1, 4]
    refused(r"names expert 4 \(row 3.*there are 0 to 3", twice)
    refused(
        "'expert_choice' lets no token name its experts.*token_choice",
        routes,
        router="expert_choice",
    )
    refused("the model is dense", routes, num_dense_layers=2)
    params, state, _ = inputs()
    with pytest.raises(ConfigError, match=re.escape("must be [B, S, L', K] = (8, 4, 3, 2), the")):
        loss_fn(
            params, state, {**batch, "routes": routes[:, :, :2]}, CFG.model, objective=CFG.objective
        )
