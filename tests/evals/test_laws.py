"""Laws: coefficients that are known come back, intervals hold the truth, and the speedup worked by hand."""

import itertools

import numpy as np
import pytest

from moejax.evals.laws import LAWS, Fit, effective_speedup, fit, saturating_experts

# Of the sizes that the papers report; what matters here is that they are known.
POWER = {"floor": 1.6, "A": 95.0, "alpha": 0.0941}
GRANULARITY = {
    **{"c": 0.47, "g": 2.1, "gamma": 0.58, "a": 18.1, "alpha": 0.115},
    **{"b": 30.8, "beta": 0.147},
}
JOINT = {
    **{"a": 35.9, "delta": 0.23, "alpha": -0.19, "gamma": -0.009, "b": 35.9, "omega": -0.07},
    **{"beta": -0.2, "zeta": 0.005, "c": 1.4, "e_start": 2.0, "e_max": 290.0},
}
GRIDS = {
    "power": {"compute": np.geomspace(1e17, 1e20, 7)},
    "granularity": {
        "parameters": np.geomspace(1e7, 1e9, 4),
        "tokens": np.geomspace(1e9, 1e11, 4),
        "granularity": np.array([1.0, 2.0, 4.0, 8.0, 16.0]),
    },
    "joint": {
        "active": np.geomspace(1e7, 1e9, 5),
        "tokens": np.geomspace(1e9, 1e11, 5),
        "experts": np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0]),
    },
}
TRUTH = {"power": POWER, "granularity": GRANULARITY, "joint": JOINT}


def runs(name: str) -> dict[str, np.ndarray]:
    grid = GRIDS[name]
    return dict(zip(grid, np.array(list(itertools.product(*grid.values()))).T))


@pytest.mark.parametrize("name", ["power", "granularity"])
def test_known_coefficients_come_back(name):
    """Without noise the residuals are rounding; a sum of nearly parallel terms fixes its parts to a percent."""
    x, truth = runs(name), TRUTH[name]
    found = fit(LAWS[name], LAWS[name].predict(truth, x), x, starts=30, resamples=0)
    assert found.error < 1e-6
    for key, value in truth.items():
        assert found.coefficients[key] == pytest.approx(value, rel=0.02), key


def test_the_joint_law_predicts_what_it_has_not_seen():
    """Eleven coefficients, several of which trade against each other: it is the prediction that counts. At
    twice the largest size, and 64 experts, within 0.2%; e_start and e_max as given."""
    x, fixed = runs("joint"), {k: JOINT[k] for k in ("e_start", "e_max")}
    found = fit(
        LAWS["joint"], LAWS["joint"].predict(JOINT, x), x, starts=12, resamples=0, fixed=fixed
    )
    assert found.error < 1e-5 and {k: found.coefficients[k] for k in fixed} == fixed
    far = dict(active=2e9, tokens=2e11, experts=64.0)
    want = LAWS["joint"].predict(JOINT, {k: np.float64(v) for k, v in far.items()})
    assert found.predict(**far) == pytest.approx(want, rel=2e-3)


def test_intervals_hold_the_truth_and_an_outlier_moves_little():
    """Noise of 0.2% in the loss, five seeds a size, and one run that went wrong by 10%."""
    rng = np.random.default_rng(0)
    compute = np.repeat(np.geomspace(1e17, 1e20, 6), 5)
    losses = LAWS["power"].predict(POWER, {"compute": compute})
    losses = losses * np.exp(rng.normal(0, 0.002, len(losses)))
    losses[7] *= 1.1
    found = fit(LAWS["power"], losses, {"compute": compute}, starts=20, resamples=60)
    want = LAWS["power"].predict(POWER, {"compute": np.float64(1e21)})
    low, high = found.interval(compute=1e21)
    assert low < want < high and high - low < 0.05
    assert found.predict(compute=1e21) == pytest.approx(want, abs=0.02)
    low, high = found.coefficient_interval("alpha")
    assert low < POWER["alpha"] < high
    again = fit(LAWS["power"], losses, {"compute": compute}, starts=20, resamples=60)
    assert isinstance(again, Fit) and again.coefficients == found.coefficients


def test_saturating_experts():
    """e_start at one expert, e_max without end: 1 / (1 / (E - 1 + 2.4) + 1 / 12) for e_start 2, e_max 12."""
    got = saturating_experts(np.array([1.0, 8.2, 1e12]), 2.0, 12.0)
    np.testing.assert_allclose(got, [2.0, 1 / (1 / 9.6 + 1 / 12), 12.0])


def test_a_speedup_by_hand():
    """Floor 1, alpha 0.5: from 3 to 2 halves what is above the floor, which takes 2^2 times the compute. At
    half the baseline's speed that is twice the time."""
    power = {"floor": 1.0, "A": 7.0, "alpha": 0.5}
    got = effective_speedup(power, baseline=3.0, variant=2.0, variant_flops_per_second=0.5)
    assert (got.compute, got.time) == (4.0, 2.0)
    assert effective_speedup(power, baseline=2.0, variant=3.0).compute == 0.25
    assert effective_speedup(power, baseline=2.0, variant=1.0).time == np.inf
    with pytest.raises(ValueError, match="not above the floor"):
        effective_speedup(power, baseline=0.9, variant=0.8)


@pytest.mark.parametrize(
    ("losses", "inputs", "fixed", "message"),
    [
        ([3, 2, 1.5], {"compute": [1, 2, 2]}, {}, "2 different sizes cannot fix 3 coefficients"),
        ([3, 2, np.nan], {"compute": [1, 2, 4]}, {}, "leave runs that diverged out"),
        ([3, 2, 1.5], {"compute": [1, 2, -4]}, {}, "compute must be positive"),
        ([3, 2], {"compute": [1, 2, 4]}, {}, "a number for each run"),
        ([3, 2, 1.5], {"tokens": [1, 2, 4]}, {}, "inputs are compute, not tokens"),
        ([3], {"compute": [1]}, {"x": 1}, "no coefficient x; there are floor, A, alpha"),
    ],
)
def test_what_cannot_be_fitted_is_named(losses, inputs, fixed, message):
    with pytest.raises(ValueError, match=message):
        fit(LAWS["power"], losses, inputs, fixed=fixed)
