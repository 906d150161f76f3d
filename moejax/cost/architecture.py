"""What the cost model needs to know of a model, whether moejax can run it or only count it.

`of_model` describes a ModelConfig by the specs of its own parameters, `moejax.cost.counted` the published
architectures we do not run. A model is a list of `Part`s (parameters) and of `Attention`s (what grows with the
context); every count in this package follows from these two. Nothing here allocates an array.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp

from moejax import axes
from moejax.attention import kind_of
from moejax.attention.contract import Attention as Attention
from moejax.config import ModelConfig
from moejax.mesh import MeshSizes
from moejax.models.transformer import abstract_router_state, param_specs
from moejax.params import Tree, is_spec

# Logical axes that split a part's parameters: of the dense ones, and of experts.
_SPLIT = ((axes.EMBED, axes.MLP), (axes.EXPERT, axes.EXPERT_EMBED, axes.EXPERT_MLP))


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
        names = _SPLIT[self.experts]
        return frozenset(mesh.mesh_axes(*names))

    def shards(self, mesh: MeshSizes) -> int:
        """Devices that these parameters are split over."""
        return mesh.product(self.mesh_axes(mesh))

    def gathers(self, mesh: MeshSizes) -> int:
        """Devices that these parameters are gathered from for use (fsdp)."""
        split = mesh.mesh_axes(axes.EXPERT_EMBED if self.experts else axes.EMBED)
        return mesh.product({*split} & {*mesh.mesh_axes(axes.BATCH)})


@dataclasses.dataclass(frozen=True)
class Architecture:
    """Attributes:
    name: for tables.
    num_layers, d_model, vocab_size, max_seq_len: sizes.
    experts: (routed experts, experts per token on average), or None for a dense model.
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
    experts: tuple[int, float] | None
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


# --------------------------------------------------------------------------------------------------
# Of a model that moejax runs.

# The name of a part, and keys in the path of its parameters; in the order of the tables.
PARTS = {
    "embedding": {"embed"},
    "indexer": {"indexer"},
    "attention": {"attn", "full_attn", "window_attn"},
    "compressors": {"csa_attn", "hca_attn"},
    "norms": {"attn_norm", "ffn_norm"},
    "hyper-connections": {"attn_streams", "ffn_streams"},
    "final hyper-connection": {"streams_head"},
    "dense FFN": {"ffn"},
    "routed experts": {"experts"},
    "latent projections": {"latent_down", "latent_up"},
    "shared experts": {"shared", "shared_gate"},
    "router": {"router"},
    "balance bias": set(),  # router state in moejax, a parameter in published counts
    "final norm": {"final_norm"},
    "head": {"head"},
}


def _parts(specs: Tree, cfg: ModelConfig, biases: int, rest: str) -> tuple[Part, ...]:
    """The parts of these parameters; what PARTS does not name is called `rest`."""
    # Scalars, and those of them in matrices.
    found: dict[str, tuple[int, int]] = dict.fromkeys([*PARTS, rest], (0, 0))
    found["balance bias"] = biases, 0
    for path, spec in jax.tree_util.tree_leaves_with_path(specs, is_leaf=is_spec):
        keys = {k.key for k in path}
        name = next((n for n, known in PARTS.items() if keys & known), rest)
        if cfg.tie_embeddings and keys == {"embed", "tokens"}:
            name = "head"  # it is multiplied with, and costs the input nothing
        stacked = {axes.LAYERS, axes.EXPERT} if name == "routed experts" else {axes.LAYERS}
        size, dimensions = math.prod(spec.shape), sum(a not in stacked for a in spec.axes)
        total, matrix = found[name]
        multiplied = dimensions > 1 and spec.role != "vector"
        found[name] = total + size, matrix + size * multiplied
    return tuple(_part(name, *sizes, cfg) for name, sizes in found.items() if sizes[0])


def _biases(cfg: ModelConfig, stack: str) -> int:
    """What a rule moves in the router state of a stack of layers; tables stand still."""
    state = jax.tree.leaves(abstract_router_state(cfg).get(stack, {}))
    return sum(a.size for a in state if jnp.issubdtype(a.dtype, jnp.floating) and a.ndim > 1)


def _part(name: str, total: int, matrix: int, cfg: ModelConfig) -> Part:
    if name == "embedding":
        return Part(name, total, total, matrix, 0)  # looked up
    if name == "routed experts":
        share = cfg.experts_used / cfg.moe.num_experts
        return Part(name, total, round(total * share), matrix, round(matrix * share), experts=True)
    return Part(name, total, total, matrix, matrix)


def attention_of(cfg: ModelConfig, layers: Iterable[int]) -> tuple[Attention, ...]:
    """What attention costs in these layers, equal ones together; past the last are the depths of MTP."""
    kind, of = kind_of(cfg.attention), collections.Counter()
    for layer in layers:
        window = cfg.attention.window(layer) if layer < cfg.num_layers else 0
        of[kind.layer_kind(cfg, layer), window] += 1
    return tuple(
        dataclasses.replace(
            kind.cost(cfg, name), layers=n, **({"window": window} if window else {})
        )
        for (name, window), n in sorted(of.items())
    )


@functools.cache
def of_model(cfg: ModelConfig, name: str = "model") -> Architecture:
    """The description of a model that moejax runs."""
    specs = dict(param_specs(cfg))
    mtp = specs.pop("mtp", {})
    trunk, depths = cfg.num_layers, cfg.num_layers + cfg.mtp_depth
    experts = cfg.moe.num_experts, cfg.experts_used
    return Architecture(
        name=name,
        num_layers=cfg.num_layers,
        d_model=cfg.d_model,
        vocab_size=cfg.vocab_size,
        max_seq_len=cfg.max_seq_len,
        experts=experts if cfg.num_moe_layers else None,
        parts=_parts(specs, cfg, _biases(cfg, "moe_blocks"), "other"),
        attention=attention_of(cfg, range(trunk)),
        mtp=_parts(mtp, cfg, _biases(cfg, "mtp"), "MTP projection and norms"),
        mtp_attention=attention_of(cfg, range(trunk, depths)),
    )


# --------------------------------------------------------------------------------------------------
# Counts in the conventions publishers use.

# What a token 'uses' depends on who counts.
CONVENTIONS = {
    "with embeddings": (),
    "without input embedding": ("embedding",),  # a lookup costs no FLOPs
    "without embeddings": ("embedding", "head"),
}


@dataclasses.dataclass(frozen=True)
class Count:
    """Parameters of a model under one convention."""

    total: int
    active: int


def counts(arch: Architecture) -> dict[str, Count]:
    """Total and active parameters under each of CONVENTIONS, multi-token prediction left out.

    With tied embeddings the one matrix counts as the head; learned positions count as input
    embedding.
    """
    return {
        name: Count(
            sum(p.total for p in arch.parts if p.name not in without),
            sum(p.active for p in arch.parts if p.name not in without),
        )
        for name, without in CONVENTIONS.items()
    }


def total(arch: Architecture) -> int:
    """All parameters, embeddings and head included, multi-token prediction left out."""
    return counts(arch)["with embeddings"].total


def active(arch: Architecture) -> int:
    """Parameters one token uses, embeddings and head included."""
    return counts(arch)["with embeddings"].active
