"""The models compared, continued: dense families with grouped queries, and MoE families of 2024 and later."""

from parity_shapes import DECODER, FINE, GQA, GROUPS, MHA, MLA, NO_AUX, Case, yarn

# 64 positions: of 3 frequencies of a head, one is kept, one is between and one is slowed.
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }
}  # fmt: skip

# Fewer keys than tokens. With few heads the relu makes every score 0 for some keys, and equal scores may be
# ordered in either way.
INDEXER = {"q_lora_rank": 14, "index_n_heads": 24, "index_head_dim": 10, "index_topk": 5}

BASE: dict[str, dict] = {
    "mistral": {**DECODER, "intermediate_size": 53, "rope_theta": 1e4},
    "qwen3": {**DECODER, "intermediate_size": 53, "head_dim": 10},
    "granitemoe": {
        **DECODER, **NO_AUX, "num_local_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 10,
    },
    "dots1": {**DECODER, **FINE, "num_hidden_layers": 3},
    "glm4_moe": {**DECODER, **FINE, "num_hidden_layers": 3, "num_mtp_layers": 0},
    "glm4_moe_lite": {
        **DECODER, **MLA, **FINE, "num_hidden_layers": 3, "q_lora_rank": 14, "n_shared_experts": 1,
    },
    "deepseek_v32": {**DECODER, **MLA, **FINE, **INDEXER, "num_hidden_layers": 3},
    "glm_moe_dsa": {**DECODER, **MLA, **FINE, **INDEXER, "num_hidden_layers": 4},
    "ernie4_5_moe": {
        **DECODER, **NO_AUX, "num_hidden_layers": 3, "intermediate_size": 44, "moe_intermediate_size": 10,
        "moe_num_experts": 7, "moe_k": 3, "moe_num_shared_experts": 2, "tie_word_embeddings": False,
    },
    "hunyuan_v1_moe": {**DECODER, "intermediate_size": 10, "num_experts": 7, "moe_topk": 3},
    "minimax_m2": {
        **DECODER, **NO_AUX, "num_local_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 10,
    },
    "mimo_v2_flash": {
        **DECODER, "num_hidden_layers": 4, "intermediate_size": 44, "moe_intermediate_size": 10,
        "n_routed_experts": 8, "num_experts_per_tok": 3, "head_dim": 12, "v_head_dim": 10,
        "num_attention_heads": 4, "num_key_value_heads": 1, "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.334}
            for kind, theta in (("full_attention", 5e4), ("sliding_attention", 1e2))
        },
    },
    "exaone_moe": {
        **DECODER, "num_hidden_layers": 3, "intermediate_size": 44, "moe_intermediate_size": 10,
        "num_experts": 8, "num_experts_per_tok": 3, "num_shared_experts": 2,
    },
    "solar_open": {
        **DECODER, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 10,
        "n_shared_experts": 2, "head_dim": 10,
    },
    # The clamp bites, there are more entries than the indexer picks, and so many of its heads that no two
    # entries tie at 0.
    "deepseek_v4": {
        **DECODER, "hidden_size": 36, "num_hidden_layers": 3, "max_position_embeddings": 256,
        "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 20, "qk_rope_head_dim": 8,
        "q_lora_rank": 14, "o_groups": 2, "o_lora_rank": 11, "sliding_window": 8, "index_n_heads": 24,
        "index_head_dim": 16, "index_topk": 3, "compress_rope_theta": 1000.0, "hc_mult": 3,
        "hc_sinkhorn_iters": 5, "hc_eps": 1e-3, "n_routed_experts": 8, "num_experts_per_tok": 3,
        "moe_intermediate_size": 10, "n_shared_experts": 1, "swiglu_limit": 1.0,
        "routed_scaling_factor": 1.5, "scoring_func": "sqrtsoftplus", "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128],
        "compress_rates": {"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
        "rope_scaling": {"type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1,
                         "original_max_position_embeddings": 64},
        "num_nextn_predict_layers": 0, "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
V4 = {"length": 37, "pads_left": False}

CASES = [
    Case("mistral", "window", {**GQA, "sliding_window": 5}, gradient=True),
    Case("mistral", "no-window-wide-heads-tied-shards",
         {**GQA, "head_dim": 10, "sliding_window": None, "tie_word_embeddings": True}, shard="20KB"),
    Case("qwen3", "tied", {**GQA, "tie_word_embeddings": True}, gradient=True),
    Case("qwen3", "windows-biases-shards",
         {**MHA, "num_hidden_layers": 3, "attention_bias": True, "use_sliding_window": True,
          "sliding_window": 4, "max_window_layers": 1},
         shard="20KB"),
    Case("qwen2_moe", "windows-dense-between", {**GQA, "use_sliding_window": True, "sliding_window": 4,
         "num_hidden_layers": 3, "mlp_only_layers": [1]}),
    Case("qwen3_moe", "window",
         {**GQA, "head_dim": 10, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 4,
          "num_hidden_layers": 3, "decoder_sparse_step": 2}),
    Case("granitemoe", "multipliers",
         {**GQA, "embedding_multiplier": 1.5, "residual_multiplier": 0.7, "attention_multiplier": 0.3,
          "logits_scaling": 0.8},
         gradient=True),
    Case("granitemoe", "biases-tied-shards",
         {**MHA, "attention_bias": True, "tie_word_embeddings": True, "residual_multiplier": 1.2},
         shard="20KB"),
    Case("dots1", "windows", {**GQA, **GROUPS, "sliding_window": 4, "max_window_layers": 2,
         "norm_topk_prob": True, "routed_scaling_factor": 2.5}, gradient=True),
    Case("glm4_moe", "half-rotated", {**GQA, "head_dim": 8, "use_qk_norm": True, "attention_bias": True,
         "routed_scaling_factor": 2.5}, gradient=True),
    Case("glm4_moe", "no-norm-shards", {**GQA, **GROUPS, "head_dim": 12, "use_qk_norm": False,
         "tie_word_embeddings": True}, shard="20KB"),
    Case("glm4_moe_lite", "latent", {"mlp_layer_types": ["sparse", "dense", "sparse"]}, gradient=True),
    Case("deepseek_v32", "groups-yarn", {**GROUPS, "routed_scaling_factor": 2.5, **yarn(4.0, mscale=1.0,
         mscale_all_dim=1.0)}, gradient=True),
    Case("glm_moe_dsa", "shared-shards",
         {"indexer_types": ["full", "shared", "full", "shared"], "n_group": 1, "topk_group": 1},
         shard="20KB", gradient=True),
    Case("ernie4_5_moe", "pairs", {**GQA}, gradient=True),
    Case("ernie4_5_moe", "dense-around-shards", {**MHA, "num_hidden_layers": 4, "moe_layer_interval": 2,
         "moe_layer_start_index": 0, "moe_num_shared_experts": 1}, shard="20KB"),
    Case("hunyuan_v1_moe", "norm-after", {**GQA, "head_dim": 10}, gradient=True),
    Case("hunyuan_v1_moe", "alpha-tied-shards",
         {**MHA, "head_dim": 12, "tie_word_embeddings": True,
          "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "alpha": 10.0, "factor": 1.0}},
         shard="20KB"),
    Case("minimax_m2", "half-rotated", {**GQA, "head_dim": 8, "rotary_dim": 4}, gradient=True),
    Case("mimo_v2_flash", "windows-with-heads-of-their-own", {}, gradient=True),
    Case("mimo_v2_flash", "biases-dense-between-shards",
         {**GROUPS, "attention_bias": True, "attention_value_scale": 1.3, "sliding_window": 5,
          "mlp_layer_types": ["sparse", "dense", "sparse", "sparse"]}, shard="20KB"),
    Case("exaone_moe", "windows", {**GQA, "head_dim": 10, "sliding_window": 4,
         "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}, gradient=True),
    Case("deepseek_v4", "published", {}, gradient=True, **V4),
    Case("deepseek_v4", "modules", {"compress_ratios": [4, 4, 0], "hc_mult": 4, "rms_norm_eps": 1e-3}, **V4),
    Case("deepseek_v4", "saved-shards", {"num_hidden_layers": 2, "compress_ratios": [128, 4],
         "num_hash_layers": 0, "compress_rates": None, "rope_scaling": None}, shard="20KB", **V4),
    Case("solar_open", "all-moe", {**GQA, "attention_bias": True}, gradient=True),
]  # fmt: skip
