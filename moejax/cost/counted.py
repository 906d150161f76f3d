"""DeepSeek-V4.1, which we count and do not run, from its config.json; published caches of V3.2 and V4.

Sources: V3.2 (2512.02556 section 2, the sparse-attention indexer), V4.1 (technical report of September 2026, no
arXiv id), which has V4's (2606.19348) projections and streams.
"""

import dataclasses

from moejax.config import ConfigError
from moejax.cost.architecture import (
    Architecture,
    Attention,
    Part,
    dense_part,
    expert_part,
    of_model,
    table_part,
)
from moejax.models import zoo
from moejax.models.zoo import fields

INDEX_HEAD_DIM = 128


def of_hf(hf: dict, name: str = "model") -> Architecture:
    """The description of any config.json we know, runnable or not.

    Raises ConfigError as `config_from_hf` does.
    """
    kind = hf.get("model_type")
    if kind == "deepseek_v32":
        return _v32(hf, name)
    if kind == "deepseek_v4":
        return _v4(hf, name)
    if kind == "deepseek_v41":
        return _v41(hf, name)
    return of_model(zoo.config_from_hf(hf), name)


def _v32(hf: dict, name: str) -> Architecture:
    """V3.2, with the storage of its cache as published."""
    model = of_model(zoo.config_from_hf(hf), name)
    assert model.attention is not None
    # FP8 latent with four float32 scales, BF16 rope key; FP8 index key with a float32 scale.
    stored = dict(
        key_bytes=hf["kv_lora_rank"] + 16 + 2 * hf["qk_rope_head_dim"],
        index_bytes=hf["index_head_dim"] + 4,
    )
    attention = tuple(dataclasses.replace(a, **stored) for a in model.attention)
    return dataclasses.replace(model, attention=attention)


def _v4_projections(n: dict) -> tuple[int, int]:
    """(matrices, vectors) of V4's query, key = value and grouped low-rank output projections."""
    d, q, out = n["hidden_size"], n["q_lora_rank"], n["o_groups"] * n["o_lora_rank"]
    wide = n["num_attention_heads"] * n["head_dim"]
    matrix = q * d + wide * q + n["head_dim"] * d + out * (wide // n["o_groups"]) + d * out
    return matrix, q + n["head_dim"] + n["num_attention_heads"]


V4_SIZES = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "head_dim",
    "q_lora_rank", "o_groups", "o_lora_rank", "n_routed_experts", "num_experts_per_tok",
    "moe_intermediate_size", "hc_mult", "index_n_heads", "index_topk", "max_position_embeddings",
    "sliding_window",
)  # fmt: skip


def _sizes(n: dict[str, int]) -> dict:
    """The sizes of an `Architecture` from those of a config.json."""
    return {
        "num_layers": n["num_hidden_layers"],
        "d_model": n["hidden_size"],
        "vocab_size": n["vocab_size"],
        "max_seq_len": n["max_position_embeddings"],
        "experts": (n["n_routed_experts"], n["num_experts_per_tok"]),
    }


def _v4_common(n: dict, balance_biases: int) -> tuple[Part, ...]:
    """What V4.1 has of V4: embeddings, experts, norms, hyper-connections, plain projections."""
    d, layers, experts = n["hidden_size"], n["num_hidden_layers"], n["n_routed_experts"]
    ffn, streams = 3 * d * n["moe_intermediate_size"], n["hc_mult"]
    # Each sub-layer reads, writes and mixes (n x n) its n streams: n(n+2) outputs of n d inputs.
    mixes = streams * (streams + 2)
    return (
        table_part("embedding", n["vocab_size"] * d),
        dense_part("attention", layers, *_v4_projections(n)),
        dense_part("norms", layers, 0, 2 * d),
        dense_part("hyper-connections", 2 * layers, mixes * streams * d, mixes + 3),
        dense_part("final hyper-connection", 1, streams * streams * d, streams + 1),
        expert_part(layers, experts, n["num_experts_per_tok"], ffn),
        dense_part("shared experts", layers, ffn),
        dense_part("router", layers, d * experts),
        dense_part("balance bias", 1, 0, balance_biases),
        dense_part("final norm", 1, 0, d),
        dense_part("head", 1, n["vocab_size"] * d),
    )


def _v4(hf: dict, name: str) -> Architecture:
    """The model as it runs, with the storage of its cache that the paper counts."""
    cfg = zoo.config_from_hf(hf)
    arch, rope = of_model(cfg, name), cfg.attention.qk_rope_head_dim

    def stored(a: Attention) -> Attention:
        # FP8 with BF16 rope numbers and 8 bytes of scales; an FP4 index key with its scales.
        index = a.index_cache / 2 + 4 if a.index_cache else None
        return dataclasses.replace(a, key_bytes=a.cache + rope + 8, index_bytes=index)

    assert arch.attention is not None
    return dataclasses.replace(arch, attention=tuple(map(stored, arch.attention)))


def _v41(hf: dict, name: str) -> Architecture:
    """V4.1-Flash's text backbone. Its attention is not described well enough to count FLOPs, nor
    are the key compressors of its four source layers (by the published total about 0.02B); both
    stay out.
    """
    text = hf.get("text_config")
    if not isinstance(text, dict):
        raise ConfigError("deepseek_v41 config: missing text_config")
    n = fields.sizes(text, "deepseek_v41", *V4_SIZES)
    layers, d = n["num_hidden_layers"], n["hidden_size"]
    indexers = len(text.get("index_source_layer_ids") or [])
    index = n["index_n_heads"] * (INDEX_HEAD_DIM * n["q_lora_rank"] + d)
    rows = sum(text.get("engram_num_embeddings") or [])
    return Architecture(
        name=name,
        **_sizes(n),
        parts=(
            *_v4_common(n, 2 * layers * n["n_routed_experts"]),  # one for text, one for images
            dense_part("indexers", indexers, index),
        ),
        attention=None,
        apart=(
            table_part(
                "Engram tables", rows * fields.size(text, "deepseek_v41", "engram_head_dim")
            ),
        ),
        # The decoder's keys are projected from the encoder's output: a prompt needs no decoder.
        prefill_share=0.5,
        missing="key compressors of the source layers, vision tower, drafter",
    )
