"""The table of routers. Adding one is a file beside these and a line here (see CONTRIBUTING.md)."""

from moejax.moe.routers import expert_choice, token_choice
from moejax.moe.routing import Router

ROUTERS: dict[str, Router] = {
    "token_choice": token_choice.ROUTER,
    "expert_choice": expert_choice.ROUTER,
}
