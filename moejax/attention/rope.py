"""Rotary positions (RoFormer, 2104.09864 eq. 34) and their YaRN extension (2309.00071)."""

import math

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import AttentionConfig, RopeConfig


def yarn_mscale(factor: float, mscale: float) -> float:
    """m(a) = 0.1 a ln(factor) + 1 (2309.00071 section 3.4); 1 without extension."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def inverse_frequencies(cfg: RopeConfig, width: int) -> np.ndarray:
    """Angular frequency of each of the width/2 rotated pairs, in radians per position.

    YaRN (2309.00071 section 3.2): dimensions that turn more than beta_fast times within the original
    context are kept, those that turn less than beta_slow times are slowed by the factor, with a
    linear ramp between, by dimension or by turns.
    """
    base = cfg.theta ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    if cfg.yarn_factor <= 1:
        return base

    def dimension(rotations: float) -> float:
        return (
            width
            * math.log(cfg.yarn_original_len / (rotations * 2 * math.pi))
            / (2 * math.log(cfg.theta))
        )

    if cfg.yarn_ramp == "turns":
        turns = base * cfg.yarn_original_len / (2 * math.pi)
        kept = np.clip(
            (turns - cfg.yarn_beta_slow) / (cfg.yarn_beta_fast - cfg.yarn_beta_slow), 0, 1
        )
        return base / cfg.yarn_factor * (1 - kept) + base * kept
    low, high = dimension(cfg.yarn_beta_fast), dimension(cfg.yarn_beta_slow)
    if cfg.yarn_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    if low == high:
        high += 0.001  # a step instead of 0/0 (Kimi K2 sets beta_fast = beta_slow)
    slowed = np.clip((np.arange(width // 2) - low) / (high - low), 0, 1)
    return base / cfg.yarn_factor * slowed + base * (1 - slowed)


def rotation(positions_BS: jax.Array, cfg: RopeConfig, width: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin of shape [B, S, width/2], float32, YaRN's magnitude factor included."""
    inverse = jnp.asarray(inverse_frequencies(cfg, width), jnp.float32)
    angle_BSh = positions_BS.astype(jnp.float32)[..., None] * inverse[None, None]
    factor = yarn_mscale(cfg.yarn_factor, cfg.yarn_mscale) / yarn_mscale(
        cfg.yarn_factor, cfg.yarn_mscale_all_dim
    )
    return jnp.cos(angle_BSh) * factor, jnp.sin(angle_BSh) * factor


def rotate(x_BSNH: jax.Array, cos_sin, interleaved: bool) -> jax.Array:
    """Rotate pairs of the last axis: (x0,x1),(x2,x3).. if interleaved, else (x_i, x_{i+H/2}). Channels past
    the width of the rotation stay as they are.

    Interleaved input comes out with its pairs split in halves. The order of the output does not matter
    to attention as long as queries and keys agree, and splitting is cheaper than weaving.
    """
    cos, sin = (a[:, :, None, :].astype(x_BSNH.dtype) for a in cos_sin)
    x, rest = x_BSNH, []
    if x.shape[-1] > 2 * cos.shape[-1]:
        x, *rest = jnp.split(x, [2 * cos.shape[-1]], axis=-1)
    if interleaved:
        a, b = x[..., 0::2], x[..., 1::2]
    else:
        a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, *rest], axis=-1)


def softmax_scale(cfg: AttentionConfig, width: int) -> float:
    """1/sqrt(width of a query head), times m(mscale_all_dim)^2 under YaRN; or what the config says."""
    if cfg.scale:
        return cfg.scale
    m = yarn_mscale(cfg.rope.yarn_factor, cfg.rope.yarn_mscale_all_dim)
    return width**-0.5 * m * m
