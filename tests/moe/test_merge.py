"""Merged experts (2306.03745, 2405.03133) against NumPy, value and every gradient, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import ComputeConfig, MoEConfig
from moejax.moe.dispatch import dispatch
from moejax.moe.dispatch.merge import merge
from moejax.moe.experts import expert_param_specs, of_experts
from moejax.routers.contract import MergeRouting

G, T, E, D, F = 2, 6, 3, 4, 3
MOE = MoEConfig(num_experts=E, d_expert=F, ffn_bias=True)


def inputs():
    """By name: tokens, weights of groups (that sum to nothing in particular), the experts' parameters."""
    rng = np.random.default_rng(0)
    shapes = {"x": (T, D), "weights": (G, E)}
    shapes |= {name: spec.shape for name, spec in expert_param_specs(MOE, D, 1.0).items()}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


TARGET = np.random.default_rng(1).normal(size=(T, D))


def numpy_merge(a):
    y_TD = []
    for t, x_D in enumerate(a["x"]):
        w = {n: np.tensordot(a["weights"][t // 3], p, 1) for n, p in a.items() if n[1:2] == "_"}
        gate, up = (x_D @ w[f"w_{n}"] + w[f"b_{n}"] for n in ("gate", "up"))
        y_TD.append((gate / (1 + np.exp(-gate)) * up) @ w["w_down"] + w["b_down"])
    return np.stack(y_TD)


def ours(a):
    params = {n: w for n, w in a.items() if n[1:2] == "_"}
    return merge(params, a["x"], MergeRouting(a["weights"]), of_experts(MOE))


def test_value_and_gradient():
    arrays = inputs()
    with jax.enable_x64(True):
        on_device = jax.tree.map(jnp.asarray, arrays)
        np.testing.assert_allclose(ours(on_device), numpy_merge(arrays), rtol=1e-12, atol=1e-12)
        gradient = jax.grad(lambda a: (ours(a) * TARGET).sum())(on_device)
    step = 1e-6
    for name, array in arrays.items():
        numeric = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            old, values = array[at], []
            for move in (step, -step):
                array[at] = old + move
                values.append((numpy_merge(arrays) * TARGET).sum())
            array[at] = old
            numeric[at] = (values[0] - values[1]) / (2 * step)
        # Central differences: step^2 f'''/6 plus eps |loss| / step, about 1e-8 with values near 100.
        np.testing.assert_allclose(gradient[name], numeric, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dispatcher", ["auto", "dense"])
def test_through_the_door(dispatcher):
    """Nothing is dropped whatever the capacity; in bfloat16 the experts are merged in float32."""
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in inputs().items()}
    params = {n: w for n, w in arrays.items() if n[1:2] == "_"}
    how = dict(moe=MOE, compute=ComputeConfig(dispatcher=dispatcher), capacity_factor=0.5)
    routing, want = MergeRouting(arrays["weights"]), numpy_merge(inputs())
    y, dropped = dispatch(params, arrays["x"], routing, **how)
    assert dropped == 0
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)  # float32 sums of values near 10
    half, _ = dispatch(params, arrays["x"].astype(jnp.bfloat16), routing, **how)
    assert half.dtype == jnp.bfloat16
    # Eight bits of x, parameters, hidden values and results: a handful of roundings of 2^-9.
    assert np.abs(np.float32(half) - want).max() < 0.03 * np.abs(want).max()
