"""A router beside a NumPy loop: weights, weights of shared experts and losses, and the gradient of all of them.

All in float64. Gradients are central differences of the loop, step 1e-6: their error is about 1e-9 for
functions of order 1, and counts are constants to a difference quotient as the papers mean them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.moe.dispatch.dense import combine_matrix
from moejax.params import init_params
from moejax.routers.contract import tokens_of

SEQ = 4


def inputs(router, cfg, num_tokens=8, seed=0):
    """Parameters of order 1 (not at their initial values), tokens, and a mask: the last is padding."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(router.param_specs(cfg), jax.random.key(0)))
    params = {k: rng.normal(size=s.shape) for k, s in shapes.items()}
    mask_T = np.ones(num_tokens)
    mask_T[-1] = 0
    return params, rng.normal(size=(num_tokens, cfg.d_model)), mask_T


def compare(router, cfg, loop, *, state=None, key=None, given=None):
    """`loop(params, x_TD, mask_T) -> (weights_TE, shared_TS or None, losses by name)`."""
    params, x_TD, mask_T = given or inputs(router, cfg)
    arrays = {**params, "x": x_TD}
    rng = np.random.default_rng(1)
    target_TE = rng.normal(size=(len(x_TD), cfg.num_experts))
    target_TS = rng.normal(size=(len(x_TD), max(cfg.shared_experts, 1)))

    def scalar(weights_TE, shared_TS, losses):
        value = (weights_TE * target_TE).sum() + sum(losses.values())
        return value if shared_TS is None else value + (shared_TS * target_TS).sum()

    def of_router(arrays):
        params = {k: v for k, v in arrays.items() if k != "x"}
        tokens = tokens_of(arrays["x"], SEQ, jnp.asarray(mask_T), key=key)
        out = router.route(params, state or {}, tokens, cfg)
        weights_TE = combine_matrix(out.routing, len(x_TD), cfg.num_experts)
        return scalar(weights_TE, out.shared_TS, out.losses), (weights_TE, out)

    def of_loop(arrays):
        params = {k: v for k, v in arrays.items() if k != "x"}
        return loop(params, arrays["x"], mask_T)

    with jax.enable_x64(True):
        exact = jax.tree.map(jnp.asarray, arrays)
        (_, (weights_TE, out)), got = jax.value_and_grad(of_router, has_aux=True)(exact)
        got = {k: np.asarray(v) for k, v in got.items()}
    want_TE, want_TS, want_losses = of_loop(arrays)
    np.testing.assert_allclose(weights_TE, want_TE, rtol=1e-9, atol=1e-12)
    assert (out.shared_TS is None) == (want_TS is None)
    if want_TS is not None:
        np.testing.assert_allclose(out.shared_TS, want_TS, rtol=1e-9, atol=1e-12)
    assert set(out.losses) == set(want_losses)
    for name, want in want_losses.items():
        np.testing.assert_allclose(out.losses[name], want, rtol=1e-9, err_msg=name)
    wanted = differences(lambda a: scalar(*of_loop(a)), arrays)
    for name, gradient in got.items():
        np.testing.assert_allclose(gradient, wanted[name], rtol=1e-5, atol=1e-7, err_msg=name)
    return out


def differences(function, arrays, step=1e-6):
    """The gradient of a function of a dict of arrays by central differences."""
    arrays = {k: np.array(v, np.float64) for k, v in arrays.items()}
    gradient = {k: np.zeros(v.shape) for k, v in arrays.items()}
    for name, array in arrays.items():
        for at in np.ndindex(array.shape):
            old, values = array[at], []
            for move in (step, -step):
                array[at] = old + move
                values.append(function(arrays))
            array[at] = old
            gradient[name][at] = (values[0] - values[1]) / (2 * step)
    return gradient


def softmax(z):
    p = np.exp(z - z.max())
    return p / p.sum()


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def best(values_E, k):
    """The k largest, best first."""
    return np.argsort(-values_E, kind="stable")[:k]
