"""Imported, a model stops where its files say: end tokens of every file, stop texts that are special tokens."""

import json

import numpy as np
import pytest
import tokenizers
from published import config, random_tensors, write
from tokenizers import decoders, models, pre_tokenizers

from moejax.__main__ import main

SPECIALS = ("<|endoftext|>", "<|im_end|>")


def successor_model(folder, successor, **files):
    """A LLaMA of one idle layer whose likeliest token after a is successor[a]; byte-level characters."""
    alphabet = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    made = tokenizers.Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([tokenizers.AddedToken(s, normalized=False) for s in SPECIALS])
    ids = made.get_vocab()
    size = len(ids)
    hf = config("llama") | {
        "vocab_size": size, "hidden_size": 260, "num_hidden_layers": 1, "attention_bias": False,
        **files.pop("config", {}),
    }  # fmt: skip
    tensors = {n: np.zeros_like(t, np.float32) for n, t in random_tensors(hf).items()}
    for name in tensors:
        if "norm" in name:
            tensors[name][:] = 1
    tensors["model.embed_tokens.weight"] = np.eye(size, 260, dtype=np.float32)
    head = np.eye(size, 260, dtype=np.float32)
    for a, b in successor.items():
        head[:, ids[a]] = 0
        head[ids[b], ids[a]] = 1
    tensors["lm_head.weight"] = head
    write(folder, hf, tensors)
    made.save(str(folder / "tokenizer.json"))
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))


def generate(run, capsys, *flags):
    capsys.readouterr()
    arguments = [f"--workdir={run}", "--greedy", "--jsonl", "--prompt=x", "--max_new=5", *flags]
    assert main(["generate", *arguments]) == 0
    return json.loads(capsys.readouterr().out)["text"]


CHAIN = {"x": "<|im_end|>", "<|im_end|>": "y"}
ENDS = {
    "no file": ({}, "yyyy"),
    "config.json": ({"config": {"eos_token_id": 257}}, ""),
    "config.json, a list": ({"config": {"eos_token_id": [3, 257]}}, ""),
    "tokenizer_config.json": ({"tokenizer_config": {"eos_token": "<|im_end|>"}}, ""),
    "special_tokens_map.json": ({"special_tokens_map": {"eos_token": "<|im_end|>"}}, ""),
    "generation_config.json": ({"generation_config": {"eos_token_id": [257]}}, ""),
    "stop_strings": ({"generation_config": {"stop_strings": "yy"}}, ""),
}


@pytest.mark.parametrize("files, text", ENDS.values(), ids=ENDS)
def test_a_text_ends_at_the_end_token_of_any_file(tmp_path, capsys, files, text):
    successor_model(tmp_path / "hf", CHAIN, **files)
    assert main(["import", f"--hf_dir={tmp_path / 'hf'}", f"--workdir={tmp_path / 'run'}"]) == 0
    assert generate(tmp_path / "run", capsys) == text
    if not files:
        assert generate(tmp_path / "run", capsys, "--stop=<|im_end|>") == ""
        assert generate(tmp_path / "run", capsys, "--stop=yyy") == ""
