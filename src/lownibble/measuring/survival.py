"""The mean of values of which some are only known to be beyond a limit, with a confidence interval.

How many steps a method needs to a loss is known where it gets there, and a lower bound where training ended before (in the
words of survival analysis: right-censored). The logarithm of two methods' ratio is then a normal variable that is censored on
one side: an accelerated-failure-time model of pairs. Its mean and spread are of maximum likelihood (scipy's, which knows
censored data), its interval is where the profile likelihood falls by what Student's t allows with as many degrees of freedom as
there are known values, so that without censored values it is the t-interval of `stats.mean_difference` exactly. Rejected:
leaving censored pairs out, which favours the slower method; a likelihood interval by chi-squared, which is too short with few
seeds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy import optimize, special, stats

from lownibble.measuring.stats import NO_SPREAD, Difference, mean_difference

FARTHEST = 50.0
"""How many standard deviations from the mean an end of the interval is searched; beyond it is infinite."""

LARGE = 700.0
"""Logarithms beyond this are no floating-point numbers' any more."""


def mean_of_censored(known: Sequence[float], above: Sequence[float], below: Sequence[float]) -> Difference | None:
    """The mean of a normal variable, its 95% confidence interval and the p-value against 0.

    Args:
        known: values. above, below: limits of values that are only known to be above or below them.
    Returns:
        None with fewer than two known values where others are censored: the spread cannot be told.
    """
    if not above and not below:
        return mean_difference(known) if known else None
    if len(known) < 2:
        return None
    pairs = len(known) + len(above) + len(below)
    mean, spread = map(float, stats.norm.fit(stats.CensoredData(uncensored=known, right=above, left=below)))
    if not math.isfinite(mean) or spread <= NO_SPREAD * (1 + abs(mean)):
        return Difference(float(np.mean(known)), -math.inf, math.inf, 1.0, pairs)
    best = _likelihood(known, above, below, mean, spread)

    def fall(at: float) -> float:
        """Twice the fall of the log-likelihood from its maximum to that with the mean `at`."""
        found = optimize.minimize_scalar(
            lambda log: -_likelihood(known, above, below, at, math.exp(log)),
            bounds=(math.log(spread) - 1, math.log(spread) + 6),
            method="bounded",
        )
        return max(0.0, 2 * (best + float(found.fun)))

    n = len(known)
    t = float(stats.t.ppf(0.975, n - 1))
    allowed = n * math.log1p(t * t / (n - 1))
    low, high = (_end(fall, allowed, mean, side * spread) for side in (-1, 1))
    t_of_zero = math.sqrt((n - 1) * math.expm1(min(fall(0.0) / n, LARGE)))
    return Difference(mean, low, high, float(2 * stats.t.sf(t_of_zero, n - 1)), pairs)


def _likelihood(known: Sequence[float], above: Sequence[float], below: Sequence[float], mean: float, spread: float) -> float:
    at = [(np.asarray(values) - mean) / spread for values in (known, above, below)]
    beyond = special.log_ndtr(-at[1]).sum() + special.log_ndtr(at[2]).sum()
    return float(beyond - (at[0] ** 2).sum() / 2 - len(known) * math.log(spread))


def _end(fall: Callable[[float], float], allowed: float, mean: float, spread: float) -> float:
    """Where the likelihood has fallen by `allowed`, going from `mean` in the direction of `spread`."""
    far = mean + FARTHEST * spread
    if fall(far) < allowed:
        return math.copysign(math.inf, spread)
    return float(optimize.brentq(lambda at: fall(at) - allowed, mean, far, xtol=1e-6 * abs(spread)))
