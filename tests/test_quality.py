"""The data review: planted faults are found, clean data are not accused."""

import numpy as np
import pandas as pd
import pytest

from amhs.core import InputError, ParameterError
from amhs.quality import (
    LIMITS,
    column_table,
    coverage,
    disagreement,
    gap_table,
    label_balance,
    review,
    spikes,
    stuck_sensors,
    validate,
)
from amhs.telemetry import COLUMNS


def make(days=10, lines=("HUB1",), columns=COLUMNS[:8], seed=0, start="2026-01-01"):
    "A living line: a daily wave and noise in every column."
    frames = []
    for k, line in enumerate(lines):
        rng, n = np.random.default_rng([seed, k]), days * 1440
        wave = 200 + 40 * np.sin(np.arange(n) / 1440 * 2 * np.pi)
        values = {name: np.clip((wave + rng.normal(0, 5, n)).round(), 0, 95 if "util" in name else None) for name in columns}
        times = pd.date_range(start, periods=n, freq="min", tz="UTC").as_unit("us")
        frames.append(pd.DataFrame({"line": line, "timestamp": times, **values}))
    frame = pd.concat(frames, ignore_index=True)
    return frame.astype(dict.fromkeys(columns, "float32") | {"line": "str"})


SOME = ("hub_jobs", "hub_storage_level", "hub_free_slots", "hub_queue")


def test_clean_data_pass_every_check():
    found = review(make(columns=SOME))
    assert found.verdict()["passed"].all()
    assert found.broken.empty and found.gaps.empty and found.stuck.empty and found.spikes.empty
    assert len(found.missing) == 27
    assert set(found.numbers()) == LIMITS.keys()


# the contract

@pytest.mark.parametrize("spoil, check, rows", [
    (lambda f: f.assign(hub_jobs=f["hub_jobs"].where(f.index != 7, -1)), "in_range(0, 100000)", 1),
    (lambda f: pd.concat([f, f.tail(1)]), "one_row_per_minute", 1),
    (lambda f: f.iloc[[1, 0, *range(2, len(f))]], "sorted", 1),
    (lambda f: f.assign(timestamp=f["timestamp"] + pd.Timedelta("1s")), "whole_minutes", 1440),
    (lambda f: f.assign(hub_jobs=f["hub_jobs"].astype("float64")), "dtype('float32')", 1),
    (lambda f: f.assign(who="me"), "column_in_schema", 1),
])
def test_validate_names_the_broken_rule(spoil, check, rows):
    found = validate(spoil(make(1, columns=SOME)))
    assert (found["check"].tolist(), found["rows"].tolist()) == ([check], [rows])


def test_validate_says_everything_at_once():
    frame = make(1, columns=SOME)
    frame.loc[3:5, "hub_queue"], frame.loc[9, "hub_jobs"] = -1, 2e5
    assert dict(zip(validate(frame)["column"], validate(frame)["rows"], strict=True)) == {"hub_queue": 3, "hub_jobs": 1}


# minutes

def test_gaps_and_coverage_against_plain_counting():
    rng, frame = np.random.default_rng(1), make(4, lines=("A", "B"), columns=("hub_jobs",))
    frame = frame[rng.random(len(frame)) > 0.3].reset_index(drop=True)
    gaps = gap_table(frame)
    for line, rows in frame.groupby("line"):
        there = set(rows["timestamp"])
        span = pd.date_range(min(there), max(there), freq="min")
        missing = [t for t in span if t not in there]
        listed = [t for g in gaps[gaps["line"] == line].itertuples() for t in pd.date_range(g.start, g.end, freq="min")]
        assert sorted(listed) == missing and gaps.loc[gaps["line"] == line, "minutes"].sum() == len(missing)
    assert gaps["filled"].eq(gaps["minutes"] <= 3).all() and gaps["minutes"].is_monotonic_decreasing
    covered = coverage(frame)
    assert covered["rows"].sum() == len(frame)
    assert (covered["expected"] - covered["rows"]).sum() == gaps["minutes"].sum()
    assert covered["expected"].max() == 1440 and covered["share"].between(0, 1).all()


def test_days_are_the_site_s_own_days_also_when_clocks_change():
    frame = make(3, columns=("hub_jobs",), start="2013-11-02 04:00")  # midnight in New York
    days = coverage(frame, "nycflights")
    assert days["expected"].tolist() == [1440, 1500, 1380] and days["share"].eq(1).all()


# columns

def test_column_table():
    frame = make(1, columns=SOME)
    frame.loc[:143, "hub_queue"] = np.nan
    frame["hub_storage_level"] = np.float32(7)
    table = column_table(frame)
    assert list(table.index) == list(COLUMNS)
    assert table.loc["hub_queue", "missing_share"] == pytest.approx(0.1) and table.loc["hub_oht_util", "missing_share"] == 1
    assert table.index[table["constant"]].tolist() == ["hub_storage_level"]


@pytest.mark.parametrize("minutes, found", [(25, False), (45, True), (200, True)])
def test_stuck_sensor_is_found_where_it_sticks(minutes, found):
    frame = make(10, lines=("A", "B"), columns=SOME)
    at = 14_400 + 5000
    frame.loc[at : at + minutes - 1, "hub_queue"] = frame.loc[at, "hub_queue"]
    stuck = stuck_sensors(frame)
    expected = [("B", "hub_queue", frame.loc[at, "timestamp"])] if found else []
    assert list(stuck[["line", "column", "start"]].itertuples(index=False, name=None)) == expected
    assert not found or abs(stuck["minutes"].iloc[0] - minutes) <= 2


def test_rest_is_not_a_fault():
    "Empty every night, full on many days, capacity that never changes: none of them is stuck."
    frame = make(20, columns=("hub_jobs", "hub_queue", "hub_storage_level", "upper_lifter_capacity"))
    hour, day = frame.index // 60 % 24, frame.index // 1440
    frame.loc[hour < 6, "hub_queue"] = 0
    frame.loc[(hour >= 8) & (hour < 10) & (day % 4 == 0), "hub_storage_level"] = 400
    frame["upper_lifter_capacity"] = np.float32(9.85)
    frame.loc[3000:3060, "upper_lifter_capacity"] = np.float32(1)
    assert stuck_sensors(frame).empty


def test_gap_ends_a_run_of_equal_values():
    frame = make(5, columns=("hub_jobs",))
    frame.loc[1000:1027, "hub_jobs"], frame.loc[1040:1067, "hub_jobs"] = 150, 150
    assert stuck_sensors(frame.drop(index=range(1028, 1040)).reset_index(drop=True)).empty


def test_spike_is_found_and_a_step_is_not():
    frame = make(5, columns=SOME)
    frame.loc[2000, "hub_queue"] = 5000
    frame.loc[4000:, "hub_free_slots"] -= 150
    found = spikes(frame)
    assert found[["column", "timestamp", "value"]].values.tolist() == [["hub_queue", frame.loc[2000, "timestamp"], 5000]]


def test_bursty_queue_is_no_spike():
    rng, frame = np.random.default_rng(0), make(10, columns=("hub_jobs", "hub_oht_queue"))
    burst = rng.random(len(frame)) < 0.05
    frame["hub_oht_queue"] = np.where(burst, rng.integers(1, 60, len(frame)), 0).astype("float32")
    assert spikes(frame).empty


def test_disagreement_of_collectors():
    frame = make(2, columns=("hub_jobs",))
    frame["hub_jobs_alt"] = frame["hub_jobs"] + 2
    frame.loc[:287, "hub_jobs_alt"] += 60
    frame.loc[2000:, "hub_jobs_alt"] = np.nan
    row = disagreement(frame).loc["HUB1"]
    assert row["compared"] == 2000 and row["disagree_share"] == pytest.approx(288 / 2000) and row["max_jobs"] == 62
    assert disagreement(frame.drop(columns="hub_jobs_alt")).empty


# labels and verdict

def test_label_balance():
    targets = pd.DataFrame({"now": 1.0, "surge_class_10": [0, 0, 1, 2, np.nan], "surge_class_25": [0, 0, 0, 0, 0]})
    table = label_balance(targets)
    assert table.loc[10].tolist() == [4, 0.5, 0.25, 0.25] and table.loc[25].tolist() == [5, 1, 0, 0]
    with pytest.raises(InputError, match="build_targets"):
        label_balance(targets[["now"]])


@pytest.mark.parametrize("check, spoil", [
    ("missing_minutes_share", lambda f: f.drop(index=range(2000, 4000))),
    ("missing_target_share", lambda f: f.assign(hub_jobs=f["hub_jobs"].where(f.index % 20 > 0))),
    ("missing_cells_share", lambda f: f.assign(hub_queue=f["hub_queue"].where(f.index % 3 > 0))),
    ("stuck_target_share", lambda f: f.assign(hub_jobs=f["hub_jobs"].where(~f.index.isin(range(4000, 4400)), 187))),
    ("stuck_cells_share", lambda f: f.assign(**{c: f[c].where(~f.index.isin(range(2000, 3000)), 187) for c in SOME[1:]})),
    ("spike_share", lambda f: f.assign(hub_queue=f["hub_queue"].where(f.index % 150 > 0, 9000))),
    ("disagree_share", lambda f: f.assign(hub_jobs_alt=f["hub_jobs"] + np.where(f.index % 9 == 0, 50, 0).astype("float32"))),
    ("broken_share", lambda f: f.assign(hub_free_slots=f["hub_free_slots"] * -1)),
])
def test_each_check_fails_on_its_own_fault(check, spoil):
    verdict = review(spoil(make(10, columns=SOME)).reset_index(drop=True)).verdict()
    assert verdict.loc[~verdict["passed"], "check"].tolist() == [check]
    assert verdict["why"].str.len().min() > 10 and verdict["op"].eq("<=").all()


def test_limits_are_parameters():
    found = review(make(10, columns=SOME).drop(index=range(2000, 4000)))
    assert found.verdict({"missing_minutes_share": 0.2})["passed"].all()
    with pytest.raises(ParameterError, match="missing_minutes_share"):
        found.verdict({"missing_minute_share": 0.2})


def test_nothing_to_review():
    with pytest.raises(InputError, match="no row"):
        review(make(1, columns=SOME).head(0))


def test_review_finds_what_the_simulator_broke():
    from amhs.simulate import simulate
    telemetry, truth = simulate(10, seed=1, scenario="sensor-faults")
    truth = truth[(truth["kind"] == "sensor-stuck") & ((truth["end"] - truth["start"]) > "45min")]
    stuck = stuck_sensors(telemetry, steady=("upper_lifter_capacity", "lower_lifter_capacity", "floor_storage_total"))
    planted = truth[~truth["column"].isin(["upper_lifter_capacity", "lower_lifter_capacity", "floor_storage_total"])]

    def hit(one, others):
        return ((others["column"] == one.column) & (others["start"] <= one.end) & (others["end"] >= one.start)).any()
    assert np.mean([hit(one, stuck) for one in planted.itertuples()]) >= 0.75
    assert np.mean([hit(one, truth) for one in stuck.itertuples()]) >= 0.6
