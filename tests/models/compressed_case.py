"""Layers with compressed attention at toy size, their parameters and a batch; and the equations of 2606.19348
section 2.3 in float64 NumPy, by document, token and head. No code of moejax is in these."""

import functools
import math

import numpy as np

from moejax.attention import compressed
from moejax.config import AttentionConfig, ModelConfig, RopeConfig
from moejax.params import map_specs

KINDS = ("sliding", "csa", "hca")
A = AttentionConfig(
    kind="compressed", num_heads=4, head_dim=10, q_lora_rank=9, qk_rope_head_dim=4,
    layer_kinds=KINDS, sliding_window=5, csa_rate=3, hca_rate=4, o_groups=2, o_lora_rank=6,
    index_heads=16, index_head_dim=6, index_topk=2, compress_theta=50.0,
    rope=RopeConfig(theta=20.0, interleaved=True, yarn_factor=4.0, yarn_original_len=16),
)  # fmt: skip
CFG = ModelConfig(
    vocab_size=31, d_model=12, num_layers=3, num_dense_layers=3, norm_eps=1e-3, attention=A
)
# Documents shorter than a rate, no multiple of one, longer than the window, with more entries than are picked;
# padding; a row of one document.
LENGTHS = ((2, 13, 7, 1), (23,))
S = 23 + 2


def batch():
    """x, positions, documents of rows of documents, 0 where there is none."""
    x = np.random.default_rng(0).normal(size=(2, S, 12))
    document, position = np.zeros((2, S), int), np.zeros((2, S), int)
    for row, lengths in enumerate(LENGTHS):
        start = 0
        for number, n in enumerate(lengths, 1):
            document[row, start : start + n] = number
            position[row, start : start + n] = np.arange(n)
            start += n
    return x, position, document


@functools.cache
def params(kind):
    noise = np.random.default_rng(1)
    # Every bias, sink and scale away from where it begins.
    values = lambda s: (s.init == "ones") + 0.5 * noise.normal(size=s.shape)  # noqa: E731
    specs = compressed.specs(CFG) | compressed.own_specs(CFG, kind)
    return map_specs(values, specs)


# --------------------------------------------------------------------------------------------------
# The oracle. x_SD is one document.


def rms_norm(x, scale):
    return x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + CFG.norm_eps) * scale


def angles(kind):
    """Radians per position; YaRN (2309.00071 section 3.2) in layers with entries."""
    r, half = A.qk_rope_head_dim, A.qk_rope_head_dim // 2
    theta = A.rope.theta if kind == "sliding" else A.compress_theta
    f = theta ** (-2 * np.arange(half) / r)
    if kind == "sliding":
        return f
    dim = lambda b: r * math.log(16 / (2 * math.pi * b)) / (2 * math.log(theta))  # noqa: E731
    low, high = max(math.floor(dim(32)), 0), min(math.ceil(dim(1)), r - 1)
    kept = 1 - np.clip((np.arange(half) - low) / (high - low), 0, 1)
    return f / 4 * (1 - kept) + f * kept


def turned(x_H, position, kind):
    """The last channels as complex numbers times exp(i position f)."""
    r = A.qk_rope_head_dim
    z = (x_H[-r::2] + 1j * x_H[1 - r :: 2]) * np.exp(1j * position * angles(kind))
    return np.concatenate([x_H[:-r], np.stack([z.real, z.imag], axis=-1).reshape(-1)])


def compressor(p, x_SD, m, kind):
    """The entries of a document, turned."""
    c, z, bias = x_SD @ p["w_kv"], x_SD @ p["w_gate"], p["position_bias"]
    h, out = p["norm"]["scale"].shape[0], []
    for w in range(len(x_SD) // m):
        slots = []  # (gate, value) of each
        for j in range(m):
            if kind == "hca":
                slots.append((z[w * m + j] + bias[j], c[w * m + j]))
                continue
            slots.append((z[w * m + j, h:] + bias[j, h:], c[w * m + j, h:]))
            if w:
                t = (w - 1) * m + j
                slots.append((z[t, :h] + bias[j, :h], c[t, :h]))
        gates, values = (np.array(a) for a in zip(*slots))
        weight = np.exp(gates) / np.exp(gates).sum(axis=0)
        out.append(turned(rms_norm((weight * values).sum(axis=0), p["norm"]["scale"]), w * m, kind))
    return np.array(out).reshape(-1, h)


def scored(p, x_D, c_C, t, keys, complete):
    """The indexer's scores for token t of the entries that are complete."""
    q = (c_C @ p["w_q"]).reshape(A.index_heads, -1)
    weight = x_D @ p["w_heads"] * A.index_heads**-0.5
    score = []
    for k in keys[:complete]:
        each = [max(0, turned(q[j], t, "csa") @ k) * A.index_head_dim**-0.5 for j in range(len(q))]
        score.append(weight @ np.array(each))
    return np.array(score)


def chosen(*of):
    """The entries that it picks."""
    return sorted(np.argsort(scored(*of))[::-1][: A.index_topk])


def oracle(p, x_SD, kind):
    m = A.csa_rate if kind == "csa" else A.hca_rate
    latent = rms_norm(x_SD @ p["w_q_a"], p["q_norm"]["scale"])
    q = (latent @ p["w_q_b"]).reshape(len(x_SD), A.num_heads, -1)
    kv = [
        turned(k, t, kind) for t, k in enumerate(rms_norm(x_SD @ p["w_kv"], p["kv_norm"]["scale"]))
    ]
    entries = [] if kind == "sliding" else compressor(p["compressor"], x_SD, m, kind)
    index_keys = compressor(p["indexer"]["compressor"], x_SD, m, kind) if kind == "csa" else []
    out = np.zeros((len(x_SD), A.num_heads, A.head_dim))
    for t in range(len(x_SD)):
        keys = kv[max(0, t - A.sliding_window + 1) : t + 1]
        seen = range(min((t + 1) // m, len(entries)))
        if kind == "csa":
            seen = chosen(p["indexer"], x_SD[t], latent[t], t, index_keys, len(seen))
        keys = np.array([*keys, *(entries[w] for w in seen)])
        for n in range(A.num_heads):
            query = turned(rms_norm(q[t, n], 1.0), t, kind)
            weight = np.exp(keys @ query * A.head_dim**-0.5)
            o = weight @ keys / (weight.sum() + np.exp(p["sinks"][n]))
            out[t, n] = turned(o, -t, kind)
    y, per = [], A.num_heads // A.o_groups
    for g in range(A.o_groups):
        columns = slice(g * A.o_lora_rank, (g + 1) * A.o_lora_rank)
        y.append(out[:, g * per : (g + 1) * per].reshape(len(x_SD), -1) @ p["w_o_a"][:, columns])
    return np.concatenate(y, axis=-1) @ p["w_o_b"]


def taught(p, x_SD, dense):
    """KL from the indexer's softmax to the mean of attention's over the same entries, token by token."""
    m, total, latent = A.csa_rate, 0.0, rms_norm(x_SD @ p["w_q_a"], p["q_norm"]["scale"])
    q = (latent @ p["w_q_b"]).reshape(len(x_SD), A.num_heads, -1)
    entries = compressor(p["compressor"], x_SD, m, "csa")
    keys = compressor(p["indexer"]["compressor"], x_SD, m, "csa")
    softmax = lambda a: np.exp(a) / np.exp(a).sum()  # noqa: E731
    for t in range(m - 1, len(x_SD)):
        of = p["indexer"], x_SD[t], latent[t], t, keys, (t + 1) // m
        seen = range(of[-1]) if dense else chosen(*of)
        heads = [turned(rms_norm(q[t, n], 1.0), t, "csa") for n in range(A.num_heads)]
        teacher = np.mean([softmax(entries[seen] @ h * A.head_dim**-0.5) for h in heads], axis=0)
        got = softmax(scored(*of)[seen])
        total += (teacher * np.log(teacher / got)).sum()
    return total
