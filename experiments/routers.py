"""Which router predicts held-out text best, at the same compute for each token?

    moejax sweep --config=experiments/routers.py --workdir=runs/routers

`routers.py:NAME` is one of them: any name of `moejax routers`, with what its paper sets besides. The text is
the quickstart's. All have the same layers, and per token the same width of experts: `TOKEN` hidden units, in as
many experts as the router uses on average (its own word), and a shared expert. Where a token has fewer experts,
they are wider and there are fewer of them, so that the total is the same too.

What that leaves unequal: the router's own parameters and time; special experts, which cost nothing, so that the
others are wider; routers with another number of experts by design.

Result, with tables in docs/routers.md: only tables of token ids (hash, deepseek_v4_hash) are told from plain
token choice by three seeds; they predict better. All others lie within the noise. It took two hours, on two
cores.
"""

import dataclasses

from small import EXPERTS, PER_TOKEN, SMALL, TOKEN, WIDTH

from moejax.config import ConfigError, ExperimentConfig, MoEConfig, ObjectiveConfig
from moejax.config_io import to_config_dict, with_recipe
from moejax.options import choice_problem
from moejax.routers import ROUTERS

SEQ_LEN = SMALL.data.seq_len
# Options that must fit a sequence's length: as many slots for a token as others have experts; four segments.
FITTED = {
    "soft_moe": {"slots_per_expert": SEQ_LEN * PER_TOKEN // EXPERTS},
    "lory": {"segment": SEQ_LEN // 4},
}
# In sixteen parts, for memory: each token has 128 routes.
ACCUMULATION = {"peer": 16}


def get_config(router: str = "token_choice"):
    problem = choice_problem("routers.py", router, ROUTERS)
    if problem:
        raise ConfigError(problem)
    moe = MoEConfig(
        num_experts=EXPERTS, experts_per_token=PER_TOKEN, d_expert=WIDTH, shared_experts=1
    )
    # What does not generate never sees more, and soft slots are counted for it.
    longest = SMALL.model.max_seq_len if ROUTERS[router].causal else SEQ_LEN
    base = dataclasses.replace(
        SMALL,
        name=f"router-{router}",
        model=dataclasses.replace(SMALL.model, max_seq_len=longest, moe=moe),
        objective=ObjectiveConfig(),
        train=dataclasses.replace(SMALL.train, accumulation=ACCUMULATION.get(router, 1)),
    )
    return to_config_dict(same_compute(with_recipe(base, router), router))


def same_compute(cfg: ExperimentConfig, router: str) -> ExperimentConfig:
    """The experiment with experts as wide as the compute of a token allows."""
    moe, given = cfg.model.moe, dict(ROUTERS[router].recipe)
    if "model.moe.num_experts" not in given and TOKEN % moe.experts_per_token == 0:
        moe = dataclasses.replace(moe, num_experts=EXPERTS * moe.experts_per_token // PER_TOKEN)
    own = dataclasses.replace(moe.router, **FITTED.get(router, {}))
    moe = dataclasses.replace(moe, router=own, d_shared=WIDTH)
    model = dataclasses.replace(cfg.model, moe=moe)
    if "model.moe.d_expert" not in given:
        moe = dataclasses.replace(moe, d_expert=max(1, round(TOKEN / model.experts_used)))
    return dataclasses.replace(cfg, model=dataclasses.replace(model, moe=moe))


def get_sweep():
    return {
        "variants": {name: {"variant": name} for name in ROUTERS},
        "seeds": (0, 1, 2),
        "baseline": "token_choice",
    }
