"""Statistics of a study. Oracles: scipy's own tests, made-up normal data whose truth is known, arithmetic by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as theirs

from lownibble.measuring import stats

FINITE = st.floats(-100, 100, allow_subnormal=False)


@given(st.lists(st.tuples(FINITE, FINITE), min_size=2, max_size=12))
def test_the_difference_is_a_paired_t_test(pairs):
    a, b = ({seed: pair[side] for seed, pair in enumerate(pairs)} for side in (0, 1))
    found = stats.paired_difference(a, b)
    differences = np.array([x - y for x, y in pairs])
    if differences.std() < 1e-9 * (1 + abs(differences.mean())):
        return  # scipy warns of precision loss
    expected = theirs.ttest_rel([x for x, _ in pairs], [y for _, y in pairs])
    low, high = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    assert (found.low, found.high) == (pytest.approx(low, rel=1e-6, abs=1e-9), pytest.approx(high, rel=1e-6, abs=1e-9))


def test_only_seeds_that_both_have_are_compared():
    found = stats.paired_difference({0: 1.0, 1: 2.0, 2: 9.0}, {0: 0.5, 1: 1.5, 7: -9.0})
    assert (found.mean, found.pairs) == (0.5, 2)
    with pytest.raises(ValueError, match="no pairs"):
        stats.paired_difference({0: 1.0}, {1: 1.0})


def test_one_seed_says_nothing():
    found = stats.paired_difference({0: 1.0}, {0: 0.0})
    assert (found.low, found.high, found.p) == (-math.inf, math.inf, 1.0)
    assert stats.equivalence([0.0], 1.0) == 1.0


@pytest.mark.parametrize("true", [0.0, 0.7])
def test_the_interval_holds_the_truth_as_often_as_it_says(true):
    generator = np.random.default_rng(0)
    runs = [stats.mean_difference(list(generator.normal(true, 1.0, 4))) for _ in range(2000)]
    held = sum(run.low <= true <= run.high for run in runs) / len(runs)
    assert held == pytest.approx(0.95, abs=0.015)


def test_equivalence_is_claimed_wrongly_as_rarely_as_it_says():
    generator = np.random.default_rng(1)
    at_the_margin = [stats.equivalence(list(generator.normal(1.0, 1.0, 6)), 1.0) <= 0.05 for _ in range(2000)]
    assert sum(at_the_margin) / 2000 <= 0.065
    inside = [stats.equivalence(list(generator.normal(0.0, 0.3, 6)), 1.0) <= 0.05 for _ in range(500)]
    assert sum(inside) / 500 > 0.9


@given(st.lists(FINITE, min_size=2, max_size=8), st.floats(0.01, 50))
def test_equivalence_is_scipys_two_one_sided_tests(differences, margin):
    if np.std(differences) < 1e-9 * (1 + abs(np.mean(differences))):
        return
    above = theirs.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = theirs.ttest_1samp(differences, margin, alternative="less").pvalue
    assert stats.equivalence(differences, margin) == pytest.approx(max(above, below), rel=1e-6, abs=1e-12)


def test_differences_that_are_all_the_same():
    assert stats.mean_difference([0.5, 0.5, 0.5]) == (0.5, -math.inf, math.inf, 1.0, 3)  # no spread is no certainty
    assert stats.mean_difference([0.0, 0.0]).p == 1.0
    assert stats.equivalence([0.5, 0.5], 1.0) == 1.0
    assert stats.equivalence([0.5, 0.5], 0.5) == 1.0
    with pytest.raises(ValueError, match="above 0"):
        stats.equivalence([0.1, 0.2], 0.0)


def test_curves():
    curve = [(0, 4.0), (10, 2.0), (20, 2.5), (40, 0.5)]
    assert stats.crossing(curve, 3.0) == 5.0
    assert stats.crossing(curve, 1.5) == 30.0
    assert stats.crossing(curve, 5.0) == 0.0
    assert stats.crossing(curve, 0.1) is None
    assert stats.area(curve) == pytest.approx((30 + 22.5 + 30) / 40)
    with pytest.raises(ValueError, match="two points"):
        stats.area([(0, 1.0)])


def test_the_front():
    points = {"full": (1.0, 9.0), "lora": (1.1, 5.0), "qlora": (1.1, 3.0), "worse": (1.2, 3.0), "same": (1.1, 3.0)}
    assert stats.pareto(points) == ["full", "qlora", "same"]
