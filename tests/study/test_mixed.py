"""The mixed model of differences. Oracles: statsmodels, scipy's t-tests, and made-up studies whose truth is known."""

import math
import warnings

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as theirs
from statsmodels.formula.api import mixedlm

from lownibble.measuring import mixed

FINITE = st.floats(-100, 100, allow_subnormal=False)

PARTS = {
    "of all kinds": mixed.Variances(0.024**2, 0.16**2, 0.13),  # about the articles' study, sentiment
    "few rows' worth": mixed.Variances(0.01**2, 0.24**2, 0.10),
    "rest alone": mixed.Variances(0.0, 0.0, 0.3),
    "seeds alone": mixed.Variances(0.05**2, 0.0, 0.1),
}


def rows_of(of, seeds, rows, studies, generator):
    """Differences (studies, seeds, rows) of the model, row by row."""
    shape = (studies, seeds, rows)
    of_seeds = generator.normal(0, math.sqrt(of.seed), (studies, seeds, 1))
    return of_seeds + generator.normal(0, math.sqrt(of.row), (studies, 1, rows)) + generator.normal(0, math.sqrt(of.rest), shape)


@pytest.mark.parametrize(("seeds", "rows"), [(4, 30), (6, 12)])
def test_mean_error_and_variances_are_statsmodels(seeds, rows):
    data = rows_of(mixed.Variances(0.3, 0.5, 1.0), seeds, rows, 1, np.random.default_rng(3))[0]
    frame = pd.DataFrame([(s, i, data[s, i]) for s in range(seeds) for i in range(rows)], columns=["seed", "row", "d"])
    parts = {"seed": "0 + C(seed)", "row": "0 + C(row)"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = mixedlm("d ~ 1", frame, groups=np.ones(len(frame)), vc_formula=parts).fit(reml=True)
    of = dict(zip(fitted.model.exog_vc.names, fitted.vcomp, strict=True))
    found, variances = mixed.estimate(mixed.layout(data)), mixed.variances(mixed.layout(data))
    assert min(variances) > 0
    assert variances == pytest.approx((of["seed"], of["row"], fitted.scale), rel=1e-3)
    assert found.mean == pytest.approx(fitted.fe_params.iloc[0])
    assert found.standard_error == pytest.approx(fitted.bse_fe.iloc[0], rel=1e-3)


@given(st.lists(FINITE, min_size=2, max_size=8), st.floats(0.01, 50))
def test_without_rows_it_is_the_t_test_and_two_one_sided_ones(differences, margin):
    if np.std(differences) < 1e-9 * (1 + abs(np.mean(differences))):
        return
    found = mixed.estimate(mixed.layout([[each] for each in differences]))
    expected = theirs.ttest_1samp(differences, 0.0)
    low, high = expected.confidence_interval(0.95)
    reach = found.reach(0.025)
    assert (found.mean - reach, found.mean + reach) == pytest.approx((low, high), rel=1e-6, abs=1e-9)
    assert 2 * found.tail(abs(float(found.mean))) == pytest.approx(expected.pvalue, rel=1e-6, abs=1e-12)
    above = theirs.ttest_1samp(differences, -margin, alternative="greater").pvalue
    below = theirs.ttest_1samp(differences, margin, alternative="less").pvalue
    assert found.tail(margin - abs(float(found.mean))) == pytest.approx(max(above, below), rel=1e-6, abs=1e-12)


def test_one_seed_and_identical_seeds_say_nothing():
    for data in ([[0.0, 1.0, 0.0]], [[0.5], [0.5], [0.5]], [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]):
        found = mixed.estimate(mixed.layout(data))
        assert math.isinf(found.reach(0.025))
        assert 2 * found.tail(abs(float(found.mean))) == 1.0


def test_intervals_hold_the_truth_in_two_thousand_studies_drawn_row_by_row():
    for of in (PARTS["of all kinds"], PARTS["few rows' worth"]):
        found = mixed.estimate(mixed.layout(rows_of(of, 12, 200, 2000, np.random.default_rng(0))))
        assert 0.94 <= np.mean(np.abs(found.mean) <= found.reach(0.025)) <= 0.96


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("seeds", "rows", "most"), [(3, 128, 0.975), (5, 128, 0.97), (8, 300, 0.96), (12, 500, 0.96)])
def test_intervals_hold_the_truth_as_often_as_they_say(parts, seeds, rows, most):
    """With few seeds they err on the safe side: a part that is not there cannot be told from a small one."""
    found = mixed.estimate(mixed.draw(PARTS[parts], seeds, rows, 20000, np.random.default_rng(0)))
    assert 0.945 <= np.mean(np.abs(found.mean) <= found.reach(0.025)) <= most


def test_layouts_are_drawn_as_those_of_rows():
    of, generator = mixed.Variances(0.02, 0.3, 0.7), np.random.default_rng(1)
    drawn = mixed.draw(of, 4, 9, 8000, generator, truth=0.5)
    row_by_row = mixed.layout(0.5 + rows_of(of, 4, 9, 8000, generator))
    for ours, theirs_ in zip(drawn[:2], row_by_row[:2], strict=True):
        assert ours.mean(0) == pytest.approx(theirs_.mean(0), rel=0.06)
        assert ours.var(0) == pytest.approx(theirs_.var(0), rel=0.12)


@pytest.mark.parametrize("rest", [0.0, 1e-18, 1e-12])
def test_seeds_that_score_rows_alike_can_be_drawn(rest):
    """Nothing but rows varies. Oracle: the variance of a sum of squares over rows."""
    drawn = mixed.draw(mixed.Variances(0, 0.1, rest), 5, 200, 3000, np.random.default_rng(0))
    assert np.isfinite(drawn.products).all()
    assert drawn.products.mean() == pytest.approx(0.1 * 199, rel=0.01)
