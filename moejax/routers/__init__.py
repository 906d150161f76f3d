"""The table of routers. Adding one is a file beside these and a line here (see CONTRIBUTING.md)."""

import dataclasses

from moejax.options import ConfigError, choice_problem
from moejax.routers import (
    ada_moe,
    base,
    cosine,
    deepseek_v4_hash,
    dyn_moe,
    expert_choice,
    expert_threshold,
    gshard,
    hashed,
    longcat,
    lory,
    moe_pp,
    noisy_topk,
    peer,
    published,
    quantile,
    remoe,
    sinkhorn,
    smear,
    soft_moe,
    sparse_mixer,
    token_choice,
    token_rounding,
    top_p,
)
from moejax.routers.contract import Router, RouterOptions

ROUTERS: dict[str, Router] = {
    "token_choice": token_choice.ROUTER,
    "deepseek_v2": published.DEEPSEEK_V2,
    "deepseek_v3": published.DEEPSEEK_V3,
    "deepseek_v4": published.DEEPSEEK_V4,
    "mixtral": published.MIXTRAL,
    "mistral4": published.MISTRAL4,
    "ernie": published.ERNIE,
    "kolibri": published.KOLIBRI,
    "llama4": published.LLAMA4,
    "inkling": published.INKLING,
    "gemma4": published.GEMMA4,
    "dbrx": published.DBRX,
    "switch": published.SWITCH,
    "gshard": gshard.ROUTER,
    "noisy_topk": noisy_topk.ROUTER,
    "cosine": cosine.ROUTER,
    "quantile": quantile.ROUTER,
    "sparse_mixer": sparse_mixer.ROUTER,
    "expert_choice": expert_choice.ROUTER,
    "remoe": remoe.ROUTER,
    "top_p": top_p.ROUTER,
    "dyn_moe": dyn_moe.ROUTER,
    "expert_threshold": expert_threshold.ROUTER,
    "ada_moe": ada_moe.ROUTER,
    "moe_pp": moe_pp.ROUTER,
    "longcat": longcat.ROUTER,
    "hash": hashed.ROUTER,
    "deepseek_v4_hash": deepseek_v4_hash.ROUTER,
    "base": base.ROUTER,
    "sinkhorn": sinkhorn.ROUTER,
    "token_rounding": token_rounding.ROUTER,
    "soft_moe": soft_moe.ROUTER,
    "smear": smear.ROUTER,
    "lory": lory.ROUTER,
    "peer": peer.ROUTER,
}
DEFAULT = "token_choice"


def router_of(options: RouterOptions) -> Router:
    """The router whose options these are. Raises ConfigError for a name that is not in the table."""
    problem = choice_problem("model.moe.router.name", options.name, ROUTERS)
    if problem:
        raise ConfigError(problem)
    return ROUTERS[options.name]


def router_options(name: str = DEFAULT, **values) -> RouterOptions:
    """The options of a router, at their defaults but for `values`."""
    router = router_of(RouterOptions(name))
    return dataclasses.replace(router.options, name=name, **values)
