"""Soft MoE, SMEAR and Lory: by hand, and against NumPy with every gradient."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from router_contract import sizes
from weights_oracle import check, softmax

from moejax.options import ConfigError
from moejax.routers import ROUTERS
from moejax.routers.contract import tokens_of

RNG = np.random.default_rng(0)
X_TD = RNG.normal(size=(12, 8))  # two sequences of 6
MASK_T = np.array([1] * 6 + [1] * 3 + [0] * 3)
KERNEL = {"kernel": 0.5 * RNG.normal(size=(8, 4))}


def config(name, **options):
    return dataclasses.replace(sizes(ROUTERS[name], **options), d_model=8)


def test_soft_moe_by_hand():
    """One sequence of two tokens, two experts of one slot, logits [[0, ln 3], [ln 3, 0]]: a slot takes 1/4 of
    one token and 3/4 of the other, a token 1/4 and 3/4 of the slots. With padding in place of the second
    token, slots hold the first alone."""
    phi = {"phi": jnp.array([[0.0, np.log(3)], [np.log(3), 0.0]])}
    cfg = dataclasses.replace(config("soft_moe", normalize=False), num_experts=2, d_model=2)
    want = np.array([[[0.25, 0.75], [0.75, 0.25]]])[..., None]
    out = ROUTERS["soft_moe"].route(phi, {}, tokens_of(jnp.eye(2), 2), cfg)
    np.testing.assert_allclose(out.routing.dispatch_BSEC, want, rtol=1e-6)
    np.testing.assert_allclose(out.routing.combine_BSEC, want, rtol=1e-6)
    np.testing.assert_allclose(out.stats["load"], [1, 1], rtol=1e-6)
    out = ROUTERS["soft_moe"].route(phi, {}, tokens_of(jnp.eye(2), 2, jnp.array([1, 0])), cfg)
    np.testing.assert_allclose(out.routing.dispatch_BSEC[0, :, :, 0], [[1, 1], [0, 0]])


@pytest.mark.parametrize("normalize", [False, True])
def test_soft_moe_against_numpy(normalize):
    """2308.00951 eq. 1-3, for each sequence its own softmax over tokens; norms as in section 2.3."""
    params = {"phi": RNG.normal(size=(8, 8)), "scale": np.array(1.7)}
    if not normalize:
        del params["scale"]

    def oracle(p, x_TD, _):
        phi = p["phi"]
        if normalize:
            x_TD = x_TD / np.sqrt((x_TD**2).sum(axis=1, keepdims=True) + 1e-6)
            phi = p["scale"] * phi / np.sqrt((phi**2).sum(axis=0, keepdims=True) + 1e-6)
        dispatch, combine = np.zeros((2, 2, 6, 8))
        for b, length in enumerate((6, 3)):
            logits = x_TD[6 * b : 6 * b + length] @ phi
            dispatch[b, :length], combine[b, :length] = softmax(logits, 0), softmax(logits, 1)
        return [dispatch.reshape(2, 6, 4, 2), combine.reshape(2, 6, 4, 2)]

    cfg = config("soft_moe", slots_per_expert=2, normalize=normalize)
    check(ROUTERS["soft_moe"], cfg, oracle, params, X_TD, 6, MASK_T)


def test_the_cost_of_slots_is_that_of_a_sequence():
    """Two slots of 4 experts for 16 tokens: half an expert for a token."""
    cfg = dataclasses.replace(config("soft_moe", slots_per_expert=2), max_seq_len=16)
    assert ROUTERS["soft_moe"].experts_used(cfg) == 0.5


def test_merging_by_hand():
    """Two segments of two tokens, one feature, R = [1, 0]: means 0 and ln 3. SMEAR: one gate of the mean
    ln(3)/2, e^(ln(3)/2) = sqrt(3) to 1. Lory: both segments use the first one's mean, 0: one half each."""
    x_TD = jnp.array([[-1.0], [1.0], [np.log(3) + 1], [np.log(3) - 1]])
    kernel = {"kernel": jnp.array([[1.0, 0.0]])}
    cfg = dataclasses.replace(config("lory", segment=2), num_experts=2, d_model=1)
    out = ROUTERS["lory"].route(kernel, {}, tokens_of(x_TD, 4), cfg)
    np.testing.assert_allclose(out.routing.weights_GE, [[0.5, 0.5], [0.5, 0.5]], rtol=1e-6)
    np.testing.assert_allclose(out.stats["load"], [2, 2], rtol=1e-6)
    gate = np.sqrt(3) / (1 + np.sqrt(3))
    out = ROUTERS["smear"].route(kernel, {}, tokens_of(x_TD, 4), cfg)
    np.testing.assert_allclose(out.routing.weights_GE, [[gate, 1 - gate]], rtol=1e-6)
    # The last segment is padding: the mean is the first one's, and it has no gate.
    out = ROUTERS["lory"].route(kernel, {}, tokens_of(x_TD, 4, jnp.array([1, 1, 0, 0])), cfg)
    np.testing.assert_allclose(out.routing.weights_GE, [[0.5, 0.5], [0, 0]])


def test_smear_against_numpy():
    """2306.03745 section 3: the gate of the mean over a sequence's tokens."""

    def oracle(p, x_TD, _):
        means = np.stack([x_TD[:6].mean(axis=0), x_TD[6:9].mean(axis=0)])
        return [softmax(means @ p["kernel"])]

    check(ROUTERS["smear"], config("smear"), oracle, KERNEL, X_TD, 6, MASK_T)


def test_lory_against_numpy():
    """2405.03133 section 3: the gate of the segment before; the first segment's own mean has no gradient.
    Segments of 2: the second sequence ends within its second."""

    def oracle(p, x_TD, x0_TD):
        means = [x0_TD[0:2], x_TD[0:2], x_TD[2:4], x0_TD[6:8], x_TD[6:8]]
        weights = softmax(np.stack([m.mean(axis=0) for m in means]) @ p["kernel"])
        return [np.concatenate([weights, np.zeros((1, 4))])]

    check(ROUTERS["lory"], config("lory", segment=2), oracle, KERNEL, X_TD, 6, MASK_T)


def test_lory_after_a_segment_of_padding():
    """It has no mean: the next uses its own."""
    mask_T = jnp.ones(12).at[0:2].set(0)
    cfg = config("lory", segment=2)
    params = {"kernel": jnp.float32(KERNEL["kernel"])}
    out = ROUTERS["lory"].route(params, {}, tokens_of(jnp.float32(X_TD), 6, mask_T), cfg)
    want = softmax(X_TD[2:4].mean(axis=0) @ KERNEL["kernel"])
    np.testing.assert_allclose(out.routing.weights_GE[:2], [np.zeros(4), want], rtol=1e-5)


def test_segments_must_divide_sequences():
    with pytest.raises(
        ConfigError, match="segment=4 must divide sequences of 6 tokens; 1, 2, 3 or 6"
    ):
        ROUTERS["lory"].route(
            KERNEL, {}, tokens_of(jnp.zeros((12, 8)), 6), config("lory", segment=4)
        )
    assert ROUTERS["lory"].experts_used(config("lory", segment=32)) == 1 + 4 / 32
