"""Causes in operators' words: who gets which contribution, who is named first, since when, in which sentence, and whether it is true."""

import re

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import SITE, Clock, make_desk, small_package, window_at

from amhs.causes import FULL_SPREADS, LEAST_SCORE, Cause, Namer, fault_alarms, load_causes, make_namer, named_first, say, share_out, usual_kept, usual_of
from amhs.config import Site, load_site
from amhs.core import InputError, ParameterError
from amhs.features import compile_features
from amhs.inference import AlarmPolicy
from amhs.serve import Serving
from amhs.simulate import FAULTS, Simulator, simulate
from amhs.telemetry import COLUMNS

TABLE = load_causes()
FEATURES = compile_features("hub").features
NAMES = list(TABLE.causes)
USUAL = dict.fromkeys(COLUMNS, (100.0, 10.0))
NOW = 29_000_000
NAMER = Namer(TABLE, FEATURES, COLUMNS, USUAL)


def quiet(minutes=60) -> np.ndarray:
    "A window in which everything is as usual; levels move a little, so that nothing stands."
    return np.full((len(COLUMNS), minutes), 100.0, "float32") + 0.01 * (np.arange(minutes) % 2)


def step(column: str, value: float, since: int, minutes=60) -> np.ndarray:
    "A window in which a column has another value for so many minutes."
    window = quiet(minutes)
    window[COLUMNS.index(column), minutes - since :] = value
    return window


def booked(**jobs: float) -> np.ndarray:
    return np.array([jobs.get(f.name, 0.0) for f in FEATURES])


# --- contributions ---


@pytest.mark.parametrize("feature_set", ["hub", "v8"])
def test_contributions_are_shared_out_once(feature_set):
    shares = share_out(compile_features(feature_set).features, TABLE)
    assert (shares >= 0).all() and (shares.sum(axis=0) <= 1 + 1e-9).all()
    assert (shares.sum(axis=0) > 0.99).mean() > 0.5, "most features speak of some cause"


def test_every_fault_the_simulator_knows_is_a_cause():
    assert all(TABLE.of_fault(kind) for kind in FAULTS)
    assert TABLE.of_fault("new-route") == ""


@pytest.mark.parametrize(("change", "said"), [
    ({"signs": [{"columns": ["hub_job"], "goes": "up", "says": {"en": "", "ko": ""}}]}, "did you mean hub_jobs"),
    ({"signs": [{"columns": ["hub_jobs"], "goes": "upward", "says": {"en": "", "ko": ""}}]}, "up"),
    ({"parts": ["nobody"]}, "no such cause: nobody"), ({"weight": 2}, "weight"),
])
def test_a_table_that_makes_no_sense_is_refused(tmp_path, change, said):
    import yaml

    words = TABLE.words.model_dump()
    (tmp_path / "causes.yaml").write_text(yaml.safe_dump({"words": words, "causes": {"one": {"label": {"en": "x", "ko": "y"}} | change}}))
    with pytest.raises(ParameterError, match=said):
        load_causes(tmp_path / "causes.yaml")


# --- ranking ---

windows = st.sampled_from(["lower_lifter_capacity", "hub_oht_util", "neighbor_to_hub_jobs", "floor_storage_util"])
amounts = st.integers(0, 2**32 - 1).map(lambda seed: np.random.default_rng(seed).normal(0, 10, len(FEATURES)))


def score_of(found: list[Cause], name: str) -> float:
    return next((c.score for c in found if c.name == name), 0.0)


@given(amounts, windows, st.floats(0, 200))
def test_scores_are_in_order_and_in_bounds(contributions, column, value):
    found = NAMER(contributions, step(column, value, 10), NOW, 5)
    scores = [c.score for c in found]
    assert scores == sorted(scores, reverse=True) and all(0 < s <= 2 + 1e-9 for s in scores)
    assert len({c.name for c in found}) == len(found) <= 5 and all(s >= LEAST_SCORE for s in scores[1:])
    assert found[:2] == NAMER(contributions, step(column, value, 10), NOW, 2) or any(np.isnan(c.now) for c in found[:2])


@given(amounts, st.floats(0, 40))
def test_more_booked_on_a_cause_never_speaks_against_it(contributions, more):
    window, extra = step("lower_lifter_capacity", 80, 10), booked(lower_capacity_share=more)
    before, after = (score_of(NAMER(c, window, NOW, len(NAMES)), "lower_lifter") for c in (contributions, contributions + extra))
    assert after >= before - 1e-9


@given(st.floats(0, 100), st.floats(0, 100))
def test_further_from_usual_never_speaks_against_a_cause(a, b):
    low, high = sorted((a, b))
    near, far = (score_of(NAMER(booked(hub_queue_last=1.0), step("lower_lifter_capacity", v, 10), NOW, len(NAMES)), "lower_lifter") for v in (high, low))
    assert far >= near - 1e-9
    assert score_of(NAMER(booked(), step("lower_lifter_capacity", 100 - 10 * FULL_SPREADS, 10), NOW, 9), "lower_lifter") == pytest.approx(1)


def test_nothing_booked_and_nothing_unusual_names_nothing():
    assert NAMER(booked(), quiet(), NOW) == []


def test_the_way_matters():
    "A lifter that moves more than usual slows nobody down."
    assert score_of(NAMER(booked(), step("lower_lifter_capacity", 180, 10), NOW, 9), "lower_lifter") == 0
    assert NAMER(booked(), step("hub_jobs_alt", 60, 10), NOW)[0].name == "sensors"
    assert NAMER(booked(), step("hub_jobs_alt", 140, 10), NOW)[0].name == "sensors"


def test_a_part_that_stands_out_takes_over_from_the_whole():
    rise = booked(hub_commands_last=20.0)
    window = quiet()
    for side in ("upper", "lower", "neighbor"):
        window[COLUMNS.index(f"{side}_to_hub_jobs"), -10:] = 130
    assert NAMER(rise, window, NOW)[0].name == "inflow"
    assert NAMER(rise, step("neighbor_to_hub_jobs", 150, 10), NOW)[0].name == "inflow_neighbor"


def test_without_what_is_usual_contributions_decide():
    namer = Namer(TABLE, FEATURES, COLUMNS, {})
    found = namer(booked(lower_capacity=3.0, hub_oht_util_last=9.0), step("lower_lifter_capacity", 0, 10), NOW)
    assert [c.name for c in found] == ["hub_vehicles", "lower_lifter"] and all(c.sign is None for c in found)


def test_a_site_with_few_columns_and_holes_is_served():
    site = load_site("nycflights")
    columns = [c for c in COLUMNS if c in site.columns]
    features = [f.name for f in compile_features("hub", columns, site).features]
    namer = make_namer("hub", features, columns, site, dict.fromkeys(columns, (10.0, 2.0)))
    window = np.full((len(columns), 40), 10.0, "float32")
    window[columns.index("upper_to_hub_jobs"), -10:] = 30
    window[:, -3] = np.nan
    assert namer(np.zeros(len(features)), window, NOW)[0].name == "inflow_upper"
    assert namer(np.zeros(len(features)), np.full_like(window, np.nan), NOW) == []


# --- since when ---


@given(windows, st.integers(5, 59))
def test_a_step_began_when_it_did(column, since):
    value = 10.0 if column == "lower_lifter_capacity" else 190.0
    found = NAMER(booked(), step(column, value, since), NOW)[0]
    assert found.since == NOW - since + 1 and found.now == pytest.approx(value) and found.usual == pytest.approx(100)


@given(st.integers(5, 58))
def test_a_stocker_stands_since_its_last_move(since):
    found = NAMER(booked(), step("hub_storage_level", 100.5, since), NOW)
    assert [c.since for c in found if c.name == "stocker"] in ([], [NOW - since + 1])
    assert since < 6 or found[0].name == "stocker"


def test_what_began_before_the_window_is_told_as_older():
    found = NAMER(booked(), step("lower_lifter_capacity", 10, 60), NOW)[0]
    assert found.since is None and "for over 60 min" in say(found, TABLE) and "60분" in say(found, TABLE, lang="ko")


# --- sentences ---

SIGNS = [(name, sign) for name, kind in TABLE.causes.items() for sign in kind.signs]


@pytest.mark.parametrize(("name", "sign"), SIGNS, ids=[f"{n}-{s.goes}-{s.columns[0]}" for n, s in SIGNS])
@pytest.mark.parametrize("lang", ["en", "ko"])
def test_every_sign_has_a_sentence(name, sign, lang):
    said = say(Cause(name, 4.2, 0.7, sign, 12.3, 45.6, NOW, 480), TABLE, "Asia/Seoul", lang)
    assert "12" in said and not re.search(r"[{}]|nan", said) and bool(re.search("[가-힣]", said)) == (lang == "ko")
    assert "06:20" in said, "the site's clock"


@pytest.mark.parametrize("lang", ["en", "ko"])
def test_a_cause_with_nothing_to_see_is_told_by_its_contribution(lang):
    for name, kind in TABLE.causes.items():
        said = say(Cause(name, 4.2, 0.7), TABLE, lang=lang)
        assert "+4" in said and getattr(kind.label, lang) in said


def test_what_is_usual_is_the_same_from_rows_and_from_quantiles():
    rows = simulate(1, seed=3).telemetry
    kept = usual_kept({c: {"quantiles": np.quantile(rows[c], np.linspace(0, 1, 41))} for c in COLUMNS})
    for column, usual in usual_of(rows).items():
        assert kept[column] == pytest.approx(usual, abs=1e-4)


# --- true? ---

AT, MINUTE = pd.Timestamp("2026-01-02 10:00", tz="UTC"), pd.Timedelta(minutes=1)


def alarms_for(*faults: tuple[str, int, int], caught=True, begins=(12,)) -> pd.DataFrame:
    "An event at 10:00, announced so many minutes before; faults by kind, and minutes before the event at which they begin and end."
    site = Site(name="toy", time={"column": "t", "format": "ISO8601"}, columns={})
    events = pd.DataFrame({"line": ["HUB1"], "start": [AT], "caught": [caught]})
    episodes = pd.DataFrame({"line": "HUB1", "start": [AT - b * MINUTE for b in begins]})
    truth = pd.DataFrame([("HUB1", k, AT - b * MINUTE, AT - e * MINUTE) for k, b, e in faults], columns=["line", "kind", "start", "end"])
    return fault_alarms(events, episodes, truth, site)


def test_an_alarm_is_of_the_faults_that_were_at_work():
    found = alarms_for(("crane-failure", 11, 0), ("release-wave", 12, 5), ("hub-rail-jam", 60, 41), ("fab-rail-jam", 90, 43), begins=(40, 12, 3))
    assert found["alarm"].tolist() == [AT - 12 * MINUTE], "the first that could have announced it"
    assert found["kinds"].tolist() == [("hub-rail-jam", "release-wave")]
    assert alarms_for(("release-wave", 20, 0), caught=False).empty


def test_the_right_cause_first_counts():
    alarms = pd.concat([alarms_for(("release-wave", 20, 0)), alarms_for(("release-wave", 30, 0), ("crane-failure", 20, 0)), alarms_for(),
                        alarms_for(("new-route", 99, 0))], ignore_index=True)
    found = named_first(alarms, ["stocker", "stocker", "inflow", ""], TABLE)
    assert found[["events", "right"]].to_dict("index") == {"release-wave": {"events": 2, "right": 1}, "all": {"events": 2, "right": 1}}
    assert 0 < found.loc["all", "low"] < found.loc["all", "share"] == 0.5 < found.loc["all", "high"] < 1
    assert named_first(alarms_for(), [""], TABLE).loc["all", "events"] == 0
    with pytest.raises(InputError, match="one name per alarm"):
        named_first(alarms, ["stocker"], TABLE)


# --- in the service ---


@pytest.fixture(scope="module")
def busy_desk(tmp_path_factory):
    home = tmp_path_factory.mktemp("causes")
    desk = make_desk(home, [small_package(tmp_path_factory)], clock=Clock(pd.Timestamp("2026-01-05", tz="UTC")), hybrid="model", serving=Serving(reasons=3))
    package = desk.line("HUB1").packages["live"]
    alarms, package.alarms = package.alarms, {"": AlarmPolicy(0.0, 0.0, 1.0)}  # every minute is an alarm
    yield desk
    package.alarms = alarms


@pytest.mark.parametrize(("kind", "cause", "severity", "after"), [
    ("lower-lifter-failure", "lower_lifter", 0.9, 10), ("upper-lifter-throttled", "upper_lifter", 0.4, 10), ("crane-failure", "stocker", 1.0, 25)])
def test_a_planted_fault_is_named_first(busy_desk, kind, cause, severity, after):
    sim = Simulator(seed=6)
    before = sim.run(700)
    sim.fail(kind, 60, severity)
    rows = pd.concat([before, sim.run(after)], ignore_index=True)
    answer = busy_desk.predict(window_at(rows, len(rows) - 1, minutes=300))
    assert answer.alarm.on and answer.alarm.by == "model"
    first = answer.alarm.causes[0]
    assert first.group == cause
    assert abs((first.since - rows["timestamp"].iloc[700]).total_seconds()) <= (0 if "lifter" in kind else 180)
    assert f"{first.since.astimezone(tz=pd.Timestamp.now(SITE.timezone).tzinfo):%H:%M}" in first.sentence and re.search("[가-힣]", first.sentence_ko)
    assert len(answer.alarm.causes) <= 3 and len(answer.alarm.reasons) == 3
