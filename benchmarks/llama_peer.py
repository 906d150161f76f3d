"""A child process of `real_size`: the same sizes in llama.cpp, from a GGUF file of random numbers.

    PYTHON -m benchmarks.llama_peer JSON     # PYTHON has llama-cpp-python and gguf; prints JSON

JSON: `folder`; `write` (else measure); `format`, "int8" (Q8_0) or "int4" (Q4_0), blocks of 32 with a scale
each; `batches`, `new` tokens to time, `repeats`, `threads`; and the sizes of a model as DeepSeekMoE's: `vocab`,
`layers`, `d_model`, `d_ff`, `heads`, `experts`, `chosen`, `shared`, `d_expert`. The first layer is dense.
"""

import json
import pathlib
import resource
import sys
import time

import gguf
import llama_cpp
import numpy as np

FORMATS = {
    "int8": (gguf.GGMLQuantizationType.Q8_0, 32),
    "int4": (gguf.GGMLQuantizationType.Q4_0, 16),
}


def write(path: pathlib.Path, c: dict) -> None:
    """One random matrix stands in every place of its shape: only where it is read from matters."""
    kind, values = FORMATS[c["format"]]
    rng = np.random.default_rng(0)
    made: dict = {}

    def matrix(*shape):
        if shape not in made:
            blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // 32, 2 + values), np.uint8)
            blocks[..., :2] = np.frombuffer(np.float16(0.002).tobytes(), np.uint8)
            made[shape] = blocks.reshape(*shape[:-1], -1)
        return made[shape]

    d, wide, ones = c["d_model"], c["shared"] * c["d_expert"], np.ones(c["d_model"], np.float32)
    writer = gguf.GGUFWriter(path, "deepseek")
    writer.add_context_length(4096)
    writer.add_embedding_length(d)
    writer.add_block_count(c["layers"])
    writer.add_feed_forward_length(c["d_ff"])
    writer.add_head_count(c["heads"])
    writer.add_head_count_kv(c["heads"])
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(d // c["heads"])
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(c["vocab"])
    writer.add_leading_dense_block_count(1)
    writer.add_expert_feed_forward_length(c["d_expert"])
    writer.add_expert_weights_scale(1.0)
    writer.add_expert_count(c["experts"])
    writer.add_expert_used_count(c["chosen"])
    writer.add_expert_shared_count(c["shared"])
    writer.add_tokenizer_model("no_vocab")

    def add(name, a):
        writer.add_tensor(name, a, raw_dtype=kind if a.dtype == np.uint8 else None)

    add("token_embd.weight", matrix(c["vocab"], d))
    add("output_norm.weight", ones)
    add("output.weight", matrix(c["vocab"], d))
    for i in range(c["layers"]):
        for name in ("q", "k", "v", "output"):
            add(f"blk.{i}.attn_{name}.weight", matrix(d, d))
        for name in ("attn_norm", "ffn_norm"):
            add(f"blk.{i}.{name}.weight", ones)
        if i == 0:
            for name, shape in (("gate", (c["d_ff"], d)), ("up", (c["d_ff"], d))):
                add(f"blk.{i}.ffn_{name}.weight", matrix(*shape))
            add(f"blk.{i}.ffn_down.weight", matrix(d, c["d_ff"]))
            continue
        router = rng.normal(size=(c["experts"], d)).astype(np.float32)
        add(f"blk.{i}.ffn_gate_inp.weight", router)
        for name in ("gate", "up"):
            add(f"blk.{i}.ffn_{name}_exps.weight", matrix(c["experts"], c["d_expert"], d))
            add(f"blk.{i}.ffn_{name}_shexp.weight", matrix(wide, d))
        add(f"blk.{i}.ffn_down_exps.weight", matrix(c["experts"], d, c["d_expert"]))
        add(f"blk.{i}.ffn_down_shexp.weight", matrix(d, wide))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def measure(path: pathlib.Path, c: dict) -> dict:
    """Tokens per second of decoding for each batch, and the peak of memory."""
    llama_cpp.llama_backend_init()
    quiet = llama_cpp.llama_log_callback(lambda *args: None)
    llama_cpp.llama_log_set(quiet, None)
    params = llama_cpp.llama_model_default_params()
    params.use_mmap = False  # all of it in memory, as on our side
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    assert model, "llama.cpp did not load the file"
    found: dict = {"tokens_per_second": {}}
    for batch in c["batches"]:
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_seq_max = 64 * batch, 64 * batch, batch
        context.n_threads = context.n_threads_batch = c["threads"]
        state = llama_cpp.llama_init_from_model(model, context)
        tokens = llama_cpp.llama_batch_init(batch, 0, 1)

        def step(position, state=state, tokens=tokens, batch=batch):
            tokens.n_tokens = batch
            for i in range(batch):
                tokens.token[i] = (7 * i + 3 * position) % c["vocab"]
                tokens.pos[i] = position
                tokens.n_seq_id[i] = 1
                tokens.seq_id[i][0] = i
                tokens.logits[i] = True
            assert llama_cpp.llama_decode(state, tokens) == 0

        for position in range(8):
            step(position)
        seconds, position = [], 8
        for _ in range(c["repeats"]):
            started = time.perf_counter()
            for _ in range(c["new"]):
                step(position)
                position += 1
            seconds.append((time.perf_counter() - started) / c["new"])
        found["tokens_per_second"][batch] = batch / sorted(seconds)[len(seconds) // 2]
        llama_cpp.llama_free(state)
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["version"] = llama_cpp.__version__
    return found


def main():
    c = json.loads(sys.argv[1])
    path = pathlib.Path(c["folder"]) / f"{c['format']}.gguf"
    if c["write"]:
        write(path, c)
        print("{}")
    else:
        print(json.dumps(measure(path, c)))


if __name__ == "__main__":
    main()
