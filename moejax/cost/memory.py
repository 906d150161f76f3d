"""Bytes: checkpoints, key/value cache, training and inference memory per device.

Weights, gradients, optimiser and cache follow from shapes. What a step holds besides is an
estimate of what XLA keeps, fitted to its own analysis of fifteen small steps on CPU (within 25% of
each, 9% on average); `plan --verify` compares.
"""

import dataclasses
import math

from moejax.config import ModelConfig
from moejax.cost.architecture import Architecture, Part, of_model
from moejax.cost.mesh import MeshSizes

LOGITS_BUDGET = 2**25  # as moejax.models.loss, which imports jax
BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


# --------------------------------------------------------------------------------------------------
# Key/value cache.


def cache_elements(arch: Architecture, length: int) -> float | None:
    """Numbers in the key/value cache of one sequence of `length` tokens; None if unknown.

    The keys of a sparse-attention indexer are counted in bytes only, as publications do.
    """
    return _cache(arch, length, lambda a: (a.cache, 0))


def cache_bytes(arch: Architecture, length: int, bytes_per: float = 2) -> float | None:
    """Bytes of one sequence's cache: `bytes_per` number, or as published where it is quantised."""
    return _cache(
        arch,
        length,
        lambda a: (a.key_bytes or bytes_per * a.cache, a.index_bytes or bytes_per * a.index_cache),
    )


def _cache(arch, length, sizes):
    if arch.attention is None:
        return None
    total = 0.0
    for a in arch.attention:
        main, index = sizes(a)
        keys = length / a.stride
        keys = min(keys, a.window) if a.window else keys
        total += a.layers * (keys * (main + index) + min(length, a.local) * main)
    return total


# --------------------------------------------------------------------------------------------------
# Weights on disk and in memory.


def weight_bytes(arch: Architecture, bytes_per: float = 2) -> float:
    """All weights (multi-token prediction left out) at one width."""
    return bytes_per * sum(p.total for p in (*arch.parts, *arch.apart))


# What each published quantisation stores in fewer bits, and bits per weight with its scales.
MXFP4_BITS = 4 + 8 / 32  # 2310.10537: blocks of 32 share 8 bits
FP8_BITS = 8 + 32 / 128**2  # DeepSeek-V3: blocks of 128 x 128 share a float32
NOT_FP8 = ("embedding", "head", "router", "MTP projection and norms")


def checkpoint_bytes(arch: Architecture, hf: dict) -> float:
    """Bytes of the published checkpoint's tensors, by its `quantization_config`; the rest is BF16.

    DeepSeek's FP8 checkpoints repeat embedding and head in the MTP layer, and hold the balance
    biases in float32; both are counted.
    """
    quant = hf.get("quantization_config") or {}
    method = quant.get("quant_method")
    parts = list(arch.parts)
    if method == "fp8" and arch.mtp:
        parts += [*arch.mtp, *(p for p in arch.parts if p.name in ("embedding", "head"))]
    return sum(_stored_bits(p, method, hf.get("expert_dtype")) for p in parts) / 8


def _stored_bits(p: Part, method: str | None, expert_dtype: str | None) -> float:
    if p.name == "balance bias":
        return 32 * p.total
    matrix = 16.0
    if p.experts and (method == "mxfp4" or expert_dtype == "fp4"):
        matrix = MXFP4_BITS
    elif method == "fp8" and p.name not in NOT_FP8:
        matrix = FP8_BITS
    return matrix * p.matrix + 16 * (p.total - p.matrix)


# --------------------------------------------------------------------------------------------------
# Training.


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on each device, at the fullest moment of a step."""

    weights: float  # float32 master weights
    gradients: float  # float32
    optimizer: float  # Adam's two float32 moments
    cast: float  # weights in the compute dtype, where it is not float32; unsharded layer with fsdp
    activations: float  # kept of every layer for the backward pass
    in_flight: float  # of the layer, or the chunk of logits, being worked on
    buffers: float  # all-to-all or all-gather buffers of expert parallelism

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in dataclasses.fields(self))


def training(
    cfg: ModelConfig, mesh: MeshSizes, micro_batch: int, seq_len: int, *, accumulate: bool = False
) -> TrainingMemory:
    """Training memory of one device.

    Args:
      cfg: the model; its dtype, remat and loss_chunk count.
      mesh: how many devices there are.
      micro_batch: sequences in one forward and backward pass, over all devices.
      seq_len: tokens in a sequence.
      accumulate: gradients are summed over micro-batches (a second copy of them).
    """
    arch = of_model(cfg)
    parts = (*arch.parts, *arch.mtp)
    local = sum(p.total / mesh.shards(p) for p in parts if p.name != "balance bias")
    wide, b = 4, BYTES[cfg.dtype]
    cast = b * local if cfg.dtype != "float32" else 0.0
    # One layer at a time is gathered whole, its weights and their gradients.
    gathered = [p for p in arch.parts if mesh.gathers(p) > 1]
    layer = [p.total / arch.num_layers / mesh.shards(p) * mesh.gathers(p) for p in gathered]
    cast += 2 * b * max(layer, default=0.0)
    tokens = micro_batch * seq_len / mesh.batch
    return TrainingMemory(
        weights=wide * local,
        gradients=wide * local * (2 if accumulate else 1),
        optimizer=2 * wide * local,
        cast=cast,
        activations=_activations(cfg, tokens, seq_len, mesh),
        in_flight=_in_flight(cfg, tokens, seq_len, mesh),
        buffers=_buffers(cfg, tokens, mesh),
    )


def rows_per_token(cfg: ModelConfig, mesh: MeshSizes) -> float:
    """Rows in a device's buffer of routed tokens, for each of its own tokens.

    K on a device that holds all experts. With experts split, what its peers may send at worst, or
    `buffer_factor` times the balanced load if that is less (`moejax.moe.dispatch.expert_parallel`).
    """
    m, held = cfg.moe, cfg.moe.num_experts / mesh.experts
    if mesh.experts == 1:
        return m.experts_per_token
    worst = mesh.peers * min(m.experts_per_token, held)
    balanced = mesh.peers * m.experts_per_token / mesh.experts
    return min(worst, m.buffer_factor * balanced) if m.buffer_factor else worst


def _widths(cfg: ModelConfig, seq_len: int, mesh: MeshSizes) -> dict[str, float]:
    """Numbers per token that one layer makes: (matmul outputs kept by remat='dots', all that the
    backward pass reads)."""
    a, m, d, tensor = cfg.attention, cfg.moe, cfg.d_model, mesh.tensor
    n = a.num_heads / tensor
    qkv = n * a.qk_head_dim
    if a.kind == "mla":
        qkv += n * (a.qk_head_dim + a.v_head_dim) + a.q_lora_rank + 2 * a.kv_lora_rank
    else:
        qkv += 2 * a.num_kv_heads / tensor * a.head_dim
    out = n * a.value_head_dim
    dense = 3 * cfg.d_ff / tensor
    routed = 0.0
    if m.num_experts:
        routed = rows_per_token(cfg, mesh) * (2 * d + 3 * m.d_expert / tensor)
    shared = 3 * m.shared_width / tensor if m.num_experts else 0.0
    moe_share = cfg.num_moe_layers / cfg.num_layers
    ffn = moe_share * (routed + shared + 2 * m.num_experts) + (1 - moe_share) * dense
    dots = qkv + 2 * d + moe_share * shared + (1 - moe_share) * dense
    # Two norms' inputs and outputs, rotated queries and keys; probabilities in float32 and compute
    # dtype.
    scores = n * seq_len * (1 + 4 / BYTES[cfg.dtype])
    return {"dots": dots, "all": 4 * d + 2 * qkv + out + ffn + scores}


def _activations(cfg: ModelConfig, tokens: float, seq_len: int, mesh: MeshSizes) -> float:
    width = _widths(cfg, seq_len, mesh)
    layers = cfg.num_layers + cfg.mtp_depth
    kept = {"none": width["all"], "dots": cfg.d_model + width["dots"], "full": cfg.d_model}
    return BYTES[cfg.dtype] * tokens * layers * kept[cfg.remat]


def _in_flight(cfg: ModelConfig, tokens: float, seq_len: int, mesh: MeshSizes) -> float:
    """The larger of two moments, and the experts' gradients before they join their stack.

    In a layer's backward pass: its activations and their gradients. In the loss: one chunk's
    logits, probabilities and gradient, in float32.
    """
    layer = 2 * BYTES[cfg.dtype] * tokens * _widths(cfg, seq_len, mesh)["all"]
    chunk = cfg.loss_chunk or max(1, LOGITS_BUDGET // cfg.vocab_size)
    at_once = min(tokens, max(1.0, chunk / mesh.batch))
    logits = 3 * 4 * at_once * cfg.vocab_size / mesh.tensor
    arch = of_model(cfg)
    experts = sum(p.total / mesh.shards(p) for p in (*arch.parts, *arch.mtp) if p.experts)
    return max(layer, logits) + 4 * experts


def _buffers(cfg: ModelConfig, tokens: float, mesh: MeshSizes) -> float:
    """What travels between the devices that split the experts: sent and received at once."""
    if mesh.peers == 1 or not cfg.num_moe_layers:
        return 0.0
    one = tokens * cfg.d_model * BYTES[cfg.dtype]
    if cfg.moe.expert_parallel == "ring":
        return 2 * mesh.peers * one  # every peer's tokens, and the partial results for them
    return 2 * rows_per_token(cfg, mesh) * one


# --------------------------------------------------------------------------------------------------
# Inference.


def inference(
    arch: Architecture, mesh: MeshSizes, batch: int, length: int, bytes_per: float = 2
) -> dict[str, float | None]:
    """Bytes per device to serve `batch` sequences of `length` tokens; None where unknown."""
    weights = bytes_per * sum(p.total / mesh.shards(p) for p in (*arch.parts, *arch.apart))
    rows = math.ceil(batch / mesh.batch)
    one = cache_bytes(arch, length, bytes_per)
    # Heads (or, for MLA, nothing) split the cache; count it whole, the safe side.
    cache = None if one is None else rows * one
    work = 4.0 * rows * (arch.vocab_size + 16 * arch.d_model)
    return {"weights": weights, "cache": cache, "working set": work}
