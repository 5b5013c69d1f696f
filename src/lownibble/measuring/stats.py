"""Means with confidence intervals, and learning-curve statistics, for studies.

Intervals are Student's t over seeds; with three seeds they are rightly wide. (Differences between methods, over seeds and rows,
and
equivalence: `mixed.py`.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from scipy import stats

NO_SPREAD = 1e-12
"""Relative standard error below which all differences count as identical."""


class Difference(NamedTuple):
    """Mean of `pairs` paired differences, its confidence interval, and the two-sided p-value of a t-test against zero.

    With fewer than two pairs, or with identical differences, there is no interval: `low` and `high` are infinite and `p` is 1.
    (Scores over few rows are coarse, so two seeds with the same score do not show certainty.)
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int


def mean_difference(differences: Sequence[float], confidence: float = 0.95) -> Difference:
    """Mean, confidence interval and p-value of paired differences; see `Difference`."""
    n = len(differences)
    if not n:
        raise ValueError("There are no pairs.")
    mean = math.fsum(differences) / n
    if n < 2:
        return Difference(mean, -math.inf, math.inf, 1.0, n)
    error = standard_error(differences) or 0.0
    if error <= NO_SPREAD * (1 + abs(mean)):
        return Difference(mean, -math.inf, math.inf, 1.0, n)
    reach = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Difference(mean, mean - reach, mean + reach, float(2 * stats.t.sf(abs(mean) / error, n - 1)), n)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None with fewer than two values."""
    if len(values) < 2:
        return None
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))


def crossing(curve: Sequence[tuple[float, float]], target: float) -> float | None:
    """Step at which a piecewise linear (step, loss) curve first reaches `target` or less; None if it never does."""
    if curve and curve[0][1] <= target:
        return float(curve[0][0])
    for (step_0, loss_0), (step_1, loss_1) in pairwise(curve):
        if loss_1 <= target:
            return step_0 + (step_1 - step_0) * (loss_0 - target) / (loss_0 - loss_1)
    return None


def area(curve: Sequence[tuple[float, float]]) -> float:
    """Area under a piecewise linear (step, loss) curve divided by its number of steps: the mean loss."""
    if len(curve) < 2:
        raise ValueError("A curve has two points at least.")
    total = math.fsum((step_1 - step_0) * (loss_0 + loss_1) / 2 for (step_0, loss_0), (step_1, loss_1) in pairwise(curve))
    return total / (curve[-1][0] - curve[0][0])


def pareto(points: Mapping[str, tuple[float, ...]]) -> list[str]:
    """Names of the Pareto-optimal points; lower is better in every coordinate."""

    def beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
        return all(x <= y for x, y in zip(a, b, strict=True)) and a != b

    return [name for name, point in points.items() if not any(beats(other, point) for other in points.values())]
