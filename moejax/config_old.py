"""Configs of moejax 0.1.0 in today's groups.

0.1.0 had what a model is trained for, how it is computed, and the options of every router in `model` and
`model.moe`. The tables below are its own and never change. Most keys moved with their names and values; the
router, its bias rule, the dispatcher and the kernels mean something else today.
"""

import copy
from typing import Any

# What moved from `model` and from `model.moe`.
_OBJECTIVE = (
    ("mtp_loss_weight",),
    ("expert_loss", "sequence_loss", "device_loss", "communication_loss", "z_loss",
     "balance_groups", "bias_update", "bias_rate"),
)  # fmt: skip
_FOR_ROUTES = ("grouped_matmul", "expert_parallel", "buffer_factor")
_COMPUTE = (("dtype", "scan_layers", "remat", "loss_chunk"), ("dispatcher", *_FOR_ROUTES))
# The options in `model.moe` that each router read.
_TOKEN_CHOICE = ("score", "normalize_weights", "routed_scaling", "router_bias", "num_groups",
                 "topk_groups", "group_score")  # fmt: skip
_EXPERT_CHOICE = ("capacity_factor", "routed_scaling", "router_bias")
_CAPACITY_FACTOR = 1.25  # the default that is another one today


def is_old(values: dict) -> bool:
    """Whether a stored config is one of 0.1.0's: it lacks the new groups, and its router is a name."""
    model = values.get("model", {})
    moe = model.get("moe", {}) if isinstance(model, dict) else None
    whole = isinstance(moe, dict) and isinstance(moe.get("router", ""), str)
    return whole and not {"objective", "compute"} & values.keys()


def renewed(values: dict) -> dict:
    """A stored config in today's groups; one that is up to date is returned as it is.

    A missing key stays missing: it means its default. A key that 0.1.0 did not know stays where it is, for
    whoever builds the config to refuse.
    """
    if not is_old(values):
        return values
    values = copy.deepcopy(values)
    model = values.setdefault("model", {})
    moe = model.setdefault("moe", {})
    name = moe.pop("router", "token_choice")
    slots = name == "expert_choice"
    options = {"name": name, **_pop(moe, _EXPERT_CHOICE if slots else _TOKEN_CHOICE)}
    objective = _pop(model, _OBJECTIVE[0]) | _pop(moe, _OBJECTIVE[1])
    compute = _pop(model, _COMPUTE[0]) | _pop(moe, _COMPUTE[1])
    if slots:  # it read none of these, and refused those that would have made a difference
        _pop(moe, _TOKEN_CHOICE)
        _pop(compute, _FOR_ROUTES)
    elif "bias_update" in objective:
        options["expert_bias"] = objective["bias_update"] != "none"
    if objective.get("bias_update") == "frozen":
        objective["bias_update"] = "none"
    # Slots for token choice were a dispatcher; how many there are is part of the objective now.
    factor = moe.pop("capacity_factor", _CAPACITY_FACTOR)
    if compute.get("dispatcher") == "capacity":
        del compute["dispatcher"]
        objective |= {} if slots else {"capacity_factor": factor}
    if compute.get("dispatcher") == "dropless":
        compute["dispatcher"] = "auto"
    if compute.get("grouped_matmul") == "blocked":  # what 'auto' is on a CPU
        compute["grouped_matmul"] = "auto"
    moe["router"] = options
    return values | {"objective": objective, "compute": compute}


def moved(key: str, value: str) -> dict[str, Any]:
    """What a dotted key of 0.1.0 with this value is today, by dotted keys; empty for one that did not move."""
    *groups, last = key.split(".")
    if groups not in (["model"], ["model", "moe"]):
        return {}
    values: dict = {"model": {"moe": {}}}
    (values["model"] if len(groups) == 1 else values["model"]["moe"])[last] = value
    today = _leaves(renewed(values))
    if key in today:
        return {}
    return {k: v for k, v in today.items() if k != "model.moe.router.name" or last == "router"}


def _pop(values: dict, keys: tuple[str, ...]) -> dict:
    return {k: values.pop(k) for k in keys if k in values}


def _leaves(values: dict, prefix: str = "") -> dict[str, Any]:
    out = {}
    for key, value in values.items():
        out |= (
            _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        )
    return out
