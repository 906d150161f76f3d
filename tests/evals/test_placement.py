"""Placement of experts: the published example, what always holds, and brute force on small cases."""

import itertools
import json

import numpy as np
import pytest

from moejax.commands import rebalance as command
from moejax.config import ConfigError
from moejax.evals.analysis.placement import device_load, imbalance, in_order, rebalance

LOADS = np.array(  # the example that DeepSeek gives with its balancer
    [
        [90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86],
        [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27],
    ]
)


def test_the_published_example():
    """16 slots, 4 groups, 2 nodes, 8 devices, and the placement that DeepSeek's README prints for it."""
    placed = rebalance(LOADS, 16, 4, 2, 8)
    np.testing.assert_array_equal(
        placed.expert_LP,
        [
            [5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1],
            [7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1],
        ],
    )


@pytest.mark.parametrize("seed", range(8))
def test_what_always_holds(seed):
    rng = np.random.default_rng(seed)
    groups, nodes, devices = [(1, 1, 4), (4, 2, 8), (3, 2, 4), (6, 3, 6)][seed % 4]
    load_LE = rng.gamma(0.5, size=(2, 24))
    placed = rebalance(load_LE, 48, groups, nodes, devices)
    assert (placed.replicas_LE >= 1).all() and (placed.replicas_LE.sum(axis=1) == 48).all()
    loads = device_load(load_LE, placed, devices)
    np.testing.assert_allclose(loads.sum(axis=1), load_LE.sum(axis=1))
    if groups % nodes == 0 and nodes > 1:
        slots = placed.expert_LP.reshape(2, nodes, -1) // (24 // groups)
        for layer in range(2):  # a group lies on one node
            homes = [{g for g in range(groups) if g in set(slots[layer, n])} for n in range(nodes)]
            assert sum(map(len, homes)) == groups
    assert (imbalance(loads) >= 1 - 1e-12).all()


def test_replicas_are_the_best_there_are():
    """Brute force: of all ways to hold 4 experts in 7 slots, none has a lower greatest load per replica."""
    rng = np.random.default_rng(0)
    for load_E in rng.gamma(0.5, size=(20, 4)):
        placed = rebalance(load_E[None], 7, devices=7)
        ways = [c for c in itertools.product(range(1, 5), repeat=4) if sum(c) == 7]
        best = min(max(load_E / c) for c in ways)
        assert max(load_E / placed.replicas_LE[0]) == pytest.approx(best)


def test_packing_is_near_the_best_there_is():
    """Brute force over all ways to put 6 experts on 2 devices, 3 on each. Heaviest first is within 7/6 of the
    best without the bound on room (Graham 1969); with it, these cases stay within 1.2."""
    rng = np.random.default_rng(0)
    for load_E in rng.gamma(0.5, size=(30, 6)):
        got = device_load(load_E[None], rebalance(load_E[None], 6, devices=2), 2).max()
        ways = [load_E[list(c)].sum() for c in itertools.combinations(range(6), 3)]
        assert got <= 1.2 * min(max(w, load_E.sum() - w) for w in ways) + 1e-12


def test_balance_of_a_known_placement():
    load_LE = np.array([[4.0, 0.0, 1.0, 1.0]])
    loads = device_load(load_LE, in_order(1, 4), 2)
    np.testing.assert_allclose(loads, [[4, 2]])
    np.testing.assert_allclose(imbalance(loads), [4 / 3])
    # Expert 0 is held three times, 4/3 each: two of them and nothing else, against 4/3 + 1 + 1.
    placed = rebalance(load_LE, 6, devices=2)
    np.testing.assert_array_equal(placed.replicas_LE, [[3, 1, 1, 1]])
    np.testing.assert_allclose(imbalance(device_load(load_LE, placed, 2)), [10 / 9])
    np.testing.assert_allclose(imbalance(np.zeros((1, 2))), [1.0])


def test_bad_numbers():
    for args, what in [
        ((3,), "below the 4 experts"),
        ((6, 1, 1, 4), "replicas=6 do not divide evenly over devices=4; 8 would work"),
        ((4, 3), "do not divide into groups=3"),
        ((6, 2, 2, 3), "devices=3 do not divide evenly over nodes=2"),
        ((4, 0), "groups=0"),
    ]:
        with pytest.raises(ConfigError, match=what):
            rebalance(np.ones((1, 4)), *args)
    with pytest.raises(ConfigError, match="none below 0"):
        rebalance(-np.ones((1, 4)), 4)


def test_command(tmp_path, capsys):
    file = tmp_path / "loads.json"
    file.write_text(json.dumps(LOADS.tolist()))
    out = tmp_path / "placed.json"
    args = [f"--loads={file}", "--replicas=16", "--groups=4", "--nodes=2", f"--json={out}"]
    assert command.main([*args, "--devices=8"]) == 0
    printed = capsys.readouterr().out
    assert "12 experts in 16 slots on 8 devices" in printed
    placed = np.array(json.loads(out.read_text())["expert_of_slot"])
    want = imbalance(device_load(LOADS, rebalance(LOADS, 16, 4, 2, 8), 8))
    assert placed.shape == (2, 16) and f"{want.mean():.3f}" in printed
    file.write_text('{"a": 1}')
    for bad, what in [
        ([f"--loads={file}", "--devices=2"], "holds no loads"),
        ([f"--workdir={tmp_path}", "--devices=2"], "moejax analyze --workdir"),
        (["--devices=2"], "either --loads or --workdir"),
    ]:
        with pytest.raises(ConfigError, match=what):
            command.main(bad)
