"""Figures of an analysis: counts against brute force, figures against known answers, chance against chance."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moejax.evals.analysis import importance, information, load, pairs
from moejax.evals.analysis.chance import beyond, estimate, expected_pairs, middle, permuted
from moejax.evals.analysis.collect import Collected, add
from moejax.evals.analysis.counts import SHUFFLED, Sizes, add_labels, count, scores, shuffled
from moejax.evals.analysis.figures import add_figures
from moejax.evals.analysis.table import Rows, matrix, summary
from moejax.evals.analysis.units import FOLDS, look_through
from moejax.evals.routes import Routes
from moejax.evals.statistics import student_interval

L, E, K, S, V = 3, 6, 2, 8, 10


def random_batch(rng, rows=4):
    """Rows of two documents and padding; the second half of the rows is domain 1."""
    cut, end = 5, 7
    at = np.arange(S)
    segment = np.where(at < cut, 1, np.where(at < end, 2, 0))
    batch = {
        "tokens": rng.integers(0, V, (rows, S)),
        "positions": np.tile(np.where(at < cut, at, at - cut), (rows, 1)),
        "segment_ids": np.tile(segment, (rows, 1)),
        "domain": np.repeat(np.arange(rows) >= rows // 2, S).reshape(rows, S).astype(int),
    }
    return {name: a.astype(np.int32) for name, a in batch.items()}


def random_routes(rng, batch):
    """K different experts for each token, none for padding; sometimes a special expert or an empty slot."""
    tokens = batch["tokens"].size
    expert = np.argsort(rng.random((L, tokens, E + 1)), axis=2)[:, :, :K]
    expert[rng.random(expert.shape) < 0.1] = -1
    expert[:, batch["segment_ids"].reshape(-1) == 0] = -1
    weights = np.where(expert >= 0, rng.random(expert.shape), 0).astype(np.float32)
    scored = rng.random((L, tokens, E)).astype(np.float32)
    fields = map(jnp.asarray, (expert.astype(np.int32), weights, scored, scored))
    return Routes(*fields, inputs_LTD=None, hidden_BSD=jnp.zeros(()))


def test_counts_are_those_of_a_loop():
    rng = np.random.default_rng(0)
    batch, unit_B = random_batch(rng), np.array([0, 3, 9, 9], np.int32)
    routes, bin_V = random_routes(rng, batch), np.minimum(np.arange(V), 4).astype(np.int32)
    predicted_BS = rng.integers(0, V, (4, S))
    sizes = Sizes(num_units=10, num_experts=E, num_special=1, seq_len=S)
    assert sizes.num_positions == 4  # 0, 1-2, 3-6, 7
    real_T = (batch["segment_ids"] > 0).reshape(-1)
    shuffle_T = shuffled(jax.random.key(0), jnp.asarray(real_T, jnp.float32))
    got = {n: np.asarray(a) for n, a in count(routes, batch, unit_B, shuffle_T, sizes).items()}
    for name, ids_BS in (("token", batch["tokens"]), ("predicted", predicted_BS)):
        got[name] = np.zeros((L, FOLDS, 5, E))
        label_T, fold_T = bin_V[ids_BS.reshape(-1)], np.repeat(unit_B % FOLDS, S)
        add_labels(got[name], np.asarray(routes.expert_LTK), label_T, fold_T)
    names = [n for n in got if n not in SCORED and not n.endswith("_chance")]
    want = {name: np.zeros(got[name].shape) for name in names}
    position = np.floor(np.log2(batch["positions"] + 1)).astype(int)

    def has(layer, t):
        slots = zip(*(np.asarray(a[layer, t]) for a in routes[:2]))
        return [(e, w) for e, w in slots if 0 <= e < E]

    for i, b, s in itertools.product(range(L), range(4), range(S)):
        t, u = b * S + s, unit_B[b]
        f, segment = u % FOLDS, batch["segment_ids"][b]
        if not segment[s]:
            continue
        want["tokens"][u] += i == 0
        want["special"][i] += (np.asarray(routes.expert_LTK[i, t]) == E).sum()
        before = has(i, t - 1) if s and segment[s - 1] == segment[s] else None
        want["paired"][i, f] += 0 if before is None else len(has(i, t))
        for e, w in has(i, t):
            want["load"][i, u, e] += 1
            want["gate"][i, f, e] += w
            want["share"][i, f, e] += 1 / len(has(i, t))
            want["position"][i, f, position[b, s], e] += 1
            want["token"][i, f, bin_V[batch["tokens"][b, s]], e] += 1
            want["predicted"][i, f, bin_V[predicted_BS[b, s]], e] += 1
            for other, _ in has(i, t):
                want["pairs"][i, f, e, other] += 1
            for other, _ in before or []:
                want["previous"][i, f, other, e] += 1
            for other, _ in has(i + 1, t) if i + 1 < L else []:
                want["next"][i, f, e, other] += 1
    for name in SHUFFLED:  # another token's experts: as many for each label, and for each expert
        seen, mixed = (np.asarray(got[n]).sum(axis=1) for n in (name, f"{name}_chance"))
        if name == "position":
            np.testing.assert_allclose(mixed.sum(axis=1), seen.sum(axis=1))
        assert name == "paired" or (mixed != seen).any()
    for name, a in want.items():  # whole numbers, and sums of a few float32
        np.testing.assert_allclose(got[name], a, rtol=1e-5, err_msg=name)


SCORED = ("score_entropy", "margin", "overruled", "scored")


def test_a_shuffle_leaves_padding_alone():
    real_T = jnp.array([1.0, 0, 1, 1, 0, 1, 1, 1])
    each = np.array([shuffled(jax.random.key(i), real_T) for i in range(20)])
    assert (np.sort(each, axis=1) == np.arange(8)).all()
    assert (each[:, [1, 4]] == [1, 4]).all() and len(set(map(tuple, each))) > 15


def test_scores_of_known_tokens():
    """Token 0 is undecided; 1 is sure; 2 has an expert that a bias chose; 3 has none, and 4 is padding."""
    scores_TE = jnp.array(
        [[1, 1, 1, 1], [1, 0, 0, 0], [0.5, 0.3, 0.1, 0.1], [1, 0, 0, 0], [1, 0, 0, 0]]
    )
    expert_TK = jnp.array([[0, -1], [0, -1], [1, -1], [-1, -1], [0, -1]])
    choice_TE = scores_TE + jnp.array([[0, 0.25, 0, 0]])
    got = scores(scores_TE, choice_TE, expert_TK, jnp.array([1.0, 1, 1, 1, 0]))
    p = np.array([0.5, 0.3, 0.1, 0.1])
    entropy = -(p * np.log(p)).sum() / np.log(4)
    np.testing.assert_allclose(got["score_entropy"], [1, 0, entropy, 0, 0], atol=1e-6)
    # Over the mean score: 1 against 1.25, 1 against 0.25, 0.55 against 0.5.
    np.testing.assert_allclose(got["margin"], [-0.25, 3, 0.2, 0, 0], atol=1e-6)
    np.testing.assert_array_equal(got["overruled"], [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(got["scored"], [1, 1, 1, 0, 0])


# --------------------------------------------------------------------------------------------------
# Known answers.


def test_load():
    load_LE = np.array([[5.0, 5, 5, 5], [10, 9.5, 0.5, 0]])
    np.testing.assert_allclose(load.max_violation(load_LE), [0, 1])
    np.testing.assert_allclose(load.dead(load_LE), [0, 1])
    np.testing.assert_allclose(load.cold(load_LE), [0, 1 + 0])  # 0.5 is a tenth of 5: not below
    p = np.array([0.5, 0.475, 0.025])
    np.testing.assert_allclose(load.entropy(load_LE), [1, -(p * np.log(p)).sum() / np.log(4)])


def test_information():
    """A label that says all, nothing, and something: p = [[3, 1], [1, 3]] / 8, I = log 2 - H(1/4)."""
    tables = np.array([[[5, 0], [0, 5]], [[4, 4], [2, 2]], [[3, 1], [1, 3]], [[0, 0], [0, 0]]])
    h = -(0.25 * np.log(0.25) + 0.75 * np.log(0.75))
    np.testing.assert_allclose(
        information.information(tables), [1, 0, 1 - h / np.log(2), 0], atol=1e-12
    )


def test_specialisation_and_its_chance():
    """Domain 0 has expert 0 alone, domain 1 expert 1 alone: shares 1 and 0, by chance a half; the label says
    all of the route. Where domains do not differ, their own shares are within chance."""
    domain_U = np.repeat([0, 1], 8)
    fold_U = np.arange(16) % FOLDS
    own = np.eye(2)[domain_U] * 10
    same = np.random.default_rng(0).binomial(10, 0.5, 16)
    load_LUE = np.stack([own, np.stack([same, 10 - same], axis=1)])
    got = information.specialisation(load_LUE, np.full(16, 10.0), domain_U, fold_U)
    np.testing.assert_allclose(got.value[:, 0], np.eye(2))
    np.testing.assert_allclose(got.null[:, 0], 0.5, atol=0.03)  # 200 permutations of 16
    assert beyond(got)[:, 0].all() and not beyond(got)[:, 1].any()
    told = information.domain_information(load_LUE, domain_U, fold_U)
    np.testing.assert_allclose(told.value[0], 1)
    np.testing.assert_array_equal(beyond(told)[:2], [True, False])


def test_a_domain_of_one_stretch_is_never_beyond_chance():
    """Two stretches of text that differ in all: permuted labels give as much each time."""
    load_LUE = np.eye(2)[None] * 10
    told = information.domain_information(load_LUE, np.array([0, 1]), np.array([0, 1]))
    assert told.value[0] == pytest.approx(1) and not beyond(told).any()


def test_vocabulary_and_favourites():
    """Tokens 0 and 1 have an expert each, token 2 both; the last bin is left out."""
    table_VE = np.array([[40, 0], [0, 40], [10, 10], [0, 900]])
    got = information.vocabulary_specialisation(*[np.tile(table_VE / 4, (1, 4, 1, 1))] * 2)
    assert got.value[0] == pytest.approx((40 + 40 + 10) / 100)
    token_VE = np.array([[50, 10], [10, 50], [0, 6], [3, 0]])
    assert information.favourites(token_VE, 0) == [0]  # token 3 was seen too rarely
    assert information.favourites(token_VE, 1) == [1]


def test_pairs():
    """Experts 0 and 1 always together, 2 and 3 too: 2 pairs in place of 6."""
    one = np.kron(np.eye(2), np.ones((2, 2))) * 50
    folds = np.tile(one, (1, 4, 1, 1))
    got = pairs.co_activation(folds)
    np.testing.assert_allclose(got.value[0], np.kron(np.eye(2), np.ones((2, 2))) - np.eye(4))
    np.testing.assert_allclose(got.null[0], (np.ones((4, 4)) - np.eye(4)) / 3, rtol=1e-6)
    far = pairs.co_activation_strength(folds)
    assert far.value[0] == pytest.approx(1 - 2 / 6) and beyond(far).all()


def test_expected_pairs_keep_the_sums():
    rng = np.random.default_rng(0)
    pairs_LEE = rng.random((2, 5, 5))
    pairs_LEE = pairs_LEE + pairs_LEE.swapaxes(1, 2)
    got = expected_pairs(pairs_LEE)
    off = 1 - np.eye(5)
    np.testing.assert_allclose(got.sum(axis=2), (pairs_LEE * off).sum(axis=2), rtol=1e-6)
    # What has that form is its own expectation.
    a = rng.random(5)
    np.testing.assert_allclose(
        expected_pairs((np.outer(a, a) * off)[None])[0], np.outer(a, a) * off, rtol=1e-6
    )


def test_repetition_and_transitions():
    always = np.tile(np.eye(3) * 30, (2, 4, 1, 1))
    mixed = np.full((2, 4, 3, 3), 10.0)
    got = pairs.repetition((always, np.full((2, 4), 90.0)), (mixed, np.full((2, 4), 90.0)))
    np.testing.assert_allclose(got.value, 1)
    np.testing.assert_allclose(got.null, 1 / 3)
    moved = np.tile(np.array([[0, 30, 0], [0, 0, 30], [15, 15, 0]]), (2, 4, 1, 1))
    np.testing.assert_allclose(pairs.concentration(moved, moved).value, (30 + 30 + 15) / 90)
    got = pairs.transition(moved)
    np.testing.assert_allclose(got.value[0], [[0, 1, 0], [0, 0, 1], [0.5, 0.5, 0]])
    np.testing.assert_allclose(got.null[0, 0], [15 / 90, 45 / 90, 30 / 90])


def test_saturation():
    """Half of the routes are there already. By chance: loads [3/4, 1/4] and [1/2, 1/2] of 100 tokens."""
    common, routes = np.full((1, 4), 10.0), np.full((1, 4), 20.0)
    got = pairs.saturation(common, routes, np.array([[60.0, 20]]), np.array([[50.0, 50]]), 100)
    assert got.value[0] == pytest.approx(0.5)
    assert got.null[0] == pytest.approx(0.5, abs=0.02) and not beyond(got).any()


def test_importance():
    load_FLE = np.array([[[2.0, 0, 2]], [[4, 0, 4]]])
    norm_FLE = np.array([[[6.0, 0, 1]], [[12, 0, 2]]])
    got = importance.reap(norm_FLE, load_FLE)
    np.testing.assert_allclose(got.value, [[3, 0, 0.5]])
    np.testing.assert_allclose(got.null, [[1.75] * 3])
    np.testing.assert_allclose(importance.frequency(load_FLE).value, [[0.5, 0, 0.5]])
    assert importance.select(np.array([1.0, 6, 3]), 0.6) == [1]
    assert importance.select(np.array([1.0, 6, 3]), 0.61) == [1, 2]
    assert importance.select(np.array([1.0, 6, 3]), 1.0) == [1, 2, 0]
    most_LE = np.ones((4, 100))
    most_LE[1, 7], most_LE[2, 3] = 80, 9
    # Both are above the 99.5% quantile of 400 experts; 9 lies above a tenth of 80, 7 would not.
    assert importance.super_experts(most_LE) == [(1, 7), (2, 3)]
    most_LE[2, 3] = 7
    assert importance.super_experts(most_LE) == [(1, 7)]


# --------------------------------------------------------------------------------------------------
# Intervals.


def test_the_interval_of_a_mean_is_students():
    """Equal folds: the jackknife of a mean is exactly Student's interval of the folds' means."""
    x = np.random.default_rng(0).random(6)
    got = estimate(lambda total, n: total / n, [x, np.ones(6)])
    np.testing.assert_allclose((got.low, got.high), student_interval(x))
    assert np.isnan(estimate(lambda n: n, [x[:1]]).low)  # a single fold


def test_middle_of_draws():
    few = middle(np.random.default_rng(0).normal(size=20), ())
    many = middle(np.random.default_rng(1).normal(size=20_000), ())
    # Deviations: 0.22 of the mean of 20; the half-width varies by 1/sqrt(2 n) = 16% of 2.1; quantiles by 0.02.
    np.testing.assert_allclose(few, (0, -2.1, 2.1), atol=0.9)
    np.testing.assert_allclose(many, (0, -1.96, 1.96), atol=0.06)


def test_permutations_keep_how_many_have_a_label():
    each = list(permuted(np.array([0, 0, 0, 1]), 2))
    assert all((p.sum(axis=0) == [3, 1]).all() for p in each)
    assert 20 < sum(p[0, 1] for p in each) < 80  # 200 draws with chance 1/4, 5 deviations


def test_units_are_equal_stretches_of_a_domain():
    rng = np.random.default_rng(0)
    batches = [random_batch(rng) for _ in range(80)]
    batches[-1]["segment_ids"][3] = 0  # the last batch is padded
    units = look_through(batches, 2, V, counts_per_token=1)
    np.testing.assert_array_equal(units.rows_d, [160, 159])
    assert len(units.domain_U) == 64 and (np.bincount(units.domain_U) == 32).all()
    rows_U, last = np.zeros(64, int), {0: -1, 1: -1}
    for batch, unit_B in units.of_rows(batches):
        for row, u in enumerate(unit_B):
            if batch["segment_ids"][row].any():
                d = batch["domain"][row, 0]
                assert units.domain_U[u] == d and u >= last[d]
                rows_U[u], last[d] = rows_U[u] + 1, u
    assert set(rows_U) == {4, 5}
    tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in batches])
    assert len(units.frequent) == V and units.frequent[0] == np.bincount(tokens).argmax()
    np.testing.assert_array_equal(units.frequent[units.bin_V], np.arange(V))


# --------------------------------------------------------------------------------------------------
# A router that draws at random, and one that does not.


@pytest.fixture(scope="module")
def collected():
    """(what a pass would collect of routes drawn at random, and of routes by domain; units)"""
    rng = np.random.default_rng(0)
    batches = [random_batch(rng, rows=32) for _ in range(16)]
    units = look_through(batches, 2, V, counts_per_token=L * E)
    sizes = Sizes(len(units.domain_U), E, 0, S)
    out, jitted, mixed = [], jax.jit(count, static_argnums=4), jax.jit(shuffled)
    for by_domain in (False, True):
        sums, words, vio = {}, {}, np.zeros((2, L))
        for number, (batch, unit_B) in enumerate(units.of_rows(batches)):
            tokens = batch["tokens"].size
            expert = np.argsort(rng.random((L, tokens, E)), axis=2)[:, :, :K].astype(np.int32)
            if by_domain:  # the first expert of a token says its domain
                expert[:, :, 0] = batch["domain"].reshape(-1)
                expert[:, :, 1] = 2 + expert[:, :, 1] % (E - 2)
            expert[:, batch["segment_ids"].reshape(-1) == 0] = -1
            routes = Routes(expert, np.ones(expert.shape, np.float32), *[None] * 4)
            real_T = (batch["segment_ids"] > 0).reshape(-1).astype(np.float32)
            shuffle_T = mixed(jax.random.key(number), real_T)
            one = jitted(routes, batch, unit_B, shuffle_T, sizes)
            add(sums, {name: np.asarray(a) for name, a in one.items()})
            label_T, fold_T = (
                units.bin_V[batch["tokens"].reshape(-1)],
                np.repeat(unit_B % FOLDS, S),
            )
            for name, at_LTK in (("token", expert), ("token_chance", expert[:, shuffle_T])):
                words.setdefault(name, np.zeros((L, FOLDS, units.num_bins, E)))
                add_labels(words[name], at_LTK, label_T, fold_T)
            vio_L = load.max_violation(np.asarray(one["load"]).sum(axis=1))
            vio += [vio_L, vio_L**2]
        ones = np.ones((L, FOLDS, E))
        words |= {n.replace("token", "predicted"): a for n, a in words.items()}
        sums |= words | {"gate_norm": ones, "most": rng.random((L, E))}
        names = ("weights", "outputs", "cka")
        alike = {f"{n}{end}": rng.normal(size=(L, E, E)) for n in names for end in ("", "_chance")}
        out.append(Collected(sums, vio, len(batches), alike))
    return *out, units


# Random in the fixture although figures about outputs need a model; that one is tested with a model.
NOT_ROUTES = {"weight_similarity_mean", "output_similarity_mean", "cka_mean"}
SURE = {"domain_information", "domain_share"}


def test_random_routes_are_within_chance(collected):
    rows = Rows(0, [0, 1, 2], ("a", "b"))
    add_figures(rows, collected[0], collected[2])
    found = [r for r in summary(rows.table()) if r["figure"] not in NOT_ROUTES]
    judged = {r["figure"] for r in found if r["beyond_chance"] is not None}
    assert len(judged) >= 12
    # 3 layers and their mean each, at 95%; over 40 seeds no figure was beyond chance in more than 3.3% of rows.
    over = [r["layer"] for r in found if r["beyond_chance"]]
    assert len(over) <= 0.05 * len(found) and -1 not in over
    share = rows.table().to_pylist()
    share = [r for r in share if r["figure"] == "domain_share"]
    out = sum(not r["null_low"] <= r["value"] <= r["null_high"] for r in share)
    assert (
        len(share) == 2 * L * E and out <= 5
    )  # 36 at 95%: 1.8 expected, 5 is 2.4 deviations above


def test_experts_by_domain_are_beyond_chance(collected):
    rows = Rows(7, [1], ("a", "b"))
    add_figures(rows, collected[1], collected[2])
    table = rows.table()
    found = {(r["figure"], r["layer"]): r for r in summary(table)}
    assert {layer for _, layer in found} == {1, -1}  # of --layers, and the mean of all
    for figure in ("max_vio", "domain_information", "co_activation_strength", "repetition"):
        assert found[figure, 1]["beyond_chance"], figure
    assert not found["token_information", 1]["beyond_chance"]  # tokens and domains are independent
    # Each domain has its own expert of two; the other is one of E - 2: H = log 2 + log 2 / 2 + log(E - 2) / 2.
    both, rest = np.log(2), np.log(E - 2)
    assert found["domain_information", 1]["value"] == pytest.approx(
        0.5 * both / (both + 0.5 * both + 0.5 * rest), rel=0.05
    )
    got = matrix(table, "frequency", 7, 1, E)
    np.testing.assert_allclose(got[:2], 0.25, atol=0.02)
    pairs_EE = matrix(table, "co_activation", 7, 1, E, E)
    assert np.isnan(np.diagonal(pairs_EE)).all() and pairs_EE[0, 1] == 0
    assert np.isnan(matrix(table, "frequency", 7, 0, E)).all()
