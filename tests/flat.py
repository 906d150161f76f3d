"""Configs for tests, from flat names: `experiment(num_experts=8, score="sigmoid", expert_loss=0.1,
remat="full")`.

A name goes to the group that has a field of it. Names that two groups have are the model's (`vocab_size`,
`activation`, `ffn_bias`) unless a prefix says otherwise: `moe_activation`, `moe_ffn_bias`, `data_vocab_size`,
`data_seed`, `train_seed`.
"""

import dataclasses

from moejax.config import ComputeConfig, ExperimentConfig, ModelConfig, ObjectiveConfig
from moejax.routers import router_options

# In this order; a dotted path to each group.
GROUPS = ("model", "model.moe", "model.moe.router", "model.attention", "model.attention.rope", "model.streams",
          "objective", "compute", "data", "optimizer", "train", "mesh")  # fmt: skip


def _get(cfg, path: str):
    for part in filter(None, path.split(".")):
        cfg = getattr(cfg, part)
    return cfg


def put(cfg, path: str, value):
    """`cfg` with the value at a dotted path replaced."""
    head, _, rest = path.partition(".")
    new = put(getattr(cfg, head), rest, value) if rest else value
    return dataclasses.replace(cfg, **{head: new})


def change(cfg: ExperimentConfig, **fields) -> ExperimentConfig:
    """An experiment with some fields replaced. `router=NAME` chooses a router, at its defaults."""
    router = fields.pop("router", None)
    if router is not None:
        cfg = put(cfg, "model.moe.router", router_options(router))
    for name, value in fields.items():
        if name in {f.name for f in dataclasses.fields(cfg)}:
            cfg = dataclasses.replace(cfg, **{name: value})
            continue
        prefix, _, rest = name.partition("_")
        named = [
            g for g in GROUPS if g.rpartition(".")[2] == prefix and hasattr(_get(cfg, g), rest)
        ]
        owners = [g for g in GROUPS if name in {f.name for f in dataclasses.fields(_get(cfg, g))}]
        if owners:
            cfg = put(cfg, f"{owners[0]}.{name}", value)
        elif named:
            cfg = put(cfg, f"{named[0]}.{rest}", value)
        else:
            raise TypeError(f"no group of the config has {name!r}")
    return cfg


def experiment(**fields) -> ExperimentConfig:
    return change(ExperimentConfig(), **fields)


def model(**fields) -> ModelConfig:
    return experiment(**fields).model


def split(**fields) -> tuple[ModelConfig, ObjectiveConfig, ComputeConfig]:
    cfg = experiment(**fields)
    return cfg.model, cfg.objective, cfg.compute
