"""ReMoE by hand, against NumPy, and its rule."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flat import model

from moejax.models import transformer
from moejax.routers import ROUTERS

REMOE = ROUTERS["remoe"]


def test_by_hand():
    """Gates [1, 0, 2, 0] and [0, 4, 0, 0]: one token of two experts, one of one. Experts are open for
    [1, 1, 1, 0] of 2 tokens, so with K = 1 f = 4/2 [1, 1, 1, 0]; mean gates are [.5, 2, 1, 0], and the loss is
    lambda (1 + 4 + 2)."""
    cfg = oracle.config(REMOE, 4, 1, 4, coefficient=0.5)
    out = oracle.on_logits(REMOE, cfg, [[1, -1, 2, 0], [-3, 4, -1, -1]])
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[2, 0, -1, -1], [1, -1, -1, -1]])
    np.testing.assert_array_equal(out.routing.combine_weights_TK, [[2, 1, 0, 0], [4, 0, 0, 0]])
    np.testing.assert_allclose(out.losses["gates"], 3.5, rtol=1e-6)
    np.testing.assert_array_equal(out.stats["load"], [1, 1, 1, 0])


def test_at_most_as_many_as_allowed():
    """The widest is computed; the loss still sees both."""
    cfg = oracle.config(REMOE, 4, 1, 4, coefficient=0.5, max_experts=1)
    out = oracle.on_logits(REMOE, cfg, [[1, -1, 2, 0], [-3, 4, -1, -1]])
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[2], [1]])
    np.testing.assert_array_equal(out.stats["load"], [0, 1, 1, 0])
    np.testing.assert_allclose(out.losses["gates"], 3.5, rtol=1e-6)
    assert REMOE.routes_per_token(cfg) == 1 and REMOE.experts_used(cfg) == 1


def test_against_numpy():
    cfg = oracle.config(REMOE, 4, 2, 5, coefficient=0.3)

    def numpy(params, x_TD, mask_T, _):
        gates_TE = np.maximum(x_TD @ params["kernel"], 0) * mask_T[:, None]
        n, loss = mask_T.sum(), 0.0
        for e in range(4):
            f = 4 / (2 * n) * (gates_TE[:, e] > 0).sum()
            loss += f * gates_TE[:, e].sum() / n
        return gates_TE, {"gates": np.float32(0.3) * loss}

    oracle.compare(REMOE, cfg, numpy)


@pytest.mark.parametrize("last, factor", [(1, 1.0), (2, 1.2), (0, 1 / 1.2)])
def test_rule(last, factor):
    """K T = 4 open gates are wanted."""
    open_E = [3, last, 0, 0]
    cfg = oracle.config(REMOE, 4, 2, 4, coefficient=0.5)
    stats = {"open": jnp.array(open_E, jnp.float32), "tokens": jnp.float32(2)}
    got = REMOE.update(REMOE.init_state(cfg, 0), stats, cfg)["coefficient"]
    np.testing.assert_allclose(got, 0.5 * factor, rtol=1e-6)


def test_all_layers_have_one_coefficient():
    """One layer with 6 open gates where 4 are wanted and one with 1: 7 of 8, so lambda sinks in both."""
    sizes = dict(num_layers=2, num_dense_layers=0, num_experts=4, d_expert=8, experts_per_token=2)
    cfg = model(router="remoe", coefficient=0.5, **sizes)
    state = transformer.init_router_state(cfg)
    stats = {
        "open": jnp.array([[3, 3, 0, 0], [1, 0, 0, 0]], jnp.float32),
        "tokens": jnp.array([2.0, 2.0]),
    }
    got = transformer.update_router_state(state, {"moe_blocks": stats}, cfg, None)
    np.testing.assert_allclose(got["moe_blocks"]["coefficient"], [0.5 / 1.2] * 2, rtol=1e-6)


def test_bad_options():
    assert "0 means all" in REMOE.problems(oracle.config(REMOE, 4, 2, 4, max_experts=5), "m.")[0]
    few = REMOE.problems(oracle.config(REMOE, 4, 2, 4, max_experts=1), "m.")
    assert few[0].endswith("is less than m.experts_per_token=2, the mean; 2 to 4 would work")
