"""Flax Linen shells, for models written in Linen: they declare the parameters and call the pure functions.

The parameter tree is the functions' own: `nn.unbox(module.init(..)["params"])` is what `moe` and `forward`
take.
Every array carries its logical axes, see `moejax.axes`. Router state is passed in and never held: there
are no mutable collections.
"""

from typing import Any

import jax
from flax import linen as nn

from moejax.config import ModelConfig
from moejax.models import transformer
from moejax.moe import layer
from moejax.params import init_params, is_spec
from moejax.routers import router_of


def _declare(module: nn.Module, specs: dict) -> dict:
    """A Linen parameter for each entry of `specs`; a nested entry is one parameter that is a tree."""

    def init(key: jax.Array, name: str) -> Any:
        part = {name: specs[name]}
        values = init_params(part, key)
        box = lambda spec, value: nn.LogicallyPartitioned(value, spec.axes)  # noqa: E731
        return jax.tree.map(box, part, values, is_leaf=is_spec)[name]

    return {name: module.param(name, init, name) for name in specs}


class MoELayer(nn.Module):
    """`moejax.moe.layer.moe` as a module: (x_BSD, router_state, **options) -> (y_BSD, MoEAux).

    `router_state` of None is a fresh one; see `Router.init_state` and `Router.update`.
    """

    cfg: ModelConfig

    @nn.compact
    def __call__(self, x_BSD: jax.Array, router_state: dict | None = None, **options):
        params = _declare(self, layer.param_specs(self.cfg))
        if router_state is None:
            router_state = router_of(self.cfg.moe.router).init_state(self.cfg.router_config(), 0)
        return layer.moe(params, router_state, x_BSD, self.cfg, **options)


class Transformer(nn.Module):
    """`moejax.models.transformer.forward` and `logits` as a module:
    (tokens_BS, router_state, **options) -> (logits_BSV, Output)."""

    cfg: ModelConfig

    @nn.compact
    def __call__(self, tokens_BS: jax.Array, router_state: dict | None = None, **options):
        params = _declare(self, transformer.param_specs(self.cfg))
        if router_state is None:
            router_state = transformer.init_router_state(self.cfg)
        out = transformer.forward(params, router_state, tokens_BS, self.cfg, **options)
        return transformer.logits(params, out.hidden_BSD), out
