"""The torch side of `benchmarks.step`: a training step of transformers' Qwen2-MoE, on request.

Run by an interpreter that has torch and transformers; it imports nothing else. Reads names of expert
implementations from standard input, one a line, runs a step of that model and answers with its seconds
of wall clock and of processor time.
"""

import argparse
import json
import sys
import time

import torch
import transformers


def build(sizes: dict, implementation: str):
    """A step (forward, backward, clipping, AdamW) as a function without arguments."""
    config = transformers.Qwen2MoeConfig(
        vocab_size=sizes["vocab_size"],
        hidden_size=sizes["d_model"],
        num_hidden_layers=sizes["num_layers"],
        mlp_only_layers=list(range(sizes["num_dense_layers"])),
        intermediate_size=sizes["d_ff"],
        num_attention_heads=sizes["num_heads"],
        num_key_value_heads=sizes["num_heads"],
        num_experts=sizes["num_experts"],
        num_experts_per_tok=sizes["experts_per_token"],
        moe_intermediate_size=sizes["d_expert"],
        shared_expert_intermediate_size=sizes["d_shared"],
        max_position_embeddings=sizes["seq_len"],
        use_cache=False,
        tie_word_embeddings=False,
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(config).train()
    used = model.config._experts_implementation
    if used != implementation:
        raise SystemExit(f"transformers uses {used!r} experts, not {implementation!r}")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)
    tokens = torch.randint(sizes["vocab_size"], (sizes["batch_size"], sizes["seq_len"]))

    def step():
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=json.loads, required=True, help="a JSON object")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    steps = {}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for line in sys.stdin:
        name = line.strip()
        if name not in steps:
            steps[name] = build(args.sizes, name)
            steps[name]()
        wall, cpu = time.perf_counter(), time.process_time()
        steps[name]()
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    main()
