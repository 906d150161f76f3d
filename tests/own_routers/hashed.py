"""Hash layers (2106.04426): a table says which experts an entry of the vocabulary uses, each layer has its own.

There is nothing to learn and nothing to balance. How often each entry was met is counted, for whoever asks.
"""

import jax
import jax.numpy as jnp

from moejax.routers import parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


def init_state(cfg: RouterConfig, layer: int) -> dict:
    lots_VE = jax.random.uniform(jax.random.key(layer), (cfg.vocab_size, cfg.num_experts))
    _, table_VK = jax.lax.top_k(lots_VE, cfg.experts_per_token)
    return {"table": table_VK.astype(jnp.int32), "met": jnp.zeros((cfg.vocab_size,), jnp.float32)}


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    del params
    if tokens.ids_T is None:
        raise ValueError("hashed routes by vocabulary ids: it needs Tokens.ids_T")
    index_TK = tokens.forced_TK
    if index_TK is None:
        parts.refuse_barred(tokens, "hashed reads its routes in a table")
        index_TK = state["table"][tokens.ids_T]
    index_TK = jnp.where(tokens.mask_T[:, None] > 0, index_TK, -1)
    routes_TK = (index_TK >= 0).astype(tokens.mask_T.dtype)
    stats = {
        "load": parts.chosen(index_TK, cfg.num_experts, routes_TK.dtype).sum(axis=(0, 1)),
        "ids": jnp.zeros((cfg.vocab_size,), routes_TK.dtype).at[tokens.ids_T].add(tokens.mask_T),
    }
    return Routed(Routing(index_TK, routes_TK / cfg.experts_per_token), {}, stats)


ROUTER = Router(
    options=RouterOptions(),
    route=route,
    form="token",
    causal=True,
    init_state=init_state,
    update=lambda state, stats, cfg: {**state, "met": state["met"] + stats["ids"]},
    linear_losses=lambda cfg: True,  # there are none
)
