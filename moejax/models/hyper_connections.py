"""The residual in several streams: manifold-constrained hyper-connections (mHC, 2512.24880), as in
DeepSeek-V4 (2606.19348 section 2.2).

A token's state is I streams X, at first its embedding I times. Each sub-layer F reads one mix of them, writes
to all of them, and mixes them among themselves. With u = vec(X) / rms(vec(X)) and z = u W, in three parts:

    pre  = sigmoid(s_0 z_pre + b_pre) + eps          h    = sum_i pre_i X_i
    post = 2 sigmoid(s_1 z_post + b_post)            X'_k = post_k F(norm(h)) + sum_j M_jk X_j
    M    = sinkhorn(softmax_rows(s_2 z_M + b_M) + eps)

The head of the model, and of each depth of multi-token prediction, reads sum_i pre_i X_i with weights of its
own. Weights and mixes are float32. Streams are not split over devices, nor are these weights: they are few.
With one stream nothing here has parameters, and the residual is x + F(norm(x)).

Here: I, J, K streams, Z outputs.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.params import ParamSpec


def _specs(cfg: ModelConfig, outputs: int, scales: int) -> dict:
    rows = cfg.streams.count * cfg.d_model
    return {
        "kernel": ParamSpec((rows, outputs), (None, None), std=cfg.init_std),
        "base": ParamSpec((outputs,), (None,), init="zeros"),
        "scale": ParamSpec((scales,), (None,), init="ones"),
    }


def sub_layer_specs(cfg: ModelConfig) -> dict:
    """W, b and s of one sub-layer; z is pre, post, then M row by row."""
    n = cfg.streams.count
    return _specs(cfg, (2 + n) * n, 3)


def head_specs(cfg: ModelConfig) -> dict:
    """W, b and s of a head."""
    return _specs(cfg, cfg.streams.count, 1)


def spread(x_BSD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """The state that the first block reads: every stream is the embedding. With one stream, the embedding."""
    n = cfg.streams.count
    return (
        x_BSD if n == 1 else jnp.broadcast_to(x_BSD[:, :, None], (*x_BSD.shape[:2], n, cfg.d_model))
    )


def sinkhorn(m_JK: jax.Array, steps: int, eps: float) -> jax.Array:
    """`m` [.., J, K] with its columns, then `steps - 1` times its rows and its columns divided by their sums:
    columns sum to 1 in the end, rows nearly."""

    def over(m, axis):
        return m / (m.sum(axis=axis, keepdims=True) + eps)

    return jax.lax.fori_loop(1, steps, lambda _, m: over(over(m, -1), -2), over(m_JK, -2))


def read(params: dict | None, x: jax.Array, cfg: ModelConfig) -> tuple[jax.Array, Callable]:
    """What a sub-layer reads of the state, before its norm, and how it writes.

    Args:
      params: values of `sub_layer_specs`, None with one stream.
      x: the state, [B,S,I,D]; with one stream [B,S,D].
      cfg: the model.

    Returns:
      h_BSD, and a function from the sub-layer's y_BSD to the new state.
    """
    if params is None:
        by = cfg.residual_multiplier
        return x, lambda y_BSD: x + (y_BSD if by == 1 else y_BSD * by)
    n, eps = cfg.streams.count, cfg.streams.eps
    z_BSZ, scale, base = _scores(params, x, cfg)
    pre, post, mix = (
        part * s + b[None, None]
        for part, s, b in zip(
            jnp.split(z_BSZ, [n, 2 * n], axis=-1), scale, jnp.split(base, [n, 2 * n]), strict=True
        )
    )
    mix_BSJK = jax.nn.softmax(mix.reshape(*mix.shape[:-1], n, n), axis=-1) + eps
    mix_BSJK = sinkhorn(mix_BSJK, cfg.streams.sinkhorn_steps, eps)
    post_BSK = 2 * jax.nn.sigmoid(post)

    def write(y_BSD):
        kept = jnp.einsum("BSJK,BSJD->BSKD", mix_BSJK, x.astype(mix_BSJK.dtype))
        by = cfg.residual_multiplier
        new = post_BSK[..., None] * (y_BSD if by == 1 else y_BSD * by)[:, :, None]
        return (kept + new).astype(x.dtype)

    return _mixed(jax.nn.sigmoid(pre) + eps, x), write


def head(params: dict | None, x: jax.Array, cfg: ModelConfig) -> jax.Array:
    """One hidden state BSD of the state, for the last norm and the head. `params`: None with one stream."""
    if params is None:
        return x
    z_BSI, scale, base = _scores(params, x, cfg)
    return _mixed(jax.nn.sigmoid(z_BSI * scale[0] + base[None, None]) + cfg.streams.eps, x)


def _scores(params: dict, x_BSID: jax.Array, cfg: ModelConfig):
    """u W, and scale and base, in float32 or wider."""
    wide = jnp.promote_types(x_BSID.dtype, jnp.float32)
    x = x_BSID.astype(wide).reshape(*x_BSID.shape[:2], -1)
    u = x * jax.lax.rsqrt(jnp.square(x).mean(axis=-1, keepdims=True) + cfg.norm_eps)
    return jnp.dot(u, params["kernel"].astype(wide)), *(
        params[k].astype(wide) for k in ("scale", "base")
    )


def _mixed(weights_BSI, x_BSID) -> jax.Array:
    return jnp.einsum("BSI,BSID->BSD", weights_BSI, x_BSID.astype(weights_BSI.dtype)).astype(
        x_BSID.dtype
    )
