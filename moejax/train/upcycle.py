"""Upcycling: a mixture that begins as a dense model, every expert a copy of its FFN (2212.05055 section 3).

What is not an expert or a router is the base's. Routers are fresh. With weights that add up to 1 the mixture
computes what the base computes, before its first step; the paper's top-K weights do not, and its loss jumps.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from moejax.config import ConfigError, ModelConfig
from moejax.models import transformer
from moejax.params import init_params
from moejax.sharding import Layout


def begun_from(dense: ModelConfig, cfg: ModelConfig) -> ModelConfig:
    """What a base must be for `cfg` to begin from: `dense`, with the experts of `cfg` in the same layers.

    ConfigError if `dense` has experts, or `cfg` none that can be copies of its FFN.
    """
    if dense.num_moe_layers:
        raise ConfigError(
            "train.upcycle: the base has experts already; train.upcycle=false begins from it as it is"
        )
    moe = cfg.moe
    wrong = [
        (not cfg.num_moe_layers, "model.moe.num_experts", moe.num_experts, "8, say"),
        (moe.d_expert != dense.d_ff, "model.moe.d_expert", moe.d_expert, dense.d_ff),
        (moe.shared_width > 0, "model.moe.shared_experts", moe.shared_experts, "0, and d_shared=0"),
        (moe.latent_dim > 0, "model.moe.latent_dim", moe.latent_dim, 0),
        (
            moe.activation != dense.activation,
            "model.moe.activation",
            moe.activation,
            dense.activation,
        ),
        (moe.ffn_bias != dense.ffn_bias, "model.moe.ffn_bias", moe.ffn_bias, dense.ffn_bias),
        (cfg.mtp_depth > 0, "model.mtp_depth", cfg.mtp_depth, 0),
    ]
    lines = [f"  - {key}={now}: {would} would work" for bad, key, now, would in wrong if bad]
    if lines:
        raise ConfigError(
            "train.upcycle makes every expert a copy of the base's FFN:\n" + "\n".join(lines)
        )
    ours = {f: getattr(cfg, f) for f in ("moe", "num_dense_layers", "dense_at")}
    return dataclasses.replace(dense, **ours)


def upcycle(params: dict, cfg: ModelConfig, seed: int, layout: Layout | None) -> tuple[dict, dict]:
    """(params, router_state) of the mixture `cfg` that begins as the dense model of `params`.

    `seed`: of the routers, the same as of a run from scratch. Every device holds its part only.
    """
    shardings = None if layout is None else layout.of_specs(transformer.param_specs(cfg))
    build = jax.jit(lambda p, key: _build(p, cfg, key), out_shardings=shardings)
    return build(params, jax.random.key(seed)), transformer.init_router_state(cfg)


def _build(params: dict, cfg: ModelConfig, key: jax.Array) -> dict:
    fresh = init_params(transformer.param_specs(cfg), key)
    every = params["dense_blocks"]
    rest = {k: v for k, v in params.items() if k != "dense_blocks"}
    stacks = {
        name: jax.tree.map(lambda a, at=at: a[jnp.array(at)], every)
        for name, at in cfg.layers.items()
        if len(at)
    }
    block = stacks["moe_blocks"]
    ffn: Mapping[str, jax.Array] = block.pop("ffn")
    moe = fresh["moe_blocks"]["moe"]
    copies = {k: jnp.broadcast_to(a[:, None], moe["experts"][k].shape) for k, a in ffn.items()}
    return {**rest, **stacks, "moe_blocks": {**block, "moe": {**moe, "experts": copies}}}
