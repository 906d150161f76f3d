"""Soft dispatch (2308.00951 eq. 1-3) against NumPy's einsum, value and every gradient, in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ComputeConfig, MoEConfig
from moejax.moe.dispatch import dispatch
from moejax.moe.dispatch.soft import soft
from moejax.moe.experts import expert_param_specs, of_experts
from moejax.routers.contract import SoftRouting

B, S, E, C, D, F = 2, 3, 3, 2, 4, 3
T = B * S
MOE = MoEConfig(num_experts=E, d_expert=F)


def inputs():
    """By name: tokens, both mixes, the experts' matrices. Mixes that sum to nothing in particular."""
    rng = np.random.default_rng(0)
    shapes = {"x": (T, D), "dispatch": (B, S, E, C), "combine": (B, S, E, C)}
    shapes |= {name: spec.shape for name, spec in expert_param_specs(MOE, D, 1.0).items()}
    return {name: rng.normal(size=shape) for name, shape in shapes.items()}


TARGET = np.random.default_rng(1).normal(size=(T, D))


def numpy_soft(a):
    x_BSD = a["x"].reshape(B, S, D)
    slots_BECD = np.einsum("bsec,bsd->becd", a["dispatch"], x_BSD)  # X~ = D^T X, eq. 1
    gate, up = (np.einsum("becd,edf->becf", slots_BECD, a[f"w_{n}"]) for n in ("gate", "up"))
    out_BECD = np.einsum("becf,efd->becd", gate / (1 + np.exp(-gate)) * up, a["w_down"])
    return np.einsum("bsec,becd->bsd", a["combine"], out_BECD).reshape(T, D)  # Y = C Y~, eq. 3


def ours(a):
    params = {n: w for n, w in a.items() if n.startswith("w_")}
    routing = SoftRouting(a["dispatch"], a["combine"])
    return soft(params, a["x"], routing, of_experts(MOE))


def test_value_and_gradient():
    arrays = inputs()
    with jax.enable_x64(True):
        y = ours(arrays)
        gradient = jax.grad(lambda a: (ours(a) * TARGET).sum())(arrays)
        np.testing.assert_allclose(y, numpy_soft(arrays), rtol=1e-12, atol=1e-12)
    step = 1e-6
    for name, array in arrays.items():
        numeric = np.zeros_like(array)
        for at in np.ndindex(array.shape):
            old, values = array[at], []
            for move in (step, -step):
                array[at] = old + move
                values.append((numpy_soft(arrays) * TARGET).sum())
            array[at] = old
            numeric[at] = (values[0] - values[1]) / (2 * step)
        # Central differences: step^2 f'''/6 plus eps |loss| / step, about 1e-8 with values near 100.
        np.testing.assert_allclose(gradient[name], numeric, rtol=1e-6, atol=1e-6, err_msg=name)


def test_through_the_door_nothing_is_dropped_whatever_the_options():
    """A capacity and a dispatcher are about routes; there are none. In bfloat16 the mixes stay float32."""
    arrays = {n: jnp.asarray(a, jnp.float32) for n, a in inputs().items()}
    params = {n: w for n, w in arrays.items() if n.startswith("w_")}
    routing = SoftRouting(arrays["dispatch"], arrays["combine"])
    want = numpy_soft(inputs())
    for compute in (ComputeConfig(), ComputeConfig(dispatcher="dense")):
        y, dropped = dispatch(params, arrays["x"], routing, MOE, compute, capacity_factor=0.5)
        assert dropped == 0
        np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)  # float32 sums of values near 10
    half, _ = dispatch(params, arrays["x"].astype(jnp.bfloat16), routing, MOE, ComputeConfig())
    assert half.dtype == jnp.bfloat16
    # Eight bits of x, slots, weights, hidden values and results: a handful of roundings of 2^-9.
    assert np.abs(np.float32(half) - want).max() < 0.03 * np.abs(want).max()
