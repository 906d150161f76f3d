"""DeepSeek-V4 as it is published, and by the names of its modules in `transformers`, which saves a mixture."""

import json
import pathlib
import re

import torch
from safetensors.torch import save_file

# The modules' names, and the published ones. Written from the headers of the released files.
NAMES = {
    r"model\.": "",
    r"embed_tokens": "embed",
    r"lm_head": "head",
    r"hc_head\.hc_": "hc_head_",
    r"(attn|ffn)_hc\.": r"hc_\1_",
    r"input_layernorm": "attn_norm",
    r"post_attention_layernorm": "ffn_norm",
    r"self_attn\.compressor\.indexer\.(kv_proj|gate_proj|position_bias|kv_norm)":
        r"self_attn.indexer.compressor.\1",
    r"self_attn\.compressor\.indexer\.(scorer\.)?": "self_attn.indexer.",
    r"compressor\.kv_proj": "compressor.wkv",
    r"compressor\.gate_proj": "compressor.wgate",
    r"position_bias": "ape",
    r"compressor\.kv_norm": "compressor.norm",
    r"q_a_proj": "wq_a",
    r"q_a_norm": "q_norm",
    r"q_b_proj": "wq_b",
    r"kv_proj": "wkv",
    r"o_([ab])_proj": r"wo_\1",
    r"self_attn\.sinks": "attn.attn_sink",
    r"self_attn\.": "attn.",
    r"mlp\.": "ffn.",
    r"e_score_correction_bias": "bias",
    r"shared_experts\.gate_proj": "shared_experts.w1",
    r"shared_experts\.down_proj": "shared_experts.w2",
    r"shared_experts\.up_proj": "shared_experts.w3",
}  # fmt: skip


def published(state: dict) -> dict:
    """A state dict under the published names, experts one by one."""
    out = {}
    for name, value in state.items():
        for theirs, ours in NAMES.items():
            name = re.sub(theirs, ours, name)
        if name.endswith("experts.gate_up_proj"):
            for e, both in enumerate(value):
                for w, part in zip(("w1", "w3"), both.chunk(2)):
                    out[name.replace("gate_up_proj", f"{e}.{w}.weight")] = part
        elif name.endswith("experts.down_proj"):
            out |= {name.replace("down_proj", f"{e}.w2.weight"): w for e, w in enumerate(value)}
        else:
            out[name] = value.to(torch.int32) if name.endswith("tid2eid") else value
    return out


def save(model, keys: dict, name: str, path: pathlib.Path):
    """`model` with the published config.json and tensors, or both by the names of the modules."""
    path.mkdir()
    state = model.state_dict()
    if name == "published":
        config, state = {"model_type": "deepseek_v4", **keys}, published(state)
    else:
        config = model.config.to_dict()
    (path / "config.json").write_text(json.dumps(config))
    save_file({k: v.contiguous() for k, v in state.items()}, path / "model.safetensors")
