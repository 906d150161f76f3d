"""Bytes: checkpoints, key/value cache, training and inference memory per device.

Weights, gradients, optimiser and cache follow from shapes. What a step holds besides follows from
what the layers save, and from what XLA was seen to copy. tests/cost/test_verify.py holds it to XLA's own
analysis: to 15% on one device, to 25% on a mesh. On CPU a bfloat16 step takes more, since XLA computes it in
float32. `plan --verify` compares.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

from moejax.attention import kind_of
from moejax.attention.block_attention import block_size
from moejax.axes import BATCH, EXPERT
from moejax.config import ComputeConfig, ExperimentConfig, ModelConfig, OptimizerConfig
from moejax.cost.architecture import Architecture, Part, of_model
from moejax.mesh import MeshSizes
from moejax.models import transformer
from moejax.models.zoo import FAMILIES
from moejax.moe.experts import ACTIVATIONS
from moejax.params import ParamSpec, by_path, roles

BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1}


# --------------------------------------------------------------------------------------------------
# Key/value cache.


def cache_bytes(arch: Architecture, length: int, bytes_per: float = 2) -> float | None:
    """Bytes of the cache of one sequence of `length` tokens, `bytes_per` number, or as published where it is
    quantised; None if unknown."""
    if arch.attention is None:
        return None
    total = 0.0
    for a in arch.attention:
        main = a.key_bytes or bytes_per * a.cache
        index = a.index_bytes or bytes_per * a.index_cache
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

    Where a family's files repeat embedding and head in the layers of multi-token prediction (DeepSeek-V3), they
    are counted twice; balance biases are float32.
    """
    quant = hf.get("quantization_config") or {}
    method = quant.get("quant_method")
    parts = list(arch.parts)
    if method == "fp8" and arch.mtp:
        parts += arch.mtp
        if any(d.written for d in FAMILIES[hf["model_type"]].NAMES.duplicates):
            parts += [p for p in arch.parts if p.name in ("embedding", "head")]
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
    gradients: float  # float32, of what is trained
    optimizer: float  # the optimiser's float32 moments
    cast: float  # weights in the compute dtype, where it is not float32; unsharded layer with fsdp
    activations: float  # kept of every layer for the backward pass
    in_flight: float  # of the layer, or the chunk of logits, being worked on
    buffers: float  # all-to-all or all-gather buffers of expert parallelism

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in dataclasses.fields(self))


class Kept(NamedTuple):
    """What training keeps of the experts, or of all other parameters, per parameter.

    Attributes:
      trained: the share that is not frozen.
      moments: float32 numbers of optimiser state.
    """

    trained: float
    moments: float


@functools.cache
def kept(cfg: ModelConfig, optimizer: OptimizerConfig) -> dict[bool, Kept]:
    """`Kept` of the experts (True) and of everything else (False)."""
    specs = by_path(transformer.param_specs(cfg))
    treated = optimizer.treatments(roles(specs))

    def one(experts: bool) -> Kept:
        mine = {p: s for p, s in specs.items() if (EXPERT in s.axes) == experts}
        trained = {p: s for p, s in mine.items() if not treated[p].frozen}
        everything = max(1, sum(math.prod(s.shape) for s in mine.values()))
        return Kept(
            sum(math.prod(s.shape) for s in trained.values()) / everything,
            sum(moments_of(optimizer, s) for s in trained.values()) / everything,
        )

    return {experts: one(experts) for experts in (False, True)}


def moments_of(optimizer: OptimizerConfig, spec: ParamSpec) -> int:
    """Numbers that the optimiser keeps for a parameter (a test compares with its own state)."""
    size, own = math.prod(spec.shape), spec.shape[spec.batch_dims :]
    if optimizer.name == "muon":
        return size if spec.role in optimizer.muon_roles else 2 * size
    if optimizer.name == "adafactor":
        factored = len(own) == 2 and min(own) >= 128
        return size // math.prod(own) * sum(own) if factored else size
    return {"adamw": 2, "lion": 1}[optimizer.name] * size


def training(
    cfg: ExperimentConfig,
    mesh: MeshSizes,
    micro_batch: int,
    seq_len: int,
    *,
    accumulate: bool = False,
) -> TrainingMemory:
    """Training memory of one device.

    Args:
      cfg: the model, how it is computed, and its optimiser.
      mesh: how many devices there are.
      micro_batch: sequences in one forward and backward pass, over all devices.
      seq_len: tokens in a sequence.
      accumulate: gradients are summed over micro-batches (a second copy of them).
    """
    arch, compute = of_model(cfg.model), cfg.compute
    parts = [p for p in (*arch.parts, *arch.mtp) if p.name != "balance bias"]
    local = sum(p.total / p.shards(mesh) for p in parts)
    keeps = kept(cfg.model, cfg.optimizer)
    trained = sum(keeps[p.experts].trained * p.total / p.shards(mesh) for p in parts)
    moments = sum(keeps[p.experts].moments * p.total / p.shards(mesh) for p in parts)
    wide, b = 4, BYTES[compute.dtype]
    cast = b * local if compute.dtype != "float32" else 0.0
    # One layer at a time is gathered whole, its weights and their gradients.
    gathered = [p for p in arch.parts if p.gathers(mesh) > 1]
    layer = [p.total / arch.num_layers / p.shards(mesh) * p.gathers(mesh) for p in gathered]
    cast += 2 * b * max(layer, default=0.0)
    if compute.remat == "none":  # the backward pass keeps the gathered experts of every layer
        cast += sum(b * p.total / p.shards(mesh) * p.gathers(mesh) for p in gathered if p.experts)
    tokens = micro_batch * seq_len / mesh.size(BATCH)
    saved = _activations(cfg, tokens, seq_len, mesh)
    # All that the backward pass needs and the optimiser does not.
    passing = saved + cast + (wide * trained if accumulate else 0.0)
    return TrainingMemory(
        weights=wide * local,
        gradients=wide * trained * (2 if accumulate else 1),
        optimizer=wide * moments,
        cast=cast,
        activations=saved,
        in_flight=_in_flight(cfg, tokens, seq_len, mesh, passing, trained),
        buffers=_buffers(cfg, tokens, mesh),
    )


def rows_per_token(cfg: ExperimentConfig, mesh: MeshSizes) -> float:
    """Rows in a device's buffer of routed tokens, for each of its own tokens.

    K on a device that holds all experts. With experts split, what its peers may send at worst, or
    `buffer_factor` times the balanced load if that is less (`moejax.moe.dispatch.expert_parallel`).
    """
    k, factor = cfg.model.routes_per_token, cfg.compute.buffer_factor
    if mesh.size(EXPERT) == 1:
        return max(k, cfg.model.experts_used)  # slots of an expert may be more than its routes
    worst = mesh.peers * min(k, cfg.model.moe.num_experts / mesh.size(EXPERT))
    balanced = mesh.peers * min(k, cfg.model.moe.experts_per_token) / mesh.size(EXPERT)
    return min(worst, factor * balanced) if factor else worst


def layer_bytes(cfg: ExperimentConfig, seq_len: int, mesh: MeshSizes) -> float:
    """Bytes per token that one layer keeps for its backward pass without rematerialisation.

    What JAX saves, as it stands in the code of `moejax.models` and `moejax.moe` (a test compares).
    """
    model, b, tensor = cfg.model, BYTES[cfg.compute.dtype], mesh.tensor
    a, m, d = model.attention, model.moe, model.d_model
    n, wide = a.num_heads / tensor, 4.0  # norms, router and softmax work in float32
    attention = kind_of(a).saved(model, b, tensor)
    if block_size(seq_len, cfg.compute.attention_block):
        attention += n * (
            b * kind_of(a).widths(a).value + wide
        )  # outputs in blocks, and sums of exponentials
    else:
        attention += n * seq_len * (wide + b)  # scores, and probabilities
    into = 1 + ACTIVATIONS[model.activation].gated
    dense = b * (6 * model.d_ff / tensor + into * d)
    moe = 0.0
    if m.num_experts:
        inputs = 1 + ACTIVATIONS[m.activation].gated
        moe += b * rows_per_token(cfg, mesh) * inputs * m.d_expert / tensor
        if mesh.peers > 1:  # tokens of the peers; or their rows, and the results for one's own
            ring = cfg.compute.expert_parallel == "ring"
            width = m.expert_input(d)
            moe += b * width * (mesh.peers if ring else 2 * rows_per_token(cfg, mesh))
        moe += 2 * b * m.latent_dim
        moe += b * 6 * m.shared_width / tensor + b * into * d * bool(m.shared_width)
        moe += wide * (d + m.num_experts * (model.routes_per_token + 1))
    share = model.num_moe_layers / model.num_layers
    streams, steps = model.streams.count, model.streams.sinkhorn_steps - 1
    state = 0.0
    if (
        streams > 1
    ):  # both sub-layers: it, in float32 the same, normed, and mixed; every Sinkhorn step
        state = 2 * (b + 3 * wide) * streams * d + 2 * wide * steps * 2 * streams * (streams + 2)
    return 2 * 3 * wide * d + state + attention + share * moe + (1 - share) * dense


def _gradient_bytes(cfg: ExperimentConfig, seq_len: int, mesh: MeshSizes) -> float:
    """Bytes per token of the gradients inside attention: of its scores, or in blocks of queries, outputs, keys
    and values."""
    a = cfg.model.attention
    n = a.num_heads / mesh.tensor
    if not block_size(seq_len, cfg.compute.attention_block):
        return 4 * n * seq_len
    widths = kind_of(a).widths(a)
    return 4 * (n + widths.key_heads / mesh.tensor) * (widths.query + widths.value)


def _activations(cfg: ExperimentConfig, tokens: float, seq_len: int, mesh: MeshSizes) -> float:
    model, remat = cfg.model, cfg.compute.remat
    layers = model.num_layers + model.mtp_depth
    b, a, m, d = BYTES[cfg.compute.dtype], model.attention, model.moe, model.d_model
    if remat == "none":
        return tokens * layers * layer_bytes(cfg, seq_len, mesh)
    kept = d * model.streams.count  # the layer's input
    if remat == "dots":  # and the results of its unbatched products
        share = model.num_moe_layers / model.num_layers
        widths = kind_of(a).widths(a)
        kept += 2 * d + a.num_heads * (widths.query + widths.value) / mesh.tensor
        kept += 3 * (share * m.shared_width + (1 - share) * model.d_ff) / mesh.tensor
        kept += share * (m.latent_dim + d * bool(m.latent_dim))
    return b * tokens * layers * kept


def _in_flight(
    cfg: ExperimentConfig,
    tokens: float,
    seq_len: int,
    mesh: MeshSizes,
    passing: float,
    trained: float,
) -> float:
    """The fullest of three moments, beside weights, gradients and activations.

    In a layer's backward pass: what that layer keeps, the gradients of its rows and of its attention, and those
    of its experts (several times: they are summed up, and copied into their stack). In the loss: one chunk's
    logits, probabilities and gradient, in float32. In the optimiser: new weights and moments beside the old of
    the `trained` parameters, while the `passing` bytes (activations and what else it has no use for) are gone.
    """
    model = cfg.model
    arch = of_model(model)
    parts = (*arch.parts, *arch.mtp)
    experts = 4 * sum(p.total / p.shards(mesh) for p in parts if p.experts)
    one = experts / max(model.num_moe_layers + model.mtp_depth, 1)
    wide = BYTES[cfg.compute.dtype] * model.moe.expert_input(model.d_model)
    rows = tokens * rows_per_token(cfg, mesh) * wide if experts else 0.0
    layer = tokens * layer_bytes(cfg, seq_len, mesh) + rows + 3 * one + 0.4 * experts
    if cfg.compute.remat == "full":  # else they take the place of what later layers kept
        layer += tokens * _gradient_bytes(cfg, seq_len, mesh)
    chunk = cfg.compute.tokens_of_logits(model.vocab_size)
    at_once = min(tokens, max(1.0, chunk / mesh.size(BATCH)))
    logits = 3 * 4 * at_once * model.vocab_size / mesh.tensor
    update = 1.4 * 4 * trained - passing
    return max(layer, logits, update)


def _buffers(cfg: ExperimentConfig, tokens: float, mesh: MeshSizes) -> float:
    """What travels between the devices that split the experts: sent and received at once."""
    if mesh.peers == 1 or not cfg.model.num_moe_layers:
        return 0.0
    one = tokens * cfg.model.moe.expert_input(cfg.model.d_model) * BYTES[cfg.compute.dtype]
    if cfg.compute.expert_parallel == "ring":
        return 2 * mesh.peers * one  # every peer's tokens, and the partial results for them
    return 2 * rows_per_token(cfg, mesh) * one


# --------------------------------------------------------------------------------------------------
# Rematerialisation: what it costs in time.


def passes(compute: ComputeConfig) -> int:
    """Passes over the layers in a step: forward, backward, and with full rematerialisation forward again."""
    return 2 + (compute.remat == "full")


def recomputed(compute: ComputeConfig, total: float, attention: float) -> float:
    """FLOPs computed again, of a step's `total` and of those in `attention`: everything, or attention's
    products (batched, so not kept by 'dots')."""
    return {"none": 0.0, "dots": attention / 3, "full": total / 3}[compute.remat]


def sparing(compute: ComputeConfig) -> tuple[ComputeConfig, ...]:
    """The same, and the same with full rematerialisation."""
    return tuple(dict.fromkeys((compute, dataclasses.replace(compute, remat="full"))))


def compute_text(compute: ComputeConfig) -> str:
    return f"{compute.dtype}, remat {compute.remat}"


# --------------------------------------------------------------------------------------------------
# Inference.


def inference(
    arch: Architecture, mesh: MeshSizes, batch: int, length: int, bytes_per: float = 2
) -> dict[str, float | None]:
    """Bytes per device to serve `batch` sequences of `length` tokens; None where unknown."""
    weights = bytes_per * sum(p.total / p.shards(mesh) for p in (*arch.parts, *arch.apart))
    rows = math.ceil(batch / mesh.size(BATCH))
    one = cache_bytes(arch, length, bytes_per)
    # Heads (or, for MLA, nothing) split the cache; count it whole, the safe side.
    cache = None if one is None else rows * one
    work = 4.0 * rows * (arch.vocab_size + 16 * arch.d_model)
    return {"weights": weights, "cache": cache, "working set": work}
