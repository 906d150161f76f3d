"""The torch side of `benchmarks.generate`: prefill and generation with transformers' Qwen2-MoE, on request.

Run by an interpreter that has torch and transformers; it imports nothing else. Reads requests from standard
input, one a line: an expert implementation, rows, prompt tokens and new tokens (0 = only the forward pass
that fills the cache); answers with seconds of wall clock and of processor time.
"""

import argparse
import json
import sys
import time

import torch
import transformers


def build(sizes: dict, implementation: str):
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
        max_position_embeddings=sizes["max_seq_len"],
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    config._experts_implementation = implementation
    torch.manual_seed(0)
    model = transformers.Qwen2MoeForCausalLM(config).eval()
    used = model.config._experts_implementation
    if used != implementation:
        raise SystemExit(f"transformers uses {used!r} experts, not {implementation!r}")
    return model


def answer(model, rows: int, prompt: int, new: int) -> tuple[float, float]:
    tokens = torch.randint(model.config.vocab_size, (rows, prompt))
    wall, cpu = time.perf_counter(), time.process_time()
    if new:
        out = model.generate(tokens, max_new_tokens=new, do_sample=False)
        assert out.shape == (rows, prompt + new)
    else:
        model(tokens, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - wall, time.process_time() - cpu


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=json.loads, required=True, help="a JSON object")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    models = {}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    with torch.inference_mode():
        for line in sys.stdin:
            name, *numbers = line.split()
            if name not in models:
                models[name] = build(args.sizes, name)
            print(*answer(models[name], *map(int, numbers)), flush=True)


if __name__ == "__main__":
    main()
