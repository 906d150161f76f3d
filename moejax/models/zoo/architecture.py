"""Which fields of a ModelConfig define the function it computes."""

import dataclasses

from moejax.config import ModelConfig

# Fields that change how a model is trained or computed, not which function it is.
_NOT_ARCHITECTURE = {
    "init_std", "mtp_loss_weight", "dtype", "scan_layers", "remat", "loss_chunk",
    *("moe." + f for f in (
        "bias_rate", "expert_loss", "sequence_loss", "device_loss", "communication_loss", "z_loss",
        "balance_groups", "dispatcher", "capacity_factor", "grouped_matmul", "expert_parallel",
        "buffer_factor", "shared_experts", "d_shared",
    )),
}  # fmt: skip


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
    flat["moe.shared_width"] = cfg.moe.shared_width
    a, m, unused = cfg.attention, cfg.moe, set(_NOT_ARCHITECTURE)
    mla = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    unused |= {f"attention.{k}" for k in (("num_kv_heads", "head_dim") if a.kind == "mla" else mla)}
    if cfg.positions == "rope":
        unused.add("max_seq_len")  # only learned positions have a parameter for each
    else:
        unused |= {k for k in flat if k.startswith("attention.rope.")}
    if a.rope.yarn_factor == 1.0:
        unused |= {k for k in flat if k.startswith("attention.rope.yarn_")}
    if not m.num_experts:
        unused |= {k for k in flat if k.startswith("moe.")} | {"num_dense_layers"}
    elif not cfg.num_dense_layers:
        unused |= {"d_ff", "activation", "ffn_bias"}
    if m.num_groups == 1:
        unused |= {"moe.topk_groups", "moe.group_score"}
    if not m.shared_width:
        unused.add("moe.shared_gate")
    flat["moe.bias_update"] = m.bias_update != "none"  # is there a bias
    if not any(a.windows):
        flat["attention.windows"] = ()
    return {k: ("unused" if k in unused else v) for k, v in flat.items()}
