"""Statistics of a study. Oracles: made-up normal data whose truth is known, arithmetic by hand."""

import math

import numpy as np
import pytest
from hypothesis import strategies as st

from lownibble.measuring import stats

FINITE = st.floats(-100, 100, allow_subnormal=False)


@pytest.mark.parametrize("true", [0.0, 0.7])
def test_the_interval_holds_the_truth_as_often_as_it_says(true):
    generator = np.random.default_rng(0)
    runs = [stats.mean_difference(list(generator.normal(true, 1.0, 4))) for _ in range(2000)]
    held = sum(run.low <= true <= run.high for run in runs) / len(runs)
    assert held == pytest.approx(0.95, abs=0.015)


def test_differences_that_are_all_the_same():
    assert stats.mean_difference([0.5, 0.5, 0.5]) == (0.5, -math.inf, math.inf, 1.0, 3)  # no spread is no certainty
    assert stats.mean_difference([0.0, 0.0]).p == 1.0


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
