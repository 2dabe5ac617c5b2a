"""Targets against a slow reference; splits that no minute of training can look across."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amhs.config import HORIZONS_MIN, PURGE_GAP_MIN, Alarms, Thresholds, load_site
from amhs.core import InputError, ParameterError
from amhs.targets import build_targets, surge_class, time_folds, time_split


def table(rows):
    "[(line, minute, jobs, filled)] as telemetry."
    lines, minutes, jobs, filled = zip(*sorted(rows, key=lambda r: r[:2]))
    times = pd.Timestamp("2026-03-01", tz="UTC") + pd.to_timedelta(list(minutes), unit="min")
    return pd.DataFrame({"line": lines, "timestamp": times.as_unit("us"), "hub_jobs": np.array(jobs, "float32"), "filled": filled})


def slow_event_in(telemetry, site, most):
    "Minutes to the next event by (line, timestamp), by looking at one minute after the other."
    found = {}
    for line, rows in telemetry.groupby("line"):
        minute = [round(t.timestamp() / 60) for t in rows["timestamp"]]
        above, events = [m for m, jobs in zip(minute, rows["hub_jobs"]) if jobs > site.thresholds.surge_level], []
        for start in (m for m in above if m - 1 not in above):
            end = next(m for m in range(start, start + len(minute) + 1) if m + 1 not in above)
            if end - start + 1 >= site.alarms.min_duration:
                if events and start - events[-1][1] <= max(site.alarms.merge_gap, 1):
                    start = events.pop()[0]
                events.append((start, end))
        for m, time in zip(minute, rows["timestamp"]):
            inside = any(start <= m <= end for start, end in events)
            found[line, time] = 0 if inside else min([most, *(start - m for start, _ in events if start > m)])
    return found


def slow_targets(telemetry, horizons, site):
    "One minute after the other, in plain Python."
    event_in = slow_event_in(telemetry, site, max(horizons))
    seen = {(r.line, r.timestamp): float(r.hub_jobs) for r in telemetry.itertuples() if not r.filled and not math.isnan(r.hub_jobs)}
    out = {}
    for (line, time), now in seen.items():
        row = {"now": now}
        for h in horizons:
            following = [seen.get((line, time + pd.Timedelta(minutes=m))) for m in range(1, h + 1)]
            if None in following:
                break
            change = max(following) - now
            low, high = site.classes[h]
            row |= {f"change_min_{h}": min(following) - now, f"change_max_{h}": change, f"change_avg_{h}": sum(following) / h - now,
                    f"surge_class_{h}": 2 if change >= high else 1 if change >= low else 0}  # fmt: skip
        else:
            out[line, time] = row | {"event_in": event_in[line, time]}
    return out


minutes = st.integers(0, 90)
rows = st.lists(
    st.tuples(st.sampled_from(["A", "B"]), minutes, st.integers(0, 300) | st.just(math.nan), st.integers(0, 30).map(lambda n: n == 0)),
    min_size=60, max_size=150, unique_by=lambda r: r[:2],
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(rows, st.sampled_from([(1,), (1, 2, 4), (3, 10)]), st.integers(0, 4))
def test_targets_are_the_slow_reference(rows, horizons, gap):
    telemetry = table(rows)
    site = load_site().model_copy(update={"classes": dict.fromkeys(horizons, (5.0, 25.0)), "thresholds": Thresholds(surge_level=120),
                                          "alarms": Alarms(min_duration=2, merge_gap=gap)})
    expected = slow_targets(telemetry, horizons, site)
    found = build_targets(telemetry, horizons, site)
    assert list(found.index) == sorted(expected)
    for key, row in zip(found.index, found.to_dict("records")):
        assert row == pytest.approx(expected[key], rel=1e-6, abs=1e-4)


def test_a_whole_day_with_holes():
    random = np.random.default_rng(3)
    jobs = np.round(250 + np.cumsum(random.normal(size=1440) * 3))
    keep = random.random(1440) > 0.01
    telemetry = table([("HUB1", m, j, False) for m, j in enumerate(jobs) if keep[m]])
    found, expected = build_targets(telemetry), slow_targets(telemetry, HORIZONS_MIN, load_site())
    assert 300 < len(found) == len(expected) < 1400
    assert (found.dtypes == "float32").all()
    assert list(found.columns) == ["now", *(f"{c}_{h}" for h in (10, 15, 25) for c in ("change_min", "change_max", "change_avg", "surge_class")), "event_in"]
    assert 0 < (found["event_in"] < 25).mean() < 1
    np.testing.assert_allclose(found, pd.DataFrame(list(expected.values()), columns=found.columns), rtol=1e-6, atol=1e-4)


def test_one_absent_minute_takes_the_targets_of_all_that_look_at_it():
    whole = table([("HUB1", m, 200 + m, False) for m in range(120)])
    for spoilt in (whole.drop(index=60), whole.assign(filled=whole.index == 60), whole.assign(hub_jobs=whole.hub_jobs.where(whole.index != 60))):
        lost = build_targets(whole).index.difference(build_targets(spoilt).index)
        assert list(lost.get_level_values(1).minute + 60 * lost.get_level_values(1).hour) == list(range(60 - 25, 61))


def test_classes_change_at_the_edge_itself():
    assert list(surge_class(np.array([9.999, 10.0, 29.999, 30.0, math.nan]), (10, 30))[:4]) == [0, 1, 1, 2]
    assert math.isnan(surge_class(np.array([math.nan]), (10, 30))[0])


@pytest.mark.parametrize("empty", [0, 1, 20])
def test_too_short_telemetry_has_no_targets(empty):
    telemetry = table([("HUB1", m, 200, False) for m in range(30)]).head(empty)
    assert build_targets(telemetry).shape == (0, 14)


def test_order_does_not_matter_but_repeated_minutes_and_unknown_horizons_are_refused():
    telemetry = table([("HUB1", m, 200, False) for m in range(60)])
    by_time = table([(line, m, 200, False) for line in "AB" for m in range(60)]).sort_values(["timestamp", "line"])
    for shuffled in (by_time, by_time.iloc[::-1]):
        pd.testing.assert_frame_equal(build_targets(shuffled), build_targets(by_time.sort_values(["line", "timestamp"])))
    for wrong in (telemetry.iloc[[0, 1, 1, 2]], pd.concat([telemetry, telemetry])):
        with pytest.raises(InputError, match="two rows for the same line and minute"):
            build_targets(wrong)
    with pytest.raises(ParameterError, match="edges for this horizon .got 12.*10, 15, 25"):
        build_targets(telemetry, horizons=(12,))


def index_of(minutes_by_line):
    pairs = [(line, m) for line, minutes in minutes_by_line.items() for m in sorted(minutes)]
    times = pd.Timestamp("2026-03-01", tz="UTC") + pd.to_timedelta([m for _, m in pairs], unit="min")
    return pd.MultiIndex.from_arrays([[line for line, _ in pairs], times.as_unit("us")], names=["line", "timestamp"])


def minute_of(index, rows):
    return ((index.get_level_values("timestamp")[rows] - pd.Timestamp("2026-03-01", tz="UTC")) // pd.Timedelta(minutes=1)).to_numpy()


indices = st.dictionaries(st.sampled_from("ABC"), st.sets(st.integers(0, 3000), min_size=120, max_size=200), min_size=1).map(index_of)
gaps = st.integers(0, 120)


@settings(max_examples=40, deadline=None)
@given(indices, gaps, st.floats(0.1, 0.4), st.floats(0.1, 0.4))
def test_no_minute_of_a_block_reaches_the_next(index, gap, valid_share, test_share):
    split = time_split(index, valid_share, test_share, gap)
    train, valid, test = (minute_of(index, rows) for rows in split)
    assert train.max() + gap < valid.min() and valid.max() + gap < test.min()
    assert len(set(np.concatenate(split))) == sum(map(len, split)) <= len(index)
    left_out = np.setdiff1d(np.arange(len(index)), np.concatenate(split))
    missed = minute_of(index, left_out)
    assert all(m < start <= m + gap for m in missed for start in [valid.min() if m < valid.min() else test.min()])
    assert len(test) == pytest.approx(test_share * len(index), abs=5)
    assert all((np.diff(rows) > 0).all() for rows in split)


@settings(max_examples=40, deadline=None)
@given(indices, gaps, st.integers(1, 5))
def test_folds_grow_and_never_look_ahead(index, gap, n_folds):
    try:
        folds = time_folds(index, n_folds, gap)
    except ParameterError:  # rightly, if all rows before the first fold lie within the gap
        start = minute_of(index, time_folds(index, n_folds, 0)[0].valid).min()
        assert minute_of(index, np.arange(len(index))).min() + gap >= start
        return
    assert len(folds) == n_folds
    for fold in folds:
        assert minute_of(index, fold.train).max() + gap < minute_of(index, fold.valid).min()
    for before, after in zip(folds, folds[1:]):
        assert set(before.train) < set(after.train)
        assert minute_of(index, before.valid).max() < minute_of(index, after.valid).min()
    judged = np.concatenate([fold.valid for fold in folds])
    assert len(set(judged)) == len(judged) == pytest.approx(len(index) * n_folds / (n_folds + 1), abs=5)


def test_the_usual_gap_covers_window_and_horizon():
    index = index_of({"A": range(3000), "B": range(1500, 3000)})
    train, valid, test = (minute_of(index, rows) for rows in time_split(index))
    assert PURGE_GAP_MIN == 55
    # the newest training target ends before the oldest validation window begins
    assert train.max() + 25 < valid.min() - 29 and valid.max() + 25 < test.min() - 29


def test_impossible_splits_say_so():
    index = index_of({"A": range(200)})
    for shares in ((0, 0.2), (0.2, 0), (0.6, 0.5)):
        with pytest.raises(ParameterError, match="leave rows to train on"):
            time_split(index, *shares)
    with pytest.raises(ParameterError, match="block of the split has no rows.*gap of 500"):
        time_split(index, gap_min=500)
    with pytest.raises(ParameterError, match="no rows to split"):
        time_split(index[:0])
    with pytest.raises(ParameterError, match="at least one fold"):
        time_folds(index, 0)
