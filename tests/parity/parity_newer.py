"""The models compared, continued: dense families with grouped queries, and MoE families of 2024 and later."""

from parity_shapes import DECODER, GQA, MHA, NO_AUX, Case

# 64 positions: of 3 frequencies of a head, one is kept, one is between and one is slowed.
LLAMA3 = {
    "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 50.0, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
    }
}  # fmt: skip

BASE: dict[str, dict] = {
    "mistral": {**DECODER, "intermediate_size": 53, "rope_theta": 1e4},
    "qwen3": {**DECODER, "intermediate_size": 53, "head_dim": 10},
    "granitemoe": {
        **DECODER, **NO_AUX, "num_local_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 10,
    },
}  # fmt: skip

CASES = [
    Case("mistral", "window", {**GQA, "sliding_window": 5}, gradient=True),
    Case("mistral", "no-window-wide-heads-tied-shards",
         {**GQA, "head_dim": 10, "sliding_window": None, "tie_word_embeddings": True}, shard="20KB"),
    Case("qwen3", "tied", {**GQA, "tie_word_embeddings": True}, gradient=True),
    Case("qwen3", "windows-biases-shards",
         {**MHA, "num_hidden_layers": 3, "attention_bias": True, "use_sliding_window": True,
          "sliding_window": 4, "max_window_layers": 1},
         shard="20KB"),
    Case("qwen2_moe", "windows", {**GQA, "use_sliding_window": True, "sliding_window": 4}),
    Case("qwen3_moe", "window",
         {**GQA, "head_dim": 10, "norm_topk_prob": True, "use_sliding_window": True, "sliding_window": 4}),
    Case("granitemoe", "multipliers",
         {**GQA, "embedding_multiplier": 1.5, "residual_multiplier": 0.7, "attention_multiplier": 0.3,
          "logits_scaling": 0.8},
         gradient=True),
    Case("granitemoe", "biases-tied-shards",
         {**MHA, "attention_bias": True, "tie_word_embeddings": True, "residual_multiplier": 1.2},
         shard="20KB"),
]  # fmt: skip
