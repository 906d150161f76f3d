"""All figures of one step, from what a pass collected."""

import numpy as np

from moejax.evals.analysis import importance, information, load, pairs
from moejax.evals.analysis.chance import Estimate, estimate, with_mean
from moejax.evals.analysis.collect import Collected
from moejax.evals.analysis.placement import device_load, imbalance, in_order, rebalance
from moejax.evals.analysis.table import Rows
from moejax.evals.analysis.units import FOLDS, Units

SHARES = (0.1, 0.2, 0.5, 0.9)  # of ESFT's scores, for how few experts hold them


def add_figures(rows: Rows, seen: Collected, units: Units) -> dict[str, np.ndarray]:
    """Add every figure that one step's counts give. Returns the importance of every expert, by name, [L, E]."""
    sums = seen.sums
    load_ULE, tokens_U = sums["load"].swapaxes(0, 1), sums["tokens"]
    in_fold_FU = np.arange(FOLDS)[:, None] == units.fold_U
    load_FLE = np.tensordot(in_fold_FU.astype(float), load_ULE, axes=(1, 0))
    tokens_F = in_fold_FU @ tokens_U
    tokens = tokens_U.sum()
    load_LE = load_FLE.sum(axis=0)

    for name, e in load.load_figures(load_FLE, tokens).items():
        rows.add(name, e, "layers")
    vio = load.batch_violation(seen.batch_vio, seen.batches, load_LE, tokens)
    rows.add("max_vio_batch", vio, "layers")
    rows.add("load", load.expert_load(load_FLE, tokens_F), "layer", "expert")
    if sums["special"].any():
        rows.add("special_experts", _known(sums["special"].sum(axis=1) / tokens), "layer")
    for name, e in balance(load_FLE).items():
        rows.add(name, e, "layers")

    if len(set(units.domain_U)) > 1:
        where = units.domain_U, units.fold_U
        rows.add(
            "domain_information", information.domain_information(sums["load"], *where), "layers"
        )
        special = information.specialisation(sums["load"], tokens_U, *where)
        rows.add("domain_share", special, "domain", "layer", "expert")
    for name in ("position", "token", "previous"):
        e = information.table_information(sums[name], sums[f"{name}_chance"])
        rows.add(f"{name}_information", e, "layers")
    for name in ("token", "predicted"):
        e = information.vocabulary_specialisation(sums[name], sums[f"{name}_chance"])
        rows.add(f"{name}_specialisation", e, "layers")

    rows.add("co_activation", pairs.co_activation(sums["pairs"]), "layer", "expert", "other")
    rows.add("co_activation_strength", pairs.co_activation_strength(sums["pairs"]), "layers")
    again = [(sums[f"previous{end}"], sums[f"paired{end}"]) for end in ("", "_chance")]
    rows.add("repetition", pairs.repetition(*again), "layers")
    if len(load_LE) > 1:
        following = sums["next"], sums["next_chance"]
        e = information.table_information(*(a[:-1] for a in following))
        rows.add("layer_information", e, "layers")
        rows.add("transition_concentration", pairs.concentration(*following), "layers")
        rows.add("transition", pairs.transition(sums["next"]), "layer", "expert", "other")

    if "scored" in sums:
        for name in ("score_entropy", "margin", "overruled"):
            rows.add(name, _mean(sums[name], sums["scored"]), "layers")
    if "flipped" in sums:
        rows.add("bf16_flips", _mean(sums["flipped"], sums["routed"]), "layers")

    for name, key in {
        "weight_similarity": "weights",
        "output_similarity": "outputs",
        "cka": "cka",
    }.items():
        null_LEE = seen.alike[f"{key}_chance"]
        rows.add(name, _pairwise(seen.alike[key], null_LEE), "layer", "expert", "other")
        rows.add(f"{name}_mean", _mean_of_pairs(seen.alike[key], null_LEE), "layers")
    rows.add("greatest_output", _known(sums["most"]), "layer", "expert")
    scored = scores(seen, load_FLE)
    for name, e in scored.items():
        rows.add(name, e, "layer", "expert")
    return {name: e.value for name, e in scored.items()}


def scores(seen: Collected, load_FLE: np.ndarray) -> dict[str, Estimate]:
    """The importance of every expert, by name."""
    by_fold = lambda name: seen.sums[name].swapaxes(0, 1)  # noqa: E731
    return {
        "frequency": importance.frequency(load_FLE),
        "reap": importance.reap(by_fold("gate_norm"), load_FLE),
        "esft_token": importance.esft(by_fold("share")),
        "esft_gate": importance.esft(by_fold("gate")),
    }


def balance(load_FLE: np.ndarray) -> dict[str, Estimate]:
    """Greatest load of a device over the mean with the experts in their order, and with `rebalance` and as many
    slots, [L + 1], for every power of two of devices that divides the experts."""
    layers, experts = load_FLE.shape[1:]
    out, devices = {}, 2
    while experts % devices == 0 and devices < experts:

        def usual(load_LE, n=devices):
            return with_mean(imbalance(device_load(load_LE, in_order(layers, experts), n)))

        def best(load_LE, n=devices):
            placed = rebalance(load_LE, experts, devices=n)
            return with_mean(imbalance(device_load(load_LE, placed, n)))

        out[f"balance_{devices}_devices"] = estimate(usual, [load_FLE])
        out[f"rebalanced_{devices}_devices"] = estimate(best, [load_FLE])
        devices *= 2
    return out


def details(
    seen: Collected,
    units: Units,
    layers: list[int],
    scored: dict[str, np.ndarray],
    pieces: list[str],
) -> dict:
    """What is not in the table, as JSON: importance and load of the step, super experts, how few experts hold
    which share of ESFT's scores, and the tokens that experts get beyond their share."""
    load_LE, most_LE = seen.sums["load"].sum(axis=1), seen.sums["most"]
    tokens_LVE = seen.sums["token"].sum(axis=1)
    names = [pieces[i] for i in units.frequent]
    return {
        "load": load_LE.tolist(),
        "importance": {name: value.tolist() for name, value in scored.items()},
        "selected": {
            name: {str(p): [importance.select(s, p) for s in scored[name]] for p in SHARES}
            for name in ("esft_token", "esft_gate")
        },
        "super_experts": [
            {"layer": i, "expert": e, "greatest_output": float(most_LE[i, e])}
            for i, e in importance.super_experts(most_LE)
        ],
        "median_greatest_output": float(np.median(most_LE)),
        "favourite_tokens": {
            str(layer): [
                [names[b] for b in information.favourites(tokens_LVE[layer, :-1], e)]
                for e in range(load_LE.shape[1])
            ]
            for layer in layers
        },
    }


def _mean(sum_LF: np.ndarray, count_LF: np.ndarray) -> Estimate:
    fn = lambda s_L, n_L: with_mean(s_L / np.maximum(n_L, 1))  # noqa: E731
    return estimate(fn, [sum_LF.T, count_LF.T])


def _known(value: np.ndarray) -> Estimate:
    """A number that is not an estimate of anything, without a null model."""
    return Estimate(value, *(np.full(value.shape, np.nan) for _ in range(5)))


def _pairwise(value_LEE: np.ndarray, null_LEE: np.ndarray) -> Estimate:
    nothing = np.full(value_LEE.shape, np.nan)
    return Estimate(value_LEE, nothing, nothing, null_LEE, nothing, nothing)


def _mean_of_pairs(value_LEE: np.ndarray, null_LEE: np.ndarray) -> Estimate:
    """Mean over pairs of different experts; the null's interval is 2 deviations of its pairs, over the root of
    the number of experts, which are what is drawn."""
    e = value_LEE.shape[1]
    off = ~np.eye(e, dtype=bool)
    value, null = (with_mean(a[:, off].mean(axis=1)) for a in (value_LEE, null_LEE))
    half = with_mean(2 * null_LEE[:, off].std(axis=1) / np.sqrt(e))
    nothing = np.full(value.shape, np.nan)
    return Estimate(value, nothing, nothing, null, null - half, null + half)
