"""The simulated hub through its public interface: reproducible, forkable, nothing lost, faults in data and truth, congestion by physics."""

import hashlib

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simpy_hub import SimpyHub, plain

from amhs.config import load_site
from amhs.core import InputError, ParameterError
from amhs.simulate import FAULTS, SCENARIOS, Hub, Simulator, read_truth, simulate, write_simulation
from amhs.targets import build_targets
from amhs.telemetry import COLUMNS, check_telemetry, read_dataset

IN = ["upper_to_hub_jobs", "lower_to_hub_jobs", "neighbor_to_hub_jobs"]
OUT = ["hub_to_upper_jobs", "hub_to_lower_jobs", "hub_to_neighbor_jobs"]


def content(telemetry: pd.DataFrame) -> str:
    return hashlib.sha256(telemetry[list(COLUMNS)].to_numpy("<f4").tobytes()).hexdigest()[:16]


@pytest.fixture(scope="module")
def month():
    return simulate(days=28, seed=5)


# reproducible

def test_same_seed_same_rows_anywhere():
    "The stored hashes were computed once; another value means that a seed no longer gives the rows it gave."
    assert content(simulate(days=1, seed=7).telemetry) == "59736dfc5ba4c4e1"
    assert content(simulate(days=1, seed=7, scenario="lifter-outage", start="2026-03-02").telemetry) == "4d02d92a8582b097"


def test_seed_line_and_start_matter():
    runs = {content(simulate(days=0.1, **kw).telemetry)
            for kw in ({}, {"seed": 1}, {"line": "HUB2"}, {"start": "2026-01-03 21:00"}, {"scenario": "busy"})}
    assert len(runs) == 5


def test_telemetry_keeps_the_contract(month):
    telemetry = month.telemetry
    pd.testing.assert_frame_equal(check_telemetry(telemetry), telemetry)
    assert list(telemetry) == ["line", "timestamp", *COLUMNS]
    assert set(telemetry[list(COLUMNS)].dtypes) == {np.dtype("float32")}
    assert str(telemetry["timestamp"].dtype) == "datetime64[us, UTC]"
    assert len(telemetry) == 28 * 1440 and telemetry["timestamp"].iloc[0] == pd.Timestamp("2026-01-01", tz="UTC")
    assert np.isfinite(telemetry[list(COLUMNS)]).all(axis=None)


# state

@given(st.lists(st.integers(1, 200), min_size=1, max_size=4), st.sampled_from(sorted(SCENARIOS)))
@settings(max_examples=12, deadline=None)
def test_running_in_pieces_changes_nothing(pieces, scenario):
    whole = Simulator(3, scenario, days=0.3)
    parts = Simulator(3, scenario, days=0.3)
    expected = whole.run(sum(pieces))
    found = pd.concat([parts.run(n) for n in pieces], ignore_index=True)
    pd.testing.assert_frame_equal(found, expected)
    pd.testing.assert_frame_equal(parts.truth, whole.truth)


@given(st.integers(1, 600))
@settings(max_examples=8, deadline=None)
def test_a_saved_state_goes_on_exactly(tmp_path_factory, minute):
    file = tmp_path_factory.mktemp("state") / "hub.npz"
    sim = Simulator(11, "season", days=1)
    sim.run(minute)
    saved = sim.save(file)
    expected, truth = sim.run(400), sim.truth
    for again in (Simulator.load(saved), Simulator.load(file)):
        pd.testing.assert_frame_equal(again.run(400), expected)
        pd.testing.assert_frame_equal(again.truth, truth)


def test_a_fork_shares_the_present_and_nothing_else():
    sim = Simulator(2)
    sim.run(300)
    futures = sim.futures(20, 60, seed=40)
    assert futures.shape == (20, 60)
    assert len({row.tobytes() for row in futures}) == 20
    np.testing.assert_array_equal(sim.fork(43).run(60)["hub_jobs"], futures[3])
    now = sim.run(1)["hub_jobs"].iloc[0]
    assert np.abs(futures[:, 0] - now).max() < 25, "a minute later the futures are still close"
    assert futures[:, -1].std() > futures[:, 0].std()


def test_forking_leaves_the_simulator_alone():
    one, other = Simulator(2), Simulator(2)
    one.fork(9).run(100)
    one.futures(5, 100)
    pd.testing.assert_frame_equal(one.run(100), other.run(100))


def test_a_file_that_is_no_state_is_refused(tmp_path):
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 no archive")
    np.savez(tmp_path / "other.npz", state=np.zeros(3), about=np.array("{}"))
    with pytest.raises(InputError, match=r"broken\.npz"):
        Simulator.load(tmp_path / "broken.npz")
    with pytest.raises(InputError, match="another version"):
        Simulator.load(tmp_path / "other.npz")
    with pytest.raises(InputError, match="not a saved"):
        Simulator.load(tmp_path / "absent.npz")


# nothing is lost, limits hold

@pytest.mark.parametrize("scenario", sorted(set(SCENARIOS) - {"sensor-faults"}))
def test_jobs_are_conserved_every_minute(scenario):
    table = simulate(days=3, seed=8, scenario=scenario).telemetry
    inside = table["hub_jobs"] + table["hub_storage_level"]
    net = table[IN].sum(axis=1) - table[OUT].sum(axis=1)
    assert (inside.diff().iloc[1:] == net.iloc[1:]).all()
    assert table["hub_queue"].min() >= 0 and table["interfab_jobs"].min() >= 0 and table["hub_commands"].min() >= 0
    assert (table["hub_queue_completed"] == table[OUT].sum(axis=1)).all()


def test_slots_vehicles_and_places_stay_within_limits():
    hub = Hub()
    sim = Simulator(6, "lifter-outage", days=1)
    held = 0
    for _ in range(1440):
        sim.run(1)
        s = sim.state[0]
        assert 0 <= s["fab_busy"] <= hub.fab_vehicles and 0 <= s["hub_busy"] <= hub.hub_vehicles
        assert (s["bound"] <= hub.fab_bound).all() and s["hub_inbound"] <= hub.hub_inbound
        assert (s["zone_used"] >= 0).all() and (s["zone_used"] <= hub.zone_slots).all()
        assert 0 <= s["side_used"] <= hub.side_overflow and (s["exiting"] <= hub.exit_carriers).all()
        assert 0 <= s["at_crane"] <= hub.crane_port
        assert s["stocked"] + hub.stocker_foreign <= hub.stocker_slots
        held += s["size"][11:14].sum() + s["size"][20:22].sum()
    assert held > 0, "vehicles were held at the door or at a lifter"
    assert sim.state["refused"][0] == 0


def test_columns_agree_with_each_other(month):
    t, hub = month.telemetry, Hub()
    assert (t["floor_storage_total"] == hub.side_slots).all()
    np.testing.assert_allclose(t["floor_storage_util"], 100 * t["floor_storage_used"] / hub.side_slots, rtol=1e-5)
    assert t[["hub_oht_util", "fab_oht_util"]].max(axis=None) <= 100
    assert (t["upper_lifter_capacity"] <= np.float32(hub.lifter_per_min[0])).all()
    lag = t["hub_jobs_alt"] - t["hub_jobs"]
    assert 0 < lag.abs().mean() < 6 and abs(lag.mean()) < 1, "the second collector sees nearly the same"


# scenarios

def test_every_kind_of_fault_occurs_and_ends(month):
    truth = month.truth
    assert set(truth["kind"]) == set(FAULTS)
    assert (truth["end"] > truth["start"]).all() and truth["start"].is_monotonic_increasing
    assert set(truth.loc[~truth["precursor"], "kind"]) == {"unannounced-batch"}


@pytest.mark.parametrize(("floor", "column"), [("upper", "upper_lifter_capacity"), ("lower", "lower_lifter_capacity")])
def test_lifter_faults_are_in_data_and_truth(floor, column):
    telemetry, truth = simulate(days=7, seed=4, scenario="lifter-outage")
    capacity = telemetry.set_index("timestamp")[column]
    left = pd.Series(1.0, capacity.index)
    for fault in truth[truth["kind"].str.startswith(f"{floor}-lifter")].itertuples():
        left[(left.index >= fault.start) & (left.index < fault.end)] *= 1 - fault.severity
    np.testing.assert_allclose(capacity, Hub().lifter_per_min[0] * left, rtol=1e-5)
    assert (truth["kind"] == f"{floor}-lifter-failure").sum() >= 5


def halves(telemetry):
    middle = len(telemetry) // 2
    return telemetry.iloc[:middle], telemetry.iloc[middle:]


@pytest.mark.parametrize("scenario", ["new-route", "season", "capacity-upgrade"])
def test_a_change_begins_half_way_and_not_before(scenario):
    telemetry, truth = simulate(days=6, seed=4, scenario=scenario)
    before, after = halves(telemetry)
    normal_before, normal_after = halves(simulate(days=6, seed=4).telemetry)
    pd.testing.assert_frame_equal(before, normal_before)
    assert not after.equals(normal_after)
    change = truth[truth["kind"] == scenario]
    assert list(change["start"]) == [after["timestamp"].iloc[0]]


def test_new_route_changes_what_commands_mean():
    before, after = halves(simulate(days=12, seed=4, scenario="new-route").telemetry)
    assert after["neighbor_to_hub_jobs"].mean() > 1.08 * before["neighbor_to_hub_jobs"].mean()
    assert after["upper_to_hub_jobs"].mean() < 0.97 * before["upper_to_hub_jobs"].mean()
    notice = [t["hub_commands"].mean() / t[IN].sum(axis=1).mean() for t in (before, after)]
    assert notice[1] < 0.93 * notice[0], "lots are announced later"


def test_season_drifts_and_an_upgrade_relieves():
    seasons = simulate(days=20, seed=4, scenario="season").telemetry
    last, normal_last = seasons.iloc[-5 * 1440:], simulate(days=20, seed=4).telemetry.iloc[-5 * 1440:]
    assert last["fab_queue_created"].mean() > 1.02 * normal_last["fab_queue_created"].mean()
    assert last["hub_total_time_1min"].median() > 1.05 * normal_last["hub_total_time_1min"].median()
    upgraded = halves(simulate(days=20, seed=4, scenario="capacity-upgrade").telemetry)[1]
    plain_ = halves(simulate(days=20, seed=4).telemetry)[1]
    assert upgraded["upper_lifter_capacity"].max() == pytest.approx(1.25 * Hub().lifter_per_min[0])
    assert (upgraded["hub_jobs"] > 280).mean() < 0.7 * (plain_["hub_jobs"] > 280).mean()


def test_busy_is_busier():
    busy, normal = (simulate(days=14, seed=4, scenario=name).telemetry for name in ("busy", "normal"))
    assert busy[IN].sum(axis=1).mean() > 1.02 * normal[IN].sum(axis=1).mean()
    assert (busy["hub_jobs"] > 280).mean() > 1.3 * (normal["hub_jobs"] > 280).mean()


def test_bad_sensors_do_not_alter_the_physics():
    spoilt, truth = simulate(days=4, seed=4, scenario="sensor-faults")
    sound = simulate(days=4, seed=4).telemetry.set_index("timestamp")
    pd.testing.assert_frame_equal(truth[truth["kind"].isin(FAULTS)].reset_index(drop=True), simulate(days=4, seed=4).truth)
    jumps = truth[truth["kind"] == "clock-jump"]
    for jump in jumps.itertuples():  # five minutes ahead: those rows are somebody else's minute
        ahead = spoilt["timestamp"].between(jump.start, jump.end + pd.Timedelta(minutes=5))
        spoilt = spoilt[~ahead]
    spoilt = spoilt.set_index("timestamp")
    differs = spoilt[list(COLUMNS)].ne(sound.loc[spoilt.index, list(COLUMNS)])
    for fault in truth[truth["column"] != ""].itertuples():
        differs.loc[(differs.index >= fault.start) & (differs.index < fault.end), fault.column] = False
    assert not differs.any(axis=None), "outside the faults of the truth every value is the sound one"
    assert not spoilt.index.has_duplicates


def test_each_sensor_fault_is_seen():
    spoilt, truth = simulate(days=4, seed=4, scenario="sensor-faults")
    sound = simulate(days=4, seed=4).telemetry
    kinds = truth["kind"].value_counts()
    assert {"sensor-stuck", "sensor-missing", "minutes-missing", "clock-jump"} <= set(kinds.index)
    assert spoilt[list(COLUMNS)].isna().any(axis=None) and len(spoilt) < len(sound)
    pd.testing.assert_frame_equal(check_telemetry(spoilt), spoilt)
    jump = truth[truth["kind"] == "clock-jump"].iloc[0]
    gap = spoilt["timestamp"].diff().max()
    assert gap >= pd.Timedelta(minutes=6) and jump.end > jump.start
    at = spoilt.set_index("timestamp")
    for fault in truth[truth["kind"] == "sensor-stuck"].itertuples():
        inside = at.loc[(at.index >= fault.start) & (at.index < fault.end), fault.column].dropna()
        assert inside.nunique() <= 2 or jumps_overlap(truth, fault), fault


def jumps_overlap(truth, fault):
    others = truth[(truth["kind"] == "clock-jump") | ((truth["column"] == fault.column) & (truth["start"] != fault.start))]
    late = pd.Timedelta(minutes=10)
    return ((others["start"] - late < fault.end) & (others["end"] + late > fault.start)).any()


# congestion emerges

@pytest.fixture(scope="module")
def outage():
    "Mean over eight futures of one present: as it is, and with the upper lifter standing still for 40 minutes."
    sim = Simulator(12)
    sim.run(600)
    as_is, stopped = Simulator.load(sim.save()), Simulator.load(sim.save())
    stopped.fail("upper-lifter-failure", minutes=40)
    return [sum(future.fork(seed).run(420)[list(COLUMNS)] for seed in range(8)) / 8 for future in (as_is, stopped)]


def test_an_outage_fills_the_hub_step_by_step(outage):
    as_is, stopped = outage
    more = stopped["hub_jobs"] - as_is["hub_jobs"]
    assert more[2] < 30 < more[12] < more[25], "gradually, so that it can be foreseen"
    assert more[38] > 80
    assert stopped["hub_free_slots"][30:45].mean() < as_is["hub_free_slots"][30:45].mean() - 60
    assert stopped["floor_storage_util"][30:40].mean() > 10 > as_is["floor_storage_util"].mean()


def test_held_vehicles_slow_everything(outage):
    as_is, stopped = outage
    assert as_is["hub_total_time_1min"].iloc[:120].median() < 4 < stopped["hub_total_time_1min"].iloc[:120].max()
    assert stopped["fab_over_4min"].iloc[:150].max() > 1.5 * as_is["fab_over_4min"].iloc[:150].max()
    assert stopped["hub_oht_util"][45:90].max() > 95 > as_is["hub_oht_util"].max(), "all that waited wants to leave at once"
    assert (stopped["upper_lifter_capacity"][:40] < 0.01).all()


def test_the_queue_drains_slowly(outage):
    as_is, stopped = outage
    more = stopped["hub_jobs"] - as_is["hub_jobs"]
    assert more[70] > 40, "half an hour after the repair the hub is still full"
    assert more.iloc[-60:].mean() < 0.35 * more[38], "in the end it recovers"


# like the V8 site

def test_levels_are_those_of_the_v8_site(month):
    t = month.telemetry
    middle = t[list(COLUMNS)].quantile([0.05, 0.5, 0.95])
    expected = {"hub_jobs": (170, 240), "hub_free_slots": (600, 700), "hub_queue": (1000, 1400), "hub_storage_level": (193, 210),
                "floor_storage_util": (3, 12), "hub_oht_util": (60, 95), "fab_oht_util": (60, 95), "hub_total_time_1min": (2.5, 5),
                "fab_over_4min": (10, 60)}
    assert {name: middle[name][0.5] for name, (low, high) in expected.items() if not low <= middle[name][0.5] <= high} == {}
    assert 200 <= (t["hub_commands"] + t["upper_to_hub_commands"]).median() <= 260
    assert middle["hub_free_slots"][0.05] < 590 < 610 < middle["hub_free_slots"][0.5]
    assert t["hub_free_slots"].min() < 550


def events(jobs, level, min_duration, merge_gap):
    "First and last minute of every event."
    above = np.flatnonzero(jobs > level)
    groups = np.split(above, np.flatnonzero(np.diff(above) > merge_gap) + 1)
    return [(g[0], g[-1]) for g in groups if len(g) and g[-1] - g[0] + 1 >= min_duration]


def test_surges_are_rare_and_mostly_announced(month):
    site = load_site("simulated")
    jobs = month.telemetry["hub_jobs"].to_numpy()
    found = events(jobs, site.thresholds.surge_level, site.alarms.min_duration, site.alarms.merge_gap)
    assert 1 <= len(found) / 28 <= 4
    batches = month.truth[month.truth["kind"] == "unannounced-batch"]
    starts = month.telemetry["timestamp"].iloc[[begin for begin, _ in found]]
    sudden = [((batches["start"] <= at) & (batches["end"] >= at - pd.Timedelta(minutes=10))).any() for at in starts]
    assert 0 < np.mean(sudden) <= 0.2


def test_classes_and_persistence(month):
    targets = build_targets(month.telemetry, site="simulated")
    for horizon_min in (10, 15, 25):
        shares = targets[f"surge_class_{horizon_min}"].value_counts(normalize=True)
        assert 0.65 < shares[0] < 0.76 and 0.17 < shares[1] < 0.27 and 0.04 < shares[2] < 0.11
    level = targets["now"] + targets["change_avg_10"]
    r2 = 1 - (targets["change_avg_10"] ** 2).mean() / level.var()
    assert r2 > 0.9


def test_the_future_shows_in_the_columns(month):
    "Without a model: what is announced and on its way goes with what comes, and lost capacity goes with a climb."
    t = month.telemetry
    arrivals = t[IN].sum(axis=1)
    coming = arrivals.rolling(5).sum().shift(-8)
    announced = t["fab_queue_created"].rolling(5).sum()
    assert coming.corr(announced) > 0.3 > abs(coming.corr(t["hub_jobs_alt"] - t["hub_jobs"]))
    climb = t["hub_jobs"].shift(-10) - t["hub_jobs"]
    lost = (t["upper_lifter_capacity"] < 4) & (t["upper_lifter_capacity"].shift(3) < 4)
    assert climb[lost].mean() > climb.mean() + 20


# on disk, and mistakes

def test_written_and_read_again(tmp_path):
    folder = write_simulation(tmp_path / "hub", days=1.5, seed=3, scenario="sensor-faults")
    telemetry, truth = simulate(days=1.5, seed=3, scenario="sensor-faults")
    pd.testing.assert_frame_equal(read_dataset(folder), telemetry)
    pd.testing.assert_frame_equal(read_truth(folder), truth)
    write_simulation(folder, days=0.5, line="HUB2")
    assert set(read_truth(folder)["line"]) == {"HUB1", "HUB2"}
    pd.testing.assert_frame_equal(read_dataset(folder, lines="HUB1"), telemetry)


@pytest.mark.parametrize(("call", "says"), [
    (lambda: simulate(1, scenario="lifter_outage"), "use one of lifter-outage"),
    (lambda: simulate(0), "at least a minute"),
    (lambda: simulate(1, start="soon"), "write it like 2026-01-01"),
    (lambda: Simulator().run(0), "at least a minute"),
    (lambda: Simulator().fail("lifter", 5), "no such fault"),
])
def test_mistakes_are_told(call, says):
    with pytest.raises(ParameterError, match=says):
        call()


# the independent oracle

FIGURES = ["hub_jobs", "hub_oht_util", "fab_oht_util", "hub_oht_queue", "hub_total_time_1min"]
LIGHT = {"jobs_per_min": (8.0, 8.0, 8.0, 5.0), "fab_vehicles": 200}
BLOCKED = {**LIGHT, "jobs_per_min": (8.6, 8.6, 8.0, 5.0), "zone_slots": (60, 60, 60), "lifter_per_min": (9.0, 9.0, 26.0), "port_carriers": 4}


WARM_UP_MIN = 360  # of the compiled simulator; the other one gets the same


def compared(numbers: dict, replications: int, minutes: int):
    "Means of both models of one hub, and the standard error of their difference, from Friday 09:00 of the site on."
    hub, friday_9 = plain(**numbers), 4 * 1440 + 9 * 60
    slow = pd.DataFrame([SimpyHub(hub, seed, friday_9 - WARM_UP_MIN).run(WARM_UP_MIN, minutes) for seed in range(replications)])
    fast = pd.DataFrame([Simulator(seed, hub=hub, start="2026-01-02").run(minutes)[FIGURES].mean() for seed in range(4 * replications)])
    return slow[FIGURES].mean(), fast.mean(), np.hypot(slow[FIGURES].sem(), fast.sem())


@pytest.mark.parametrize("numbers", [LIGHT, BLOCKED], ids=["light", "blocked"])
def test_simpy_agrees(numbers):
    "Utilisations within 2 points, mean jobs at the hub within 3 %, everything within four standard errors."
    slow, fast, error = compared(numbers, replications=5, minutes=120)
    assert ((fast - slow).abs() <= 4 * error + 0.01 * slow).all(), pd.DataFrame({"simpy": slow, "kernel": fast, "error": error})
    assert abs(fast["hub_jobs"] / slow["hub_jobs"] - 1) < 0.03
    assert (fast - slow)[["hub_oht_util", "fab_oht_util"]].abs().max() < 2


@pytest.mark.full
def test_simpy_agrees_closely_over_many_replications():
    slow, fast, error = compared(BLOCKED, replications=24, minutes=480)
    assert ((fast - slow).abs() <= 3 * error).all(), pd.DataFrame({"simpy": slow, "kernel": fast, "error": error})
