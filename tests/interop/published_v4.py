"""DeepSeek-V4's tensors, name by name, as `published` has those of the other families."""

CONFIG = {
    "vocab_size": 41, "hidden_size": 12, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 1e4,
    "head_dim": 6, "qk_rope_head_dim": 4, "q_lora_rank": 8, "o_groups": 2, "o_lora_rank": 5,
    "sliding_window": 4, "index_n_heads": 3, "index_head_dim": 7, "index_topk": 2, "hc_mult": 3,
    "hc_sinkhorn_iters": 4, "hc_eps": 1e-4, "n_routed_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 7, "n_shared_experts": 1, "swiglu_limit": 2.0,
    "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "num_hash_layers": 1,
    "compress_ratios": [0, 4, 128, 0], "compress_rope_theta": 2e4, "num_nextn_predict_layers": 1,
}  # fmt: skip


def _streams(c, name, outputs, scales):
    width = c["hc_mult"] * c["hidden_size"]
    return {
        f"{name}_fn": (outputs, width),
        f"{name}_base": (outputs,),
        f"{name}_scale": (scales,),
    }


def _compressor(c, name, m, channels, width):
    d = c["hidden_size"]
    return {
        f"{name}.wkv.weight": (channels, d),
        f"{name}.wgate.weight": (channels, d),
        f"{name}.ape": (m, channels),
        f"{name}.norm.weight": (width,),
    }


def _v4_block(c, ratio, hashed):
    d, n, h, q = c["hidden_size"], c["num_attention_heads"], c["head_dim"], c["q_lora_rank"]
    f, e, k = c["moe_intermediate_size"], c["n_routed_experts"], c["num_experts_per_tok"]
    out_groups, i = c["o_groups"] * c["o_lora_rank"], c["index_head_dim"]
    mixes = (2 + c["hc_mult"]) * c["hc_mult"]
    out = {
        "attn_norm.weight": (d,),
        "ffn_norm.weight": (d,),
        **_streams(c, "hc_attn", mixes, 3),
        **_streams(c, "hc_ffn", mixes, 3),
        "attn.wq_a.weight": (q, d),
        "attn.q_norm.weight": (q,),
        "attn.wq_b.weight": (n * h, q),
        "attn.wkv.weight": (h, d),
        "attn.kv_norm.weight": (h,),
        "attn.wo_a.weight": (out_groups, n * h // c["o_groups"]),
        "attn.wo_b.weight": (d, out_groups),
        "attn.attn_sink": (n,),
        "ffn.gate.weight": (e, d),
    }
    out |= {"ffn.gate.tid2eid": (c["vocab_size"], k)} if hashed else {"ffn.gate.bias": (e,)}
    for name in (*(f"experts.{j}" for j in range(e)), "shared_experts"):
        out |= {f"ffn.{name}.w1.weight": (f, d), f"ffn.{name}.w3.weight": (f, d)}
        out[f"ffn.{name}.w2.weight"] = (d, f)
    if ratio == 4:
        out |= _compressor(c, "attn.compressor", 4, 2 * h, h)
        out |= _compressor(c, "attn.indexer.compressor", 4, 2 * i, i)
        out["attn.indexer.wq_b.weight"] = (c["index_n_heads"] * i, q)
        out["attn.indexer.weights_proj.weight"] = (c["index_n_heads"], d)
    return out | (_compressor(c, "attn.compressor", 128, h, h) if ratio == 128 else {})


def deepseek_v4(c):
    v, d, n = c["vocab_size"], c["hidden_size"], c["hc_mult"]
    out = {"embed.weight": (v, d), "norm.weight": (d,), "head.weight": (v, d)}
    out |= _streams(c, "hc_head", n, 1)
    for i in range(c["num_hidden_layers"]):
        block = _v4_block(c, c["compress_ratios"][i], i < c["num_hash_layers"])
        out |= {f"layers.{i}.{name}": shape for name, shape in block.items()}
    for i in range(c["num_nextn_predict_layers"]):
        block = _v4_block(c, 0, False) | _streams(c, "hc_head", n, 1)
        block |= {f"{name}.weight": (d,) for name in ("enorm", "hnorm", "norm")}
        block |= {f"{name}.weight": (d, d) for name in ("e_proj", "h_proj")}
        out |= {f"mtp.{i}.{name}": shape for name, shape in block.items()}
    return out
