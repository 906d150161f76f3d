"""Routers of published models that no family here loads yet, against their own modules in `transformers`."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import DeepseekV4Config, LongcatFlashConfig
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HashRouter,
    DeepseekV4TopKRouter,
)
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashTopkRouter

from moejax.routers import ROUTERS, router_options
from moejax.routers.contract import RouterConfig, tokens_of

EXPERTS, D, V, T = 6, 16, 11, 24
RNG = np.random.default_rng(0)
X_TD = RNG.normal(size=(T, D)).astype(np.float32)
IDS_T = RNG.integers(0, V, T)


def route(name, kernel_ND, k, state, **options):
    """moejax's weights of a token on all experts, special ones included."""
    cfg = RouterConfig(router_options(name, **options), EXPERTS, k, D, V, num_layers=4)
    tokens = tokens_of(jnp.asarray(X_TD), T, ids_T=jnp.asarray(IDS_T, jnp.int32))
    params = {"kernel": jnp.asarray(kernel_ND.T)}
    return dense(*ROUTERS[name].route(params, state, tokens, cfg).routing, len(kernel_ND))


def dense(index_TK, weights_TK, count):
    out_TN = np.zeros((T, count))
    np.put_along_axis(out_TN, np.asarray(index_TK), np.asarray(weights_TK), axis=1)
    return out_TN


def compare(theirs, ours_TN, record, name):
    _, weights, index = theirs
    want_TN = dense(index.numpy(), weights.detach().numpy(), ours_TN.shape[1])
    assert ((want_TN > 0) == (ours_TN > 0)).all()
    difference = abs(ours_TN - want_TN).max()
    assert difference <= 1e-6 * want_TN.max()  # float32 products of 16 terms
    record(name, "router", difference)


def test_longcat(record):
    """Four identity experts behind the FFNs, softmax over all, a bias for the choice, weights not
    normalised."""
    hf = LongcatFlashConfig(
        hidden_size=D, n_routed_experts=EXPERTS, zero_expert_num=4, moe_topk=3,
        routed_scaling_factor=6.0,
    )  # fmt: skip
    theirs = LongcatFlashTopkRouter(hf)
    theirs.e_score_correction_bias.copy_(torch.tensor(RNG.normal(size=10) * 0.1))
    bias_N = theirs.e_score_correction_bias.numpy()
    assert len({tuple(sorted(row)) for row in theirs(torch.tensor(X_TD))[2].tolist()}) > 3
    ours_TN = route(
        "longcat",
        theirs.classifier.weight.detach().numpy(),
        3,
        {"expert_bias": jnp.asarray(bias_N)},
        identity_experts=4,
    )
    compare(theirs(torch.tensor(X_TD)), ours_TN, record, "longcat_flash")


@pytest.mark.parametrize("hashed", [True, False])
def test_deepseek_v4(record, hashed):
    hf = DeepseekV4Config(
        hidden_size=D, n_routed_experts=EXPERTS, num_experts_per_tok=2, vocab_size=V,
        routed_scaling_factor=1.5,
    )  # fmt: skip
    theirs = (DeepseekV4HashRouter if hashed else DeepseekV4TopKRouter)(hf)
    torch.nn.init.normal_(theirs.weight, generator=torch.Generator().manual_seed(0))
    table_VK = np.argsort(RNG.random((V, EXPERTS)), axis=1)[:, :2]
    bias_E = RNG.normal(size=EXPERTS).astype(np.float32)
    inputs = [torch.tensor(X_TD)]
    if hashed:
        theirs.tid2eid.copy_(torch.tensor(table_VK))
        inputs.append(torch.tensor(IDS_T))
    else:
        theirs.e_score_correction_bias.copy_(torch.tensor(bias_E))
    state = {
        "table": jnp.asarray(table_VK, jnp.int32),
        "hashed": jnp.float32(hashed),
        "expert_bias": jnp.asarray(bias_E),
    }
    ours_TN = route("deepseek_v4_hash", theirs.weight.detach().numpy(), 2, state)
    compare(theirs(*inputs), ours_TN, record, "deepseek_v4")
