"""Looks at a study while it runs, with intervals that hold over all of them.

A study that is looked at several times, and stops when it has decided, finds more than it should if each look takes 5%. So the
looks share it: alpha spending (Lan and DeMets, Biometrika 70, 1983) by the third power of the share of seeds (Kim and DeMets,
Biometrika 74, 1987). Intervals of every look hold together (repeated confidence intervals: Jennison and Turnbull, Group
Sequential Methods, 2000, ch. 9), so a study may also go on after a decision. With few degrees of freedom a look takes the
t-quantile of its tail (same book, section 3.8).

Rejected: O'Brien and Fleming's spending function, which is much like this one where all of 5% is spent, but leaves early looks
nothing where a comparison is one of many (a tail of 2e-9 after 5 of 20 seeds, for one of 18).

The share of a look is its number of seeds over all. What rows contribute is common to all looks, so they are correlated more than
those shares say, and cross less often than planned: the error is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy import optimize
from scipy.stats import norm

EXPONENT = 3
"""Of the share of seeds until a look: what is spent until then is the level times that."""

NODES, FAR = 240, 8.0
"""Points of the integration over what has not crossed yet, and where it begins, in standard deviations below 0."""


def tails(looks: Sequence[int], level: float) -> tuple[float, ...]:
    """For each look the probability that a one-sided test has to fall below there, so that all of them together have `level`.

    Args:
        looks: numbers of seeds, increasing; the last one is all of them.
    """
    return _tails(tuple(seeds / looks[-1] for seeds in looks), level)


@cache
def _tails(shares: tuple[float, ...], level: float) -> tuple[float, ...]:
    """As `tails`. A test statistic is a Brownian motion looked at in the times `shares`; what has not crossed is integrated."""
    points, weights = np.polynomial.legendre.leggauss(NODES)
    found: list[float] = []
    spent, before, at, density = 0.0, 0.0, np.zeros(1), np.ones(1)  # all of it at 0 at the beginning
    for share in shares:
        now, step = level * share**EXPONENT, np.sqrt(share - before)

        bound = optimize.brentq(lambda b: density @ norm.sf((b - at) / step) - (now - spent), -FAR, 2 * FAR)  # noqa: B023
        found.append(float(norm.sf(bound / np.sqrt(share))))
        low = -FAR * np.sqrt(share)
        new = low + (bound - low) * (points + 1) / 2
        density = (bound - low) / 2 * weights * (norm.pdf((new[:, None] - at) / step) @ density) / step
        spent, before, at = now, share, new
    return tuple(found)
