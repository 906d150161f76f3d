"""Interventions: a model with something taken away or turned, to see what it was for. Pure functions on
(config, parameters, router state); docs/interventions.md has definitions and sources.

Nothing here changes the arrays it is given, and what an intervention leaves alone is shared, not copied.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ConfigError, ModelConfig
from moejax.config_checks import model_problems, problems_text
from moejax.models.replay import most_routes
from moejax.models.transformer import abstract_router_state
from moejax.moe import layer
from moejax.params import abstract_params
from moejax.routers.contract import tokens_of
from moejax.weights import is_quantized


class Model(NamedTuple):
    """Attributes: as everywhere. `cfg` is a ModelConfig."""

    cfg: ModelConfig
    params: dict
    router_state: dict


# --------------------------------------------------------------------------------------------------
# Which experts: bool [L, E].


def given(shape: tuple[int, int], places: Sequence[tuple[int | None, int]]) -> np.ndarray:
    """These (layer, expert); a layer of None is every layer."""
    out_LE = np.zeros(shape, bool)
    for at, expert in places:
        out_LE[slice(None) if at is None else at, expert] = True
    return out_LE


def largest(values_LE: np.ndarray, count: int) -> np.ndarray:
    """The `count` largest of each layer; of equal ones the first."""
    order_LE = np.argsort(-np.asarray(values_LE, np.float64), axis=1, kind="stable")
    return np.argsort(order_LE, axis=1) < count


def drawn(shape: tuple[int, int], count: int, seed: int) -> np.ndarray:
    """`count` random ones of each layer."""
    return largest(np.random.default_rng(seed).random(shape), count)


# --------------------------------------------------------------------------------------------------
# What is done to them.


def bar(model: Model, out_LE: np.ndarray) -> Model:
    """Without these experts, and tokens choose among the rest: their next best takes the place."""
    before = model.router_state.get("moe_blocks", {}).get(layer.BARRED, False)
    return _with_state(model, layer.BARRED, jnp.asarray(out_LE | np.asarray(before)))


def skip_best(model: Model, count_L: np.ndarray) -> Model:
    """Every token without the `count` experts that it scores highest, whichever these are; it chooses among the
    rest. DeepSeekMoE, 2401.06066 section 4.5, figure 4."""
    return _with_state(model, layer.SKIPPED, jnp.asarray(count_L, jnp.int32))


def _with_state(model: Model, name: str, value_L: jax.Array) -> Model:
    blocks = {**model.router_state.get("moe_blocks", {}), name: value_L}
    return model._replace(router_state={**model.router_state, "moe_blocks": blocks})


def silence(model: Model, out_LE: np.ndarray) -> Model:
    """With the outputs of these experts zero, weights and biases, and nobody in their place: tokens are routed
    as before."""

    def one(name, a):  # [L, E, ..]
        if name not in ("w_down", "b_down"):
            return a
        out = jnp.asarray(out_LE).reshape(*out_LE.shape, *[1] * (a.ndim - 2))
        if is_quantized(a):
            return dataclasses.replace(a, scale=jnp.where(out, 0, a.scale).astype(a.scale.dtype))
        return jnp.where(out, jnp.zeros((), a.dtype), a)

    moe = model.params["moe_blocks"]["moe"]
    experts = {name: one(name, a) for name, a in moe["experts"].items()}
    return _with_moe(model, model.cfg, lambda moe: {**moe, "experts": experts}, trunk_only=True)


def drop_shared(model: Model, one_more: bool) -> Model:
    """Without the shared experts, with one more routed one in their place or not (2401.06066 section 4.5)."""
    own = lambda moe: {k: a for k, a in moe.items() if k not in ("shared", "shared_gate")}  # noqa: E731
    return _with_moe(model, config_without_shared(model.cfg, one_more), own)


def config_without_shared(cfg: ModelConfig, one_more: bool) -> ModelConfig:
    k = cfg.moe.experts_per_token + one_more
    return _with(cfg, shared_experts=0, d_shared=0, shared_gate=False, experts_per_token=k)


def with_k(model: Model, k: int) -> Model:
    """With another number of experts for each token."""
    return model._replace(cfg=config_with_k(model.cfg, k))


def config_with_k(cfg: ModelConfig, k: int) -> ModelConfig:
    return _with(cfg, experts_per_token=k)


def with_temperature(model: Model, temperature: float) -> Model:
    """Logits of the routers / T, by their matrix and bias."""

    def one(moe):
        scaled = {n: a / temperature for n, a in moe["router"].items() if n in ("kernel", "bias")}
        return {**moe, "router": {**moe["router"], **scaled}}

    return _with_moe(model, model.cfg, one)


def uniform_routes(cfg: ModelConfig, shape: tuple[int, int], seed: Sequence[int]) -> np.ndarray:
    """Random distinct experts for every token of a batch [B, S], K of them: a batch field `routes`."""
    rng, k = np.random.default_rng(seed), cfg.moe.experts_per_token
    routes = np.full((*shape, cfg.num_moe_layers, most_routes(cfg)), -1, np.int32)
    for at in range(cfg.num_moe_layers):
        lots_BSE = rng.random((*shape, cfg.moe.num_experts), np.float32)
        routes[:, :, at, :k] = np.argpartition(lots_BSE, k - 1, axis=-1)[..., :k]
    return routes


def _with(cfg: ModelConfig, **moe) -> ModelConfig:
    return dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, **moe))


def _with_moe(model: Model, cfg: ModelConfig, change, trunk_only: bool = False) -> Model:
    """The parameters of every MoE layer changed, those of MTP's blocks too."""
    params = dict(model.params)
    blocks = params["moe_blocks"]
    params["moe_blocks"] = {**blocks, "moe": change(blocks["moe"])}
    if "mtp" in params and not trunk_only:
        block = params["mtp"]["block"]
        params["mtp"] = {**params["mtp"], "block": {**block, "moe": change(block["moe"])}}
    return Model(cfg, params, model.router_state)


# --------------------------------------------------------------------------------------------------
# What cannot be: ConfigError, from the config alone.


def check_experts(cfg: ModelConfig) -> None:
    if cfg.router is None:
        raise ConfigError("the model is dense, it has no experts; a model with experts would work")


def check_rerouting(cfg: ModelConfig, name: str) -> None:
    """Whether the router honours layer.BARRED (`bar`) or layer.SKIPPED (`skip_best`): it is asked, with shapes
    in place of arrays."""
    check_experts(cfg)
    assert cfg.router is not None
    router, static = cfg.router, cfg.router_config()
    state = jax.eval_shape(lambda: router.init_state(static, 0))
    shapes = {layer.BARRED: ((static.num_experts,), bool), layer.SKIPPED: ((), jnp.int32)}
    state[name] = jax.ShapeDtypeStruct(*shapes[name])
    params = abstract_params(router.param_specs(static))
    width = router.carries(static)

    def route(params, state, x_TD):
        carried_TW = jnp.zeros((2, width)) if width else None
        tokens = tokens_of(x_TD, 2, ids_T=jnp.zeros((2,), jnp.int32), carried_TW=carried_TW)
        return layer.route(params, state, tokens, router, static).stats

    try:
        jax.eval_shape(route, params, state, jax.ShapeDtypeStruct((2, cfg.d_model), jnp.float32))
    except ValueError as e:
        raise ConfigError(f"re-routing cannot be: {e} (':silent' here)") from e


def check_left(cfg: ModelConfig, most_out: int) -> None:
    """Whether a token still finds its experts when `most_out` of a layer are gone."""
    assert cfg.router is not None
    k, static = cfg.moe.experts_per_token, cfg.router_config()
    needed = k if cfg.router.routes_per_token(static) == k else 1
    left = cfg.moe.num_experts + len(cfg.router.specials(static)) - most_out
    if left < needed:
        raise ConfigError(
            f"of {cfg.moe.num_experts} experts {most_out} are knocked out: {left} are left, and a token "
            f"needs {needed}; at most {most_out - (needed - left)} would work, or ':silent'"
        )


def check_k(cfg: ModelConfig, k: int) -> None:
    check_experts(cfg)
    assert cfg.router is not None
    new, router = config_with_k(cfg, k), cfg.router
    _check_new(cfg, new)
    routes = [router.routes_per_token(c.router_config()) for c in (cfg, new)]
    if router.form not in ("token", "slot") or (
        router.form == "token" and routes[0] == routes[1] and k != cfg.moe.experts_per_token
    ):
        raise ConfigError(
            f"the router {cfg.moe.router.name!r} does not give a token K experts: another K changes nothing; a "
            "model whose tokens take the K best would work"
        )
    if abstract_router_state(new) != abstract_router_state(cfg):
        raise ConfigError(
            f"the router {cfg.moe.router.name!r} keeps {cfg.moe.experts_per_token} experts for each entry of a "
            f"table; k={cfg.moe.experts_per_token} alone would work"
        )


def check_shared(cfg: ModelConfig, one_more: bool) -> None:
    check_experts(cfg)
    if not cfg.moe.shared_width:
        raise ConfigError("the model has no shared experts; one that has would work")
    if one_more:
        check_k(cfg, cfg.moe.experts_per_token + 1)
    _check_new(cfg, config_without_shared(cfg, one_more))


def check_temperature(cfg: ModelConfig) -> None:
    """Logits are linear in the matrix and the bias where a router has nothing else that makes them."""
    check_experts(cfg)
    assert cfg.router is not None
    own = set(cfg.router.param_specs(cfg.router_config()))
    beside = {"bias", "input_scale", "expert_scale", "scale"}  # of the input, or of the weights
    if "kernel" not in own or own - beside - {"kernel"}:
        raise ConfigError(
            f"the router {cfg.moe.router.name!r} has no logits x W that a temperature could divide; a linear "
            "router (token_choice, mixtral, deepseek_v3, ..) would work"
        )


def check_uniform(cfg: ModelConfig) -> None:
    most = most_routes(cfg)  # or why not
    if cfg.moe.experts_per_token > min(most, cfg.moe.num_experts):
        raise ConfigError(f"there are no {cfg.moe.experts_per_token} distinct experts to draw")


def _check_new(cfg: ModelConfig, new: ModelConfig) -> None:
    before = model_problems(cfg)
    problems = [p for p in model_problems(new) if p not in before]
    if problems:
        raise ConfigError(problems_text(problems))
