"""Random weights of a model, each matrix in the form that is asked for."""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.config import ModelConfig
from moejax.models import transformer
from moejax.params import map_specs
from moejax.weights import FORMATS, quantized_like


def random_params(cfg: ModelConfig, form: str) -> dict:
    """Weights of the model, its matrices in a form, made in it. One random matrix stands in every place of a
    stack: only where it is read from matters."""

    def make(shape, dtype):
        dtype = jnp.dtype(dtype)
        if jnp.issubdtype(dtype, jnp.floating):
            one = lambda key: 0.02 * jax.random.normal(key, shape[-2:], dtype)  # noqa: E731
        else:
            kind = jnp.uint8
            one = lambda key: jax.random.bits(key, shape[-2:], kind).astype(dtype)  # noqa: E731
        return jax.jit(lambda key: jnp.broadcast_to(one(key), shape))(jax.random.key(0))

    def leaf(spec):
        if spec.role in ("router", "vector") or spec.init != "normal":
            return jnp.ones(spec.shape) if spec.init == "ones" else make(spec.shape, jnp.float32)
        if spec.role != "matrix":
            return make(spec.shape, jnp.bfloat16 if form != "float32" else jnp.float32)
        if form not in FORMATS:
            return make(spec.shape, form)
        how = FORMATS[form].of(spec.shape[-2])
        assert how is not None
        w = quantized_like(spec.shape, how, make)
        return dataclasses.replace(w, scale=w.scale * 0.01)

    return map_specs(leaf, transformer.param_specs(cfg))
