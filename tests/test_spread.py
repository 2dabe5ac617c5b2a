"""From a forecast and its spread to classes: against the normal distribution, a slow reference, and what any distribution must keep."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import norm

from amhs.spread import LEVELS, alike, class_edges, class_row, class_rows, class_slope, error_quantiles, even, ladder, mixed, odds_below, rung

EDGES = np.array([5.0, 20.0])
NORMAL = np.array([[0.0, *norm.ppf(LEVELS)]])  # a ladder of one rung
jobs = st.floats(-200, 200)
spreads = st.floats(0.1, 100)
samples = st.lists(st.floats(-30, 30), min_size=1, max_size=60)


def probs(change, spread, errors=NORMAL, edges=EDGES):
    out = np.empty(3)
    class_row(change, spread, errors, edges, out)
    return out


def one_rung(errors):
    return np.array([[0.0, *error_quantiles(np.array(errors))]])


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=30), st.integers(1, 300), st.floats(-30, 30))
def test_every_row_stands_on_one_rung_and_between_two_once(log_spreads, times, at):
    log_spreads = np.repeat(log_spreads, times)
    parts = alike(log_spreads)
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(log_spreads)))
    assert all(log_spreads[a].max() < log_spreads[b].min() for a, b in zip(parts, parts[1:]))
    found = ladder(log_spreads, lambda rows: [len(rows)])
    assert mixed(found, rung(found, at), 1) == pytest.approx(np.interp(at, *found.T))


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(-30, 30))
def test_made_equally_long_ladders_say_the_same(lengths, at):
    ladders = [[[float(i), 7.0 * n + i * i] for i in range(n)] for n in lengths]
    for own, long in zip(ladders, even(ladders)):
        assert mixed(long, rung(long, at), 1) == pytest.approx(mixed(np.array(own), rung(np.array(own), at), 1), rel=1e-6)


def test_errors_that_grow_otherwise_than_their_spread_are_met():
    "Exact on calm rows and wild on others, at spreads that say two to one."
    rng = np.random.default_rng(0)
    sizes = np.repeat(np.log([1.0, 2.0]), 4000)
    errors = rng.normal(size=8000) * np.repeat([0.1, 3.0], 4000)
    known = ladder(sizes, lambda rows: error_quantiles(errors[rows]))
    calm, wild = (probs(4, s, known) for s in (1.0, 2.0))
    assert calm[0] > 0.999 and wild == pytest.approx(np.diff([0, *norm.cdf((EDGES - 4) / 6), 1]), abs=0.03)


@given(samples)
def test_quantiles_rise_whatever_the_errors(errors):
    found = error_quantiles(np.array(errors))
    assert (np.diff(found) > 0).all() and np.allclose(found, np.quantile(errors, LEVELS), atol=1e-4)


@given(samples, st.lists(st.floats(-100, 100), min_size=2, max_size=20))
def test_the_further_the_limit_the_likelier_the_error_is_below(errors, limits):
    odds = [odds_below(one_rung(errors), 1.0, z) for z in sorted(limits)]
    assert odds == sorted(odds) and odds[0] >= -12 and odds[-1] <= 12


def test_between_quantiles_odds_are_those_of_a_slow_reference():
    at = np.linspace(NORMAL[0, 1], NORMAL[0, -1], 500)
    wanted = np.interp(at, NORMAL[0, 1:], np.log(LEVELS / (1 - LEVELS)))
    assert np.allclose([odds_below(NORMAL, 0.0, z) for z in at], wanted)


@given(jobs, spreads, samples)
def test_probabilities_are_a_distribution(change, spread, errors):
    found = probs(change, spread, one_rung(errors))
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
    errors = even([NORMAL, np.vstack([NORMAL, [1.0, *NORMAL[0, 1:] * 1.5]]), NORMAL + 0.2])
    edges, out = np.array([[5.0, 20.0], [6.0, 25.0], [8.0, 30.0]]), np.empty((50, 3, 3))
    class_rows(changes, widths, errors, edges, out)
    for i, h in np.ndindex(50, 3):
        assert np.array_equal(out[i, h], probs(changes[i, h], widths[i, h], errors[h], edges[h]))


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
