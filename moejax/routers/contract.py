"""What a router is given, what it returns, and what it declares: the contract of every file in this folder.

A router is one file that builds a `Router`, and one line in `ROUTERS`. Contract tests run over that table.
Nothing outside the file asks for a router's name: what it declares here decides what is possible with it.

Here: W width of what a router passes on to the next layer's.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from moejax.routers.balance import BalanceConfig

# --------------------------------------------------------------------------------------------------
# What a router returns: one of four forms.


class Routing(NamedTuple):
    """Token choice: each token names its experts, up to K of them (`Router.routes_per_token`).

    Attributes:
      expert_index_TK: int32. 0 .. E-1 are experts, E, E+1, .. the router's special experts in their order, -1
        is an empty slot (a padding token, a token with fewer than K experts). The experts of a token are
        distinct: buffers of expert parallelism count on it.
      combine_weights_TK: float32, 0 where the slot is empty.
    """

    expert_index_TK: jax.Array
    combine_weights_TK: jax.Array


class SlotRouting(NamedTuple):
    """Slots: each expert names its tokens (expert choice; token choice under a capacity).

    Attributes:
      token_index_EC: int32, -1 is an empty slot. The tokens of an expert are distinct.
      combine_weights_EC: float32, 0 where the slot is empty.
    """

    token_index_EC: jax.Array
    combine_weights_EC: jax.Array


class SoftRouting(NamedTuple):
    """Soft: every slot of an expert holds a weighted mix of a sequence's tokens, every token a weighted mix of
    its sequence's results. C slots of each expert for every sequence.

    Attributes:
      dispatch_BSEC: float32; slot c of expert e computes FFN_e(sum_s dispatch_bsec x_bs) for sequence b.
      combine_BSEC: float32; token s receives sum_ec combine_bsec of the results.
    """

    dispatch_BSEC: jax.Array
    combine_BSEC: jax.Array


class MergeRouting(NamedTuple):
    """Merging: the tokens of a group share one FFN, whose parameters are a weighted sum of the experts'.
    Padding in a group with a token is computed along, and nobody reads it.

    Attributes:
      weights_GE: float32, for G equal groups of consecutive tokens; 0 where all of a group is padding.
    """

    weights_GE: jax.Array


FORMS = {"token": Routing, "slot": SlotRouting, "soft": SoftRouting, "merge": MergeRouting}


class Routed(NamedTuple):
    """One layer's routing.

    Attributes:
      routing: of the form that the router declares.
      losses: balance losses by name, each multiplied by its coefficient.
      stats: sums over the tokens of this call, float32, without padding: `load` (routes per expert, special
        experts included, [E + specials]) and whatever else `route`, `update` or a reader wants to know of the
        whole batch. Micro-batches and devices add them up. No gradient.
      scores_TE: affinities before any bias, for whoever looks at single tokens; None if the router has none.
      carry_TW: float32, what the next layer's router receives as `carried_TW`; None if it carries nothing.
      shared_TS: float32, each token's weight on the output of each of the S shared experts, 0 for padding;
        None: all weigh 1.
      choice_TN: float32, finite, what was ranked, where that is not the scores: with a selection bias, or of
        special experts too (N is E, or E and those). Groups that are closed to a token are ranked here as well.
        For whoever looks at single tokens, without gradient; None: the scores, if there are any.
      logits_TE: of the experts, what the scores are made of and rise with, before noise and any bias for the
        choice. For whoever watches how large they grow; None if the router has none.
    """

    routing: Any
    losses: dict[str, jax.Array]
    stats: dict[str, jax.Array]
    scores_TE: jax.Array | None = None
    carry_TW: jax.Array | None = None
    shared_TS: jax.Array | None = None
    choice_TN: jax.Array | None = None
    logits_TE: jax.Array | None = None


# --------------------------------------------------------------------------------------------------
# What a router is given.


class BatchTotals(NamedTuple):
    """Totals over the whole global batch, for losses that are not linear in the tokens.

    A micro-batch of a gradient-accumulation step sees only its own tokens; with the totals of the whole
    batch its losses and gradients are its exact share of the whole batch's.

    Attributes:
      num_tokens: tokens that are not padding.
      num_sequences: sequences with at least one such token.
      stats: this layer's `Routed.stats` over the whole batch; None: this call holds the whole batch, sum here.
    """

    num_tokens: jax.Array
    num_sequences: jax.Array
    stats: dict[str, jax.Array] | None = None


class Tokens(NamedTuple):
    """The tokens that one call routes: whole sequences of `seq_len`, one after the other.

    Attributes:
      x_TD: normalised hidden states.
      mask_T: float, 1 = token, 0 = padding: never routed, never counted.
      seq_len: of each sequence; T is a multiple of it.
      totals: of the global batch.
      ids_T: vocabulary ids, int32.
      key: for routers that draw random numbers, None if there is none to draw from (evaluation). It differs
        from layer to layer, step to step and micro-batch to micro-batch: what is drawn from it depends on
        accumulation.
      forced_TK: expert indices to take instead of choosing, int32, or None; weights are computed all the same.
        Routers of another form than 'token' raise ValueError.
      barred_TE: bool, (1, E) or (T, E): experts that a token may not choose, or None. Its next best takes the
        place; where nothing is left the slot is empty. Forced routes are taken as they are. Routers that have
        no next best raise ValueError.
      carried_TW: what the router of the MoE layer before returned as `carry_TW`, gradient included; zeros
        before the first layer, and before each depth of multi-token prediction. None if `Router.carries` is 0.
    """

    x_TD: jax.Array
    mask_T: jax.Array
    seq_len: int
    totals: BatchTotals
    ids_T: jax.Array | None = None
    key: jax.Array | None = None
    forced_TK: jax.Array | None = None
    barred_TE: jax.Array | None = None
    carried_TW: jax.Array | None = None

    def total(self, stats: dict[str, jax.Array], name: str) -> jax.Array:
        """A stat summed over the whole batch: as counted beforehand, or else here."""
        return stats[name] if self.totals.stats is None else self.totals.stats[name]

    @property
    def mask_BS(self) -> jax.Array:
        return self.mask_T.reshape(-1, self.seq_len)


def tokens_of(x_TD: jax.Array, seq_len: int, mask_T: jax.Array | None = None, **fields) -> Tokens:
    """`Tokens` of a whole batch: the mask is all ones if there is none, the totals are its own unless given."""
    dtype = jnp.promote_types(x_TD.dtype, jnp.float32)
    given = jnp.ones(x_TD.shape[:1], dtype) if mask_T is None else (mask_T > 0).astype(dtype)
    totals = fields.pop("totals", None)
    if totals is None:
        totals = count_totals(given.reshape(-1, seq_len))
    return Tokens(x_TD, given, seq_len, totals, **fields)


def count_totals(mask_BS: jax.Array) -> BatchTotals:
    """Totals of a whole batch from its padding mask (1 = token)."""
    mask = (mask_BS > 0).astype(jnp.promote_types(mask_BS.dtype, jnp.float32))
    return BatchTotals(mask.sum(), (mask.max(axis=1) > 0).astype(mask.dtype).sum())


@dataclasses.dataclass(frozen=True)
class RouterOptions:
    """Base of every router's own options: its config group `model.moe.router`.

    Attributes:
      name: the router's name in `ROUTERS`.
    """

    name: str = ""


@dataclasses.dataclass(frozen=True)
class RouterConfig:
    """All that is static and that a router may depend on.

    Attributes:
      options: the router's own options.
      num_experts: E; special experts are not among them.
      experts_per_token: K.
      d_model, vocab_size, num_layers, max_seq_len: sizes of the model; layers with a router only.
      shared_experts: S, beside the routed ones.
      init_std: for parameters that start at random.
      balance: what the step is trained for besides the text; all off where nothing is trained.
      training: whether a step of training routes. Evaluation and generation do not.
    """

    options: Any
    num_experts: int
    experts_per_token: int
    d_model: int
    vocab_size: int
    num_layers: int = 1
    shared_experts: int = 0
    init_std: float = 0.006
    balance: BalanceConfig = dataclasses.field(default_factory=BalanceConfig)
    training: bool = False
    max_seq_len: int = 4096


# --------------------------------------------------------------------------------------------------
# What a router declares.


def _nothing(cfg: RouterConfig, *_: Any) -> dict:
    del cfg
    return {}


def _as_it_is(state: dict, stats: dict, cfg: RouterConfig) -> dict:
    del stats, cfg
    return state


@dataclasses.dataclass(frozen=True)
class Router:
    """A router: pure functions (router maths in float32) and what is true of them.

    Attributes:
      options: its options at their defaults, the paper's where it has any.
      source: paper and arXiv id: 'Switch Transformer, 2101.03961'.
      about: its page: what it does in three lines, the equation, what the paper claims. A router with a file of
        its own gives the file's docstring.
      recipe: what the paper sets besides the router's own options, as dotted config keys and values:
        (('model.moe.experts_per_token', 1), ('objective.expert_loss', 0.01)).
      route: `(params, state, tokens: Tokens, cfg: RouterConfig) -> Routed`.
      form: a key of `FORMS`: what `route` returns.
      causal: whether a token's route depends on that token alone in evaluation. Decoding sees one at a time, so
        generation refuses every other router.
      causal_in_training: the same of training (`RouterConfig.training`). False is for routers that balance the
        batch while they learn and route each token alone afterwards. Their routes depend on accumulation.
      param_specs: `(cfg) -> dict of ParamSpec`, what gradients learn in one layer.
      init_state: `(cfg, layer) -> dict of arrays`, what a rule learns in one layer (numbered from 0); may be
        empty.
      update: `(state, stats, cfg) -> state`, once per optimiser step and layer, from the stats of the global
        batch.
      linear_losses: `(cfg) -> whether` every loss is a sum over tokens or sequences. One that multiplies
        two sums over the batch (a count and a mean score) is not: it reads `tokens.total(..)`, and a step with
        gradient accumulation counts in a forward pass of its own first. Leave it out if unsure: True only
        saves that pass.
      specials: `(cfg) -> kinds` of its special experts, keys of `moejax.routers.specials.SPECIALS`, numbered
        from E.
      experts_used: `(cfg) -> experts` (special ones left out) that compute for one token on average: for cost
        and report.
      routes_per_token: `(cfg) -> K` of its `Routing`: the most routes that a token can have.
      carries: `(cfg) -> W`, the width of what passes from one layer's router to the next, beside the hidden
        state; 0: nothing does.
      pooled: stats that `update` sees summed over all layers, for a rule that looks at the whole model.
      weighs_inputs: `(cfg) -> whether` the weights of its `Routing` multiply what an expert reads, not what it
        returns: y = sum_k E_k(w_k x). Special experts are weighed as ever.
      balance: fields of `BalanceConfig` that it honours; any other that is set is refused.
      problems: `(cfg, prefix) -> sentences` about options that do not fit together. A key is written
        `{prefix}num_experts`, `{prefix}router.<option>` or `objective.<field>`.
    """

    options: RouterOptions
    route: Callable[[dict, dict, Tokens, RouterConfig], Routed]
    form: str
    causal: bool
    causal_in_training: bool = True
    source: str = ""
    about: str = ""
    recipe: tuple[tuple[str, Any], ...] = ()
    param_specs: Callable[[RouterConfig], dict] = _nothing
    init_state: Callable[[RouterConfig, int], dict] = _nothing
    update: Callable[[dict, dict, RouterConfig], dict] = _as_it_is
    linear_losses: Callable[[RouterConfig], bool] = lambda cfg: False
    specials: Callable[[RouterConfig], tuple[str, ...]] = lambda cfg: ()
    experts_used: Callable[[RouterConfig], float] = lambda cfg: float(cfg.experts_per_token)
    routes_per_token: Callable[[RouterConfig], int] = lambda cfg: cfg.experts_per_token
    carries: Callable[[RouterConfig], int] = lambda cfg: 0
    pooled: tuple[str, ...] = ()
    weighs_inputs: Callable[[RouterConfig], bool] = lambda cfg: False
    balance: tuple[str, ...] = ()
    problems: Callable[[RouterConfig, str], list[str]] = lambda cfg, prefix: []
