"""Into the model and out of it: token (and learned position) embedding, and the head."""

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.config import ModelConfig
from moejax.norm import norm
from moejax.params import ParamSpec
from moejax.weights import Weight, dot, is_quantized


def param_specs(cfg: ModelConfig) -> dict:
    """`embed`, and `head` unless it is tied to the embedding."""
    v, d, std = cfg.vocab_size, cfg.d_model, cfg.init_std
    specs: dict = {"embed": {"tokens": ParamSpec((v, d), (axes.VOCAB, axes.EMBED), std=std)}}
    if cfg.positions == "learned":
        specs["embed"]["positions"] = ParamSpec(
            (cfg.max_seq_len, d), (None, axes.EMBED), std=std, role="embedding"
        )
    if not cfg.tie_embeddings:
        specs["head"] = ParamSpec((d, v), (axes.EMBED, axes.VOCAB), std=std)
    return specs


def embed(params: dict, tokens_BS, positions_BS, cfg: ModelConfig, dtype) -> jax.Array:
    """x_BSD in `dtype`."""
    x_BSD = params["embed"]["tokens"][tokens_BS].astype(dtype)
    if cfg.embedding_multiplier != 1:
        x_BSD = x_BSD * cfg.embedding_multiplier
    if cfg.positions == "learned":
        x_BSD = x_BSD + params["embed"]["positions"][positions_BS].astype(dtype)
    return x_BSD


def last_norm(params: dict, x_BSD: jax.Array, cfg: ModelConfig) -> jax.Array:
    """What the head reads: normed, and divided as logits are to be. `params`: of the norm."""
    x_BSD = norm(params, x_BSD, cfg.norm_eps)
    return x_BSD if cfg.logits_divisor == 1 else x_BSD / cfg.logits_divisor


def head_weights(params: dict) -> Weight:
    """The head as [D, V], tied or not."""
    return params["head"] if "head" in params else params["embed"]["tokens"].T


def logits(params: dict, hidden_BSD: jax.Array) -> jax.Array:
    """float32 logits over the vocabulary; for a few positions, not for training (see `loss`)."""
    w, dtype = head_weights(params), jnp.promote_types(hidden_BSD.dtype, jnp.float32)
    if is_quantized(w):  # bits of bfloat16: see `evals.generate.prepare`
        y_TV = dot(hidden_BSD.astype(dtype).reshape(-1, w.shape[0]), w)
        return y_TV.reshape(*hidden_BSD.shape[:-1], -1)
    return jnp.dot(hidden_BSD, w.astype(hidden_BSD.dtype), preferred_element_type=dtype)
