"""Configs for tests of their checks: changes by dotted key, and what is said of them."""

import dataclasses

from moejax.config import ConfigError, ModelConfig
from moejax.config_io import from_config_dict

# Changes of the defaults that turn on what a row needs; keys of the model go without 'model.'.
MOE = {"moe.num_experts": 8, "moe.d_expert": 16}
GROUPS = {**MOE, "moe.router.num_groups": 4, "moe.router.topk_groups": 2}
DEVICES = {**MOE, "objective.balance_groups": 2}
BIAS = {**MOE, "moe.router.expert_bias": True}
EXPERT_CHOICE = {**MOE, "moe.router.name": "expert_choice"}
MLA = {
    "attention.kind": "mla", "attention.kv_lora_rank": 8, "attention.qk_nope_head_dim": 4,
    "attention.qk_rope_head_dim": 4, "attention.v_head_dim": 4,
}  # fmt: skip
DSA = {
    **MLA, "attention.kind": "dsa", "attention.q_lora_rank": 8, "attention.index_heads": 4,
    "attention.index_head_dim": 4, "attention.index_topk": 8,
}  # fmt: skip
COMPRESSED = {
    "attention.kind": "compressed", "attention.layer_kinds": ("sliding", "csa", "hca", "csa"),
    "attention.sliding_window": 8, "attention.q_lora_rank": 8, "attention.qk_rope_head_dim": 4,
    "attention.o_groups": 2, "attention.o_lora_rank": 4, "attention.index_heads": 2,
    "attention.index_head_dim": 8, "attention.index_topk": 2, "attention.rope.interleaved": True,
}  # fmt: skip
HYBRID = {"attention.kind": "hybrid", "attention.windows": (8, 0), "attention.window_kv_heads": 2,
          "attention.v_head_dim": 8}  # fmt: skip
BASES = ({}, MOE, GROUPS, DEVICES, BIAS, EXPERT_CHOICE, MLA, {**MLA, **GROUPS}, COMPRESSED, HYBRID)
MODEL = tuple(f.name for f in dataclasses.fields(ModelConfig))


def full(key):
    return f"model.{key}" if key.split(".")[0] in MODEL else key


def nested(changes):
    out = {}
    for key, value in changes.items():
        *groups, last = full(key).split(".")
        at = out
        for group in groups:
            at = at.setdefault(group, {})
        at[last] = value
    return out


def problems(changes) -> list[str]:
    """The lines of the ConfigError, none where the config is valid."""
    try:
        from_config_dict(nested(changes))
    except ConfigError as e:
        head, *lines = str(e).splitlines()
        assert head == f"{len(lines)} problem{'s' * (len(lines) > 1)} in the config:"
        assert all(line.startswith("  - ") for line in lines)
        return [line.removeprefix("  - ") for line in lines]
    return []
