"""A small call of a router, for the checks of `router_contract` and for tests of one router."""

import dataclasses
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from moejax.moe.dispatch.dense import combine_matrix
from moejax.params import init_params
from moejax.routers.balance import BalanceConfig
from moejax.routers.contract import (
    BatchTotals,
    Routed,
    Router,
    RouterConfig,
    tokens_of,
)

B, S = 4, 4
T = B * S
# Row 1 ends in padding, row 3 is nothing else.
MASK_T = jnp.array([1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 0, 0, 0, 0], jnp.float32)
KEY = jax.random.key(2)
# Fields of BalanceConfig that say how, not whether.
SETTINGS = ("bias_rate", "balance_groups")


def sizes(router: Router, balance: BalanceConfig | None = None, **options) -> RouterConfig:
    """A small model's: 4 experts, 2 of them for each token, or 1 where the paper has no more."""
    return RouterConfig(
        options=dataclasses.replace(router.options, **options),
        num_experts=4,
        experts_per_token=min(2, dict(router.recipe).get("model.moe.experts_per_token", 2)),
        d_model=16,
        vocab_size=32,
        num_layers=2,
        shared_experts=2,
        init_std=0.5,
        balance=balance or BalanceConfig(),
        max_seq_len=S,
    )


def with_balance(cfg: RouterConfig, *fields: str) -> RouterConfig:
    """The config with these fields of BalanceConfig on, over two groups."""
    on = {}
    for field in dataclasses.fields(BalanceConfig):
        if field.name in fields:
            choices = field.metadata.get("choices")
            on[field.name] = choices[1] if choices else 0.1
    return dataclasses.replace(cfg, balance=BalanceConfig(balance_groups=2, **on))


class Given(NamedTuple):
    """One call's arguments; `_replace` what a check varies."""

    params: Any
    state: Any
    x_TD: jax.Array
    ids_T: jax.Array
    mask_T: jax.Array = MASK_T
    totals: BatchTotals | None = None
    key: jax.Array | None = None
    forced_TK: jax.Array | None = None
    barred_TE: jax.Array | None = None
    carried_TW: jax.Array | None = None

    def rows(self, rows) -> "Given":
        """Some of its tokens."""
        names = ("x_TD", "ids_T", "mask_T", "forced_TK", "carried_TW")
        return self._replace(**{n: a[rows] for n in names if (a := getattr(self, n)) is not None})


def given(router: Router, cfg: RouterConfig) -> Given:
    params = init_params(router.param_specs(cfg), jax.random.key(0))
    x_TD = (
        jax.random.normal(jax.random.key(1), (T, cfg.d_model)).at[9].set(0.0)
    )  # 0 has no direction
    width = router.carries(cfg)
    carried_TW = jax.random.normal(jax.random.key(3), (T, width)) if width else None
    state, ids_T = router.init_state(cfg, 0), 3 * jnp.arange(T) % cfg.vocab_size
    return Given(params, state, x_TD, ids_T, carried_TW=carried_TW)


def route(router: Router, cfg: RouterConfig, g: Given, seq_len: int = S) -> Routed:
    rest = dict(ids_T=g.ids_T, key=g.key, forced_TK=g.forced_TK, totals=g.totals)
    rest |= dict(carried_TW=g.carried_TW, barred_TE=g.barred_TE)
    return router.route(g.params, g.state, tokens_of(g.x_TD, seq_len, g.mask_T, **rest), cfg)


def count_experts(router: Router, cfg: RouterConfig) -> int:
    """Experts and special experts."""
    return cfg.num_experts + len(router.specials(cfg))


def by_token(router: Router, cfg: RouterConfig, out: Routed, x_TD: jax.Array) -> jax.Array:
    """What becomes of each token: its weight on every expert, or its result where experts see mixtures; and
    what is passed on of it."""
    if out.carry_TW is not None:
        weights = by_token(router, cfg, out._replace(carry_TW=None), x_TD)
        return jnp.concatenate([weights, out.carry_TW], axis=1)
    if router.form == "soft":
        dispatch_BSEC, combine_BSEC = out.routing
        b, s, e, _ = dispatch_BSEC.shape
        slots_BECD = jnp.einsum("BSEC,BSD->BECD", dispatch_BSEC, x_TD.reshape(b, s, -1))
        scale_E = 1.0 + jnp.arange(e)  # experts that differ
        y_BSD = jnp.einsum("BSEC,BECD,E->BSD", combine_BSEC, slots_BECD, scale_E)
        return y_BSD.reshape(x_TD.shape)
    if router.form == "merge":
        weights_GE = out.routing.weights_GE
        return jnp.repeat(weights_GE, x_TD.shape[0] // weights_GE.shape[0], axis=0)
    return combine_matrix(out.routing, x_TD.shape[0], count_experts(router, cfg))


def same(got, want, rtol=1e-5):
    """Equal up to the order of float32 sums, of up to 16 terms of order 1."""
    chex.assert_trees_all_close(got, want, rtol=rtol, atol=1e-6)
