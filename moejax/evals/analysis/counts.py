"""Counts of one batch: a pure function from routes to sums, all that the figures need to know of the text.

Here: F folds, U units (`units`); P bins of positions; V bins of the vocabulary; Z special experts.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.evals.analysis.units import FOLDS
from moejax.evals.routes import Routes

SHUFFLED = ("position", "previous", "paired", "next")


class Sizes(NamedTuple):
    """Static: num_units U, num_experts E, num_special Z, seq_len S."""

    num_units: int
    num_experts: int
    num_special: int
    seq_len: int

    @property
    def num_positions(self) -> int:
        """Bins of positions: 0, 1-2, 3-6, 7-14, .., each twice as long as the one before."""
        return int(math.log2(self.seq_len)) + 1


def hot_experts(expert_TK: jax.Array, num_experts: int) -> jax.Array:
    """Which experts each token has, [T, E] of zeros and ones; empty slots and special experts are left out."""
    return jax.nn.one_hot(expert_TK, num_experts, dtype=jnp.float32).sum(axis=1)


def fold_sums(what: jax.Array, unit_T: jax.Array) -> jax.Array:
    """Sums over the tokens of each fold: [T, ..] -> [F, ..]."""
    return jax.ops.segment_sum(what, unit_T % FOLDS, FOLDS)


def previous(a_TE: jax.Array, segment_BS: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(what the token before in its document has, zeros if there is none; whether there is one, [T, 1])."""
    ids_T = segment_BS.reshape(-1)
    same_BS = (segment_BS[:, 1:] == segment_BS[:, :-1]) & (segment_BS[:, 1:] > 0)
    has_T1 = jnp.pad(same_BS, ((0, 0), (1, 0))).reshape(ids_T.size, 1).astype(a_TE.dtype)
    return jnp.roll(a_TE, 1, axis=0) * has_T1, has_T1


def shuffled(key: jax.Array, real_T: jax.Array) -> jax.Array:
    """For every token another one (or itself), a random permutation of those that are not padding."""
    order_T = jnp.argsort(jnp.where(real_T > 0, jax.random.uniform(key, real_T.shape), 2.0))
    rank_T = jnp.cumsum(real_T).astype(jnp.int32) - 1
    return jnp.where(real_T > 0, order_T[rank_T], jnp.arange(real_T.size))


def count(
    routes: Routes,
    batch: dict[str, jax.Array],
    unit_B: jax.Array,
    shuffle_T: jax.Array,
    sizes: Sizes,
) -> dict[str, jax.Array]:
    """Sums over a batch, float32 (whole numbers below 2^24 are exact); each has a leading axis of layers but
    `tokens`.

    Args:
      routes: of the batch.
      batch: tokens, positions, segment_ids.
      unit_B: the unit of every row.
      shuffle_T: from `shuffled`.
      sizes: static.

    Returns:
      tokens [U]; load [L, U, E], special [L, Z], position [L, F, P, E] (routes); pairs [L, F, E, E] (tokens
      that have both experts);
      previous [L, F, E, E] (token before by this one), paired [L, F] (routes of tokens with one before);
      next [L, F, E, E] (this layer by the next; 0 for the last); gate [L, F, E] (weights), share [L, F, E]
      (1 / experts of the token); score_entropy, margin, overruled and scored [L, F] (see `scores`). Those in
      SHUFFLED once more as `NAME_chance`: with the experts that another token of the batch has in this layer.
    """
    real_BS = batch["segment_ids"] > 0
    num_tokens, e = real_BS.size, sizes.num_experts
    unit_T = jnp.broadcast_to(unit_B[:, None], real_BS.shape).reshape(num_tokens)
    real_T = real_BS.reshape(num_tokens).astype(jnp.float32)
    at_T = jnp.log2(batch["positions"].reshape(num_tokens) + 1.0).astype(jnp.int32)
    at_T = jnp.minimum(at_T, sizes.num_positions - 1)
    fold_T = unit_T % FOLDS
    in_fold_TF = jax.nn.one_hot(fold_T, FOLDS, dtype=jnp.float32)

    def by_label(label_T, num_labels, hot_TE):
        sums = jax.ops.segment_sum(hot_TE, fold_T * num_labels + label_T, FOLDS * num_labels)
        return sums.reshape(FOLDS, num_labels, e)

    def both(a_TE, b_TE):
        return jnp.einsum("TF,TA,TB->FAB", in_fold_TF, a_TE, b_TE)

    def with_others(hot_TE, prior_TE, before_TE, has_T1):
        """What the experts of a token have to do with its position, the token before and the layer before."""
        out = {"position": by_label(at_T, sizes.num_positions, hot_TE)}
        out["previous"], out["from_layer_before"] = both(prior_TE, hot_TE), both(before_TE, hot_TE)
        out["paired"] = fold_sums(hot_TE.sum(axis=1) * has_T1[:, 0], unit_T)
        return out

    def one(before_TE, layer):
        expert_TK, weights_TK, scores_TE, choice_TN = layer
        hot_TE = hot_experts(expert_TK, e) * real_T[:, None]
        used_T1 = hot_TE.sum(axis=1, keepdims=True)
        prior_TE, has_T1 = previous(hot_TE, batch["segment_ids"])
        gate_TE = jnp.einsum(
            "TKE,TK->TE",
            jax.nn.one_hot(expert_TK, e, dtype=jnp.float32),
            weights_TK.astype(jnp.float32),
            precision="highest",
        )
        special_Z = [(expert_TK == e + z).sum() for z in range(sizes.num_special)]
        out = {
            "load": jax.ops.segment_sum(hot_TE, unit_T, sizes.num_units),
            "special": jnp.array(special_Z, jnp.float32),
            "pairs": both(hot_TE, hot_TE),
            "gate": fold_sums(gate_TE * real_T[:, None], unit_T),
            "share": fold_sums(hot_TE / jnp.maximum(used_T1, 1), unit_T),
        }
        out |= with_others(hot_TE, prior_TE, before_TE, has_T1)
        by_chance = with_others(hot_TE[shuffle_T], prior_TE, before_TE, has_T1)
        out |= {f"{name}_chance": a for name, a in by_chance.items()}
        if scores_TE is not None:
            seen = scores(scores_TE, choice_TN, expert_TK, real_T)
            out |= {name: fold_sums(a, unit_T) for name, a in seen.items()}
        return hot_TE, out

    layers = routes.expert_LTK, routes.weights_LTK, routes.scores_LTE, routes.choice_LTN
    _, sums = jax.lax.scan(one, jnp.zeros((num_tokens, e)), layers)
    for end in ("", "_chance"):  # the first layer's is zero
        sums[f"next{end}"] = jnp.roll(sums.pop(f"from_layer_before{end}"), -1, axis=0)
    return sums | {"tokens": jax.ops.segment_sum(real_T, unit_T, sizes.num_units)}


def scores(
    scores_TE: jax.Array, choice_TN: jax.Array, expert_TK: jax.Array, real_T: jax.Array
) -> dict[str, jax.Array]:
    """What the router's scores say of each token that has an expert, but not all, [T]; `choice_TN` is what it
    ranked (`Routes.choice_LTN`):

    score_entropy  -sum_e p_e log p_e / log E, p = s / sum s: 1 if the router is undecided.
    margin         least choice of a chosen expert - greatest of one not chosen, over the mean |score|.
    overruled      1 where the same of the scores alone is negative: a bias, groups or an assignment decided.
    scored         1.
    """
    scores_TE, choice_TN = scores_TE.astype(jnp.float32), choice_TN.astype(jnp.float32)
    num_experts = scores_TE.shape[1]

    def gap(a_TN):
        chosen = hot_experts(expert_TK, a_TN.shape[1]) > 0
        here_T = chosen.any(axis=1) & ~chosen.all(axis=1) & (real_T > 0)
        least_T = jnp.where(chosen, a_TN, jnp.inf).min(axis=1)
        return here_T, least_T - jnp.where(chosen, -jnp.inf, a_TN).max(axis=1)

    here_T, over_T = gap(scores_TE)
    too_T, margin_T = gap(choice_TN)
    p_TE = jnp.maximum(scores_TE, 0)
    p_TE = p_TE / jnp.maximum(p_TE.sum(axis=1, keepdims=True), 1e-30)
    plogp_TE = jnp.where(p_TE > 0, p_TE * jnp.log(jnp.maximum(p_TE, 1e-30)), 0)
    entropy_T = -plogp_TE.sum(axis=1) / math.log(max(num_experts, 2))
    size_T = jnp.maximum(jnp.abs(scores_TE).mean(axis=1), 1e-30)
    found = {"score_entropy": entropy_T, "margin": margin_T / size_T, "overruled": over_T < 0}
    found["scored"] = jnp.ones_like(entropy_T)
    counted_T = here_T & too_T
    return {name: jnp.where(counted_T, a, 0).astype(jnp.float32) for name, a in found.items()}


def add_labels(
    table_LFVE: np.ndarray, expert_LTK: np.ndarray, label_T: np.ndarray, fold_T: np.ndarray
) -> None:
    """Add the routes of a batch by label to a table, in place; on the host, where a large table need not move.
    Empty slots (also padding's) and special experts are left out."""
    layers, folds, labels, experts = table_LFVE.shape
    good = (expert_LTK >= 0) & (expert_LTK < experts)
    layer_L11 = np.arange(layers)[:, None, None]
    at_LTK = (
        (layer_L11 * folds + fold_T[:, None]) * labels + label_T[:, None]
    ) * experts + expert_LTK
    np.add.at(table_LFVE.reshape(-1), at_LTK[good], 1)
