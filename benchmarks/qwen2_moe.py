"""The model that the benchmarks compare: Qwen2-MoE's, here and (a child process) in transformers."""

import json
import os
import subprocess
import time

from benchmarks import common
from moejax.config import AttentionConfig, ModelConfig, MoEConfig

SIZES = dict(
    vocab_size=4096,
    d_model=256,
    num_layers=6,
    num_dense_layers=1,
    d_ff=1024,
    num_heads=4,
    num_experts=64,
    experts_per_token=6,
    d_expert=128,
    d_shared=256,
    max_seq_len=1024,
)
TOY = dict(
    vocab_size=64,
    d_model=32,
    num_layers=3,
    num_dense_layers=1,
    d_ff=48,
    num_heads=2,
    num_experts=8,
    experts_per_token=2,
    d_expert=16,
    d_shared=16,
    max_seq_len=64,
)
# transformers' ways through the experts.
IMPLEMENTATIONS = ("grouped_mm", "eager")


def model_config(sizes: dict, **model) -> ModelConfig:
    """Biases on queries, keys and values, a gate on the shared expert; `model` replaces fields."""
    s = dict(sizes)
    heads = s.pop("num_heads")
    experts = MoEConfig(
        num_experts=s.pop("num_experts"),
        experts_per_token=s.pop("experts_per_token"),
        d_expert=s.pop("d_expert"),
        shared_experts=1,
        d_shared=s.pop("d_shared"),
        shared_gate=True,
    )
    attention = AttentionConfig(
        num_heads=heads, num_kv_heads=heads, head_dim=s["d_model"] // heads, qkv_bias=True
    )
    return ModelConfig(**{**s, **model}, init_std=0.02, attention=attention, moe=experts)


class Torch:
    """The child process with transformers' model; see `torch_peer.py` for its requests."""

    def __init__(self, python: str, sizes: dict):
        script = os.path.join(os.path.dirname(__file__), "torch_peer.py")
        threads = str(len(os.sched_getaffinity(0)))
        command = [python, script, f"--sizes={json.dumps(sizes)}", f"--threads={threads}"]
        pipe = subprocess.PIPE
        self.child = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self.versions = self.child.stdout.readline().strip()
        if not self.versions:
            raise SystemExit(
                f"{python} could not run benchmarks/torch_peer.py (see above): give the path of a "
                "Python that has torch and transformers with --torch_python=PATH"
            )

    def timer(self, *request) -> common.Timer:
        def run():
            print(*request, file=self.child.stdin, flush=True)
            wall, cpu = map(float, self.child.stdout.readline().split())
            time.sleep(0.1)  # let the child's threads go to sleep before the next one's turn
            return wall, cpu

        return common.Timer(run)

    def close(self):
        self.child.stdin.close()
        self.child.wait()
