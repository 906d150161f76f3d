"""The contract of a kind of attention: what the rest of moejax may ask of it.

A model has one kind (`model.attention.kind`), but its layers may differ: a kind names *layer kinds*, and says
which one each layer has. What all layers have (`specs`) lies in the stacks of blocks. What only layers of one
kind have (`own_specs`) is a stack of its own, and is merged into those layers' parameters. A layer kind has its
own arrays in the cache. Layers of one kind that follow each other are computed together, so the layer kind is
static where a layer is computed.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax

from moejax.config import AttentionConfig, ModelConfig, ObjectiveConfig

ALL = "all"  # the layer kind where all layers are alike


class Where(NamedTuple):
    """Where the tokens stand. Tokens of a document lie next to each other, in order.

    Attributes:
      positions_BS: position of each token within its document.
      segment_ids_BS: document number within the row, or None for one document per row.
      rotation: `AttentionKind.rotation` of these positions.
    """

    positions_BS: jax.Array
    segment_ids_BS: jax.Array | None
    rotation: Any


class Slots(NamedTuple):
    """One array of a layer's cache. A kind may keep fewer slots than tokens (a window, one slot for m tokens).

    Attributes:
      shape: rows of the batch first.
      axes: a logical axis or None for each of them.
      dtype: None: that of the computation.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    dtype: Any = None


class Call(NamedTuple):
    """How one layer's attention is called.

    Attributes:
      where: positions, documents, rotation.
      layer_kind: static.
      window: sliding window of this layer; None or 0 = all.
      cache: name -> array of all layers of this kind, their number first; or None.
      slot: of this layer in those arrays.
      prefill: static; the cache is empty and positions are 0, 1, 2, ..: attend among the new tokens.
      block: static; queries and keys of a block of attention, 0: by their number, see `block_size`.
      carried: what the layer before passed on, see `AttentionKind.carries`.
      mask_BS: 1 = token, 0 = padding, or None.
      objective: static; what the model is trained for, or None.
    """

    where: Where
    layer_kind: str = ALL
    window: Any = None
    cache: dict[str, jax.Array] | None = None
    slot: Any = 0
    prefill: bool = False
    block: int = 0
    carried: Any = None
    mask_BS: jax.Array | None = None
    objective: ObjectiveConfig | None = None


class Attended(NamedTuple):
    """Attributes:
    y_BSD: what the sub-layer gives.
    cache: as it came, with the new tokens; or None.
    carried: for the next layer.
    losses: name -> loss of this layer, a sum over tokens with its coefficient; names of `AttentionKind.losses`.
    """

    y_BSD: jax.Array
    cache: dict[str, jax.Array] | None = None
    carried: Any = None
    losses: dict[str, jax.Array] | None = None


class Widths(NamedTuple):
    """Attributes:
    query: channels of a query, and of a key as it is compared with it in training.
    value: of a value.
    rotated: channels of a query that are rotated.
    key_heads: heads of keys in training.
    """

    query: int
    value: int
    rotated: int
    key_heads: int


@dataclasses.dataclass(frozen=True)
class Attention:
    """What attention costs in `layers` equal layers. A query sees the keys of its past: all of them, or the
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


class Attend(Protocol):
    """One attention sub-layer. `params`: values of `specs` and of the layer kind's `own_specs`; `x_BSD`:
    normalised hidden states."""

    def __call__(
        self, params: dict, x_BSD: jax.Array, cfg: ModelConfig, call: Call
    ) -> Attended: ...


class AttentionKind(NamedTuple):
    """Attributes:
    specs: parameters that every layer has.
    attend: the sub-layer.
    cache: (cfg, layer kind, rows, tokens) -> name -> `Slots` of one layer.
    rotation: (cfg, positions_BS) -> what turns queries and keys, computed once for all layers; None: nothing.
    widths: of its heads.
    cost: (cfg, layer kind) -> `Attention` of one layer, without its window.
    saved: (cfg, bytes of a number, devices of the tensor axis) -> bytes that a token leaves for the backward
      pass of a layer, scores left out.
    sizes: (axis, key, value) of every size that a mesh splits, besides the query heads.
    problems: (cfg, prefix of keys) -> what does not fit together, as sentences.
    reads: fields of AttentionConfig that only some kinds read, and this one does.
    layer_kind: (cfg, l) -> the kind of layer l; those past the last are the depths of multi-token prediction.
    own_specs: (cfg, layer kind) -> parameters that only layers of this kind have.
    carries: (cfg, rows, queries, cache) -> shape and dtype of what each layer passes to the next
      (`Call.carried`); the first layer gets zeros. `cache`: of the first layer's kind if keys are read from it,
      else None. None: nothing.
    losses: (cfg, objective) -> names of the losses that its layers have when trained for this objective. They
      are divided by the number of tokens and added up over layers.
    objectives: fields of ObjectiveConfig that only some kinds read, and this one does.
    """

    specs: Callable[[ModelConfig], dict]
    attend: Attend
    cache: Callable[[ModelConfig, str, int, int], dict[str, Slots]]
    rotation: Callable[[ModelConfig, jax.Array], Any]
    widths: Callable[[AttentionConfig], Widths]
    cost: Callable[[ModelConfig, str], Attention]
    saved: Callable[[ModelConfig, float, float], float]
    sizes: Callable[[AttentionConfig], list[tuple[str, str, int]]]
    problems: Callable[[ModelConfig, str], list[str]]
    reads: frozenset[str]
    layer_kind: Callable[[ModelConfig, int], str] = lambda cfg, layer: ALL
    own_specs: Callable[[ModelConfig, str], dict] = lambda cfg, layer_kind: {}
    carries: Callable[[ModelConfig, int, int, dict | None], jax.ShapeDtypeStruct | None] = (
        lambda cfg, rows, queries, cache: None
    )
    losses: Callable[[ModelConfig, ObjectiveConfig], tuple[str, ...]] = lambda cfg, objective: ()
    objectives: frozenset[str] = frozenset()
