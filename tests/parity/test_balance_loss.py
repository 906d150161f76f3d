"""The balance loss of Mixtral, Qwen and OLMoE, which moejax reads as its expert-level loss.

One layer: `transformers` pools the tokens of all layers before it multiplies, moejax computes each layer's
loss and averages, so that one layer cannot make up for another.
"""

import jax
import jax.numpy as jnp
import numpy as np
import parity_oracle as oracle
import pytest
import torch
from parity_shapes import GQA, Case

from moejax.interop.hf_folder import open_folder
from moejax.interop.load import load_model
from moejax.models import zoo
from moejax.models.loss import loss_fn

ONE_LAYER = {**GQA, "num_hidden_layers": 1, "router_aux_loss_coef": 0.05}
CASES = [
    Case("mixtral", "one-layer", {**ONE_LAYER, "num_local_experts": 5}),
    Case("qwen3_moe", "one-layer", {**ONE_LAYER, "norm_topk_prob": True}),
    Case("olmoe", "one-layer", ONE_LAYER),
]
TOKENS = np.random.default_rng(4).integers(0, 101, (2, 9))
MASK = (np.arange(9)[None] < np.array([9, 4])[:, None]).astype(np.int32)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.id)
def test_balance_loss(case, record, tmp_path):
    original = oracle.build(case)
    oracle.save(original, case, tmp_path / "original")
    cfg, params, state = load_model(tmp_path / "original")
    objective = zoo.objective_from_hf(open_folder(tmp_path / "original").hf)
    with torch.no_grad():
        out = original(
            torch.tensor(TOKENS), attention_mask=torch.tensor(MASK), output_router_logits=True
        )
    positions = np.broadcast_to(np.arange(9), TOKENS.shape)
    batch = {
        "tokens": TOKENS,
        "targets": TOKENS,
        "positions": positions,
        "segment_ids": MASK,
        "loss_mask": MASK,
    }
    batch = {k: jnp.asarray(v, jnp.int32) for k, v in batch.items()}
    _, parts = jax.jit(lambda p, b: loss_fn(p, state, b, cfg, objective=objective))(params, batch)
    want = 0.05 * out.aux_loss.item()
    difference = abs(float(parts.balance["expert"]) - want)
    assert difference <= 1e-6 * max(1.0, want)  # float32 sums of 13 tokens, near 0.1
    record(case.family, "balance loss", difference)
