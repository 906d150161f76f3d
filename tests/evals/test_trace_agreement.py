"""routes --compare: the share of routes that differ, against sets counted one by one."""

import json

import numpy as np
import pytest

from moejax.commands import routes
from moejax.config import ConfigError
from moejax.evals.trace_agreement import compare


def test_counts_are_those_of_sets():
    rng = np.random.default_rng(0)
    two = [rng.permuted(np.tile(np.arange(6), (3, 40, 1)), axis=2)[..., :3] for _ in range(2)]
    two[0][0] = two[1][0][:, ::-1]  # the same in another order
    two[1][2, :9, 1:] = -1  # fewer experts
    real = np.arange(40) < 35
    got = compare(*two, real)
    sets = [[[set(e) - {-1} for e in layer[:35].tolist()] for layer in way] for way in two]
    differ = [[len(a ^ b) for a, b in zip(*layers)] for layers in zip(*sets)]
    assert got.routes_differ_L.tolist() == [sum(layer) for layer in differ] and got.tokens == 35
    assert got.routes_L.tolist() == [
        sum(len(a) + len(b) for a, b in zip(*layers)) for layers in zip(*sets)
    ]
    assert got.tokens_differ_L.tolist() == [sum(n > 0 for n in layer) for layer in differ]
    assert got.tokens_differ == sum(any(of) for of in zip(*differ)) and differ[0] == [0] * 35
    assert got.numbers()["routes_differ"] == sum(map(sum, differ)) / got.routes_L.sum()


WAYS = [
    "prefill,decode",
    "float32,bfloat16",
    pytest.param("mesh=data=2", marks=pytest.mark.product),
]


@pytest.mark.parametrize("ways", WAYS)
def test_two_ways_of_one_run(trained, tmp_path, ways, capsys):
    out = tmp_path / "out.json"
    args = [f"--workdir={trained}", f"--compare={ways}", "--tokens=128", f"--out={out}"]
    assert routes.main(args) == 0
    got = json.loads(out.read_text())
    assert got["tokens"] == 128 and len(got["routes_differ_by_layer"]) == 2
    assert "any" in capsys.readouterr().out
    # Float32 sums in another order are 1e-7 apart, margins near 1e-2: a wrong position, mask or cache changes
    # half of all routes. bf16 has 8 bits, scores near 0.5 differ by 1e-3: some routes flip, most do not.
    if ways == "float32,bfloat16":
        assert 0 < got["routes_differ"] < 0.3
    else:
        assert got["routes_differ"] < 0.01


@pytest.mark.parametrize(
    "flags, match",
    [
        (["--compare=float32"], "expected float32,bfloat16 or prefill,decode"),
        (["--compare=float32,decode"], "expected float32,bfloat16 or"),
        (["--compare=mesh=data=64"], "64"),
        (["--compare=prefill,decode", "--text=a"], "cannot be used together"),
    ],
)
def test_bad_comparisons_are_refused_before_weights_are_read(trained, flags, match, monkeypatch):
    monkeypatch.setattr("moejax.runs.restore.abstract_model", None)
    with pytest.raises(ConfigError, match=match):
        routes.main([f"--workdir={trained}", *flags])
