"""RMSNorm (1910.07467) and LayerNorm (1607.06450), computed in float32."""

import jax
import jax.numpy as jnp

from moejax.params import ParamSpec


def norm_specs(width: int, kind: str = "rmsnorm", axis: str | None = None) -> dict:
    specs = {"scale": ParamSpec((width,), (axis,), init="ones")}
    if kind == "layernorm":
        specs["bias"] = ParamSpec((width,), (axis,), init="zeros")
    return specs


def norm(params: dict, x: jax.Array, eps: float) -> jax.Array:
    """Over the last axis: LayerNorm if the parameters have a bias, else RMSNorm. Keeps x's dtype."""
    h = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    shape = (1,) * (x.ndim - 1) + (-1,)
    scale = params["scale"].reshape(shape).astype(h.dtype)
    if "bias" in params:
        h = h - h.mean(axis=-1, keepdims=True)
        h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + eps)
        return (h * scale + params["bias"].reshape(shape).astype(h.dtype)).astype(x.dtype)
    h = h * jax.lax.rsqrt(jnp.square(h).mean(axis=-1, keepdims=True) + eps)
    return (h * scale).astype(x.dtype)
