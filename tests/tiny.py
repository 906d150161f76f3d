"""The quickstart shrunk to what a test can train, as overrides of its config and as flags of a command."""

OVERRIDES = {
    "model.d_model": 16,
    "model.num_layers": 2,
    "model.d_ff": 32,
    "model.attention.num_heads": 2,
    "model.attention.num_kv_heads": 2,
    "model.attention.head_dim": 8,
    "model.moe.num_experts": 4,
    "model.moe.experts_per_token": 2,
    "model.moe.d_expert": 8,
    "data.tokenizer": "byte",
    "data.max_bytes": 100_000,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "train.log_every": 1,
    "train.eval_every": 100,
    "train.eval_batches": 1,
}


def flags(changes: dict) -> list[str]:
    """OVERRIDES with some replaced or added, as `--config.KEY=VALUE`."""
    return [f"--config.{key}={value}" for key, value in {**OVERRIDES, **changes}.items()]
