"""One pass of a model over a text: batches in, the sums of `counts` and `outputs` out. What is held does not
grow with the text."""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from moejax.config import ExperimentConfig
from moejax.evals.analysis import outputs
from moejax.evals.analysis.counts import Sizes, add_labels, count, hot_experts, shuffled
from moejax.evals.analysis.load import max_violation
from moejax.evals.analysis.units import FOLDS, Units
from moejax.evals.routes import routes_of
from moejax.models.embedding import head_weights
from moejax.models.loss import chunk_length
from moejax.routers import router_of

# Routes by what a token is and by what the model predicts after it, [L, F, V, E]; and of shuffled tokens.
WORDS = ("token", "token_chance", "predicted", "predicted_chance")
_FIELDS = ("tokens", "positions", "segment_ids")


class Collected(NamedTuple):
    """Attributes:
    sums: WORDS; and see `counts.count`, `outputs.output_sums` and `outputs.rounding_sums`; float64.
    batch_vio: over batches, the sum of MaxVio [L] and of its square [L].
    batches: how many.
    alike: see `outputs.similarity`.
    """

    sums: dict[str, np.ndarray]
    batch_vio: np.ndarray
    batches: int
    alike: dict[str, np.ndarray]


class Programs(NamedTuple):
    """The compiled functions of one model and text; parameters are arguments, so every step shares them."""

    batch: Any
    probe: Any
    similarity: Any
    overlap: Any


def sizes_of(cfg: ExperimentConfig, units: Units, seq_len: int) -> Sizes:
    specials = router_of(cfg.model.moe.router).specials(cfg.model.router_config())
    return Sizes(
        units.room,
        cfg.model.moe.num_experts,
        len(specials),
        seq_len,
    )


def predicted_tokens(params: dict, hidden_BSD: jax.Array, most: int) -> jax.Array:
    """The most likely next token at each position, [B, S], with the logits of about `most` tokens at a time."""
    b, s, d = hidden_BSD.shape
    w_DV = head_weights(params).astype(hidden_BSD.dtype)
    chunk = chunk_length(b, s, most)
    pieces = hidden_BSD.reshape(-1, b * chunk, d)
    best = jax.lax.map(lambda h: jnp.argmax(jnp.dot(h, w_DV), axis=-1), pieces)
    return best.reshape(b, s)


def programs(cfg: ExperimentConfig, sizes: Sizes) -> Programs:
    """Jit what a pass needs."""
    model, compute = cfg.model, cfg.compute
    carries = router_of(model.moe.router).carries(model.router_config())

    def see(params, state, batch):
        return routes_of(params, state, batch, model, compute, inputs=True)

    def one_batch(params, state, batch, unit_B, number):
        routes = see(params, state, batch)
        most = compute.tokens_of_logits(model.vocab_size)
        predicted_BS = predicted_tokens(params, routes.hidden_BSD, most)
        key, segment_BS = jax.random.fold_in(jax.random.key(0), number), batch["segment_ids"]
        shuffle_T = shuffled(key, (segment_BS > 0).reshape(-1).astype(jnp.float32))
        sums = count(routes, batch, unit_B, shuffle_T, sizes)
        sums |= outputs.output_sums(params, routes, segment_BS, unit_B, model, compute)
        if not carries:  # else a layer's routes depend on more than what it reads
            sums |= outputs.rounding_sums(params, state, routes, batch, unit_B, model)
        real_T1 = segment_BS.reshape(-1, 1) > 0
        return sums, (jnp.where(real_T1, routes.expert_LTK, -1), shuffle_T, predicted_BS)

    def overlap(first, last, batch, unit_B):
        """[L, F]: routes of the first model that the last has too, and routes of the first."""
        a, b = (
            jax.vmap(functools.partial(hot_experts, num_experts=sizes.num_experts))(
                routes_of(params, state, batch, model, compute).expert_LTK
            )
            for params, state in (first, last)
        )
        fold_T = jnp.repeat(unit_B % FOLDS, batch["tokens"].shape[1])
        sums = lambda x: jax.vmap(lambda t: jax.ops.segment_sum(t, fold_T, FOLDS))(x)  # noqa: E731
        return sums((a * b).sum(axis=2)), sums(a.sum(axis=2))

    def similar(params, probe_LPD, order_P):
        return outputs.similarity(params, probe_LPD, order_P, model)

    def probe(params, state, batch, rows_P):
        read_LTD = see(params, state, batch).inputs_LTD
        assert read_LTD is not None  # it was asked for
        return read_LTD[:, rows_P]

    return Programs(jax.jit(one_batch), jax.jit(probe), jax.jit(similar), jax.jit(overlap))


def collect(
    run: Programs, params: dict, router_state: dict, batches: Iterable[dict], units: Units
) -> Collected:
    """One pass over `batches`, those that `units` was made of."""
    total: dict[str, np.ndarray] = {}
    vio, batches_seen, alike, words = np.zeros(()), 0, {}, {}
    for batch, unit_B in units.of_rows(batches):
        fields = {name: batch[name] for name in _FIELDS}
        if not alike:  # the first rows are one of each domain
            rows_P = outputs.probe_rows(batch["segment_ids"])
            order_P = np.random.default_rng(0).permutation(len(rows_P))
            probe_LPD = run.probe(params, router_state, fields, rows_P)
            alike = jax.device_get(run.similarity(params, probe_LPD, order_P))
        sums, seen = run.batch(params, router_state, fields, unit_B, np.int32(batches_seen))
        sums, (expert_LTK, shuffle_T, predicted_BS) = jax.device_get((sums, seen))
        if not words:
            shape = len(expert_LTK), FOLDS, units.num_bins, sums["load"].shape[2]
            words = {name: np.zeros(shape, np.int32) for name in WORDS}
        fold_T = np.repeat(unit_B % FOLDS, batch["tokens"].shape[1])
        for name, ids_BS in (("token", batch["tokens"]), ("predicted", predicted_BS)):
            label_T = units.bin_V[ids_BS.reshape(-1)]
            add_labels(words[name], expert_LTK, label_T, fold_T)
            add_labels(words[f"{name}_chance"], expert_LTK[:, shuffle_T], label_T, fold_T)
        vio_L = max_violation(sums["load"].sum(axis=1))
        vio, batches_seen = vio + np.stack([vio_L, vio_L**2]), batches_seen + 1
        add(total, sums)
    for name in ("load", "tokens"):  # of the units that there are
        axis = total[name].ndim > 1
        total[name] = total[name].take(np.arange(len(units.domain_U)), axis=int(axis))
    return Collected(total | words, vio, batches_seen, alike)


def add(total: dict[str, np.ndarray], sums: dict[str, np.ndarray]) -> None:
    """Add a batch's sums in place, in float64 (a float32 sum stops growing at 2^24); `most` is a maximum."""
    for name, a in sums.items():
        if name not in total:
            total[name] = a.astype(np.float64)
        elif name == "most":
            np.maximum(total[name], a, out=total[name])
        else:
            total[name] += a


def saturation_sums(
    run: Programs, first: tuple, last: tuple, batches: Iterable[dict], units: Units
) -> tuple[np.ndarray, np.ndarray]:
    """([L, F] routes that two models share, [L, F] routes of the first); a model is (params, router_state)."""
    total: dict[str, np.ndarray] = {}
    for batch, unit_B in units.of_rows(batches):
        fields = {name: batch[name] for name in _FIELDS}
        common, routes = jax.device_get(run.overlap(first, last, fields, unit_B))
        add(total, {"common": common, "routes": routes})
    return total["common"], total["routes"]
