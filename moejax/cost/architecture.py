"""What the cost model needs to know of a model, whether moejax can run it or only count it.

`of_model` describes a ModelConfig, `moejax.cost.counted` the published architectures we do not run.
A model is a list of `Part`s (parameters) and of `Attention`s (what grows with the context); every
count in this package follows from these two. Nothing here imports jax or allocates an array.
"""

import dataclasses

from moejax.config import ModelConfig
from moejax.mesh import MeshSizes

UNGATED = ("gelu_tanh",)  # activations with an up and a down projection only


@dataclasses.dataclass(frozen=True)
class Part:
    """Parameters of one kind, over all layers.

    Attributes:
      name: what they are.
      total: how many there are.
      active: how many one token uses.
      matrix: of the total, those in matrices (the rest: norms, biases, sinks).
      active_matrix: of the active, those in matrix products: 2 FLOPs each per token.
      experts: split over the expert axis of a mesh.
    """

    name: str
    total: int
    active: int
    matrix: int
    active_matrix: int
    experts: bool = False

    def mesh_axes(self, mesh: MeshSizes) -> frozenset[str]:
        """Mesh axes that these parameters are split over."""
        names = ("expert", "expert_embed", "expert_mlp") if self.experts else ("embed", "mlp")
        return frozenset(mesh.mesh_axes(*names))

    def shards(self, mesh: MeshSizes) -> int:
        """Devices that these parameters are split over."""
        return mesh.product(self.mesh_axes(mesh))

    def gathers(self, mesh: MeshSizes) -> int:
        """Devices that these parameters are gathered from for use (fsdp)."""
        split = mesh.mesh_axes("expert_embed" if self.experts else "embed")
        return mesh.product({*split} & {*mesh.mesh_axes("batch")})


@dataclasses.dataclass(frozen=True)
class Attention:
    """Attention in `layers` equal layers. A query sees the keys of its past: all of them, or the
    last `window`, or (V3.2, V4) `topk` chosen by an indexer among one key for every `stride`
    tokens, plus the last `local` tokens.

    Attributes:
      layers: number of such layers.
      macs: multiply-adds per query and visible key, in training and prefill.
      decode_macs: the same in decoding from the cache (MLA attends in its latent space).
      cache: numbers cached for each key.
      window: keys visible at most; 0 = all.
      stride: tokens for each key.
      topk: keys chosen among the visible ones; 0 = all.
      local: recent tokens seen besides.
      index_macs: multiply-adds of the indexer per query and visible key.
      index_cache: numbers the indexer caches for each key.
      key_bytes, index_bytes: published storage of `cache` and `index_cache` (quantised); None: as
        many bytes per number as the rest of the model's cache.
    """

    layers: int
    macs: int
    decode_macs: int
    cache: int
    window: int = 0
    stride: int = 1
    topk: int = 0
    local: int = 0
    index_macs: int = 0
    index_cache: int = 0
    key_bytes: float | None = None
    index_bytes: float | None = None


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Attributes:
    name: for tables.
    num_layers, d_model, vocab_size, max_seq_len: sizes.
    experts: (routed experts, experts per token), or None for a dense model.
    parts: parameters of the model proper.
    attention: None where it is not published well enough to count.
    mtp: parameters of multi-token prediction, which publishers count apart.
    mtp_attention: its attention.
    apart: other parameters counted apart (V4.1's Engram tables).
    prefill_share: part of the layers a prompt runs through (V4.1: its encoder half).
    missing: what the parts leave out because its shape is unknown; empty if nothing.
    """

    name: str
    num_layers: int
    d_model: int
    vocab_size: int
    max_seq_len: int
    experts: tuple[int, int] | None
    parts: tuple[Part, ...]
    attention: tuple[Attention, ...] | None
    mtp: tuple[Part, ...] = ()
    mtp_attention: tuple[Attention, ...] = ()
    apart: tuple[Part, ...] = ()
    prefill_share: float = 1.0
    missing: str = ""

    def part(self, name: str) -> Part | None:
        return next((p for p in self.parts if p.name == name), None)


def dense_part(name: str, layers: int, matrix: int, vectors: int = 0) -> Part:
    """A part that every token uses whole: `matrix` and `vectors` scalars in each layer."""
    every = layers * (matrix + vectors)
    return Part(name, every, every, layers * matrix, layers * matrix)


def expert_part(layers: int, experts: int, per_token: int, matrix: int, vectors: int = 0) -> Part:
    """Routed experts of `matrix + vectors` scalars each."""
    one = layers * (matrix + vectors)
    return Part(
        "routed experts",
        experts * one,
        per_token * one,
        experts * layers * matrix,
        per_token * layers * matrix,
        experts=True,
    )


def table_part(name: str, size: int) -> Part:
    """A table that is looked up: no matrix product."""
    return Part(name, size, size, size, 0)


def ffn_size(d_model: int, width: int, activation: str, bias: bool) -> tuple[int, int]:
    """(scalars in matrices, scalars in biases) of one FFN."""
    into = 1 if activation in UNGATED else 2
    return (into + 1) * d_model * width, (into * width + d_model) * bias


def attention_size(cfg: ModelConfig) -> tuple[int, int]:
    """(scalars in matrices, scalars in biases, norms and sinks) of one attention layer."""
    a, d, n = cfg.attention, cfg.d_model, cfg.attention.num_heads
    if a.kind == "mla":
        query = a.q_lora_rank * (d + n * a.qk_head_dim) if a.q_lora_rank else d * n * a.qk_head_dim
        key_value = d * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank * n * (
            a.qk_nope_head_dim + a.v_head_dim
        )
        return query + key_value + n * a.v_head_dim * d, a.q_lora_rank + a.kv_lora_rank
    q, kv = n * a.head_dim, a.num_kv_heads * a.head_dim
    vectors = (q + 2 * kv) * a.qkv_bias + d * a.out_bias + n * a.sinks
    vectors += {"none": 0, "head": 2 * a.head_dim, "full": q + kv}[a.qk_norm]
    return d * (2 * q + 2 * kv), vectors


def block_parts(cfg: ModelConfig, dense_layers: int, moe_layers: int) -> tuple[Part, ...]:
    """The parts of that many dense and MoE blocks."""
    m, d, layers = cfg.moe, cfg.d_model, dense_layers + moe_layers
    norm = 2 * d * (2 if cfg.norm == "layernorm" else 1)
    parts = [
        dense_part("attention", layers, *attention_size(cfg)),
        dense_part("norms", layers, 0, norm),
    ]
    if dense_layers:
        size = ffn_size(d, cfg.d_ff, cfg.activation, cfg.ffn_bias)
        parts.append(dense_part("dense FFN", dense_layers, *size))
    if moe_layers:
        size = ffn_size(d, m.d_expert, m.activation, m.ffn_bias)
        parts.append(expert_part(moe_layers, m.num_experts, m.experts_per_token, *size))
        if m.shared_width:
            matrix, vectors = ffn_size(d, m.shared_width, m.activation, m.ffn_bias)
            parts.append(
                dense_part("shared experts", moe_layers, matrix + d * m.shared_gate, vectors)
            )
        bias = m.num_experts * m.router_bias
        parts.append(dense_part("router", moe_layers, d * m.num_experts, bias))
        if m.bias_update != "none":
            # Not a parameter in moejax (it is router state), but one in published counts.
            parts.append(dense_part("balance bias", moe_layers, 0, m.num_experts))
    return tuple(parts)


def attention_of(cfg: ModelConfig, layers: int, window: int = 0) -> Attention:
    a = cfg.attention
    n = a.num_heads
    macs = n * (a.qk_head_dim + a.value_head_dim)
    if a.kind == "mla":
        latent = a.kv_lora_rank + a.qk_rope_head_dim
        decode = n * (latent + a.kv_lora_rank)
        return Attention(layers, macs, decode, latent, window)
    return Attention(layers, macs, macs, 2 * a.num_kv_heads * a.head_dim, window)


def of_model(cfg: ModelConfig, name: str = "model") -> Architecture:
    """The description of a model that moejax runs."""
    v, d = cfg.vocab_size, cfg.d_model
    positions = cfg.max_seq_len * d if cfg.positions == "learned" else 0
    # A tied matrix is the head (it is multiplied with) and costs the input nothing.
    embedding = table_part("embedding", positions + (0 if cfg.tie_embeddings else v * d))
    final_norm = dense_part("final norm", 1, 0, d * (2 if cfg.norm == "layernorm" else 1))
    moe = cfg.num_moe_layers
    windows = [cfg.attention.window(i) for i in range(cfg.num_layers)]
    mtp = cfg.mtp_depth
    return Architecture(
        name=name,
        num_layers=cfg.num_layers,
        d_model=d,
        vocab_size=v,
        max_seq_len=cfg.max_seq_len,
        experts=(cfg.moe.num_experts, cfg.moe.experts_per_token) if moe else None,
        parts=(
            embedding,
            *block_parts(cfg, cfg.num_layers - moe, moe),
            final_norm,
            dense_part("head", 1, v * d),
        ),
        attention=tuple(attention_of(cfg, windows.count(w), w) for w in sorted(set(windows))),
        mtp=(
            *block_parts(cfg, 0 if moe else mtp, mtp if moe else 0),
            dense_part("MTP projection and norms", mtp, 2 * d * d, final_norm.total * 3),
        )
        if mtp
        else (),
        mtp_attention=(attention_of(cfg, mtp),) if mtp else (),
    )
