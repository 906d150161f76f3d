"""DynMoE by hand and against NumPy; its gradient is a straight-through one."""

import jax.numpy as jnp
import numpy as np
import oracle

from moejax.routers import ROUTERS
from moejax.routers.contract import tokens_of

DYN = ROUTERS["dyn_moe"]


def test_by_hand():
    """Experts along the axes (of lengths that do not matter), thresholds 0, .5, -.5. The token (3, 4) has
    cosines .6, .8 and -.6: it passes the first two, each with weight 1/2. (-1, 0) has -1, 0, 1: the third.
    (-6, -8) has -.6, -.8, .6: the third; with its threshold at .9 no expert takes the token, and it goes to the
    nearest."""
    cfg = oracle.config(DYN, 3, 1, 2, diversity_loss=0.0, simplicity_loss=0.0)
    params = {
        "kernel": jnp.array([[2.0, 0, -3], [0, 5, 0]]),
        "threshold": jnp.array([0, 0.5, -0.5]),
    }
    x_TD = jnp.array([[3.0, 4], [-1, 0], [-6, -8]])
    out = DYN.route(params, {}, tokens_of(x_TD, 3), cfg)
    assert oracle.chosen(out) == [{0, 1}, {2}, {2}]
    weights = out.routing.combine_weights_TK
    np.testing.assert_allclose(weights, [[0.5, 0.5, 0], [1, 0, 0], [1, 0, 0]], rtol=1e-6)
    shut = {**params, "threshold": jnp.array([0, 0.5, 0.9])}
    again = DYN.route(shut, {}, tokens_of(x_TD, 3), cfg)
    assert oracle.chosen(again) == [{0, 1}, {2}, {2}]


def unit(a, axis):
    return a / np.sqrt((a**2).sum(axis=axis, keepdims=True) + 1e-12)


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def test_against_numpy():
    """Weights 1/k; in the gradient a weight counts as (sigmoid(s) - sigmoid(theta)) / k of the chosen."""
    cfg = oracle.config(DYN, 4, 2, 5, diversity_loss=0.3, simplicity_loss=0.2)

    def parts_of(params, x_TD, mask_T):
        kernel_DE = params["kernel"]
        cosine_TE = unit(x_TD, 1) @ unit(kernel_DE, 0)
        open_TE = cosine_TE > params["threshold"]
        for t in range(len(x_TD)):
            if not open_TE[t].any():
                open_TE[t, cosine_TE[t].argmax()] = True
        open_TE &= mask_T[:, None] > 0
        share_TE = open_TE / np.maximum(open_TE.sum(axis=1, keepdims=True), 1)
        alike_EE = unit(kernel_DE, 0).T @ unit(kernel_DE, 0)
        losses = {
            "diversity": 0.3 * np.sqrt(((alike_EE - np.eye(4)) ** 2).sum()),
            "simplicity": 0.2 * np.sqrt((kernel_DE**2).sum(axis=0)).mean(),
        }
        return share_TE, sigmoid(cosine_TE) - sigmoid(params["threshold"]), losses

    def value(params, x_TD, mask_T, _):
        share_TE, _, losses = parts_of(params, x_TD, mask_T)
        return share_TE, losses

    def slope(params, x_TD, mask_T, _):
        share_TE, margin_TE, losses = parts_of(params, x_TD, mask_T)
        return share_TE * margin_TE, losses

    oracle.compare(DYN, cfg, value, slope=slope)


def test_equal_experts_have_a_finite_loss():
    """One expert: its diversity is exactly 0, where a root has no slope."""
    cfg = oracle.config(DYN, 1, 1, 3)
    oracle.compare(
        DYN,
        cfg,
        lambda params, x_TD, mask_T, _: (
            mask_T[:, None],
            {
                "diversity": 0.01 * 1e-6,
                "simplicity": 0.01 * np.sqrt((params["kernel"] ** 2).sum()),
            },
        ),
        slope=lambda params, x_TD, mask_T, _: (
            mask_T[:, None]
            * (sigmoid(unit(x_TD, 1) @ unit(params["kernel"], 0)) - sigmoid(params["threshold"])),
            {"diversity": 0.0, "simplicity": 0.01 * np.sqrt((params["kernel"] ** 2).sum())},
        ),
    )


def test_bad_options():
    assert DYN.problems(oracle.config(DYN, 4, 2, 4, max_experts=1), "m.")
