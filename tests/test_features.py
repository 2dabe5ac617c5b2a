"""Features: V8 to the last one, the same for history and the newest window, honest about what a site lacks."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from v8_reference import v8_row

from amhs.config import Gaps, load_site
from amhs.core import InputError, ParameterError
from amhs.features import FEATURE_SETS, build_features, compile_features, feature_table
from amhs.telemetry import COLUMNS, columns_of

# Lowest and highest reading of each column, and the step it is read in: wide enough to cross every threshold of V8.
RANGES = {
    "hub_jobs": (230, 340, 1), "hub_jobs_alt": (230, 340, 1), "hub_storage_level": (195, 215, 1),
    "floor_storage_used": (20, 90, 1), "floor_storage_total": (600, 610, 1), "floor_storage_util": (4, 13, 0.1),
    "hub_free_slots": (540, 640, 1), "hub_commands": (80, 130, 1), "upper_to_hub_commands": (90, 130, 1),
    "hub_queue": (1000, 1600, 1), "hub_total_time_1min": (3, 5.5, 0.1), "hub_total_time": (4, 7, 0.1),
    "hub_oht_util": (78, 97, 0.5), "fab_oht_util": (78, 97, 0.5), "fab_load_time_1min": (2, 3.2, 0.1),
    "fab_over_4min": (30, 60, 1), "fab_queue_delay": (0, 5, 1), "hub_queue_completed": (0, 40, 1), "interfab_jobs": (0, 90, 1),
    "fab_queue_created": (0, 900, 1), "fab_queue_completed": (0, 900, 1), "hub_oht_queue": (0, 60, 1), "fab_oht_queue": (0, 60, 1),
    "upper_lifter_capacity": (20, 30, 1), "lower_lifter_capacity": (20, 30, 1),
} | dict.fromkeys(columns_of("inflow", "outflow"), (0, 25, 1))  # fmt: skip


def feed(minutes, columns=COLUMNS, line="HUB1", seed=0, start="2026-01-01"):
    "Readings that wander between the limits of their column, in the column's own steps."
    random, table = np.random.default_rng([seed, *map(ord, line)]), {}
    for name in columns:
        low, high, step = RANGES[name]
        walk = (high - low) * (random.random() + np.cumsum(random.normal(scale=0.08, size=minutes)))
        folded = low + np.abs(np.mod(walk, 2 * (high - low)) - (high - low))
        table[name] = (np.round(folded / step) * step).astype("float32")
    times = pd.date_range(start, periods=minutes, freq="min", tz="UTC").as_unit("us")
    return pd.DataFrame({"line": line, "timestamp": times, **table})


def reference(telemetry, end):
    window = telemetry.iloc[end - 29 : end + 1]
    return v8_row({name: window[name].tolist() for name in COLUMNS})


def test_the_feed_crosses_every_threshold():
    flags = build_features(feed(4000)).loc[:, lambda t: t.isin([0, 1]).all()]
    assert len(flags.columns) == 32
    assert (flags.min() == 0).all() and (flags.max() == 1).all()


def test_v8_is_the_reference_to_the_last_feature():
    telemetry = feed(4000, seed=1)
    features = build_features(telemetry)
    ends = range(29, 4000, 7)
    expected = pd.DataFrame([reference(telemetry, end) for end in ends])
    assert len(expected.columns) == 222 and list(features.columns) == list(expected.columns)
    found = features.iloc[[end - 29 for end in ends]].to_numpy("float64")
    scale = expected.abs().to_numpy() + 1e-6
    assert np.abs(found - expected.to_numpy()).max(axis=0).max() < 1e-3
    assert (np.abs(found - expected) / scale).to_numpy().max() < 1e-4


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-3, 1.0, 1e3]), st.sampled_from([0.0, -50.0, 1e4, 1e6]))
def test_v8_holds_on_any_window(seed, spread, offset):
    "Tiny and huge spreads around tiny and huge levels, in single precision."
    random = np.random.default_rng(seed)
    telemetry = feed(30).assign(**{c: (offset + spread * random.normal(size=30)).astype("float32") for c in COLUMNS})
    found, expected = build_features(telemetry).iloc[0], reference(telemetry, 29)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4, abs=1e-9 * abs(offset) + 1e-6 * spread), name


@pytest.mark.parametrize("level", [0.1, 2.8, 600.0, 1e6 / 3])
def test_a_constant_feed_has_no_spread_and_no_slope(level):
    telemetry = feed(200).assign(**dict.fromkeys(COLUMNS, np.float32(level)))
    for feature_set in ("v8", "hub"):
        features = build_features(telemetry, feature_set)
        moving = features.filter(regex="std|slope|change|acceleration|collectors_apart")
        assert len(moving.columns) > 40 and not moving.isna().all().any()
        assert (moving.fillna(0) == 0).all(axis=None)


def test_a_large_level_keeps_its_small_changes():
    wave = np.float32(2**20) + np.tile([0.0, 0.25, 0.5], 20).astype("float32")
    found = build_features(feed(60).assign(hub_jobs=wave)).hub_jobs_std
    np.testing.assert_allclose(found, [np.std(wave[i : i + 30].astype("float64")) for i in range(31)], rtol=1e-6)


def kernel_input(feature_set, minutes=12_000, lost=0.0, seed=5):
    "A kernel and its input as one line has it, with some values unknown."
    kernel = compile_features(feature_set, site="simulated")
    values = np.ascontiguousarray(feed(minutes, seed=seed)[list(kernel.columns)].to_numpy().T)
    known = np.random.default_rng(seed).random(values.shape) >= lost
    return kernel, np.where(known, values, np.float32(np.nan))


@pytest.mark.parametrize("lost", [0.0, 0.002])
@pytest.mark.parametrize("feature_set", FEATURE_SETS)
def test_the_newest_window_is_the_history_to_the_bit(feature_set, lost):
    kernel, values = kernel_input(feature_set, lost=lost)
    ends = np.arange(kernel.memory_min - 1, values.shape[1])
    history = kernel.matrix(values, ends, 29_000_000 + ends, threads=2)
    for end in np.random.default_rng(1).choice(ends, 60, replace=False):
        window = values[:, end - kernel.memory_min + 1 : end + 1]
        newest = kernel.row(window, 29_000_000 + end)
        assert newest.tobytes() == history[end - ends[0]].tobytes()
        assert kernel.row(values, 29_000_000 + end, end=end).tobytes() == newest.tobytes()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(sorted(FEATURE_SETS)), st.sets(st.integers(10_300, 11_999), min_size=1, max_size=700), st.integers(1, 4))
def test_rows_do_not_depend_on_their_neighbours(feature_set, ends, threads):
    "Any choice of rows, cut into any tiles, on any number of threads, is the same to the bit."
    kernel, values = kernel_input(feature_set, lost=0.001)
    everything = np.arange(10_300, 12_000)
    whole = kernel.matrix(values, everything, everything, threads=1)
    ends = np.array(sorted(ends))
    assert kernel.matrix(values, ends, ends, threads=threads).tobytes() == whole[ends - 10_300].T.copy().T.tobytes()


@pytest.mark.parametrize("feature_set", FEATURE_SETS)
def test_a_short_window_answers_like_the_first_rows_of_a_line(feature_set):
    telemetry = feed(100)
    features, kernel = build_features(telemetry, feature_set, "simulated"), compile_features(feature_set, site="simulated")
    window = telemetry[list(kernel.columns)].to_numpy().T
    minute = int(telemetry.timestamp.iloc[-1].timestamp()) // 60
    assert kernel.row(window, minute).tobytes() == features.iloc[-1].to_numpy().tobytes()


@pytest.mark.parametrize("feature_set", FEATURE_SETS)
def test_the_future_does_not_matter(feature_set):
    telemetry = feed(11_000, seed=2)
    changed = telemetry.copy()
    changed.loc[10_500:, list(COLUMNS)] = 7.0
    before, after = build_features(telemetry, feature_set), build_features(changed, feature_set)
    known = slice(None, 10_500 - 29)
    pd.testing.assert_frame_equal(before.iloc[known], after.iloc[known])
    assert not before.iloc[10_500 - 29].equals(after.iloc[10_500 - 29])


# --- the hub set, against what its prose says -------------------------------------------------------------------------


def hub_expected(telemetry, end):
    "Some features of every group of the hub set, from the whole feed, one by one."
    t = telemetry.astype(dict.fromkeys(COLUMNS, "float64"))
    x = {c: t[c].to_numpy() for c in COLUMNS}
    inflow, outflow = (sum(x[c] for c in columns_of(side)) for side in ("inflow", "outflow"))
    jobs, w = x["hub_jobs"], lambda series, n, lag=0: series[end - lag - n + 1 : end - lag + 1]
    weight = 0.5 ** (np.repeat(np.arange(35, -1, -1), 5) / 3)
    capacity = x["upper_lifter_capacity"]
    high = np.flatnonzero(w(capacity, 180) >= 0.9 * w(capacity, 180).max())
    flows = x["upper_to_hub_jobs"] + x["hub_to_upper_jobs"]
    filling = (w(x["hub_free_slots"], 5, 5).mean() - w(x["hub_free_slots"], 5).mean()) / 5
    days = [end - 1440 * d for d in range(1, 8) if end - 1440 * d - 180 >= 0]
    local = t.timestamp.iloc[end].tz_convert("Asia/Seoul")
    return {
        "hub_jobs_mean_180": w(jobs, 180).mean(), "hub_jobs_change_15": jobs[end] - jobs[end - 15], "hub_jobs_std_60": w(jobs, 60).std(),
        "hub_jobs_slope_60": np.polyfit(range(60), w(jobs, 60), 1)[0], "hub_jobs_above_min_180": jobs[end] - w(jobs, 180).min(),
        "hub_jobs_below_max_60": w(jobs, 60).max() - jobs[end], "hub_jobs_above_ewma_15": jobs[end] - np.average(w(jobs, 180), weights=weight),
        "fab_over_4min_change_10": w(x["fab_over_4min"], 5).mean() - w(x["fab_over_4min"], 5, 10).mean(),
        "hub_to_lower_jobs_above_60": w(x["hub_to_lower_jobs"], 15).mean() - w(x["hub_to_lower_jobs"], 60).mean(),
        "net_flow_30": w(inflow - outflow, 30).mean(), "inflow_std_15": w(inflow, 15).std(), "outflow_share_15": w(outflow, 15).mean() / w(inflow, 15).mean(),
        "upper_capacity_share": capacity[end] / w(capacity, 180).max(), "upper_capacity_drop_age": 179 - high[-1],
        "upper_lifter_load_5": w(flows, 5).mean() / w(capacity, 5).mean(),
        "room_time_to_full_min": min(x["hub_free_slots"][end] / max(filling, 0.1), 240), "room_min_60": w(x["hub_free_slots"], 60).min(),
        "backlog_60": w(x["fab_queue_created"] - x["fab_queue_completed"], 60).sum(),
        "little_residual_15": jobs[end] - w(outflow, 15).mean() * w(x["hub_total_time"], 15).mean(),
        "collectors_apart_std_30": w(jobs - x["hub_jobs_alt"], 30).std(),
        "minute_of_day": local.hour * 60 + local.minute, "day_of_week": local.day_of_week, "minute_of_quarter": local.minute % 15,
        "week_sin": np.sin(2 * np.pi * (local.day_of_week * 1440 + local.hour * 60 + local.minute) / 10080),
        "inflow_expected_15": np.mean([inflow[d + 1 : d + 16].mean() for d in days]),
        "outflow_above_days_60": w(outflow, 60).mean() - np.mean([outflow[d - 59 : d + 1].mean() for d in days]),
        "hub_jobs_expected_rise_25": np.mean([jobs[d + 1 : d + 26].mean() - jobs[d] for d in days]),
        "hub_jobs_expected_peak_10": np.mean([jobs[d + 1 : d + 11].max() - jobs[d] for d in days]),
        "hub_jobs_above_days_5": w(jobs, 5).mean() - np.mean([jobs[d - 4 : d + 1].mean() for d in days]),
        "inflow_expected_at_2": np.mean([inflow[d + 2] for d in days]), "outflow_expected_5": np.mean([outflow[d + 1 : d + 6].mean() for d in days]),
        "hub_jobs_peak_10_days_ago_1": jobs[end - 1439 : end - 1429].max() - jobs[end - 1440],
        "inflow_week_ago_25": inflow[end - 10079 : end - 10054].mean() if end >= 10080 else np.nan,
    }  # fmt: skip


def test_hub_features_are_what_their_prose_says():
    telemetry = feed(12_000, seed=9)
    features = build_features(telemetry, "hub", "simulated")
    late_in_the_day = [end for end in np.random.default_rng(2).integers(1700, 12_000, 50) if end % 1440 > 300]  # all or no memory of a day
    for end in [*late_in_the_day, 11_999]:
        expected = hub_expected(telemetry, end)
        found = features.iloc[end - 29][list(expected)].astype("float64")
        assert found.to_dict() == pytest.approx(expected, rel=1e-4, abs=1e-4, nan_ok=True)


def test_memory_that_is_not_there_yet_is_missing_and_the_row_is_not():
    features = build_features(feed(3000), "hub")
    assert len(features) == 3000 - 29
    assert np.isnan(features.hub_jobs_mean_180[:150]).all() and not np.isnan(features.hub_jobs_mean_180[151:]).any()
    assert np.isnan(features.inflow_expected_10[: 1440 - 29 - 1]).all() and not np.isnan(features.inflow_expected_10[1440 - 29 :]).any()


# --- gaps, lines, unknown values --------------------------------------------------------------------------------------


def minutes_of(features, line="HUB1"):
    times = features.xs(line).index
    return list(times.hour * 60 + times.minute)


def test_a_long_gap_excludes_the_rows_that_look_across_it():
    holed = feed(120).drop(index=range(50, 60))
    for feature_set in FEATURE_SETS:
        features = build_features(holed, feature_set)
        assert minutes_of(features) == [*range(29, 50), *range(60 + 29, 120)]
    whole = build_features(feed(120))
    pd.testing.assert_frame_equal(build_features(holed), whole.loc[build_features(holed).index])


def test_a_short_gap_is_filled_forward_as_the_site_says():
    telemetry = feed(120)
    holed, frozen = telemetry.drop(index=[50, 51]), telemetry.copy()
    frozen.loc[50:51, list(COLUMNS)] = frozen.loc[49, list(COLUMNS)].to_numpy()
    for feature_set in FEATURE_SETS:
        pd.testing.assert_frame_equal(build_features(holed, feature_set), build_features(frozen, feature_set))
    strict = load_site("simulated").model_copy(update={"gaps": Gaps(fill_up_to_min=0)})
    assert minutes_of(build_features(holed, site=strict)) == [*range(29, 50), *range(52 + 29, 120)]


def test_lines_do_not_see_each_other():
    a, b = feed(300, line="A"), feed(200, line="B", start="2026-01-01 02:00")
    for feature_set in FEATURE_SETS:
        both = build_features(pd.concat([a, b], ignore_index=True), feature_set)
        pd.testing.assert_frame_equal(both.xs("A"), build_features(a, feature_set).xs("A"))
        pd.testing.assert_frame_equal(both.xs("B"), build_features(b, feature_set).xs("B"))
        assert list(both.index.names) == ["line", "timestamp"] and (both.dtypes == "float32").all()


def test_an_unknown_value_spoils_the_features_made_of_it_and_no_others():
    telemetry = feed(100)
    holed = telemetry.astype({"fab_oht_util": "float32"})
    holed.loc[40:60, "fab_oht_util"] = np.nan
    kernel = compile_features("v8")
    def take(t):
        return kernel.matrix(np.ascontiguousarray(t[list(COLUMNS)].to_numpy().T), np.arange(29, 100))
    before, after = (pd.DataFrame(take(t), index=range(29, 100), columns=kernel.names) for t in (telemetry, holed))
    touched = [f.name for f in kernel.features if "fab_oht_util" in f.sources()]
    assert len(touched) == 10
    pd.testing.assert_frame_equal(before.drop(columns=touched), after.drop(columns=touched))
    assert list(after.index[after.fab_oht_util_mean.isna()]) == list(range(40, 90))
    assert list(after.index[after.fab_oht_util_max.isna()]) == list(range(40, 90))
    for name in ("fab_oht_util_last", "fab_oht_util_high", "fab_oht_and_over_4min_high"):
        assert list(after.index[after[name].isna()]) == list(range(40, 61))
    assert not np.isinf(after).any(axis=None)


@pytest.mark.parametrize("minutes", [0, 1, 29, 30])
@pytest.mark.parametrize("feature_set", FEATURE_SETS)
def test_short_telemetry_has_few_rows_or_none(feature_set, minutes):
    features = build_features(feed(40).head(minutes), feature_set)
    assert len(features) == max(0, minutes - 29)
    assert list(features.columns) == compile_features(feature_set).names


# --- sites ------------------------------------------------------------------------------------------------------------


def test_a_site_without_some_columns_gets_all_the_rest():
    few = ["hub_jobs", "upper_to_hub_jobs", "lower_to_hub_jobs", "hub_to_upper_jobs", "hub_total_time", "hub_commands"]
    telemetry = feed(100)
    part, whole = build_features(telemetry[["line", "timestamp", *few]]), build_features(telemetry)
    missing = part.attrs["missing_features"]
    assert [*part.columns, *missing].sort() == [*whole.columns].sort() and not set(part.columns) & set(missing)
    assert missing["storage_high"] == ["hub_storage_level"]
    assert missing["surge_risk_score"] == ["hub_free_slots", "hub_storage_level", "upper_to_hub_commands", "floor_storage_util"]
    sums = ["net_flow", "total_commands", "commands_low", "commands_very_low"]
    same = part.columns.drop(sums)
    pd.testing.assert_frame_equal(part[same], whole[same])
    last = telemetry.iloc[29:]
    np.testing.assert_array_equal(part.net_flow, last.upper_to_hub_jobs + last.lower_to_hub_jobs - last.hub_to_upper_jobs)
    np.testing.assert_array_equal(part.total_commands, last.hub_commands)


def test_one_side_of_a_balance_is_no_balance():
    telemetry = feed(60)[["line", "timestamp", "hub_jobs", "upper_to_hub_jobs"]]
    assert "net_flow" in build_features(telemetry).attrs["missing_features"]
    hub = build_features(telemetry, "hub")
    assert "net_flow_5" in hub.attrs["missing_features"] and "inflow_5" in hub.columns


def test_the_order_of_rows_and_columns_does_not_matter():
    telemetry = feed(60)
    mixed = telemetry[["timestamp", *reversed(COLUMNS), "line"]].sample(frac=1, random_state=1)
    pd.testing.assert_frame_equal(build_features(mixed), build_features(telemetry))


def test_thresholds_are_the_sites():
    site = load_site("simulated")
    eager = site.model_copy(update={"thresholds": site.thresholds.model_copy(update={"free_high": 1000.0, "rapid_rise": -1000.0})})
    features = build_features(feed(200), site=eager)
    assert (features.room_high == 1).all() and (features.hub_jobs_rapid_rise == 1).all()
    assert features.room_critical.nunique() == 2


def test_a_sensor_that_reads_exactly_its_limit_is_at_its_limit():
    telemetry = feed(30).assign(fab_load_time_1min=np.float32(2.8), floor_storage_util=np.float32(7))
    features = build_features(telemetry).iloc[0]
    assert features.fab_load_time_critical == 1 and features.floor_util_high == 1


def test_the_clock_is_the_sites():
    site = load_site("simulated")
    telemetry = feed(30, start="2026-03-29 00:50")
    for zone in ("Asia/Seoul", "America/New_York", "Europe/Berlin", "Asia/Kolkata"):
        row = build_features(telemetry, "hub", site.model_copy(update={"timezone": zone})).iloc[0]
        local = telemetry.timestamp.iloc[-1].tz_convert(zone)
        assert [row.day_of_week, row.minute_of_day] == [local.day_of_week, local.hour * 60 + local.minute], zone


def test_feature_table_names_sources_and_what_is_missing():
    table = feature_table("v8", ["hub_jobs", "hub_free_slots"]).set_index("name")
    assert len(table) == 222 and table.history_min.between(1, 30).all()
    assert table.loc["room_storage_risk"].to_dict() == {
        "group": "room", "sources": "hub_free_slots, floor_storage_util", "history_min": 1, "missing": "floor_storage_util"}  # fmt: skip
    assert (table.missing == "").sum() == 11 + 7 + 4 + 1  # the last is surge_imminent
    assert feature_table("hub").missing.eq("").all()


def test_names_are_unique_and_no_two_features_are_the_same_but_v8s_own():
    for feature_set, twice in (("v8", 1), ("hub", 0)):
        features = compile_features(feature_set).features
        assert len({f.name for f in features}) == len(features)
        assert len(features) - len({f.value for f in features}) == twice


def test_wrong_input_is_refused():
    telemetry = feed(60)
    with pytest.raises(ParameterError, match="no such feature set .got 'v9'.*v8"):
        build_features(telemetry, "v9")
    with pytest.raises(InputError, match="hub_jobs"):
        build_features(telemetry.drop(columns="hub_jobs"))
    with pytest.raises(InputError, match="two rows for the same line and minute"):
        build_features(telemetry.iloc[[*range(40), 39]])
    kernel = compile_features("v8")
    with pytest.raises(InputError, match="31 columns"):
        kernel.matrix(np.zeros((3, 60), "float32"), np.arange(29, 60))
    for ends in ([28], [60]):
        with pytest.raises(InputError, match="30 minutes up to their newest"):
            kernel.matrix(np.zeros((31, 60), "float32"), np.array(ends))
    with pytest.raises(InputError, match="at least 30 minutes"):
        kernel.row(np.zeros((31, 20), "float32"))
    with pytest.raises(ParameterError, match="looks at the clock"):
        compile_features("hub").row(np.zeros((31, 30), "float32"))
