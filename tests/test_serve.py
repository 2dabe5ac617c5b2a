"""The desk: every answer says where it comes from, equals the offline one, and comes whatever is wrong."""

import json
from datetime import timedelta

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import SITE, Clock, labelled, make_desk, small_package, window_at

from amhs.deployment import assign, deploy, deployment_history, package_folder, read_deployment, rollback
from amhs.evaluate import alarm_score
from amhs.features import build_features
from amhs.inference import AlarmPolicy, load_package
from amhs.messages import Answer, Observation
from amhs.model import load_model, surge_class
from amhs.rules import apply_rules, hybrid_score, load_rules
from amhs.serve import History, Refused, Serving, carried, class_of, minute_of, model_score, moment_of, prediction_row, read_inputs, trial_table
from amhs.telemetry import COLUMNS, fill_gaps


@pytest.fixture(scope="module")
def data():
    return labelled(days=3)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return [small_package(tmp_path_factory), small_package(tmp_path_factory, number=2, trees=5)]


@pytest.fixture
def clock(data):
    return Clock(data.telemetry["timestamp"].iloc[-1].to_pydatetime())


@pytest.fixture
def desk(packages, clock, tmp_path):
    return make_desk(tmp_path, packages[:1], clock=clock)


def level(answer, horizon, target):
    return getattr(next(h for h in answer.horizons if h.horizon_min == horizon), target).level


# --- the same answer as offline ---


def test_a_long_window_is_answered_as_offline_to_the_rounding(desk, data, packages):
    package = load_package(packages[0])
    end = len(data.telemetry) - 100
    features = build_features(data.telemetry.iloc[: end + 1], package.feature_set, SITE).iloc[[-1]]
    offline = load_model(packages[0] / "model").predict(features).iloc[0]
    answer = desk.predict(window_at(data.telemetry, end, minutes=end + 1))
    assert answer.model == package.version and answer.source == "hybrid" and answer.notes == []
    for h in package.horizons:
        for target in ("min", "avg", "max"):
            assert level(answer, h, target) == pytest.approx(offline["now"] + offline[f"change_{target}_{h}"], abs=0.0051)
        found = next(x for x in answer.horizons if x.horizon_min == h)
        assert [found.surge.flat, found.surge.slight, found.surge.surge] == pytest.approx(
            [offline[f"prob_{c}_{h}"] for c in ("flat", "slight", "surge")], abs=5.1e-5)
        assert found.max.low <= found.max.high


def test_classes_and_alarms_are_those_of_the_evaluation(desk, data, packages):
    package = load_package(packages[0])
    features = build_features(data.telemetry, package.feature_set, SITE).iloc[-300:]
    forecast = load_model(packages[0] / "model").predict(features)
    rows = package.forecasts(features[list(package.engine.features)].to_numpy())
    known = alarm_score(forecast, SITE).to_numpy()
    assert np.array([model_score(package, row) for row in rows]) == pytest.approx(known, abs=1e-3)
    for i, h in enumerate(package.horizons):
        decided = [class_of(row[4 + 6 * i : 7 + 6 * i].astype("float64"), np.array(package.facts["class_shares"].get(str(h)) or [1.0] * 3)) for row in rows]
        assert decided == surge_class(forecast, h).tolist() == package.surge_class(rows)[:, i].tolist()


@pytest.mark.parametrize("hybrid", ["model", "rules", "shadow", "rules_first", "corrected"])
def test_alarms_follow_the_lines_pattern_as_in_the_evaluation(packages, clock, data, tmp_path, hybrid):
    desk = make_desk(tmp_path, packages[:1], clock=clock, hybrid=hybrid)
    package = load_package(packages[0])
    ends = range(300, len(data.telemetry), 499)
    found = apply_rules(data.telemetry, package.rules)
    for end in ends:
        answer = desk.predict(window_at(data.telemetry, end))
        said = package.forecast(package.features(data.telemetry[list(package.kernel.columns)].to_numpy().T[:, end - 29 : end + 1].copy(), minute_of(answer.at)))
        index = found.index[[end]]
        expected = hybrid_score(pd.Series([model_score(package, said)], index), found, hybrid)
        assert answer.alarm.on == bool(expected["score"].iloc[0] >= package.alarm_of("HUB1").threshold)
        assert answer.alarm.by == expected["by"].iloc[0]
        assert ", ".join(answer.alarm.rules) == found["fired"].iloc[end]
        assert answer.source == ("rules" if hybrid in ("rules", "shadow") else "model" if hybrid == "model" else "hybrid")


def test_a_day_observed_minute_by_minute_is_forecast_as_offline(packages, clock, data, tmp_path):
    desk, package = make_desk(tmp_path, packages[:1], clock=clock), load_package(packages[0])
    lost = {500, 501, 700, 701, 702, 703, 704, 900}  # minutes that never come: short holes are closed, a long one is open
    rows = data.telemetry.iloc[400:1000]
    rows = rows[~rows.index.isin(lost)].reset_index(drop=True)
    offline = load_model(packages[0] / "model").predict(build_features(rows, package.feature_set, SITE))
    compared = 0
    for row in rows.itertuples():
        clock.at(row.timestamp)
        record = desk.take_row(Observation(line="HUB1", timestamp=row.timestamp.to_pydatetime(), values={c: getattr(row, c) for c in COLUMNS}))
        desk.store.write("observations", [record])
        answer = desk.answer(desk.newest_task(desk.line("HUB1")))
        if (row.line, row.timestamp) in offline.index:
            known = offline.loc[(row.line, row.timestamp)]
            assert answer.notes == [] and answer.source == "hybrid"
            for h in package.horizons:
                assert level(answer, h, "max") == pytest.approx(known["now"] + known[f"change_max_{h}"], abs=0.0051)
            compared += 1
        else:
            assert answer.source == "rules" and ("hole" in answer.notes[0])
    assert compared == len(offline) - 3 > 450  # offline also forecasts the three minutes that were closed


# --- histories ---


rows_of = st.lists(st.tuples(st.integers(0, 40), st.sampled_from([1.0, 2.0, 3.0, float("nan")])), min_size=1, max_size=60, unique_by=lambda r: r[0])


@given(rows_of, st.randoms(use_true_random=False))
def test_rows_in_any_order_end_up_as_the_table_filled(rows, random):
    history = History(memory_min=64, limit_min=SITE.gaps.fill_up_to_min)
    newest = max(minute for minute, _ in rows)
    random.shuffle(rows)
    for minute, value in rows:
        history.put(1000 + minute, np.array([value, *[5.0] * (len(COLUMNS) - 1)], np.float32))
    table = pd.DataFrame(sorted(rows), columns=["minute", "hub_jobs"])
    frame = pd.DataFrame({"line": "A", "timestamp": pd.to_datetime((1000 + table["minute"]) * 60, unit="s", utc=True).astype("datetime64[us, UTC]"),
                          "hub_jobs": table["hub_jobs"].astype("float32"), "hub_queue": np.float32(5)})
    filled = fill_gaps(frame, SITE)
    minutes = filled["timestamp"].astype("int64").to_numpy() // 60_000_000
    for column in ("hub_jobs", "hub_queue"):
        kept = history.filled[COLUMNS.index(column), history.end - (1000 + newest - minutes)]
        assert np.array_equal(kept, filled[column].to_numpy(), equal_nan=True)
    assert history.there.sum() == len(filled) and history.newest == 1000 + newest


@given(st.lists(st.sampled_from([1.0, 2.0, float("nan")]), min_size=1, max_size=40))
def test_a_window_is_carried_as_the_table_is_filled(values):
    frame = pd.DataFrame({"line": "A", "timestamp": pd.date_range("2026-01-01", periods=len(values), freq="min", tz="UTC").astype("datetime64[us, UTC]"),
                          "hub_jobs": np.array(values, "float32")})
    mine = carried(np.array([values], "float32"), SITE.gaps.fill_up_to_min)[0]
    assert np.array_equal(mine, fill_gaps(frame, SITE)["hub_jobs"].to_numpy(), equal_nan=True)


def test_a_buffer_that_is_full_goes_on():
    history = History(memory_min=40, limit_min=3)
    for minute in range(500):
        history.put(minute, np.full(len(COLUMNS), minute, np.float32))
    assert history.filled[0, history.end - 39 : history.end + 1].tolist() == list(range(460, 500)) and history.usable()


def test_another_workers_rows_come_from_the_store(packages, clock, data, tmp_path):
    one, other = (make_desk(tmp_path, packages[:1], clock=clock) for _ in range(2))
    rows = data.telemetry.iloc[:200]
    for i, row in enumerate(rows.itertuples()):
        clock.at(row.timestamp)
        desk = (one, other)[i % 2]
        record = desk.take_row(Observation(line="HUB1", timestamp=row.timestamp.to_pydatetime(), values={c: getattr(row, c) for c in COLUMNS}))
        desk.store.write("observations", [record])
        desk.remember(desk.line("HUB1"))
    for desk in (one, other):
        history = desk.remember(desk.line("HUB1"))
        assert np.array_equal(history.raw[:, history.end - 199 : history.end + 1].T, rows[list(COLUMNS)].to_numpy())


# --- never without an answer ---


def test_what_is_wrong_is_said_and_answered_by_rules(desk, data):
    end, telemetry = 2000, data.telemetry
    hole = [list(r) for r in window_at(telemetry, end).rows]
    for i in range(10, 16):
        hole[i] = [None] * len(COLUMNS)
    few = [c for c in COLUMNS if c != "hub_queue"]
    lacking = [[r[COLUMNS.index(c)] for c in few] for r in window_at(telemetry, end).rows]
    for changes, said in [({"rows": window_at(telemetry, end).rows[-29:]}, "29 minutes"), ({"rows": hole}, "hole"),
                          ({"columns": few, "rows": lacking}, "columns missing: hub_queue"), ({"replay": False}, "min old")]:
        answer = desk.predict(window_at(telemetry, end, **changes))
        assert answer.source == "rules" and said in answer.notes[0]
        assert level(answer, 10, "max") == answer.now == telemetry["hub_jobs"].iloc[end]
        low, high = answer.horizons[0].max.low, answer.horizons[0].max.high
        assert low <= high and high > answer.now
        assert answer.alarm.by == "rules" and answer.alarm.score is None


def without_level(telemetry, end):
    window = window_at(telemetry, end)
    window.rows[-5:] = [[None, *row[1:]] for row in window.rows[-5:]]
    return window


def test_without_the_level_the_last_good_forecast_answers_with_its_age(desk, data, clock):
    clock.at(data.telemetry["timestamp"].iloc[2000])
    good = desk.predict(window_at(data.telemetry, 2000))
    desk.predict(window_at(data.telemetry, 1000))  # an old window, asked again: no forecast about now
    answer = desk.predict(without_level(data.telemetry, 2007))
    assert answer.source == "cache" and answer.age_min == 7 and answer.horizons == good.horizons and answer.id != good.id
    assert "hub_jobs" in answer.notes[0]


def test_the_last_good_forecast_is_known_after_a_restart(desk, packages, data, clock, tmp_path):
    clock.at(data.telemetry["timestamp"].iloc[2000])
    good = desk.predict(window_at(data.telemetry, 2000))
    desk.store.write("predictions", [prediction_row(good, msgspec.json.encode(good))])
    again = make_desk(tmp_path, packages[:1], clock=clock)
    answer = again.predict(without_level(data.telemetry, 2003))
    assert answer.source == "cache" and answer.age_min == 3 and answer.horizons == good.horizons


def test_an_alarm_ends_later_than_it_began_whichever_worker_answers(desk, packages, data, clock, tmp_path):
    def observed(at_desk, minute):
        row = data.telemetry.iloc[minute]
        clock.at(row["timestamp"])
        values = {c: float(row[c]) for c in COLUMNS if row[c] == row[c]}
        record = at_desk.take_row(Observation(line="HUB1", timestamp=row["timestamp"].to_pydatetime(), values=values))
        at_desk.store.write("observations", [record])
        answer = at_desk.answer(at_desk.newest_task(at_desk.line("HUB1")))
        at_desk.store.write("predictions", [prediction_row(answer, msgspec.json.encode(answer))])
        return answer

    other = make_desk(tmp_path, packages[:1], clock=clock)
    threshold = float(data.telemetry["hub_jobs"].iloc[2000:2200].median())
    for at_desk in (desk, other):
        assign("HUB1", at_desk.folder, hybrid="model")
        at_desk.refresh()
        package = at_desk.line("HUB1").packages["live"]
        package.alarms = {"": AlarmPolicy(threshold, 15.0, 1.0)}
    answers = [observed((desk, other)[i % 2], 2000 + i) for i in range(200)]
    before = False
    for i, answer in enumerate(answers):
        limit = threshold - (15.0 if before else 0.0)
        assert answer.alarm.threshold == pytest.approx(limit), i
        before = answer.alarm.on
    assert len({a.alarm.threshold for a in answers}) == 2  # both cases were seen


def test_with_nothing_at_all_the_request_is_refused(desk, data):
    window = window_at(data.telemetry, 2000)
    window.rows[-5:] = [[None] * len(COLUMNS)] * 5
    with pytest.raises(Refused, match="nothing to answer from") as e:
        desk.predict(window)
    assert e.value.status == 422


def test_a_failing_model_leaves_the_answer_to_the_rules_and_rests(desk, data, clock):
    line, window = desk.line("HUB1"), window_at(data.telemetry, 2000)
    package, asked = line.packages["live"], []

    class Broken:
        def __getattr__(self, name):
            return getattr(package, name)

        def forecast(self, x):
            asked.append(1)
            raise MemoryError("no room")

    line.packages = {"live": Broken()}
    for _ in range(desk.serving.trips + 3):
        answer = desk.predict(window)
        assert answer.source == "rules" and answer.notes
    assert len(asked) == desk.serving.trips and "rests" in answer.notes[0]
    line.packages = {"live": package}
    clock.now += desk.serving.rest_s + 1
    assert desk.predict(window).source == "hybrid" and line.failures == 0


def test_a_forecast_that_is_no_number_is_a_failure(desk, data, monkeypatch):
    package = desk.line("HUB1").packages["live"]
    monkeypatch.setattr(package, "forecast", lambda x: np.full(19, np.nan, np.float32))
    answer = desk.predict(window_at(data.telemetry, 2000))
    assert answer.source == "rules" and "not a number" in answer.notes[0]
    json.loads(msgspec.json.encode(answer))


# --- what is refused ---


@pytest.mark.parametrize(("changes", "status", "said"), [
    ({"line": "HUB7"}, 404, "no such line"), ({"columns": ["hub_job"], "rows": [[1.0]] * 30}, 422, "did you mean hub_jobs"),
    ({"columns": ["hub_jobs", "hub_jobs"], "rows": [[1.0, 1.0]] * 30}, 422, "named twice"),
    ({"columns": ["hub_jobs"], "rows": [[1.0]] * 29 + [[1.0, 2.0]]}, 422, "every row needs 1"),
    ({"columns": ["hub_jobs"], "rows": [[]] * 30}, 422, "every row needs 1"),
    ({"columns": ["hub_jobs"], "rows": [[1e8]] * 30}, 422, "beyond"), ({"columns": ["hub_jobs"], "rows": [[-1e300]] * 30}, 422, "beyond")])
def test_requests_that_make_no_sense_are_refused_with_a_sentence(desk, data, changes, status, said):
    with pytest.raises(Refused, match=said) as e:
        desk.predict(window_at(data.telemetry, 2000, **changes))
    assert e.value.status == status


# --- rows ---


def test_what_becomes_of_rows(desk, data, clock):
    telemetry = data.telemetry

    def send(i, **changes):
        row = telemetry.iloc[i]
        record = desk.take_row(Observation(line="HUB1", timestamp=row["timestamp"].to_pydatetime(), values={c: float(row[c]) for c in COLUMNS} | changes))
        status = desk.row_status(record)
        desk.store.write("observations", [record])
        desk.newest_task(desk.line("HUB1"))
        return status

    clock.at(telemetry["timestamp"].iloc[200])
    said = [send(i) for i in (100, 101, 103, 102, 102)] + [send(102, hub_jobs=1.0), send(20), send(200), send(130)]
    assert said == ["new", "new", "new", "late", "duplicate", "corrected", "kept", "new", "kept"]
    assert len(desk.store.read("observations")) == 7
    with pytest.raises(Refused, match="ahead of this machine's clock"):
        send(210)
    clock.now += 86400 * 40
    with pytest.raises(Refused, match="older than 30 days"):
        send(199)


def test_nothing_observed_yet(desk):
    with pytest.raises(Refused, match="nothing was observed") as e:
        desk.newest_task(desk.line("HUB1"))
    assert e.value.status == 404


# --- deployments ---


def test_switch_and_rollback_swap_in_place(packages, clock, data, tmp_path):
    desk, window = make_desk(tmp_path, packages[:1], clock=clock), window_at(data.telemetry, 2000)
    folder = tmp_path / "deployed"
    first = desk.predict(window)
    deploy(packages[1], ["HUB1"], folder=folder, why="better")
    assert desk.changed()
    desk.refresh()
    second = desk.predict(window)
    rollback("HUB1", folder, who="kim", why="worse")
    desk.refresh()
    third = desk.predict(window)
    assert (first.model, second.model) == tuple(load_package(p).version for p in packages) and third.model == first.model
    assert level(first, 10, "max") == level(third, 10, "max") != level(second, 10, "max") and not desk.changed()
    assert deployment_history(folder)["why"].tolist() == ["", "better", "worse"]


def test_a_damaged_package_is_refused_and_the_old_one_goes_on(packages, clock, data, tmp_path):
    desk, folder = make_desk(tmp_path, packages[:1], clock=clock), tmp_path / "deployed"
    version = deploy(packages[1], ["HUB1"], folder=folder)
    (package_folder(version, folder) / "site.json").write_text("{}")
    desk.refresh()
    answer = desk.predict(window_at(data.telemetry, 2000))
    assert answer.source == "hybrid" and answer.model == load_package(packages[0]).version
    assert version in desk.errors and "damaged" in desk.errors[version]


def test_one_lines_broken_model_does_not_hurt_another(packages, clock, data, tmp_path):
    folder = tmp_path / "deployed"
    make_desk(tmp_path, packages, clock=clock)
    other = deploy(packages[0], ["HUB2"], folder=folder)
    assign("HUB3", folder, hybrid="rules", why="new line")
    (package_folder(other, folder) / "package.json").write_text("broken")
    fresh = make_desk(tmp_path, [], clock=clock)
    answers = {line: fresh.predict(window_at(data.telemetry, 2000, line=line)) for line in ("HUB1", "HUB2", "HUB3")}
    assert {line: a.source for line, a in answers.items()} == {"HUB1": "hybrid", "HUB2": "rules", "HUB3": "rules"}
    assert read_deployment(folder).lines["HUB2"].live == other


def test_a_canary_answers_its_share_and_a_shadow_only_listens(packages, clock, data, tmp_path):
    desk, folder = make_desk(tmp_path, packages[:1], clock=clock), tmp_path / "deployed"
    deploy(packages[1], ["HUB1"], "canary", folder, canary_share=0.3)
    desk.refresh()
    told = [desk.predict(window_at(data.telemetry, end)) for end in range(1000, 1300)]
    assert 0.2 < np.mean([a.role == "canary" for a in told]) < 0.4
    assert {a.role: a.model for a in told} == {"live": load_package(packages[0]).version, "canary": load_package(packages[1]).version}
    assert [a.role for a in told] == [desk.predict(window_at(data.telemetry, end)).role for end in range(1000, 1300)]
    assign("HUB1", folder, canary="", shadow=load_package(packages[1]).version)
    desk.refresh()
    rows = []
    for end in range(1000, 1040):
        task = desk.take_window(window_at(data.telemetry, end))
        both = desk.answer(task), desk.shadow(task)
        assert [a.role for a in both] == ["live", "shadow"] and both[0].at == both[1].at
        rows += [prediction_row(a, msgspec.json.encode(a)) for a in both]
    desk.store.write("predictions", rows)
    table = trial_table(desk.store.read("predictions")).iloc[0]
    assert table["minutes"] == 40 and table["apart_max_10"] > 0 and 0 <= table["same_alarm"] <= 1


def test_a_line_without_a_package_is_answered_by_rules(packages, clock, data, tmp_path):
    assign("HUB9", tmp_path / "deployed", hybrid="rules", why="no history yet")
    desk = make_desk(tmp_path, [], clock=clock)
    answer = desk.predict(window_at(data.telemetry, 2000, line="HUB9"))
    assert answer.source == "rules" and answer.model == "" and answer.notes == []
    assert answer.horizons[0].max.low is None and [h.horizon_min for h in answer.horizons] == [10, 15, 25]


# --- what is kept ---


def test_a_kept_window_comes_back_as_it_was(desk, data):
    window = window_at(data.telemetry, 2000)
    window.rows[3][4] = None
    task = desk.take_window(window)
    back = read_inputs(task.inputs)
    assert back["columns"] == window.columns and back["rows"][3][4] is None
    assert desk.predict(window_at(data.telemetry, 2000, **back)).horizons == desk.predict(window).horizons


def test_an_alarm_names_its_reasons(packages, clock, data, tmp_path):
    desk = make_desk(tmp_path, packages[:1], clock=clock, hybrid="model", serving=Serving(reasons=4))
    highest = int(data.telemetry["hub_jobs"].iloc[200:].where(data.telemetry["hub_jobs"] <= 280).idxmax())
    package = desk.line("HUB1").packages["live"]
    package.alarms = {"": AlarmPolicy(150.0, 0.0, 1.0)}
    answer = desk.predict(window_at(data.telemetry, highest))
    assert answer.alarm.on and answer.alarm.by == "model" and answer.alarm.score >= 150
    assert 1 <= len(answer.alarm.reasons) <= 4 and all(r.feature in package.engine.features for r in answer.alarm.reasons)
    sizes = [abs(r.jobs) for r in answer.alarm.reasons]
    assert sizes == sorted(sizes, reverse=True)
    assert 1 <= len(answer.alarm.causes) <= 4 and all(c.sentence and c.sentence_ko for c in answer.alarm.causes)
    assert all(c.since is None or c.since <= answer.at for c in answer.alarm.causes)
    assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer
    assert make_desk(tmp_path / "none", packages[:1], clock=clock, serving=Serving(reasons=0)).predict(window_at(data.telemetry, highest)).alarm.causes == []


def test_an_answer_says_until_when_it_may_be_used(desk, data):
    answer = desk.predict(window_at(data.telemetry, 2000))
    assert answer.valid_until - answer.at == timedelta(minutes=desk.serving.stale_after_min) and moment_of(minute_of(answer.at)) == answer.at
    assert msgspec.json.decode(msgspec.json.encode(answer), type=Answer) == answer


def test_the_rules_of_a_package_are_those_of_its_site(packages):
    assert load_package(packages[0]).rules.columns == load_rules(site=SITE).columns
