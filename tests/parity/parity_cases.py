"""The models compared: each family in several small shapes, as the keys of its published config.json.

Sizes are odd on purpose: a transposed, fused or mis-split tensor then cannot fit by accident.
"""

import parity_newer
from parity_shapes import DECODER, EXPERTS, FINE, GQA, GROUPS, MHA, MLA, NO_AUX, Case, yarn

# What every case of a family shares.
BASE: dict[str, dict] = {
    "llama": {**DECODER, "intermediate_size": 53},
    "gpt2": {
        "vocab_size": 101,
        "n_embd": 36,
        "n_layer": 2,
        "n_positions": 64,
        "bos_token_id": None,
        "eos_token_id": None,
    },
    "gpt_oss": {
        **DECODER,
        **NO_AUX,
        "num_hidden_layers": 3,
        "intermediate_size": 10,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
    },
    "mixtral": {**DECODER, **NO_AUX, "intermediate_size": 22},
    "qwen2_moe": {
        **DECODER,
        **NO_AUX,
        **EXPERTS,
        "intermediate_size": 44,
        "shared_expert_intermediate_size": 18,
    },
    "qwen3_moe": {**DECODER, **NO_AUX, **EXPERTS, "intermediate_size": 44},
    "olmoe": {
        **DECODER,
        **NO_AUX,
        "num_experts": 7,
        "num_experts_per_tok": 3,
        "intermediate_size": 10,
    },
    "deepseek": {
        **DECODER,
        **FINE,
        "num_hidden_layers": 3,
        "rms_norm_eps": 1e-6,
        "aux_loss_alpha": 0.0,
    },
    "deepseek_v2": {**DECODER, **MLA, **FINE, "num_hidden_layers": 3, "aux_loss_alpha": 0.0},
    "deepseek_v3": {**DECODER, **MLA, **FINE, "num_hidden_layers": 3, "num_nextn_predict_layers": 0},
}  # fmt: skip
BASE["kimi_k2"] = BASE["deepseek_v3"]
BASE |= parity_newer.BASE

CASES = [
    Case("llama", "mha-tied", {**MHA, "tie_word_embeddings": True}, gradient=True),
    Case(
        "llama",
        "gqa-biases-shards",
        {**GQA, "head_dim": 8, "attention_bias": True, "mlp_bias": True, "rms_norm_eps": 1e-5},
        shard="20KB",
    ),
    Case("llama", "yarn", {**GQA, **yarn(4.0)}),
    Case("llama", "llama3", {**GQA, **parity_newer.LLAMA3}),
    Case("gpt2", "3-heads", {"n_head": 3}, gradient=True),
    Case("gpt2", "inner-shards", {"n_head": 4, "n_inner": 50, "n_layer": 3}, shard="20KB"),
    Case(
        "gpt_oss",
        "windows-yarn",
        {**GQA, "head_dim": 8, "sliding_window": 4, **yarn(8.0, truncate=False)},
        gradient=True,
    ),
    Case(
        "gpt_oss",
        "mha-clamped-shards",
        {
            **MHA,
            "head_dim": 12,
            "sliding_window": 3,
            "layer_types": ["full_attention", "sliding_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
            "swiglu_limit": 0.5,
        },
        shard="20KB",
    ),
    Case(
        "mixtral",
        "gqa-window-tied",
        {**GQA, "sliding_window": 5, "num_local_experts": 5, "tie_word_embeddings": True},
        gradient=True,
    ),
    Case(
        "mixtral",
        "mha-top3-shards",
        {**MHA, "head_dim": 10, "num_local_experts": 8, "num_experts_per_tok": 3},
        shard="20KB",
    ),
    Case("qwen2_moe", "shared-gate", {**MHA}, gradient=True),
    Case(
        "qwen2_moe",
        "gqa-dense-layer-normalised-tied-shards",
        {
            **GQA,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
            "norm_topk_prob": True,
            "qkv_bias": False,
            "tie_word_embeddings": True,
        },
        shard="20KB",
    ),
    Case("qwen3_moe", "gqa-wide-heads", {**GQA, "head_dim": 10, "norm_topk_prob": True}, gradient=True),
    Case(
        "qwen3_moe",
        "mha-biases-dense-layer-yarn-shards",
        {
            **MHA,
            "head_dim": 12,
            "num_hidden_layers": 3,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            "attention_bias": True,
            **yarn(4.0),
        },
        shard="20KB",
    ),
    Case("olmoe", "mha", {**MHA}, gradient=True),
    Case(
        "olmoe",
        "gqa-normalised-biases-tied-shards",
        {**GQA, "norm_topk_prob": True, "attention_bias": True, "tie_word_embeddings": True},
        shard="20KB",
    ),
    Case("deepseek", "16b-like", {**MHA}, gradient=True),
    Case(
        "deepseek",
        "gqa-all-moe-tied-shards",
        {**GQA, "first_k_dense_replace": 0, "num_hidden_layers": 2, "tie_word_embeddings": True,
         "n_shared_experts": 1, "rope_theta": 500.0},
        shard="20KB",
    ),
    Case(
        "deepseek_v2",
        "lite",
        {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1,
         **yarn(40.0, mscale=0.707, mscale_all_dim=0.707)},
        gradient=True,
    ),
    Case(
        "deepseek_v2",
        "groups-shards",
        {"q_lora_rank": 14, "topk_method": "group_limited_greedy", **GROUPS,
         "routed_scaling_factor": 4.0, **yarn(40.0, mscale=1.0, mscale_all_dim=0.5)},
        shard="20KB",
    ),
    Case(
        "deepseek_v2",
        "groups-plain-rope-tied",
        {"q_lora_rank": 14, "topk_method": "group_limited_greedy", "n_group": 2, "topk_group": 1,
         "first_k_dense_replace": 0, "num_hidden_layers": 2, "tie_word_embeddings": True},
    ),
    Case(
        "deepseek_v3",
        "groups-yarn",
        {"q_lora_rank": 14, **GROUPS, **yarn(40.0, mscale=1.0, mscale_all_dim=1.0)},
        gradient=True,
    ),
    Case(
        "deepseek_v3",
        "moonlight-shards",
        {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "routed_scaling_factor": 2.446,
         "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 50_000.0}},
        shard="20KB",
    ),
    Case(
        "deepseek_v3",
        "groups-unnormalised-tied",
        {"q_lora_rank": 14, "n_group": 2, "topk_group": 1, "norm_topk_prob": False,
         "first_k_dense_replace": 2, "n_shared_experts": 1, "tie_word_embeddings": True},
    ),
    Case(
        "kimi_k2",
        "one-group-yarn-step",
        {"q_lora_rank": 14, "n_group": 1, "topk_group": 1, "n_shared_experts": 1,
         **yarn(32.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0)},
    ),
    *parity_newer.CASES,
]  # fmt: skip
