"""How many experts a token may have at most, where their number varies: options and checks of those routers."""

import dataclasses

from moejax.options import Problems, number
from moejax.routers.contract import RouterConfig, RouterOptions


@dataclasses.dataclass(frozen=True)
class VariableOptions(RouterOptions):
    """Options of routers that give a token as many experts as it needs."""

    # The most experts of one token; buffers of routes are so wide. 0: all of them.
    max_experts: int = number(0, least=0)


def most_experts(cfg: RouterConfig) -> int:
    return cfg.options.max_experts or cfg.num_experts


def most_experts_problems(cfg: RouterConfig, prefix: str) -> list[str]:
    """`max_experts` against E, and against K, the number that is meant on average."""
    most, e, k, out = cfg.options.max_experts, cfg.num_experts, cfg.experts_per_token, Problems()
    key = f"{prefix}router.max_experts={most}"
    out.need(most <= e, f"{key} is more than {prefix}num_experts={e}; 0 means all of them")
    out.need(
        most == 0 or most >= k,
        f"{key} is less than {prefix}experts_per_token={k}, the mean; {k} to {e} would work",
    )
    return out
