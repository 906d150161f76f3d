"""Which fields of a ModelConfig define the function it computes."""

import dataclasses

from moejax.attention import ATTENTIONS, kind_of
from moejax.config import ModelConfig


def architecture(cfg: ModelConfig) -> dict:
    """The fields that define the function a model computes, flat; the rest are 'unused'.

    Two configs with equal dicts describe the same function of the same parameters.
    """
    flat: dict = {}

    def add(values: dict, prefix: str):
        for key, value in values.items():
            if isinstance(value, dict):
                add(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    add(dataclasses.asdict(cfg), "")
    flat["moe.shared_width"] = cfg.moe.shared_width  # however it is made up
    a, m, unused = cfg.attention, cfg.moe, {"init_std", "moe.shared_experts", "moe.d_shared"}
    kind = kind_of(a)
    optional = frozenset().union(*(k.reads for k in ATTENTIONS.values()))
    unused |= {f"attention.{k}" for k in optional - kind.reads}
    if cfg.positions == "rope":
        unused.add("max_seq_len")  # only learned positions have a parameter for each
    else:
        unused |= {k for k in flat if k.startswith("attention.rope.")}
    if cfg.dense_at == tuple(range(cfg.num_dense_layers)):
        flat["dense_at"] = ()  # the default, spelled out
    if a.rope.width == a.head_dim:
        flat["attention.rope.width"] = 0  # the default, spelled out
    if a.rope.yarn_factor == 1.0:
        unused |= {k for k in flat if k.startswith("attention.rope.yarn_")}
    if cfg.streams.count == 1:
        unused |= {"streams.sinkhorn_steps", "streams.eps"}
    if not m.num_experts:
        unused |= {k for k in flat if k.startswith("moe.")} | {"num_dense_layers"}
    elif not cfg.num_dense_layers:
        unused |= {"d_ff", "activation", "ffn_bias"}
    if flat.get("moe.router.num_groups") == 1:
        unused |= {"moe.router.topk_groups", "moe.router.group_score"}
    if not m.shared_width:
        unused.add("moe.shared_gate")
    if a.scale == kind.widths(a).query ** -0.5:
        flat["attention.scale"] = 0.0  # the default, spelled out
    if not any(a.windows):
        flat["attention.windows"] = ()
    return {k: ("unused" if k in unused else v) for k, v in flat.items()}
