"""DeepSeek-V3 with multi-token prediction against float64 NumPy written from the papers' equations.

Token by token and head by head, without a mask, a scan or a cache; it shares no code with moejax. The
published implementations do not contain the MTP loss, and this needs neither of them.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.config import AttentionConfig, ModelConfig, MoEConfig, ObjectiveConfig, RopeConfig
from moejax.models import transformer
from moejax.models.loss import loss_fn
from moejax.params import map_specs
from moejax.routers import router_options

MLA = AttentionConfig(
    kind="mla", num_heads=2, q_lora_rank=7, kv_lora_rank=6, qk_nope_head_dim=4, qk_rope_head_dim=4,
    v_head_dim=5, rope=RopeConfig(theta=100.0, interleaved=True),
)  # fmt: skip
CFG = ModelConfig(
    vocab_size=23, d_model=12, num_layers=2, num_dense_layers=1, d_ff=14, norm_eps=1e-5,
    attention=MLA, mtp_depth=2,
    moe=MoEConfig(
        num_experts=6, experts_per_token=2, d_expert=5, shared_experts=1,
        router=router_options(
            score="sigmoid", normalize_weights=True, routed_scaling=2.5, expert_bias=True,
            num_groups=3, topk_groups=2, group_score="top2_sum",
        ),
    ),
)  # fmt: skip
ROUTER = CFG.moe.router
OBJECTIVE = ObjectiveConfig(mtp_loss_weight=0.3, sequence_loss=0.1, bias_update="sign")
S = 9
# A row of two documents and padding, and a row of one document.
SEGMENTS_BS = np.array([[1, 1, 1, 1, 1, 2, 2, 2, 0], [1] * S])
TOKENS_BS = np.random.default_rng(0).integers(0, 23, (2, S + 1))


def documents():
    """(row, first position, tokens with one more than is read) of each document."""
    for row, start, stop in ((0, 0, 5), (0, 5, 8), (1, 0, S)):
        yield row, start, TOKENS_BS[row, start : stop + 1]


def batch() -> dict:
    positions = np.zeros_like(SEGMENTS_BS)
    for row, start, tokens in documents():
        positions[row, start : start + len(tokens) - 1] = np.arange(len(tokens) - 1)
    fields = {
        "tokens": TOKENS_BS[:, :-1] * (SEGMENTS_BS > 0),
        "targets": TOKENS_BS[:, 1:],
        "segment_ids": SEGMENTS_BS,
        "positions": positions,
        "loss_mask": SEGMENTS_BS > 0,
    }
    return {k: jnp.asarray(v, jnp.int32) for k, v in fields.items()}


# ---------------------------------------------------------------------------------------------------
# The oracle. x_TD is one document; p are parameters as float64 NumPy arrays.


def rms_norm(p, x, eps):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + eps) * p["scale"]


def turn(x_H, position):
    """RoPE (2104.09864 eq. 34): adjacent pairs as complex numbers."""
    pairs = x_H[0::2] + 1j * x_H[1::2]
    theta = MLA.rope.theta ** (-np.arange(len(pairs)) / len(pairs))
    return pairs * np.exp(1j * position * theta)


def latent_attention(p, x_TD):
    """2405.04434 eq. 37-47."""
    n, nope, rope = MLA.num_heads, MLA.qk_nope_head_dim, MLA.qk_rope_head_dim
    q_TNH = (rms_norm(p["q_norm"], x_TD @ p["w_q_a"], 1e-6) @ p["w_q_b"]).reshape(len(x_TD), n, -1)
    kv_a = x_TD @ p["w_kv_a"]
    latent = rms_norm(p["kv_norm"], kv_a[:, : MLA.kv_lora_rank], 1e-6)
    kv_TNH = (latent @ p["w_kv_b"]).reshape(len(x_TD), n, -1)
    rope_key = [turn(k, t) for t, k in enumerate(kv_a[:, MLA.kv_lora_rank :])]
    out = np.zeros((len(x_TD), n, MLA.v_head_dim))
    for t in range(len(x_TD)):
        for head in range(n):
            q = q_TNH[t, head]
            q_rope = turn(q[nope:], t)
            logits = np.array([
                q[:nope] @ kv_TNH[j, head, :nope] + (q_rope * rope_key[j].conj()).real.sum()
                for j in range(t + 1)
            ]) / np.sqrt(nope + rope)  # fmt: skip
            weight = np.exp(logits - logits.max())
            out[t, head] = weight / weight.sum() @ kv_TNH[: t + 1, head, nope:]
    return out.reshape(len(x_TD), -1) @ p["w_o"]


def swiglu(p, x, at=()):
    gate = x @ p["w_gate"][at]
    return (gate / (1 + np.exp(-gate)) * (x @ p["w_up"][at])) @ p["w_down"][at]


def moe(p, bias_E, x_TD):
    """2412.19437 eq. 12-16; also (scores, chosen) of each token."""
    m, y_TD, seen = CFG.moe, swiglu(p["shared"], x_TD), []
    size = m.num_experts // ROUTER.num_groups
    for t, x_D in enumerate(x_TD):
        s_E = 1 / (1 + np.exp(-(x_D @ p["router"]["kernel"])))
        c_E = s_E + bias_E
        worth = [
            np.sort(c_E[g * size : (g + 1) * size])[-2:].sum() for g in range(ROUTER.num_groups)
        ]
        kept = np.argsort(worth)[-ROUTER.topk_groups :]
        allowed = [i for i in range(m.num_experts) if i // size in kept]
        chosen = sorted(allowed, key=lambda i: c_E[i])[-m.experts_per_token :]
        for i in chosen:
            weight = ROUTER.routed_scaling * s_E[i] / s_E[chosen].sum()
            y_TD[t] += weight * swiglu(p["experts"], x_D, i)
        seen.append((s_E, chosen))
    return y_TD, seen


def block(p, x_TD, bias_E=None):
    x_TD = x_TD + latent_attention(p["attn"], rms_norm(p["attn_norm"], x_TD, CFG.norm_eps))
    h_TD = rms_norm(p["ffn_norm"], x_TD, CFG.norm_eps)
    y_TD, seen = moe(p["moe"], bias_E, h_TD) if "moe" in p else (swiglu(p["ffn"], h_TD), None)
    return x_TD + y_TD, seen


def nll(p, hidden_TD, targets):
    logits = hidden_TD @ p["head"]
    log_z = np.log(np.exp(logits).sum(axis=-1))
    return [z - row[t] for z, row, t in zip(log_z, logits, targets)]


def sequence_loss(routes) -> float:
    """2412.19437 eq. 17-20 for the tokens of one sequence."""
    m = CFG.moe
    f_E = np.zeros(m.num_experts)
    for _, chosen in routes:
        f_E[chosen] += m.num_experts / (m.experts_per_token * len(routes))
    return f_E @ np.mean([s / s.sum() for s, _ in routes], axis=0)


def oracle(params, state):
    """(mean cross-entropy, mean over depths of the MTP cross-entropy, balance loss of each MoE layer)."""
    pick = lambda tree, i: jax.tree.map(lambda a: a[i], tree)  # noqa: E731
    layers = 1 + CFG.mtp_depth
    main, depths = [], [[] for _ in range(CFG.mtp_depth)]
    routes = {(layer, row): [] for layer in range(layers) for row in range(2)}
    for row, _, tokens in documents():
        read = len(tokens) - 1
        x_TD, _ = block(pick(params["dense_blocks"], 0), params["embed"]["tokens"][tokens[:-1]])
        x_TD, seen = block(
            pick(params["moe_blocks"], 0), x_TD, state["moe_blocks"]["expert_bias"][0]
        )
        routes[0, row] += seen
        h_TD = rms_norm(params["final_norm"], x_TD, CFG.norm_eps)
        main += nll(params, h_TD, tokens[1:])
        for k in range(1, CFG.mtp_depth + 1):
            # Eq. 21-23: position i reads t_{i+k} and predicts t_{i+k+1}. A position without such a target
            # in its document does not count, and what stands behind is not read before it.
            p = pick(params["mtp"], k - 1)
            known = max(read - k + 1, 0)
            ahead = np.zeros((read, CFG.d_model))
            ahead[:known] = params["embed"]["tokens"][tokens[k : k + known]]
            both = np.concatenate(
                [rms_norm(p["embed_norm"], ahead, CFG.norm_eps),
                 rms_norm(p["hidden_norm"], h_TD, CFG.norm_eps)], axis=-1,
            )  # fmt: skip
            bias_E = state["mtp"]["expert_bias"][k - 1]
            h_TD, seen = block(p["block"], both @ p["proj"], bias_E)
            counted = max(read - k, 0)
            routes[k, row] += seen[:counted]  # who predicts nothing is not routed
            normed = rms_norm(p["norm"], h_TD[:counted], CFG.norm_eps)
            depths[k - 1] += nll(params, normed, tokens[k + 1 : k + 1 + counted])
    balance = [np.mean([sequence_loss(routes[i, row]) for row in range(2)]) for i in range(layers)]
    return np.mean(main), np.mean([np.mean(d) for d in depths]), balance


@pytest.fixture(scope="module")
def model():
    noise = np.random.default_rng(1)

    def values(spec):
        # Norms away from 1 and a bias away from 0, else their places would not matter.
        if spec.init == "ones":
            return noise.uniform(0.5, 1.5, spec.shape).astype(np.float32)
        return (0.3 * noise.normal(size=spec.shape)).astype(np.float32)

    state = jax.eval_shape(lambda: transformer.init_router_state(CFG))
    bias = lambda a: (0.3 * noise.normal(size=a.shape)).astype(np.float32)  # noqa: E731
    return map_specs(values, transformer.param_specs(CFG)), jax.tree.map(bias, state)


def test_losses_equal_the_equations(model):
    params, state = model
    step = jax.jit(lambda p, s, b: loss_fn(p, s, b, CFG, objective=OBJECTIVE))
    loss, parts = step(params, state, batch())
    exact = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, state))
    main, mtp, balance = oracle(*exact)
    # float32 against float64: losses near 3, three blocks deep.
    np.testing.assert_allclose(parts.cross_entropy, main, rtol=1e-5)
    np.testing.assert_allclose(parts.mtp, mtp, rtol=1e-5)
    assert abs(main - mtp) > 1e-2
    per_layer = [*(parts.aux[n].losses["sequence"] for n in ("moe_blocks", "mtp"))]
    np.testing.assert_allclose(np.concatenate(per_layer), 0.1 * np.array(balance), rtol=1e-5)
    np.testing.assert_allclose(loss, main + 0.3 * mtp + 0.1 * np.mean(balance), rtol=1e-5)


ALL = dict(expert_loss=0.1, device_loss=0.2, communication_loss=0.3, z_loss=0.01, balance_groups=2)


@pytest.mark.parametrize("losses", [{}, ALL], ids=["sequence", "all losses"])
def test_padding_and_its_ids_count_nowhere(model, losses):
    """At depth 2 a document's last two positions have no target: neither they nor padding, whatever its ids,
    are routed, balanced or counted. One row is padding alone."""
    params, state = model
    objective = dataclasses.replace(OBJECTIVE, **losses)

    def step(params, state, batch):
        of = lambda p: loss_fn(p, state, batch, CFG, objective=objective)  # noqa: E731
        (loss, parts), grads = jax.value_and_grad(of, has_aux=True)(params)
        stats = {name: aux.stats for name, aux in parts.aux.items()}
        moved = transformer.update_router_state(state, stats, CFG, objective)
        return loss, parts.balance, grads, moved, stats

    one = {k: jnp.concatenate([v, jnp.zeros_like(v[:1])]) for k, v in batch().items()}
    real, other = one["segment_ids"] > 0, dict(one)
    other["tokens"] = jnp.where(real, one["tokens"], 17)
    other["targets"] = jnp.where(real, one["targets"], 5)
    run = jax.jit(step)
    first, second = run(params, state, one), run(params, state, other)
    chex.assert_trees_all_equal(first, second)
    _, balance, _, moved, stats = first
    assert len(balance) == 1 + 4 * bool(losses) and all(v > 0 for v in balance.values())
    # Documents of 5, 3 and 9 targets: 4 + 2 + 8 of them have one more token ahead, 3 + 1 + 7 two more.
    np.testing.assert_array_equal(stats["mtp"]["load"].sum(axis=1), [2 * 14, 2 * 11])
    # One layer's bias moves by what the 17 tokens of the two rows chose.
    load = stats["moe_blocks"]["load"]
    assert load.sum() == 2 * 17
    step_E = np.sign(load.mean() - load) * objective.bias_rate
    chosen = state["moe_blocks"]["expert_bias"] + step_E
    np.testing.assert_allclose(moved["moe_blocks"]["expert_bias"], chosen, atol=1e-7)
