"""How a step is computed changes nothing: accumulation, rematerialisation, scanned or unrolled layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.train.step import loss_and_grads
from tests.flat import change, experiment

CFG = experiment(
    num_experts=4,
    experts_per_token=2,
    d_expert=8,
    score="sigmoid",
    normalize_weights=True,
    expert_bias=True,
    bias_update="proportional",
    bias_rate=0.1,
    balance_groups=2,
    expert_loss=0.1,
    sequence_loss=0.1,
    device_loss=0.1,
    communication_loss=0.1,
    z_loss=0.01,
    vocab_size=32,
    d_model=16,
    num_layers=2,
    num_dense_layers=0,
    init_std=0.2,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    mtp_depth=1,
    seq_len=8,
    batch_size=4,
)


def run(accumulation, remat, scan):
    batch = {k: np.array(v) for k, v in synthetic_batch(8, 4, 32).items()}
    for name in batch:  # row 1 is all padding, row 2 ends in padding
        batch[name][1], batch[name][2, 5:] = 0, 0
    cfg = change(CFG, remat=remat, scan_layers=scan, accumulation=accumulation)
    params, state = transformer.init_model(cfg.model, jax.random.key(0))

    @jax.jit
    def step(params, state, batch):
        loss, parts, grads = loss_and_grads(params, state, batch, cfg)
        stats = {n: a.stats for n, a in parts.aux.items()}
        new = transformer.update_router_state(state, stats, cfg.model, cfg.objective)
        return loss, (parts.cross_entropy, parts.mtp), parts.balance, grads, new, stats

    return step(params, state, jax.tree.map(jnp.asarray, batch))


@pytest.fixture(scope="module")
def whole():
    return run(1, "none", True)


@pytest.mark.parametrize(
    ("accumulation", "remat", "scan"),
    [
        pytest.param(2, "full", True, marks=pytest.mark.product),
        (4, "dots", False),
    ],
)
def test_same_step(whole, accumulation, remat, scan):
    assert set(whole[2]) == {"expert", "sequence", "device", "communication", "z"}
    assert set(whole[5]) == {"moe_blocks", "mtp"} and whole[1][1] > 0
    assert all(np.isfinite(a).all() for a in jax.tree.leaves(whole))
    got = run(accumulation, remat, scan)
    # float32 sums in another order; gradients are of order 0.1 and below.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6), got, whole)
