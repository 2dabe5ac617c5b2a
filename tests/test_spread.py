"""From a forecast and its spread to classes: against the normal distribution, a slow reference, and what any distribution must keep."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from amhs.spread import LEVELS, class_edges, class_row, class_rows, class_slope, error_quantiles, odds_below

EDGES = np.array([5.0, 20.0])
NORMAL = norm.ppf(LEVELS)
jobs = st.floats(-200, 200)
spreads = st.floats(0.1, 100)
samples = st.lists(st.floats(-30, 30), min_size=1, max_size=60)


def probs(change, spread, quantiles=NORMAL, edges=EDGES):
    out = np.empty(3)
    class_row(change, spread, quantiles, edges, out)
    return out


@given(samples)
def test_quantiles_rise_whatever_the_errors(errors):
    found = error_quantiles(np.array(errors))
    assert (np.diff(found) > 0).all() and np.allclose(found, np.quantile(errors, LEVELS), atol=1e-4)


@given(samples, st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_the_further_the_limit_the_likelier_the_error_is_below(errors, limits):
    quantiles = error_quantiles(np.array(errors))
    odds = [odds_below(quantiles, z) for z in sorted(limits)]
    assert odds == sorted(odds) and odds[0] >= -12 and odds[-1] <= 12


def test_between_quantiles_odds_are_those_of_a_slow_reference():
    at = np.linspace(NORMAL[0], NORMAL[-1], 500)
    wanted = np.interp(at, NORMAL, np.log(LEVELS / (1 - LEVELS)))
    assert np.allclose([odds_below(NORMAL, z) for z in at], wanted)


@given(jobs, spreads, samples)
def test_probabilities_are_a_distribution(change, spread, errors):
    found = probs(change, spread, error_quantiles(np.array(errors)))
    assert (found >= 0).all() and found.sum() == pytest.approx(1)


@given(jobs, st.floats(0.1, 50), spreads)
def test_a_higher_forecast_never_makes_a_surge_less_likely(change, more, spread):
    lower, higher = probs(change, spread), probs(change + more, spread)
    assert higher[2] >= lower[2] - 1e-12 and higher[0] <= lower[0] + 1e-12


@pytest.mark.parametrize(("change", "spread"), [(0, 10), (12, 10), (20, 5), (30, 15), (8, 2)])
def test_normal_errors_make_normal_probabilities(change, spread):
    first, second = norm.cdf((EDGES - change) / spread)
    assert probs(change, spread) == pytest.approx([first, second - first, 1 - second], abs=0.002)


def test_many_rows_are_each_row():
    rng = np.random.default_rng(0)
    changes, widths = rng.normal(10, 20, (50, 3)), rng.uniform(1, 30, (50, 3))
    quantiles, edges, out = np.stack([NORMAL, NORMAL * 1.5, NORMAL + 0.2]), np.array([[5.0, 20.0], [6.0, 25.0], [8.0, 30.0]]), np.empty((50, 3, 3))
    class_rows(changes, widths, quantiles, edges, out)
    for i, h in np.ndindex(50, 3):
        assert np.array_equal(out[i, h], probs(changes[i, h], widths[i, h], quantiles[h], edges[h]))


@given(st.lists(jobs, min_size=3, max_size=50), st.tuples(jobs, jobs).map(sorted))
def test_edges_found_in_labelled_rows_label_them_again(changes, edges):
    changes = np.array(changes)
    classes = np.digitize(changes, edges)
    assert np.array_equal(np.digitize(changes, class_edges(changes, classes)), classes)


@given(jobs, jobs, st.floats(1, 50), st.integers(0, 2))
def test_from_the_base_the_slope_leads_to_the_forecast(base, change, spread, klass):
    start, slope = class_slope(base, change, spread, NORMAL, EDGES, klass)
    p = np.clip(probs(change, spread)[klass], 1e-9, 1 - 1e-9)
    if base != change:
        assert start + slope * (change - base) == pytest.approx(np.clip(np.log(p / (1 - p)), -12, 12), abs=1e-6)
