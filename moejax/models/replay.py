"""Replay: a batch that brings its routes along, in the field `routes`, int32 [B, S, L', K].

L' are the MoE layers of the trunk, then the depths of multi-token prediction. K is as many routes as a token
can have (`Router.routes_per_token`); -1 is an empty slot. Routers take these routes instead of choosing, and
weigh them by their own scores: gradients reach the router (rollout routing replay, 2510.11370).
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError, ModelConfig
from moejax.routers import ROUTERS

FIELD = "routes"


def most_routes(cfg: ModelConfig) -> int:
    """K of the field. Raises ConfigError for a model whose tokens cannot be told their routes."""
    if cfg.router is None:
        raise ConfigError("batch field 'routes': the model is dense, no layer routes")
    if cfg.router.form != "token":
        named = ", ".join(name for name, r in ROUTERS.items() if r.form == "token")
        raise ConfigError(
            f"batch field 'routes': the router {cfg.moe.router.name!r} lets no token name its experts, so it "
            f"cannot be told routes; a model with one of these would work: {named}"
        )
    return cfg.router.routes_per_token(cfg.router_config())


def with_routes(batch: Mapping, routes_BSLK: np.ndarray, cfg: ModelConfig) -> dict:
    """The batch with these routes, every one of which is checked: on the host, before anything is compiled.

    Raises ConfigError for a model without routes, another shape, an expert that does not exist, or the same one
    twice for a token.
    """
    routes_BSLK = np.asarray(routes_BSLK)
    if not np.issubdtype(routes_BSLK.dtype, np.integer):
        raise ConfigError(f"batch field 'routes' is {routes_BSLK.dtype}; it must hold integers")
    _check_shape(routes_BSLK.shape, batch["tokens"].shape, cfg, mtp=False)
    assert cfg.router is not None
    end = cfg.moe.num_experts + len(cfg.router.specials(cfg.router_config()))
    bad = (routes_BSLK < -1) | (routes_BSLK >= end)
    if bad.any():
        raise ConfigError(
            f"batch field 'routes' names expert {routes_BSLK[bad][0]} {_place(bad)}; there are 0 to {end - 1}, "
            "and -1 for an empty slot"
        )
    ordered = np.sort(routes_BSLK, axis=-1)
    twice = (ordered[..., 1:] == ordered[..., :-1]) & (ordered[..., 1:] >= 0)
    if twice.any():
        raise ConfigError(
            f"batch field 'routes' names expert {ordered[..., 1:][twice][0]} twice {_place(twice)}; the "
            "experts of a token are distinct"
        )
    return {**batch, FIELD: routes_BSLK.astype(np.int32)}


def _place(bad_BSLK: np.ndarray) -> str:
    row, position, layer, _ = np.argwhere(bad_BSLK)[0]
    return f"(row {row}, position {position}, MoE layer {layer})"


def _check_shape(shape: tuple, batch_shape: tuple, cfg: ModelConfig, *, mtp: bool) -> None:
    """`mtp`: the depths of multi-token prediction are computed, so they need their routes too."""
    k, trunk = most_routes(cfg), cfg.num_moe_layers
    whole = trunk + cfg.mtp_depth
    layers = (whole,) if mtp else (trunk, whole)
    if shape not in [(*batch_shape, n, k) for n in layers]:
        raise ConfigError(
            f"batch field 'routes' has shape {tuple(shape)}; for this batch and model it must be "
            f"[B, S, L', K] = {' or '.join(str((*batch_shape, n, k)) for n in dict.fromkeys(layers))}"
            + (", the depths of MTP last" if cfg.mtp_depth else "")
        )


def forced_routes(batch: Mapping, cfg: ModelConfig, *, mtp: bool = False):
    """(forced_LTK of the trunk, forced_LTK of the depths) of a batch; (None, None) if it has no such field.

    `mtp`: whether the depths are computed. Without, a batch need not bring their routes.
    """
    if FIELD not in batch:
        return None, None
    routes_BSLK = batch[FIELD]
    b, s = batch["tokens"].shape
    _check_shape(routes_BSLK.shape, (b, s), cfg, mtp=mtp)
    forced_LTK = jnp.moveaxis(routes_BSLK, 2, 0).reshape(-1, b * s, routes_BSLK.shape[3])
    return forced_LTK[: cfg.num_moe_layers], forced_LTK[cfg.num_moe_layers :]


def field_of(expert_LTK: jax.Array | np.ndarray, batch_size: int):
    """The field of routes as layers report them: [L', T, K] -> [B, S, L', K]."""
    layers, tokens, k = expert_LTK.shape
    array = jnp if isinstance(expert_LTK, jax.Array) else np
    return array.moveaxis(expert_LTK.reshape(layers, batch_size, tokens // batch_size, k), 0, 2)
