"""Balance losses through the router against float64 NumPy loops written from the papers' equations.

The published implementations leave most of them out, so the equations are the oracle. Gradients are
checked against central differences of the same loops: counts are piecewise constant, so a difference
quotient sees them as the constants that the papers mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.routers import ROUTERS, router_options
from moejax.routers.balance import BalanceConfig
from moejax.routers.contract import RouterConfig, tokens_of

B, S, D, E, K, GROUPS, REACH = 3, 5, 6, 8, 3, 4, 2
KEPT = 5 + 3  # real tokens: the last sequence is all padding
MASK_BS = np.arange(S)[None] < np.array([5, 3, 0])[:, None]
RNG = np.random.default_rng(0)
X_BSD = RNG.normal(size=(B, S, D))
KERNEL_DE = RNG.normal(size=(D, E))
BIAS_E = 0.3 * RNG.normal(size=E)

GROUPED = dict(num_groups=GROUPS, topk_groups=REACH)
V3 = dict(
    score="sigmoid", group_score="top2_sum", expert_bias=True, normalize_weights=True, routed_scaling=2.5
)  # fmt: skip
# Coefficient, router and its options.
CONFIGS = {
    "expert": (0.7, "token_choice", {}),
    "device": (0.6, "token_choice", {}),
    "communication": (0.5, "token_choice", dict(GROUPED, group_score="max")),
    "sequence": (0.4, "token_choice", dict(GROUPED, **V3)),
    "z": (0.3, "token_choice", dict(score="sigmoid")),
    "z of expert choice": (0.2, "expert_choice", {}),
}


def config(router="token_choice", options=None, **balance) -> RouterConfig:
    return RouterConfig(
        options=router_options(router, **(options or {})),
        num_experts=E,
        experts_per_token=K,
        d_model=D,
        vocab_size=8,
        balance=BalanceConfig(balance_groups=GROUPS, **balance),
    )


def scores_of(x_D, kernel_DE, kind):
    logits_E = x_D @ kernel_DE
    if kind == "sigmoid":
        return 1 / (1 + np.exp(-logits_E))
    weight_E = np.exp(logits_E - logits_E.max())
    return weight_E / weight_E.sum()


def choose(s_E, options):
    """The K experts of a token; 2405.04434 section 2.2.2, 2412.19437 eq. 16 and section 2.1.2."""
    c_E = s_E + (BIAS_E if options.expert_bias else 0.0)
    size = E // options.num_groups
    groups = [list(range(g * size, (g + 1) * size)) for g in range(options.num_groups)]
    if options.num_groups > 1:
        best = 1 if options.group_score == "max" else 2
        worth = [sum(sorted(c_E[g], reverse=True)[:best]) for g in groups]
        groups = [groups[g] for g in np.argsort(worth)[::-1][: options.topk_groups]]
    return sorted((i for g in groups for i in g), key=lambda i: -c_E[i])[:K]


def oracle(kernel_DE, name, options) -> float:
    """The loss `name`, without its coefficient."""
    if name == "z":
        # 2202.08906 eq. 5: the mean over tokens of (log sum_i exp x_i)^2, of logits x.
        return float(
            np.mean([np.log(np.exp(x_D @ kernel_DE).sum()) ** 2 for x_D in X_BSD[MASK_BS]])
        )
    s = {(b, t): scores_of(X_BSD[b, t], kernel_DE, options.score) for b, t in np.argwhere(MASK_BS)}
    chosen = {at: choose(s[at], options) for at in s}
    tokens = len(s)
    assert tokens == KEPT
    if name == "sequence":
        # 2412.19437 eq. 17-20: f_i = E/(K T) sum_t 1(selected), P_i = mean_t s_i / sum_j s_j, in each
        # sequence; the mean over the sequences that have a token.
        values = []
        for b in range(B):
            rows = [at for at in s if at[0] == b]
            if rows:
                f_E = [E / (K * len(rows)) * sum(i in chosen[at] for at in rows) for i in range(E)]
                p_E = sum(s[at] / s[at].sum() for at in rows) / len(rows)
                values.append(np.dot(f_E, p_E))
        return float(np.mean(values))
    # 2401.06066 eq. 13-14.
    f_E = np.array([E / (K * tokens) * sum(i in c for c in chosen.values()) for i in range(E)])
    p_E = sum(s.values()) / tokens
    if name == "expert":
        return float(f_E @ p_E)  # eq. 12
    size = E // GROUPS
    p_G = [p_E[g * size : (g + 1) * size].sum() for g in range(GROUPS)]
    if name == "device":
        # 2401.06066 eq. 15-17: f' the mean over a device's experts, P' the sum.
        return sum(f_E[g * size : (g + 1) * size].mean() * p_G[g] for g in range(GROUPS))
    # 2405.04434 eq. 29-31: f''_i = D/(M T) sum_t 1(token t is sent to device i).
    total = 0.0
    for g in range(GROUPS):
        sent = sum(any(i // size == g for i in c) for c in chosen.values())
        total += GROUPS / (REACH * tokens) * sent * p_G[g]
    return total


@pytest.mark.parametrize("case", CONFIGS)
def test_loss_and_gradient_equal_the_equations(case):
    name = case.split()[0]
    coefficient, router, options = CONFIGS[case]
    cfg = config(router, options, **{f"{name}_loss": coefficient})
    assert ROUTERS[router].problems(cfg, "model.moe.") == []
    state = ROUTERS[router].init_state(cfg, 0)
    state = jax.tree.map(lambda zeros: zeros + BIAS_E.astype(np.float32), state)
    x_TD = jnp.asarray(X_BSD, jnp.float32).reshape(-1, D)
    tokens = tokens_of(x_TD, S, jnp.asarray(MASK_BS.ravel(), jnp.float32))

    def loss(kernel):
        out = ROUTERS[router].route({"kernel": kernel}, state, tokens, cfg)
        assert set(out.losses) == {name}
        return out.losses[name]

    got, grad = jax.jit(jax.value_and_grad(loss))(jnp.asarray(KERNEL_DE, jnp.float32))
    want = coefficient * oracle(KERNEL_DE, name, cfg.options)
    np.testing.assert_allclose(got, want, rtol=1e-5)  # float32 sums of a few dozen terms

    step = 1e-5  # float64: truncation and rounding are both near 1e-10
    numeric = np.zeros_like(KERNEL_DE)
    for at in np.ndindex(KERNEL_DE.shape):
        moved = [KERNEL_DE.copy(), KERNEL_DE.copy()]
        moved[0][at] += step
        moved[1][at] -= step
        numeric[at] = np.subtract(*(oracle(k, name, cfg.options) for k in moved)) / (2 * step)
    numeric *= coefficient
    assert np.abs(numeric).max() > 1e-3
    np.testing.assert_allclose(grad, numeric, atol=1e-6)  # float32 rounding of terms near 0.1


@pytest.mark.parametrize("rule", ["sign", "sign_centered"])
def test_bias_rule_moves_each_expert_as_published(rule):
    """2408.15664 algorithm 1, V3's rule; 2502.16982 appendix C subtracts the mean of the signs."""
    cfg = config(options=dict(expert_bias=True), bias_update=rule, bias_rate=0.001)
    load_E = RNG.integers(0, 50, E)
    signs = [np.sign(load_E.mean() - n) for n in load_E]
    want = BIAS_E + 0.001 * (np.array(signs) - (np.mean(signs) if rule == "sign_centered" else 0.0))
    state = {"expert_bias": jnp.asarray(BIAS_E, jnp.float32)}
    stats = {"load": jnp.asarray(load_E, jnp.float32)}
    got = ROUTERS["token_choice"].update(state, stats, cfg)
    np.testing.assert_allclose(got["expert_bias"], want, atol=1e-7)  # float32 near 0.5: 6e-8
