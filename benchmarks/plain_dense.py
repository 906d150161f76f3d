"""A plain dense transformer, as one writes it in JAX: what the training step is compared with.

Pre-norm decoder with RMSNorm, rotary positions, biases on queries, keys and values, SwiGLU, an untied head;
layers in a Python loop, einsums on [B, S, ..] arrays, `optax.adamw`, jitted. Nothing of moejax is used and
nothing is tuned.
"""

import jax
import jax.numpy as jnp
import optax


def init(key, vocab, d, layers, heads, width):
    def matrix(i, *shape):
        return 0.02 * jax.random.normal(jax.random.fold_in(key, i), shape)

    def layer(i):
        h = d // heads
        return {
            "norm1": jnp.ones((d,)),
            "norm2": jnp.ones((d,)),
            "qkv": matrix(10 * i, 3, d, heads, h),
            "qkv_bias": jnp.zeros((3, heads, h)),
            "out": matrix(10 * i + 1, heads, h, d),
            "gate": matrix(10 * i + 2, d, width),
            "up": matrix(10 * i + 3, d, width),
            "down": matrix(10 * i + 4, width, d),
        }

    return {
        "embed": matrix(1001, vocab, d),
        "layers": [layer(i) for i in range(layers)],
        "norm": jnp.ones((d,)),
        "head": matrix(1002, d, vocab),
    }


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def rope(x, positions):
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10_000.0 ** (-jnp.arange(half) / half)
    cos, sin = jnp.cos(angle)[None, :, None], jnp.sin(angle)[None, :, None]
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def block(p, x):
    s = x.shape[1]
    h = rms_norm(x, p["norm1"])
    q, k, v = jnp.einsum("bsd,cdnh->cbsnh", h, p["qkv"]) + p["qkv_bias"][:, None, None]
    q, k = (rope(a, jnp.arange(s)) for a in (q, k))
    logits = jnp.einsum("bsnh,btnh->bnst", q, k) / q.shape[-1] ** 0.5
    logits = jnp.where(jnp.tril(jnp.ones((s, s), bool)), logits, -1e30)
    y = jnp.einsum("bnst,btnh->bsnh", jax.nn.softmax(logits, axis=-1), v)
    x = x + jnp.einsum("bsnh,nhd->bsd", y, p["out"])
    h = rms_norm(x, p["norm2"])
    return x + (jax.nn.silu(h @ p["gate"]) * (h @ p["up"])) @ p["down"]


def loss(params, tokens, targets):
    x = params["embed"][tokens]
    for p in params["layers"]:
        x = block(p, x)
    log_p = jax.nn.log_softmax(rms_norm(x, params["norm"]) @ params["head"], axis=-1)
    return -jnp.take_along_axis(log_p, targets[..., None], axis=-1).mean()


OPTIMIZER = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1))


def step(params, state, tokens, targets):
    """Forward, backward, clipping, AdamW: (params, state, loss)."""
    value, grads = jax.value_and_grad(loss)(params, tokens, targets)
    updates, state = OPTIMIZER.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value
