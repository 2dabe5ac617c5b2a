"The smooth forecast: one way to compute it, honest on rows it learns from, calm on rows nobody expected."

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from amhs.smooth import LIMIT, fit_smooth, no_smooth, passed_on, read_smooth, smooth_row, widened, write_smooth

NUMBERS = st.floats(-(2.0**100), 2.0**100, width=32) | st.just(np.nan)


@pytest.fixture(scope="module")
def found():
    rng = np.random.default_rng(4)
    X = rng.normal(10, 3, size=(800, 7)).astype("float32")
    Y = np.stack([X[:, 0] - X[:, 1], (X[:, 2] - 10) ** 2], axis=1) + rng.normal(size=(800, 2))
    return fit_smooth(X, Y, [0, 1, 2, 4], np.arange(800))[0]


@given(arrays("float32", (5, 7), elements=NUMBERS))
@settings(max_examples=60, deadline=None)
def test_a_row_alone_is_a_row_among_others_to_the_bit(found, X):
    many = widened(found, X)
    assert np.array_equal(many[:, :7], X, equal_nan=True) and np.isfinite(many[:, 7:]).all()
    for x, known in zip(X, many):
        out = np.empty(4, "float32")
        smooth_row(found, x, np.empty(6), out)
        assert np.array_equal(out, known[7:])
    assert np.array_equal(widened(found, np.asfortranarray(X)), many, equal_nan=True)


@given(arrays("float32", (3, 7), elements=NUMBERS), arrays("float64", (3, 11), elements=st.floats(-100, 100)))
@settings(max_examples=60, deadline=None)
def test_what_is_passed_on_adds_up(found, X, booked):
    told = passed_on(found, X, booked)
    assert told.shape == X.shape and np.allclose(told.sum(axis=1), booked.sum(axis=1), atol=1e-6)
    assert np.array_equal(told[:, [3, 5, 6]], booked[:, [3, 5, 6]]), "a feature it does not read has nothing to answer for"


@pytest.mark.parametrize("side", [-1, 1])
def test_it_runs_away_nowhere(found, side):
    "A thousand standard deviations off is as four."
    far, near = (widened(found, np.full((1, 7), 10 + 3 * side * s, "float32"))[0, 7:] for s in (1000, LIMIT * 1.2))
    assert np.array_equal(far, near)


@pytest.fixture(scope="module")
def two_counters():
    "Two sensors that tell nearly the same; what the target does lies in the small difference."
    rng = np.random.default_rng(7)
    level = rng.normal(200, 40, size=3000)
    X = np.stack([level, level + rng.normal(0, 4, size=3000)], axis=1).astype("float32")
    Y = (2.5 * (X[:, :1] - X[:, 1:]) + rng.normal(size=(3000, 1))).astype("float64")
    return fit_smooth(X, Y, [0, 1], np.arange(3000))[0], X, Y[:, 0]


@pytest.mark.parametrize("value", [180.0, 60.0, np.nan])
def test_a_sensor_that_fails_does_little_harm(two_counters, value):
    "One that stands still, or shows nothing: without the calm forecast the answer would be off by many times what it is."
    smooth, X, Y = two_counters
    spoilt = np.column_stack([X[:, 0], np.full(len(X), value, "float32")])
    free = smooth._replace(limit=np.full(1, np.inf), least=np.full(2, -np.inf), most=np.full(2, np.inf))
    guarded = smooth._replace(least=free.least, most=free.most)
    sound, harmed, harmed_freely = (np.abs(widened(s, rows)[:, 2] - Y).mean() for s, rows in ((guarded, X), (guarded, spoilt), (free, spoilt)))
    assert sound < 1.2 < 5 * sound < harmed_freely, "or the test proves nothing"
    assert harmed < harmed_freely / 3


@given(arrays("float32", (4, 7), elements=NUMBERS))
@settings(max_examples=40, deadline=None)
def test_no_forecast_is_further_from_the_calm_one_than_believed(found, X):
    calm = found._replace(limit=np.zeros(2))
    told, least = widened(found, X)[:, 7:9], widened(calm, X)[:, 7:9]
    assert (np.abs(told - least) <= found.limit + 1e-3).all()


def test_features_that_share_a_sensor_fail_together():
    "A difference of two features of one sensor is trusted, the same difference of two sensors is not."
    rng = np.random.default_rng(8)
    X = rng.normal(size=(2000, 1)) + 0.05 * rng.normal(size=(2000, 2))
    Y = 10 * (X[:, :1] - X[:, 1:])
    lost = {name: fit_smooth(X.astype("float32"), Y, [0, 1], np.arange(2000), s)[0]._replace(limit=np.zeros(1))
            for name, s in (("one", np.ones((2, 1))), ("two", np.eye(2)))}
    error = {name: np.abs(widened(s, X.astype("float32"))[:, 2] - Y[:, 0]).mean() for name, s in lost.items()}
    assert error["one"] < 0.2 * error["two"]


def test_beyond_what_the_rows_showed_nothing_changes():
    "A capacity that is nearly always full: more of it means no more."
    rng = np.random.default_rng(9)
    X = np.stack([np.where(rng.random(2000) < 0.02, 50, 100), rng.normal(size=2000)], axis=1).astype("float32")
    smooth, _ = fit_smooth(X, X[:, :1] + rng.normal(size=(2000, 1)), [0, 1], np.arange(2000))
    full, fuller, half = (widened(smooth, np.array([[level, 0]], "float32"))[0, 2:] for level in (100, 110, 50))
    assert np.array_equal(full, fuller) and abs(full[0] - half[0]) > 20


def test_noise_is_not_learnt():
    "On targets that have nothing to do with the features the answers to left-out rows stay near the mean; a fit that had seen them would not."
    rng = np.random.default_rng(1)
    X, Y = rng.normal(size=(400, 80)).astype("float32"), rng.normal(size=(400, 1))
    smooth, left_out = fit_smooth(X, Y, range(80), np.arange(400))
    assert abs(np.corrcoef(left_out[:, 0], Y[:, 0])[0, 1]) < 0.2
    assert left_out.std() < 0.5
    assert np.corrcoef(widened(smooth, X)[:, 80], Y[:, 0])[0, 1] > 0.5, "or the test proves nothing"


def test_where_it_is_harder_to_foresee_it_says_so():
    "Noise three times as strong on one side: so is the spread, on rows it has not seen."
    rng = np.random.default_rng(5)
    X = rng.normal(size=(4000, 3)).astype("float32")
    Y = X[:, :1] + rng.normal(size=(4000, 1)) * np.where(X[:, 1:2] > 0, 3, 1)
    _, left_out = fit_smooth(X, Y, range(3), np.arange(4000))
    wide, narrow = (np.exp(left_out[side, 1]).mean() for side in (X[:, 1] > 0.5, X[:, 1] < -0.5))
    assert 2 < wide / narrow < 4


@given(arrays("float32", (4, 7), elements=NUMBERS))
@settings(max_examples=40, deadline=None)
def test_no_answer_leaves_what_was_seen(found, X):
    told = widened(found, X)[:, 7:]
    assert (told >= found.least.astype("float32")).all() and (told <= found.most.astype("float32")).all()


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_few_rows_and_useless_columns(rows):
    "Constant, unknown and repeated columns; fewer rows than blocks."
    rng = np.random.default_rng(2)
    X = rng.normal(size=(rows, 6)).astype("float32")
    X[:, 1], X[:, 2], X[:, 3] = 7, np.nan, X[:, 0]
    smooth, left_out = fit_smooth(X, np.ones((rows, 2)) * 5, range(6), np.arange(rows))
    assert np.isfinite(left_out).all() and np.isfinite(widened(smooth, X)[:, 6:]).all()
    if rows == 40:
        assert np.allclose(widened(smooth, X)[:, 6:8], 5, atol=0.2)


def test_blocks_are_blocks_of_time():
    "Rows of two lines, one after the other, are left out by time and not by line."
    time = np.tile(np.arange(200), 2)
    X = np.zeros((400, 1), "float32")
    Y = (time // 40)[:, None].astype(float)  # each fifth of the time has a level of its own
    _, left_out = fit_smooth(X, Y, [0], time.argsort(kind="stable").argsort())
    assert np.allclose(left_out[:, 0], (10 - Y[:, 0]) / 4, atol=0.01), "the mean of the other four fifths, on both lines"


def test_written_and_read(found, tmp_path):
    write_smooth(found, tmp_path)
    again = read_smooth(tmp_path)
    assert all(np.array_equal(a, b) and a.dtype == b.dtype for a, b in zip(found, again, strict=True))
    (tmp_path / "none").mkdir()
    write_smooth(no_smooth(), tmp_path / "none")
    assert not list((tmp_path / "none").iterdir()) and not len(read_smooth(tmp_path / "none").least)
