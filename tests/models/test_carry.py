"""What passes from one layer's router to the next: the same however layers are run, gradients included."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flat import change, experiment

from moejax.config import ComputeConfig
from moejax.data import synthetic_batch
from moejax.models import transformer
from moejax.models.cache import init_layers
from moejax.models.loss import loss_fn
from moejax.routers import ROUTERS
from moejax.train.step import loss_and_grads

SIZES = dict(
    vocab_size=32,
    d_model=16,
    num_layers=3,
    num_dense_layers=1,
    d_ff=16,
    init_std=0.4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=8,
    num_experts=4,
    experts_per_token=2,
    d_expert=8,
    seq_len=8,
    batch_size=4,
    dispatcher="dense",  # compiles faster
)
CFG = experiment(router="moe_pp", mtp_depth=1, expert_loss=0.1, **SIZES)
TOKENS = jax.random.randint(jax.random.key(2), (2, 8), 0, 32)


def make_batch():
    """Row 1 is all padding, row 2 ends in padding."""
    batch = {k: np.array(v) for k, v in synthetic_batch(8, 4, 32).items()}
    for a in batch.values():
        a[1], a[2, 5:] = 0, 0
    return jax.tree.map(jnp.asarray, batch)


@pytest.mark.parametrize("scan", [True, False])
def test_each_layer_receives_what_the_one_before_returned(monkeypatch, scan):
    """A router that adds 1 to what it receives: MoE layer i, and no other, sees i; multi-token prediction 0."""
    plain = ROUTERS["token_choice"]

    def route(params, state, tokens, cfg):
        out = plain.route(params, state, tokens, cfg)
        seen = {"seen": (tokens.carried_TW * tokens.mask_T[:, None]).sum(axis=0)}
        return out._replace(stats={**out.stats, **seen}, carry_TW=tokens.carried_TW + 1)

    monkeypatch.setitem(
        ROUTERS, "token_choice", dataclasses.replace(plain, route=route, carries=lambda cfg: 2)
    )
    cfg = experiment(mtp_depth=1, scan_layers=scan, **SIZES)
    params, state = transformer.init_model(cfg.model, jax.random.key(0))
    how = dict(objective=cfg.objective, compute=cfg.compute)
    aux = jax.jit(lambda p, b: loss_fn(p, state, b, cfg.model, **how)[1].aux)(params, make_batch())
    seen = aux["moe_blocks"].stats["seen"]
    np.testing.assert_array_equal(seen, 21 * np.arange(2)[:, None] * [1, 1])  # 21 tokens
    np.testing.assert_array_equal(aux["mtp"].stats["seen"], 0)


def run(accumulation, remat, scan):
    cfg = change(CFG, remat=remat, scan_layers=scan, accumulation=accumulation)
    params, state = transformer.init_model(cfg.model, jax.random.key(0))
    step = jax.jit(lambda params, batch: loss_and_grads(params, state, batch, cfg))
    loss, parts, grads = step(params, make_batch())
    return loss, parts.balance, grads, {n: a.stats for n, a in parts.aux.items()}


@pytest.mark.product
def test_same_step():
    """Scanned or not, rematerialised or not, in micro-batches or whole. The gradient reaches a layer's
    matrix on what it received, but not where that was zero: in the first layer and in multi-token
    prediction."""
    whole = run(1, "none", True)
    # float32 sums in another order; gradients are of order 0.1 and below.
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)  # noqa: E731
    jax.tree.map(close, run(2, "full", False), whole)
    trunk_LNN = whole[2]["moe_blocks"]["moe"]["router"]["residual"]
    reached = [bool((abs(a) > 1e-6).any()) for a in trunk_LNN]
    assert reached == [False, True]
    assert not whole[2]["mtp"]["block"]["moe"]["router"]["residual"].any()


def test_decoding_in_lists_of_layers_equals_one_pass():
    cfg = CFG.model
    params, state = transformer.init_model(cfg, jax.random.key(1))
    forward = jax.jit(
        lambda p, t: transformer.forward(p, state, t, cfg, compute=CFG.compute).hidden_BSD
    )
    want = forward(params, TOKENS)
    unrolled = ComputeConfig(scan_layers=False, dispatcher="dense")
    listed, cache = transformer.unstack(params), init_layers(cfg, 2, 8)

    @jax.jit
    def decode(listed, token, cache, position):
        out = transformer.forward(
            listed, state, token, cfg, compute=unrolled, cache=cache, positions_BS=position
        )
        return out.hidden_BSD, out.cache

    got = []
    for i in range(8):
        hidden, cache = decode(listed, TOKENS[:, i : i + 1], cache, jnp.full((2, 1), i))
        got.append(hidden)
    # float32, values of order 1.
    np.testing.assert_allclose(jnp.concatenate(got, axis=1), want, rtol=1e-4, atol=1e-4)
    # It matters: without what is carried the result is another.
    cut = jax.tree_util.tree_map_with_path(
        lambda path, a: a * 0 if "residual" in jax.tree_util.keystr(path) else a, params
    )
    assert abs(forward(cut, TOKENS) - want).max() > 0.01
