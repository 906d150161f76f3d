"""A router against an oracle in float64 NumPy: its weights and losses, and their gradients against central
differences of the oracle. Counts and choices are piecewise constant: a difference sees them as constants."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from router_case import by_token

from moejax.params import init_params
from moejax.routers.balance import BalanceConfig
from moejax.routers.contract import Routed, Router, RouterConfig, tokens_of

STEP = 1e-6  # of a difference: errors of 1e-16/1e-6 from rounding and 1e-12 from curvature


def config(router: Router, experts: int, k: int, d_model: int, balance=None, **options):
    return RouterConfig(
        options=dataclasses.replace(router.options, **options),
        num_experts=experts,
        experts_per_token=k,
        d_model=d_model,
        vocab_size=16,
        num_layers=2,
        init_std=0.7,
        balance=BalanceConfig(**(balance or {})),
    )


def on_logits(router: Router, cfg: RouterConfig, logits, state=None, **fields) -> Routed:
    """The router where the hidden states are the logits: its kernel is the identity."""
    x_TD = jnp.asarray(logits, jnp.float32)
    params = init_params(router.param_specs(cfg), jax.random.key(0))
    if "kernel" in params:
        params = {**params, "kernel": jnp.eye(*params["kernel"].shape)}
    state = router.init_state(cfg, 0) if state is None else state
    return router.route(params, state, tokens_of(x_TD, len(x_TD), **fields), cfg)


def chosen(out: Routed) -> list[set[int]]:
    """The experts of each token."""
    return [set(row[row >= 0].tolist()) for row in np.asarray(out.routing.expert_index_TK)]


def softmax(a):
    e = np.exp(a - a.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def best(score_E, k: int) -> list[int]:
    return np.argsort(-score_E, kind="stable")[:k].tolist()


def compare(router: Router, cfg: RouterConfig, oracle, state=None, slope=None, ids=None) -> None:
    """Runs both on 7 tokens, one of them padding.

    Args:
      oracle: `(params, x_TD, mask_T, carried_TW or None) -> (by_token, losses)` in NumPy; `by_token` as of
        `router_case.by_token`.
      slope: an oracle whose differences are the gradient, where they are not the function's own.
    """
    rng = np.random.default_rng(3)
    mask_T, width = np.array([1, 1, 1, 0, 1, 1, 1.0]), router.carries(cfg)
    params = {k: rng.normal(size=s.shape) for k, s in sorted(router.param_specs(cfg).items())}
    args = {**params, "x": rng.normal(size=(7, cfg.d_model))}
    if width:
        args["carried"] = rng.normal(size=(7, width))
    state = router.init_state(cfg, 0) if state is None else state

    def split(args):
        return {k: args[k] for k in params}, args["x"], mask_T, args.get("carried")

    want_TN, want_losses = oracle(*split(args))
    cotangent_TN = rng.normal(size=want_TN.shape)
    factor = dict(zip(sorted(want_losses), rng.normal(size=len(want_losses)) + 2))

    def scalar(args):
        weights_TN, losses = (slope or oracle)(*split(args))
        return (cotangent_TN * weights_TN).sum() + sum(factor[k] * v for k, v in losses.items())

    with jax.enable_x64(True):

        def ours(args):
            given, x_TD, mask, carried = split(args)
            fields = {} if ids is None else {"ids_T": jnp.asarray(ids)}
            tokens = tokens_of(x_TD, 7, jnp.asarray(mask), carried_TW=carried, **fields)
            out = router.route(given, state, tokens, cfg)
            weights_TN = by_token(router, cfg, out, x_TD)
            total = (cotangent_TN * weights_TN).sum() + sum(
                factor[k] * v for k, v in out.losses.items()
            )
            return total, (weights_TN, out.losses)

        gradient, (got_TN, got_losses) = jax.jit(jax.grad(ours, has_aux=True))(
            jax.tree.map(jnp.asarray, args)
        )
    real = mask_T > 0
    # The state and what the router draws from it may be float32.
    np.testing.assert_allclose(got_TN[real], want_TN[real], rtol=1e-6, atol=1e-7)
    assert set(got_losses) == set(want_losses)
    for name, want in want_losses.items():
        np.testing.assert_allclose(got_losses[name], want, rtol=1e-6, err_msg=name)
    for name, value in args.items():
        for at in np.ndindex(value.shape):
            ends = []
            for sign in (1, -1):
                moved = value.copy()
                moved[at] += sign * STEP
                ends.append(scalar({**args, name: moved}))
            want = (ends[0] - ends[1]) / (2 * STEP)
            np.testing.assert_allclose(
                gradient[name][at], want, rtol=1e-5, atol=1e-7, err_msg=f"{name}{at}"
            )
