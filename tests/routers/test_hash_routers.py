"""Routers with a table of vocabulary ids: hash layers, DeepSeek-V4."""

import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from moejax.routers import ROUTERS
from moejax.routers.contract import tokens_of

HASH, V4 = ROUTERS["hash"], ROUTERS["deepseek_v4_hash"]
TABLE = np.array([[0, 2], [3, 1], [1, 2]], np.int32)


def test_hash_by_hand():
    """Each id's two experts, half of the result each; padding has none."""
    cfg = oracle.config(HASH, 4, 2, 3)
    ids, mask = jnp.array([1, 0, 1, 2]), jnp.array([1, 1, 1, 0])
    tokens = tokens_of(jnp.ones((4, 3)), 4, mask, ids_T=ids)
    out = HASH.route({}, {"table": jnp.asarray(TABLE)}, tokens, cfg)
    np.testing.assert_array_equal(out.routing.expert_index_TK, [[3, 1], [0, 2], [3, 1], [-1, -1]])
    np.testing.assert_array_equal(out.routing.combine_weights_TK, [[0.5, 0.5]] * 3 + [[0, 0]])
    np.testing.assert_array_equal(out.stats["load"], [1, 2, 1, 2])
    assert out.losses == {} and HASH.param_specs(cfg) == {}


def test_tables():
    """Distinct experts, all of them used; of a layer and a seed its own; drawn again the same."""
    cfg = oracle.config(HASH, 4, 2, 3)
    table = np.asarray(HASH.init_state(cfg, 0)["table"])
    assert table.shape == (16, 2) and (table[:, 0] != table[:, 1]).all()
    assert set(table.ravel()) == {0, 1, 2, 3}
    np.testing.assert_array_equal(HASH.init_state(cfg, 0)["table"], table)
    assert (HASH.init_state(cfg, 1)["table"] != table).any()
    assert (HASH.init_state(oracle.config(HASH, 4, 2, 3, seed=1), 0)["table"] != table).any()


def test_ids_are_needed():
    cfg = oracle.config(HASH, 4, 2, 3)
    with pytest.raises(ValueError, match=r"needs Tokens\.ids_T"):
        HASH.route({}, HASH.init_state(cfg, 0), tokens_of(jnp.ones((4, 3)), 4), cfg)


def sqrt_softplus(a):
    return np.sqrt(np.log1p(np.exp(a)))


def state_of(hashed: bool, bias=(0, 0, 0, 0)):
    return {
        "table": jnp.asarray(TABLE),
        "hashed": jnp.float32(hashed),
        "expert_bias": jnp.asarray(bias, jnp.float32),
    }


def test_v4_by_hand():
    """Logits ln(e^{s^2} - 1) have scores s = 1, 2, 3, 4. The table gives id 0 the experts 0 and 2, with
    1/4 and 3/4 of 1.5; by scores it would have 3 and 2; and with a bias of 5 on expert 0, 0 and 3, with
    1/5 and 4/5."""
    s = np.array([1.0, 2, 3, 4])
    logits, ids = np.log(np.expm1(s**2))[None], jnp.zeros(1, jnp.int32)
    cfg = oracle.config(V4, 4, 2, 4)
    for state, index, weights in (
        (state_of(True, (0, 0, 0, 9)), [0, 2], [0.375, 1.125]),
        (state_of(False), [3, 2], [6 / 7, 4.5 / 7]),
        (state_of(False, (5, 0, 0, 0)), [0, 3], [0.3, 1.2]),
    ):
        out = oracle.on_logits(V4, cfg, logits, state, ids_T=ids)
        np.testing.assert_array_equal(out.routing.expert_index_TK, [index])
        np.testing.assert_allclose(out.routing.combine_weights_TK, [weights], rtol=1e-5)


@pytest.mark.parametrize("hashed", [True, False])
def test_v4_against_numpy(hashed):
    """With the sequence-wise loss of V3 (one sequence here), 2412.19437 eq. 17-20."""
    cfg = oracle.config(V4, 4, 2, 5, dict(sequence_loss=0.3))
    ids = np.array([0, 1, 2, 0, 1, 0, 2])

    def numpy(params, x_TD, mask_T, _):
        s_TE = sqrt_softplus(x_TD @ params["kernel"])
        routes_TE, n = np.zeros_like(s_TE), mask_T.sum()
        for t in np.flatnonzero(mask_T):
            routes_TE[t, TABLE[ids[t]] if hashed else oracle.best(s_TE[t], 2)] = 1
        weights_TE = routes_TE * s_TE
        weights_TE *= 1.5 / np.where(mask_T > 0, weights_TE.sum(axis=1), 1)[:, None]
        share_TE = s_TE / s_TE.sum(axis=1, keepdims=True)
        f_E, p_E = 4 / (2 * n) * routes_TE.sum(axis=0), mask_T @ share_TE / n
        return weights_TE, {"sequence": 0.3 * (f_E * p_E).sum()}

    oracle.compare(V4, cfg, numpy, state_of(hashed), ids=ids)


def test_v4_layers():
    """The first three have the table, the others scores; the rule moves the bias and leaves the table."""
    cfg = oracle.config(V4, 4, 2, 4, dict(bias_update="sign", bias_rate=0.1))
    states = [V4.init_state(cfg, layer) for layer in range(5)]
    assert [bool(s["hashed"]) for s in states] == [True, True, True, False, False]
    new = V4.update(states[3], {"load": jnp.array([4.0, 1, 2, 1])}, cfg)
    np.testing.assert_allclose(new["expert_bias"], [-0.1, 0.1, 0, 0.1], rtol=1e-6)
    np.testing.assert_array_equal(new["table"], states[3]["table"])
