"""The torch side of `benchmarks.step`, `.generate` and `.full_width`: a model of transformers, on request.

`--sizes` are those of a Qwen2-MoE, or {"hf": the fields of a config.json, "dtype": ..}. Run by an interpreter
that has torch and transformers; it imports nothing else. Reads requests from standard input, one a line, and
answers with seconds of wall clock and of processor time:

    step IMPLEMENTATION ROWS LENGTH                a training step (forward, backward, clipping, AdamW)
    generate IMPLEMENTATION ROWS PROMPT NEW        greedy; NEW = 0: only the pass that fills the cache

IMPLEMENTATION is one of transformers' for the experts: eager, grouped_mm. The first request of a kind also
builds the model and runs once unmeasured.
"""

import argparse
import functools
import json
import sys
import time

import torch
import transformers


def build(sizes: dict, implementation: str):
    torch.manual_seed(0)
    if "hf" in sizes:
        fields = dict(sizes["hf"])
        config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
        config._experts_implementation = implementation
        dtype = getattr(torch, sizes["dtype"])
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    else:
        model = build_qwen2_moe(sizes, implementation)
    used = model.config._experts_implementation
    if used != implementation:
        raise SystemExit(f"transformers uses {used!r} experts, not {implementation!r}")
    return model


def build_qwen2_moe(sizes: dict, implementation: str):
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
    return transformers.Qwen2MoeForCausalLM(config)


def training(sizes: dict, implementation: str):
    """A step as a function of rows and length."""
    model = build(sizes, implementation).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1, fused=True)

    @functools.cache
    def tokens(rows, length):
        return torch.randint(sizes["vocab_size"], (rows, length))

    def step(rows: int, length: int):
        optimizer.zero_grad()
        ids = tokens(rows, length)
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def generation(sizes: dict, implementation: str):
    """Generation as a function of rows, prompt tokens and new tokens."""
    model = build(sizes, implementation).eval()

    @torch.inference_mode()
    def generate(rows: int, prompt: int, new: int):
        vocabulary = model.config.vocab_size
        tokens = torch.randint(vocabulary, (rows, prompt))
        if new:
            out = model.generate(tokens, max_new_tokens=new, do_sample=False)
            assert out.shape == (rows, prompt + new)
        else:
            model(tokens, use_cache=True, logits_to_keep=1)

    return generate


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=json.loads, required=True, help="a JSON object")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kinds, functions = {"step": training, "generate": generation}, {}
    print(f"torch {torch.__version__}, transformers {transformers.__version__}", flush=True)
    for line in sys.stdin:
        kind, implementation, *numbers = line.split()
        numbers = list(map(int, numbers))
        if (kind, implementation) not in functions:
            functions[kind, implementation] = kinds[kind](args.sizes, implementation)
            functions[kind, implementation](*numbers)
        wall, cpu = time.perf_counter(), time.process_time()
        functions[kind, implementation](*numbers)
        print(time.perf_counter() - wall, time.process_time() - cpu, flush=True)


if __name__ == "__main__":
    main()
