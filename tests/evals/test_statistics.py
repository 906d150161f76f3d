"""The statistics of paired runs, against numbers worked out by hand."""

import math

import numpy as np
import pytest

from moejax.evals.statistics import (
    bootstrap_interval,
    difference,
    seeds_needed,
    standard_error,
    student_interval,
)

# Differences 1, 2, 3, 6: mean 3, squares of the rest 4 + 1 + 0 + 9 = 14, s = sqrt(14/3), error = sqrt(14/12).
BASELINE, VALUES = [10.0, 20.0, 30.0, 40.0], [11.0, 22.0, 33.0, 46.0]


def test_a_difference_worked_by_hand():
    d = difference(VALUES, BASELINE)
    assert d.each == (1.0, 2.0, 3.0, 6.0) and d.mean == 3.0
    assert d.error == pytest.approx(math.sqrt(14 / 12))
    # t(0.975, 3) = 3.182446 in any table.
    half = 3.182446 * math.sqrt(14 / 12)
    assert d.student == pytest.approx((3 - half, 3 + half), rel=1e-6)
    assert d.student[0] < 0 and not d.resolved
    # With 3 degrees of freedom, P(T > t) = 1/2 - (atan(u) + u / (1 + u^2)) / pi, where u = t / sqrt(3).
    u = 3 / math.sqrt(14 / 12) / math.sqrt(3)
    assert d.p_value == pytest.approx(1 - 2 * (math.atan(u) + u / (1 + u * u)) / math.pi)


def test_pairs_cancel_what_they_share():
    """The quickstart's five seeds (docs/experiments.md): the seeds differ by 0.4, the pairs by 0.07."""
    moe = [4.6284, 4.7088, 4.7728, 4.3895, 4.7411]
    dense = [4.7192, 4.7281, 4.8547, 4.4161, 4.7740]
    d = difference(moe, dense)
    assert d.mean == pytest.approx(-0.0503, abs=5e-5) and d.error == pytest.approx(0.015, abs=5e-4)
    assert d.resolved and d.student[1] < 0
    shuffled = difference(moe, [*dense[1:], dense[0]])
    assert shuffled.mean == pytest.approx(d.mean) and not shuffled.resolved


def test_the_bootstrap_has_the_quantiles_of_every_resample():
    # Of two values 0 and 1, the mean of a resample is 0, 1/2 or 1 with chances 1/4, 1/2, 1/4.
    assert bootstrap_interval([0.0, 1.0]) == (0.0, 1.0)
    # Of 7 pairs the mean is 1 only if all are, one in 7^7 / 1: never in 10,000 resamples' 2.5% tails.
    values = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]
    low, high = bootstrap_interval(values)
    # P(k ones of 7) = C(7,k) 6^(7-k) / 7^7: P(k <= 2) = 0.9398, P(k <= 3) = 0.9910.
    assert (low, high) == pytest.approx((0.0, 3 / 7))
    assert bootstrap_interval(values) == (low, high)  # seeded
    normal = np.random.default_rng(1).normal(size=400)
    narrow, wide = bootstrap_interval(normal), student_interval(normal)
    # For many values both are the normal interval; 10,000 resamples give its ends to some percent.
    assert narrow == pytest.approx(wide, abs=0.1 * (wide[1] - wide[0]))


def test_one_seed_says_nothing_of_its_error():
    d = difference([1.0], [2.0])
    assert d.mean == -1.0 and not d.resolved and d.needed is None
    assert all(map(math.isnan, (d.error, *d.student, *d.bootstrap, d.p_value)))
    assert math.isnan(standard_error([1.0]))


def test_how_many_seeds_are_needed():
    # The normal quantiles are 1.960 + 0.842 = 2.802: a tenth of a deviation needs 28.02^2 = 785 pairs, and
    # a few more because t is wider.
    assert 785 <= seeds_needed(0.1, 1.0) <= 790
    assert seeds_needed(-0.1, 1.0) == seeds_needed(0.1, 1.0)
    # t(0.975, 2) + t(0.8, 2) = 4.303 + 1.061 = 5.364, over sqrt(3) 3.097; t(.., 3): 3.182 + 0.978 = 4.161, half
    # of it 2.080.
    assert seeds_needed(3.1, 1.0) == 3 and seeds_needed(3.09, 1.0) == 4
    assert seeds_needed(2.081, 1.0) == 4 and seeds_needed(2.08, 1.0) == 5
    assert seeds_needed(0.001, 1.0) is None
    assert seeds_needed(0.0, 0.0) is None and seeds_needed(1.0, 0.0) == 2


def test_so_many_seeds_do_find_it():
    """In 2000 experiments with n = seeds_needed pairs, 80% leave out 0 (binomial deviation 0.9%; the formula is
    an approximation of the noncentral t, good to a few percent)."""
    n = seeds_needed(1.0, 1.0)
    assert n is not None
    draws = np.random.default_rng(0).normal(1.0, 1.0, size=(2000, n))
    found = np.mean([student_interval(row)[0] > 0 for row in draws])
    assert 0.76 < found < 0.86


def test_no_false_discoveries_beyond_five_percent():
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    ends = np.array([student_interval(row) for row in draws])
    hits = np.mean((ends[:, 0] > 0) | (ends[:, 1] < 0))
    assert hits == pytest.approx(0.05, abs=0.011)  # three binomial deviations


def test_values_that_are_no_pairs():
    with pytest.raises(ValueError, match="2 values cannot be paired with 1"):
        difference([1.0, 2.0], [1.0])
