"""A router's weights and their gradients against a NumPy function, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.routers.contract import tokens_of


def route64(router, cfg, params, x_TD, seq_len, mask_T=None):
    """`Routed` in float64. Call it under jax.enable_x64(True)."""
    tokens = tokens_of(jnp.asarray(x_TD), seq_len, None if mask_T is None else jnp.asarray(mask_T))
    return router.route(jax.tree.map(jnp.asarray, params), {}, tokens, cfg)


def check(router, cfg, oracle, params, x_TD, seq_len, mask_T=None):
    """The float arrays of the routing, and the gradient of their sum with fixed weights to every parameter and
    to x.

    Args:
      oracle: (params, x_TD, x0_TD) -> those arrays; x0_TD is x where no gradient flows into it.
    """
    params = {name: np.array(a, np.float64) for name, a in params.items()}
    x_TD, x0_TD = np.array(x_TD, np.float64), np.array(x_TD, np.float64)
    want = oracle(params, x_TD, x0_TD)
    rng = np.random.default_rng(5)
    cotangents = [rng.normal(size=w.shape) for w in want]

    def floats(params, x_TD):
        routing = route64(router, cfg, params, x_TD, seq_len, mask_T).routing
        return [a for a in routing if jnp.issubdtype(a.dtype, jnp.floating)]

    def total(params, x_TD):
        return sum((a * c).sum() for a, c in zip(floats(params, x_TD), cotangents, strict=True))

    with jax.enable_x64(True):
        got = floats(params, x_TD)
        for a, w in zip(got, want, strict=True):
            np.testing.assert_allclose(a, w, rtol=1e-10, atol=1e-12)
        gradients = jax.grad(total, (0, 1))(jax.tree.map(jnp.asarray, params), jnp.asarray(x_TD))
    loss = lambda: sum((w * c).sum() for w, c in zip(oracle(params, x_TD, x0_TD), cotangents))  # noqa: E731
    step = 1e-6
    for gradient, array in (*((gradients[0][n], params[n]) for n in params), (gradients[1], x_TD)):
        numeric = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            old, values = array[at], []
            for move in (step, -step):
                array[at] = old + move
                values.append(loss())
            array[at] = old
            numeric[at] = (values[0] - values[1]) / (2 * step)
        # Central differences: step^2 f'''/6 plus eps |loss| / step, about 1e-9 with values near 1.
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-7)


def softmax(a, axis=-1):
    e = np.exp(a - a.max(axis=axis, keepdims=True))
    return e / e.sum(axis=axis, keepdims=True)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))
