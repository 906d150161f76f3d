"""Routes of an imported folder against hooks on the original's routers: the same experts, weights and
co-activation on the same text.
"""

import jax
import jax.numpy as jnp
import numpy as np
import parity_oracle as oracle
import pytest
import torch
from parity_cases import CASES

from moejax.config import ComputeConfig
from moejax.evals import trace
from moejax.evals.analysis import counts
from moejax.evals.routes import routes_of
from moejax.interop.load import load_model

# One row of 40 tokens and one of 23, padded.
TOKENS_BS = np.random.default_rng(5).integers(0, 101, (2, 40))
REAL_BS = np.arange(40)[None] < np.array([[40], [23]])


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.family in ("olmoe", "mixtral")], ids=lambda c: c.id
)
def test_routes_weights_and_co_activation_are_those_of_hooks(case, tmp_path, record, record_one):
    original = oracle.build(case)
    oracle.save(original, case, tmp_path / "hf")
    seen, hooks = [], []
    for module in original.modules():
        if type(module).__name__.endswith("TopKRouter"):  # returns logits, weights, experts
            hooks.append(module.register_forward_hook(lambda m, i, out: seen.append(out[1:3])))
    with torch.no_grad():
        original(torch.tensor(TOKENS_BS), attention_mask=torch.tensor(REAL_BS))
    assert len(seen) == len(hooks) == 2
    theirs = np.stack([e.numpy().reshape(80, -1) for _, e in seen])
    their_weights = np.stack([w.numpy().reshape(80, -1) for w, _ in seen])

    cfg, params, state = load_model(tmp_path / "hf")
    batch = {
        "tokens": jnp.asarray(TOKENS_BS, jnp.int32),
        "segment_ids": jnp.asarray(REAL_BS, jnp.int32),
        "positions": jnp.broadcast_to(jnp.arange(40), (2, 40)),
    }
    read = jax.jit(lambda p, s, b: routes_of(p, s, b, cfg, ComputeConfig()))
    routes = read(params, state, batch)
    ours = trace.records_of(
        *(np.moveaxis(np.asarray(a), 1, 0) for a in (routes.expert_LTK, routes.weights_LTK)),
        None,
        batch,
        0,
    )
    real_T = REAL_BS.reshape(-1)
    order = np.argsort(theirs, axis=-1)
    our_order = np.argsort(ours.experts_NLK, axis=-1)
    sorted_by = np.take_along_axis
    want = np.moveaxis(sorted_by(theirs, order, -1)[:, real_T], 0, 1)
    np.testing.assert_array_equal(sorted_by(ours.experts_NLK, our_order, -1), want)
    record_one(case.family, "routes equal", want.size)
    want = np.moveaxis(sorted_by(their_weights, order, -1)[:, real_T], 0, 1)
    got = sorted_by(ours.weights_NLK, our_order, -1)
    # Float32 sums in another order, a few layers deep: below 1e-5; weights are shares of 1.
    record(case.family, "router", np.abs(got - want).max())
    np.testing.assert_allclose(got, want, atol=1e-4)

    # Tokens that have both experts, counted one by one.
    experts = cfg.moe.num_experts
    pairs = np.zeros((2, experts, experts))
    for layer in range(2):
        for token in theirs[layer][real_T]:
            for one in token:
                for other in token:
                    pairs[layer, one, other] += 1
    real_T = (batch["segment_ids"] > 0).reshape(-1)
    order_T = counts.shuffled(jax.random.key(0), real_T)
    sizes = counts.Sizes(2, experts, 0, 40)
    sums = counts.count(routes, batch, jnp.zeros(2, jnp.int32), order_T, sizes)
    np.testing.assert_array_equal(np.asarray(sums["pairs"]).sum(axis=1), pairs)
