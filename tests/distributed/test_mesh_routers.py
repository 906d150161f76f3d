"""On a mesh: what passes from layer to layer beside the hidden state, special experts, variable numbers."""

import numpy as np
import pytest
from mesh_case import assert_same, make_batch, oracle, run

CASES = {
    "carried, specials": dict(router="moe_pp", how=dict(accumulation=2, remat="full")),
    "any number": dict(router="top_p", how=dict(expert_parallel="all_to_all")),
}


@pytest.mark.product
@pytest.mark.parametrize("name", CASES)
def test_one_step(name):
    router, how = CASES[name]["router"], CASES[name]["how"]
    want = oracle(router=router)
    got = run(router=router, mesh=dict(data=2, expert=2, tensor=2), **how)
    assert set(got["balance"]) >= {"expert"}
    stats = want["stats"]["moe_blocks"]
    assert (stats["dropped"] == 0).all() and (stats["load"] > 0).mean() > 0.8
    if router == "moe_pp":
        residual_LNN = want["grads"]["moe_blocks"]["moe"]["router"]["residual"]
        assert (residual_LNN[0] == 0).all() and np.abs(residual_LNN[1]).max() > 1e-6
    else:  # tokens of one expert and of more
        tokens = (make_batch()["segment_ids"] > 0).sum()
        assert tokens < stats["load"].sum(axis=1).max() < 8 * tokens
    assert_same(got, want)
