"""The path of decoding, a few rows through their experts, against every expert in turn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import MoEConfig
from moejax.moe.dispatch.dropless import dropless
from moejax.moe.experts import expert_param_specs, ffn, of_experts
from moejax.moe.few_rows_ffn import ROWS_PER_EXPERT
from moejax.options import choices_of
from moejax.params import init_params
from moejax.routers.contract import Routing

E, D, F, R = 5, 8, 6, 9
EXPERT_R = np.array([0, 4, 0, 2, 4, -1, 4, 0, 4], np.int32)  # one token of R has no expert
assert R <= ROWS_PER_EXPERT * E


def make(activation="swiglu", bias=False):
    moe = MoEConfig(
        num_experts=E, d_expert=F, activation=activation, activation_limit=1.0, ffn_bias=bias
    )
    params = init_params(expert_param_specs(moe, D, 0.5), jax.random.key(0))
    if bias:
        params = {k: v + 0.1 if k.startswith("b_") else v for k, v in params.items()}
    return moe, params, jax.random.normal(jax.random.key(1), (R, D))


def through_experts(params, x_RD, moe):
    routing = Routing(jnp.asarray(EXPERT_R)[:, None], jnp.ones((R, 1)))
    return dropless(params, x_RD, routing, of_experts(moe))[0]


def one_by_one(moe, params, x_RD):
    rows = [
        ffn({k: w[e] for k, w in params.items()}, x, of_experts(moe))
        if e >= 0
        else jnp.zeros((1, D))
        for e, x in zip(EXPERT_R, x_RD[:, None])
    ]
    return jnp.concatenate(rows)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", choices_of(MoEConfig, "activation"))
def test_each_row_through_its_expert(activation, bias):
    """float32, two short sums in either order: 1e-5 of values near 1."""
    moe, params, x_RD = make(activation, bias)
    y_RD = jax.jit(lambda p, x: through_experts(p, x, moe))(params, x_RD)
    np.testing.assert_allclose(y_RD, one_by_one(moe, params, x_RD), atol=1e-5)


def test_experts_without_rows_and_rows_without_experts_are_not_read():
    moe, params, x_RD = make()
    poisoned = {k: w.at[jnp.array([1, 3])].set(jnp.nan) for k, w in params.items()}
    y_RD = through_experts(poisoned, x_RD.at[5].set(jnp.nan), moe)
    np.testing.assert_array_equal(y_RD, through_experts(params, x_RD, moe))
    assert not y_RD[5].any()


def test_value_beside_a_gradient_is_the_same():
    """With a gradient the rows take the path of training: another order of the same sums."""
    moe, params, x_RD = make()
    value = lambda x: (through_experts(params, x, moe) ** 2).sum()  # noqa: E731
    plain, (beside, gradient) = value(x_RD), jax.value_and_grad(value)(x_RD)
    np.testing.assert_allclose(plain, beside, rtol=1e-5)
    want = jax.grad(lambda x: (one_by_one(moe, params, x) ** 2).sum())(x_RD)
    np.testing.assert_allclose(gradient, want, rtol=1e-4, atol=1e-4)


def test_bfloat16_rows_with_float32_parameters():
    """Parameters are cast as elsewhere; bfloat16 has 8 bits, so 2% of values near 1."""
    moe, params, x_RD = make()
    y_RD = through_experts(params, x_RD.astype(jnp.bfloat16), moe)
    assert y_RD.dtype == jnp.bfloat16
    want = one_by_one(moe, params, x_RD)
    np.testing.assert_allclose(y_RD.astype(jnp.float32), want, atol=0.02 * float(abs(want).max()))
