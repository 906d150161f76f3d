"""The table of routers. Adding one is a file beside these and a line here (see CONTRIBUTING.md)."""

import dataclasses

from moejax.options import ConfigError, choice_problem
from moejax.routers import expert_choice, token_choice
from moejax.routers.contract import Router, RouterOptions

ROUTERS: dict[str, Router] = {
    "token_choice": token_choice.ROUTER,
    "expert_choice": expert_choice.ROUTER,
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
