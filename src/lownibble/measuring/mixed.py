"""The mixed model of two methods' difference over seeds and evaluation rows, for balanced data in closed form.

    d[s, i] = difference + seed[s] + row[i] + rest[s, i]        seed s, row i; all but the difference random, with mean 0

A seed is another training, a row another question: an interval of the difference holds for other seeds and other rows than those
of the study. In the balanced layout (every seed scored on every row) the mean over both is the best estimate, and the variances
follow from three mean squares, as restricted maximum likelihood finds them where none is zero (a test compares with statsmodels).
Scores without rows, such as a loss over all of them, are one row: the model is then the paired t-test, and holds for those rows.

The variance of the mean has a part of the seeds (few degrees of freedom) and what rows add to it (many). The interval's reach
is that of the mean of both parts' t-quantiles, weighted by the parts (Cochran and Cox, Experimental Designs, 1957). Rejected:
Satterthwaite's degrees of freedom, whose intervals cover 92% with three seeds; intervals of the normal distribution, as most
libraries give for mixed models, which cover less still; averages over rows alone, which say nothing about another training.

Everything works on a whole array of studies at once, so that simulations (`study/power.py` and the tests) run the code that
decides.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

Floats = NDArray[np.float64]

NO_SPREAD = 1e-12
"""Relative standard error below which the seeds count as identical: coarse scores with few seeds do not show certainty."""


SMALLEST = 1e-15
"""The smallest probability that is reported."""


class Variances(NamedTuple):
    """Variances of the parts of one difference: of seeds, of rows, and the rest (for scores without rows: 0 and 0)."""

    seed: float
    row: float
    rest: float


class Layout(NamedTuple):
    """What the model needs of the differences of one or many studies.

    Attributes:
        means: (..., seeds): the mean over rows of each seed.
        products: (..., seeds, seeds): sums over rows of the products of two seeds' differences, each less its mean.
        rows: their number.
    """

    means: Floats
    products: Floats
    rows: int

    def first(self, seeds: int) -> Layout:
        """The layout of the first `seeds` seeds."""
        return Layout(self.means[..., :seeds], self.products[..., :seeds, :seeds], self.rows)


def layout(differences: ArrayLike) -> Layout:
    """The layout of differences (seeds, rows)."""
    values = np.asarray(differences, np.float64)
    means = values.mean(-1)
    apart = values - means[..., None]
    return Layout(means, apart @ np.swapaxes(apart, -1, -2), values.shape[-1])


class Estimate(NamedTuple):
    """The difference, and the variance of its estimate in two parts; `seeds`, `rows`: their degrees of freedom."""

    mean: Floats
    of_seeds: Floats
    of_rows: Floats
    seeds: int
    rows: int

    @property
    def standard_error(self) -> Floats:
        """Standard error of the difference."""
        return np.sqrt(self.of_seeds + self.of_rows)

    def reach(self, tail: float) -> Floats:
        """Distance by which the estimate is above the truth with probability `tail`; infinite with one seed or identical
        seeds."""
        if self.seeds < 1:
            return np.full(np.shape(self.mean), np.inf)
        by_seeds, by_rows = stats.t.isf(tail, self.seeds), stats.t.isf(tail, self.rows)
        same = np.sqrt(self.of_seeds) <= NO_SPREAD * (1 + np.abs(self.mean))
        error = np.where(same, 1.0, self.standard_error)
        found = (self.of_seeds * by_seeds + self.of_rows * by_rows) / error
        return np.where(same, np.inf, found)

    def tail(self, distance: float) -> float:
        """The probability at which `reach` is `distance`, of one study: the one-sided p-value (0.5 if nothing can be told)."""
        if distance < 0:
            return 1 - self.tail(-distance)
        if not np.isfinite(self.reach(0.25)) or distance == 0:
            return 0.5
        if self.reach(SMALLEST) <= distance:
            return SMALLEST
        found = optimize.brentq(lambda log: float(self.reach(np.exp(log))) - distance, np.log(SMALLEST), np.log(0.5))
        return float(np.exp(found))


def estimate(data: Layout) -> Estimate:
    """Estimate the difference and its variance."""
    seeds, rows = data.means.shape[-1], data.rows
    mean, (by_seed, by_row, rest) = data.means.mean(-1), _mean_squares(data)
    return Estimate(mean, by_seed / (seeds * rows), np.maximum(by_row - rest, 0) / (seeds * rows), seeds - 1, max(1, rows - 1))


def variances(data: Layout) -> Variances:
    """Estimate the variances of one study's differences; none is below 0."""
    by_seed, by_row, rest = (float(each) for each in _mean_squares(data))
    return Variances(max(0.0, by_seed - rest) / data.rows, max(0.0, by_row - rest) / data.means.shape[-1], rest)


def _mean_squares(data: Layout) -> tuple[Floats, Floats, Floats]:
    """Mean squares of seeds, of rows, and of the rest; those without degrees of freedom are 0."""
    seeds, rows = data.means.shape[-1], data.rows
    apart = data.means - data.means.mean(-1, keepdims=True)
    between = data.products.sum((-1, -2)) / seeds
    within = np.trace(data.products, axis1=-2, axis2=-1) - between
    free = max(1, rows - 1)
    return rows * (apart**2).sum(-1) / max(1, seeds - 1), between / free, within / (free * max(1, seeds - 1))


def draw(of: Variances, seeds: int, rows: int, studies: int, generator: np.random.Generator, truth: float = 0.0) -> Layout:
    """Layouts of synthetic studies whose difference is `truth`.

    The means and products are drawn from their distributions (the products' is Wishart's, by Bartlett's decomposition), which
    costs the same for any number of rows.
    """
    common = generator.normal(truth, np.sqrt(of.row / rows), (studies, 1))
    means = common + generator.normal(0, np.sqrt(of.seed + of.rest / rows), (studies, seeds))
    products = np.zeros((studies, seeds, seeds))
    if rows > 1:
        rest = max(of.rest, 1e-12 * of.row, 1e-30)  # of identical seeds it is 0, and the root takes what rounding leaves positive
        root = np.linalg.cholesky(of.row * np.ones((seeds, seeds)) + rest * np.eye(seeds))
        lower = np.tril(generator.normal(size=(studies, seeds, seeds)), -1)
        lower[:, :, rows - 1 :] = 0.0  # with fewer rows than seeds the products have not full rank
        for i in range(min(seeds, rows - 1)):
            lower[:, i, i] = np.sqrt(generator.chisquare(rows - 1 - i, studies))
        half = root @ lower
        products = half @ half.transpose(0, 2, 1)
    return Layout(means, products, rows)
