"""Routes read off a forward pass: those of the layers, by token whichever side chooses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import AttentionConfig, ComputeConfig, ConfigError, ModelConfig, MoEConfig
from moejax.evals.routes import by_token, check_routes, routes_of
from moejax.models.transformer import init_model
from moejax.moe.layer import moe
from moejax.routers import router_options
from moejax.routers.contract import SlotRouting
from moejax.runs.open import load_run

MODEL = ModelConfig(
    vocab_size=32,
    d_model=16,
    num_layers=3,
    num_dense_layers=1,
    d_ff=32,
    init_std=0.1,
    attention=AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8),
    moe=MoEConfig(num_experts=8, experts_per_token=2, d_expert=8, shared_experts=1),
)
TOKENS_BS = np.random.default_rng(0).integers(0, 32, (2, 6))
BATCH = {
    "tokens": jnp.asarray(TOKENS_BS),
    "positions": jnp.broadcast_to(jnp.arange(6), (2, 6)),
    "segment_ids": jnp.ones((2, 6), jnp.int32).at[1, 4:].set(0),
}


@pytest.mark.parametrize("scan", [True, False])
@pytest.mark.parametrize("router", ["token_choice", "expert_choice"])
def test_inputs_and_routes_are_those_of_the_layer(router, scan):
    cfg = dataclasses.replace(
        MODEL, moe=dataclasses.replace(MODEL.moe, router=router_options(router))
    )
    params, state = init_model(cfg, jax.random.key(0))
    compute = ComputeConfig(scan_layers=scan)
    seen = routes_of(params, state, BATCH, cfg, compute, inputs=True)
    assert seen.inputs_LTD.shape == (2, 12, 16) and seen.hidden_BSD.shape == (2, 6, 16)
    for i in range(2):
        layer = jax.tree.map(lambda a, i=i: a[i], params["moe_blocks"]["moe"])
        x_BSD = seen.inputs_LTD[i].reshape(2, 6, 16)
        _, aux = moe(layer, {}, x_BSD, cfg, mask_BS=BATCH["segment_ids"] > 0)
        expert_TK, weights_TK = by_token(aux.routing, 12)
        np.testing.assert_array_equal(seen.expert_LTK[i], expert_TK)
        # The same float32 sums in another program.
        np.testing.assert_allclose(seen.weights_LTK[i], weights_TK, rtol=1e-5)
        np.testing.assert_allclose(seen.scores_LTE[i], aux.scores_TE, rtol=1e-5)
    assert (np.asarray(seen.expert_LTK)[:, 10:] == -1).all()  # padding
    assert routes_of(params, state, BATCH, cfg, compute).inputs_LTD is None


def test_slots_by_token():
    """Expert 0 takes tokens 2 and 0, expert 1 takes 2, expert 2 nobody; token 1 is taken by none."""
    routing = SlotRouting(
        jnp.array([[2, 0], [2, -1], [-1, -1]]), jnp.array([[0.25, 0.5], [0.75, 0.0], [0.0, 0.0]])
    )
    expert_TE, weights_TE = by_token(routing, 3)
    np.testing.assert_array_equal(expert_TE, [[0, -1, -1], [-1, -1, -1], [1, 0, -1]])
    np.testing.assert_array_equal(weights_TE, [[0.5, 0, 0], [0, 0, 0], [0.75, 0.25, 0]])


def test_who_has_no_routes_is_refused():
    with pytest.raises(ConfigError, match="--x: the model is dense"):
        check_routes(dataclasses.replace(MODEL, num_dense_layers=3), "--x")
    for name in ("soft_moe", "smear"):
        moe_cfg = dataclasses.replace(MODEL.moe, router=router_options(name))
        with pytest.raises(ConfigError, match=f"'{name}' sends no token.*token_choice"):
            check_routes(dataclasses.replace(MODEL, moe=moe_cfg), "--x")
    check_routes(MODEL, "--x")


def test_a_saved_step_is_opened_by_its_number(trained):
    first, last = load_run(trained, step=10), load_run(trained)
    assert (first.step, last.step) == (10, 20)
    leaves = zip(jax.tree.leaves(first.params), jax.tree.leaves(last.params), strict=True)
    assert any((a != b).any() for a, b in leaves)
    with pytest.raises(ConfigError, match="no checkpoint of step 11; it has 10, 20"):
        load_run(trained, step=11)
