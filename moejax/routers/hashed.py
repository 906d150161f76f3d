"""Hash layers (2106.04426): a table says which K experts an entry of the vocabulary has; each layer has its
own.

    y_t = 1/K sum of FFN_e(x_t) over e in table[id of t]

The table is drawn at random and never changes (the paper's random hash; it has K = 1). Nothing is learned
or balanced: an expert's load is what its entries of the vocabulary weigh in the text. Causal: the route is
the token's own id. State: the table. The paper claims to match or beat Switch and BASE at the same size,
with no router to train.
"""

import dataclasses

import jax
import jax.numpy as jnp

from moejax.options import number
from moejax.routers import parts
from moejax.routers.contract import Routed, Router, RouterConfig, RouterOptions, Routing, Tokens


@dataclasses.dataclass(frozen=True)
class Options(RouterOptions):
    seed: int = number(0, least=0)  # of the tables


def draw_table(cfg: RouterConfig, layer: int) -> jax.Array:
    """table_VK, int32: K distinct experts for each entry of the vocabulary."""
    key = jax.random.fold_in(jax.random.key(cfg.options.seed), layer)
    lots_VE = jax.random.uniform(key, (cfg.vocab_size, cfg.num_experts))
    return jax.lax.top_k(lots_VE, cfg.experts_per_token)[1].astype(jnp.int32)


def look_up(table_VK: jax.Array, tokens: Tokens) -> jax.Array:
    """index_TK of the table, before padding is taken out. Raises ValueError without vocabulary ids."""
    if tokens.ids_T is None:
        raise ValueError("this router looks vocabulary ids up in a table: it needs Tokens.ids_T")
    return table_VK[tokens.ids_T]


def route(params: dict, state: dict, tokens: Tokens, cfg: RouterConfig) -> Routed:
    """See `Router.route`."""
    del params
    index_TK = tokens.forced_TK
    if index_TK is None:
        parts.refuse_barred(tokens, "hash reads its routes in a table")
        index_TK = look_up(state["table"], tokens)
    index_TK = parts.but_padding(index_TK, tokens)
    even_TE = jnp.full((*tokens.mask_T.shape, cfg.num_experts), 1 / cfg.experts_per_token)
    weights_TK, routes_TE = parts.weigh(index_TK, even_TE.astype(tokens.mask_T.dtype))
    return Routed(Routing(index_TK, weights_TK), {}, {"load": routes_TE.sum(axis=0)})


ROUTER = Router(
    options=Options(),
    source="Hash Layers, 2106.04426",
    about=__doc__ or "",
    recipe=(("model.moe.experts_per_token", 1),),
    route=route,
    form="token",
    causal=True,
    init_state=lambda cfg, layer: {"table": draw_table(cfg, layer)},
    linear_losses=lambda cfg: True,  # there are none
)
