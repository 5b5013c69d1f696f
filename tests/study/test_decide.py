"""Decisions over looks and comparisons. Oracles: scipy's multivariate normal, simulated studies of known truth, arithmetic."""

import numpy as np
import pytest
from scipy.stats import multivariate_normal, norm

from lownibble.measuring import mixed, sequential
from lownibble.study import decide as deciding
from lownibble.study.decide import DIFFERENT, EQUIVALENT, Comparison, decide, is_shown, still_needed, tails


@pytest.mark.parametrize("level", [0.025, 0.05 / 18])
def test_looks_spend_the_third_power_of_their_share(level):
    """Oracle: scipy's integral of the normal distribution of several looks, correlated as partial sums are."""
    looks = (2, 3, 5, 8)
    crossed = norm.isf(sequential.tails(looks, level))
    together = np.sqrt(np.minimum.outer(looks, looks) / np.maximum.outer(looks, looks))
    for n in range(1, len(looks) + 1):
        below = multivariate_normal.cdf(crossed[:n], cov=together[:n, :n], abseps=1e-7, releps=1e-7, maxpts=2_000_000)
        assert 1 - below == pytest.approx(level * (looks[n - 1] / 8) ** 3, abs=2e-6)
    assert sequential.tails((7,), 0.05) == pytest.approx((0.05,))


@pytest.mark.parametrize(
    "parts", [mixed.Variances(0.05**2, 0, 0.1), mixed.Variances(0.02**2, 0.2**2, 0.1)], ids=["seeds", "rows"]
)
def test_looks_do_not_add_errors(parts):
    """Shown at any of three looks: a difference where there is none, equivalence where the difference is the margin."""
    looks, rows, margin, generator = (3, 6, 10), 200, 0.05, np.random.default_rng(0)
    for kind, truth in ((DIFFERENT, 0.0), (EQUIVALENT, margin)):
        data = mixed.draw(parts, looks[-1], rows, 30000, generator, truth)
        shown = [
            is_shown(kind, mixed.estimate(data.first(n)), margin, tail)
            for n, tail in zip(looks, tails(kind, looks, 1), strict=True)
        ]
        assert np.mean(np.any(shown, axis=0)) <= 0.0535


def test_looks_do_not_add_errors_of_one_of_many_comparisons():
    """At the level of one of 18, where tails are far out and the first looks have few degrees of freedom."""
    looks, level, generator = (5, 8, 12), 0.05 / 18, np.random.default_rng(3)
    data = [mixed.draw(mixed.Variances(0.02**2, 0.05**2, 0.1), looks[-1], 400, 40000, generator) for _ in range(3)]
    shown = [
        [
            is_shown(DIFFERENT, mixed.estimate(of.first(n)), 1.0, tail)
            for n, tail in zip(looks, tails(DIFFERENT, looks, 18), strict=True)
        ]
        for of in data
    ]
    assert 0.5 * level < np.mean(np.any(shown, axis=1)) < 1.2 * level


def test_an_early_look_of_many_comparisons_can_decide():
    """A difference of three standard deviations over seeds, one of 18: most such studies have shown it before the last look."""
    looks, generator = (5, 8, 12, 20), np.random.default_rng(4)
    found = mixed.estimate(mixed.draw(mixed.Variances(0.01**2, 0, 0), 20, 1, 4000, generator, 0.03).first(8))
    assert np.mean(is_shown(DIFFERENT, found, 1.0, tails(DIFFERENT, looks, 18)[1])) > 0.7


def test_looks_do_not_narrow_intervals_too_far():
    looks, generator = (3, 6, 10), np.random.default_rng(2)
    data = mixed.draw(mixed.Variances(0.05**2, 0, 0.1), 10, 200, 10000, generator)
    found = [mixed.estimate(data.first(n)) for n in looks]
    held = [np.abs(e.mean) <= e.reach(tail) for e, tail in zip(found, tails(DIFFERENT, looks, 1), strict=True)]
    assert np.mean(np.all(held, axis=0)) == pytest.approx(0.95, abs=0.006)


def comparison(differences, *, margin=0.1, ended=None, methods="ab"):
    data = mixed.layout([[each] for each in differences])
    seeds = tuple(range(len(differences)))
    return Comparison("m", "t", *methods, "loss", margin, seeds, data, ended or (len(seeds),))


FAR, NEAR, WIDE = [1.0, 1.1, 0.9, 1.05], [0.0, 0.01, -0.01, 0.005], [1.0, -1.0, 0.6, -0.5]


def test_what_is_shown():
    found = decide([comparison(FAR), comparison(NEAR), comparison(WIDE), comparison([1.0])], (4,))
    assert [each.shown for each in found] == [DIFFERENT, EQUIVALENT, None, None]


def test_comparisons_share_the_level_by_holm(monkeypatch):
    """Three p-values of 0.012, 0.02 and 0.3: alone two are shown, of three by 0.05/3 the first, then by 0.05/2 the second."""
    p = {0: 0.012, 1: 0.02, 2: 0.3}
    monkeypatch.setattr(deciding, "is_shown", lambda kind, found, margin, tail: kind == DIFFERENT and p[found] / 2 <= tail)
    monkeypatch.setattr(mixed, "estimate", lambda data: int(data.means[0]))
    planned = [comparison([float(i)] * 4) for i in p]
    assert [each.shown for each in decide(planned, (4,))] == [DIFFERENT, DIFFERENT, None]
    p[0] = 0.02  # none is below 0.05/3: then none is shown
    assert [each.shown for each in decide(planned, (4,))] == [None, None, None]


def test_a_decision_is_that_of_the_first_look_that_shows_it_and_stays():
    later = [*FAR, -3.0, -9.0]
    early = comparison(later, ended=(2, 4, 6))
    found = decide([early], (2, 4, 6))[0]
    assert (found.shown, found.seeds, found.looked) == (DIFFERENT, 4, 2)
    assert found.tail == pytest.approx(tails(DIFFERENT, (2, 4, 6), 1)[1])
    before = decide([comparison(FAR[:3], ended=(2, None, None))], (2, 4, 6))[0]
    assert (before.shown, before.seeds, before.looked) == (None, 2, 1)


def test_only_methods_whose_comparisons_are_all_decided_need_no_more_seeds():
    planned = [comparison(FAR, methods="ab"), comparison(WIDE, methods="bc"), comparison(NEAR, methods="ad")]
    needed = still_needed(planned, decide(planned, (4,)))
    assert {method: needed("m", "t", method) for method in "abcde"} == {"a": False, "b": True, "c": True, "d": False, "e": True}
    assert needed("m", "other", "a")
