"""Monitoring: outcomes joined, drift seen and noise not, sensors told from models, on the simulated hub."""

import json
from datetime import timedelta

import msgspec
import numpy as np
import pandas as pd
import pytest
from served import SITE, labelled, make_package

from amhs import monitor, runs
from amhs.config import load_params
from amhs.core import InputError, ModelError, read_json, write_json
from amhs.deployment import deploy
from amhs.evaluate import interval_bounds
from amhs.inference import load_package
from amhs.messages import Answer
from amhs.model import alarm_level
from amhs.offline import score_rows
from amhs.simulate import simulate
from amhs.store import observation_rows, open_store, telemetry_of
from amhs.targets import build_targets

PARAMS = load_params("monitor", "smoke")
DAYS = 14  # the model learnt from and was tested on; scenarios change at once after them
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    home = tmp_path_factory.mktemp("monitor")
    packed = make_package(home, labelled(DAYS, seed=11), trees=8)
    return {"home": home, "packed": packed, "package": load_package(packed)}


@pytest.fixture(scope="module")
def start():
    return pd.Timestamp("2026-01-01T00:00Z").to_pydatetime()


def operated(folder, package, telemetry, first=DAYS - 0.5, last=DAYS + 1, now=None):
    "A store that observed some days of telemetry and answered for them; outcomes are joined."
    begin = telemetry["timestamp"].iloc[0]
    part = telemetry[telemetry["timestamp"].between(begin + first * DAY, begin + last * DAY + timedelta(hours=1), inclusive="left")].reset_index(drop=True)
    store, now = open_store(folder / "store.sqlite"), now or part["timestamp"].iloc[-1].to_pydatetime()
    monitor.keep_answers(store, package, part, now)
    monitor.join_outcomes(store, {"HUB1": SITE}, part["timestamp"].iloc[0].to_pydatetime(), now, now)
    return store


@pytest.fixture(scope="module")
def clean(made, tmp_path_factory):
    telemetry = simulate(DAYS + 3, seed=11).telemetry
    return telemetry, operated(tmp_path_factory.mktemp("clean"), made["package"], telemetry, last=DAYS + 2)


def checked(store, package, start, day=DAYS, **changes):
    since = start + day * DAY
    return monitor.check_line(store, package, "HUB1", since, since + DAY, PARAMS.model_copy(update=changes), since + 2 * DAY)


def loud(check, *kinds):
    table = check.findings[check.findings["severity"] != "info"]
    return table[table["kind"].isin(kinds)] if kinds else table


def test_outcomes_are_the_targets_and_are_joined_once(clean, start):
    telemetry, store = clean
    since, until = start + DAYS * DAY, start + (DAYS + 1) * DAY
    assert monitor.join_outcomes(store, {"HUB1": SITE}, since, until, until + DAY) == 0, "they are there"
    known = build_targets(telemetry, site=SITE)
    found = monitor.outcome_table(store, "HUB1", since, until)
    pd.testing.assert_frame_equal(found, known.loc[found.index].drop(columns="event_in"), atol=1e-3, check_index_type=False)
    assert len(found) == 1440


def test_only_horizons_that_have_passed_are_joined(clean, tmp_path, start):
    telemetry, _ = clean
    store = open_store(tmp_path / "store.sqlite")
    store.write("observations", observation_rows(telemetry.head(200), start))
    now = start + timedelta(minutes=60)
    assert monitor.join_outcomes(store, {"HUB1": SITE}, start, start + DAY, now) == 51 + 46 + 36
    assert monitor.join_outcomes(store, {"HUB1": SITE}, start, start + DAY, now + timedelta(minutes=1)) == 3, "one more of each"
    rows = store.read("outcomes")
    assert (rows["minute"] + rows["horizon_min"]).max() == int(now.timestamp() // 60) + 1


def test_late_and_corrected_telemetry_is_joined_again(clean, tmp_path, start):
    telemetry, _ = clean
    rows = telemetry.head(120)
    late, corrected = rows.iloc[[60]], rows.iloc[[90]].assign(hub_jobs=999.0)
    store, sites, now = open_store(tmp_path / "store.sqlite"), {"HUB1": SITE}, start + DAY
    store.write("observations", observation_rows(rows.drop(index=60), start))
    monitor.join_outcomes(store, sites, start, now, now)
    store.write("observations", observation_rows(late, start))
    assert monitor.join_outcomes(store, sites, start, now, now) == 10 + 15 + 25 + 3, "those before the minute, and its own"
    store.write("observations", observation_rows(corrected, start))
    assert monitor.join_outcomes(store, sites, start, now, now) >= 10 + 15 + 25
    assert store.read("outcomes", horizon_min=10)["level_max"].max() == 999
    store.write("observations", observation_rows(corrected.assign(hub_jobs=np.nan), start))
    monitor.join_outcomes(store, sites, start, now, now)
    assert store.read("outcomes", horizon_min=10)["level_max"].isna().sum() >= 10, "no longer known"
    assert monitor.join_outcomes(store, sites, start, now, now) == 0


def test_outcomes_outlive_their_observations(clean, tmp_path, start):
    telemetry, _ = clean
    store, now = open_store(tmp_path / "store.sqlite"), start + DAY
    store.write("observations", observation_rows(telemetry.head(300), start))
    monitor.join_outcomes(store, {"HUB1": SITE}, start, now, now)
    store.expire(start + timedelta(minutes=150), {"observations": 0})
    assert monitor.join_outcomes(store, {"HUB1": SITE}, start, now, now) == 0
    assert store.read("outcomes", horizon_min=10)["level_max"].notna().sum() == 290


def test_kept_forecasts_are_what_was_said(made, clean, start):
    telemetry, store = clean
    since, until = start + DAYS * DAY, start + (DAYS + 1) * DAY
    found = monitor.kept_forecasts(store, "HUB1", since, until)
    part = telemetry[telemetry["timestamp"] >= start + (DAYS - 0.5) * DAY].reset_index(drop=True)
    said = score_rows(made["package"], part).loc[found.index]
    told = [c for c in made["package"].columns if not c.startswith("spread") and c != "alarm_change"]
    quiet = said["now"] <= SITE.thresholds.surge_level
    assert np.abs(found["score"] - alarm_level(said))[quiet].max() < 0.011, "alarms were decided by this level"
    assert np.abs(found[told] - said[told]).max().max() < 0.011, "levels are told to a hundredth"
    bounds = interval_bounds(said, made["package"].intervals.model).clip(lower=-said["now"], axis=0)
    assert np.abs(found[bounds.columns] - bounds).max().max() < 0.011, "and so are their bounds, none below an empty hub"
    assert (found["alarm"] == said["alarm"]).all() and set(found["source"]) == {"hybrid"}


def test_the_last_word_counts_and_the_cache_does_not(clean, tmp_path, start):
    _, store = clean
    row = store.read("predictions", "HUB1", limit=1).iloc[0].to_dict()
    other, answer = open_store(tmp_path / "store.sqlite"), msgspec.json.decode(row["answer"], type=Answer)
    for name, source, later, level in (("one", "hybrid", 0, 100.0), ("two", "hybrid", 1, 200.0), ("three", "cache", 2, 300.0)):
        told = msgspec.structs.replace(answer, id=name, source=source, now=level)
        other.write("predictions", [row | {"id": name, "source": source, "made": row["made"] + timedelta(minutes=later), "answer": msgspec.json.encode(told)}])
    found = monitor.kept_forecasts(other, "HUB1", start, start + 30 * DAY)
    assert found["id"].tolist() == ["two"] and found["now"].tolist() == [200.0]


def test_a_clean_day_is_quiet(made, clean, start):
    for day in (DAYS, DAYS + 1):
        check = checked(clean[1], made["package"], start, day)
        assert loud(check, "stuck", "missing", "telemetry_gap", "volume", "capacity", "health").empty, check.findings
        assert len(loud(check)) <= 1, check.findings[["kind", "name", "severity", "value"]]
        assert check.figures["judged"] == 1440 and 0 < check.figures["mae_max_10"] < check.figures["mae_limit"]


def test_the_numbers_are_those_of_the_evaluation(made, clean, start):
    telemetry, store = clean
    check = checked(store, made["package"], start)
    at = check.performance.query("slice == 'all' and metric == 'mae' and target == 'max' and horizon_min == 10").iloc[0]
    told = monitor.kept_forecasts(store, "HUB1", start + DAYS * DAY, start + (DAYS + 1) * DAY)
    truth = build_targets(telemetry, site=SITE).loc[told.index]
    assert at["value"] == pytest.approx((told["change_max_10"] - truth["change_max_10"]).abs().mean(), abs=0.01)
    assert at["low"] < at["centre"] < at["high"] and check.figures["mae_max_10"] == at["value"]
    assert set(check.performance["slice"]) == {"all", "shift", "week", "load"}


@pytest.mark.parametrize(("scenario", "kind"), [("new-route", "data_drift"), ("capacity-upgrade", "capacity")])
def test_a_change_is_seen_on_its_first_day(made, tmp_path, start, scenario, kind):
    store = operated(tmp_path, made["package"], simulate(2 * DAYS, seed=11, scenario=scenario).telemetry)
    first = checked(store, made["package"], start)
    assert len(loud(first, kind)), first.findings
    assert loud(first, "data_drift")["name"].iloc[0] == "all columns"
    if kind == "capacity":
        assert {"upper_lifter_capacity", "lower_lifter_capacity"} <= set(first.findings.query("kind == 'capacity'")["name"])
    else:
        carriers = first.drift.dropna(subset="carries").sort_values("carries", ascending=False)["name"].head(6)
        assert carriers.str.contains("neighbor|commands").any(), carriers.tolist()


@pytest.mark.full
def test_a_season_is_seen_when_it_has_come(made, tmp_path, start):
    "Demand and travel times creep up; at the end they are 7 and 8 % higher."
    store = operated(tmp_path, made["package"], simulate(2 * DAYS, seed=11, scenario="season").telemetry, 2 * DAYS - 3, 2 * DAYS - 1)
    assert len(loud(checked(store, made["package"], start, 2 * DAYS - 2), "data_drift"))


def test_bad_sensors_are_told_from_a_bad_model(made, tmp_path, start):
    telemetry = simulate(DAYS + 3, seed=11).telemetry
    at = np.flatnonzero(telemetry["timestamp"] >= start + DAYS * DAY + timedelta(hours=5))[0]
    telemetry.loc[at : at + 180, "hub_queue"] = telemetry.loc[at, "hub_queue"]
    telemetry.loc[at + 300 : at + 420, "hub_oht_util"] = np.nan
    lost = telemetry.drop(index=range(at + 600, at + 630)).reset_index(drop=True)
    check = checked(operated(tmp_path, made["package"], lost), made["package"], start)
    assert set(check.findings.query("kind == 'stuck'")["name"]) == {"hub_queue"}
    assert set(check.findings.query("kind == 'missing'")["name"]) == {"hub_oht_util"}
    assert check.findings.query("kind == 'telemetry_gap'")["value"].tolist() == [30] and len(loud(check, "volume")) == 1
    assert not check.drift["name"].isin(["hub_queue", "hub_oht_util"]).any(), "bad columns are no drift"
    assert loud(check, "performance", "data_drift", "calibration").empty and 700 < check.figures["judged"] < 1200


def test_simulated_sensor_faults_are_seen_within_a_day(made, tmp_path, start):
    telemetry = simulate(DAYS + 3, seed=11, scenario="sensor-faults").telemetry
    check = checked(operated(tmp_path, made["package"], telemetry), made["package"], start)
    assert len(loud(check, "stuck", "missing", "telemetry_gap")) >= 1
    assert loud(check, "data_drift", "capacity", "performance").empty


def test_a_model_that_got_worse_is_seen(made, clean, tmp_path, start):
    "The same traffic; the answers lag by twenty minutes, as if the model were another."
    _, store = clean
    since, other = start + DAYS * DAY, open_store(tmp_path / "store.sqlite")
    for table in ("observations", "outcomes"):
        rows = store.read(table)
        if table == "observations":
            other.write(table, observation_rows(telemetry_of(rows), since))
        else:
            other.write(table, [r | {"surge_class": int(r["surge_class"])} for r in rows.to_dict("records")])
    rows = store.read("predictions", "HUB1", since, since + DAY)
    other.write("predictions", [r | {"minute": r["minute"] + 20, "explanation": None, "inputs": None} for r in rows.to_dict("records")])
    check, sound = (checked(s, made["package"], start) for s in (other, store))
    assert loud(check, "performance")["name"].str.startswith("balanced_accuracy").any(), check.findings
    assert (check.performance.query("slice == 'all' and metric == 'skill' and target == 'max'").eval("value < centre")).all()
    assert check.figures["mae_max_10"] > 1.2 * sound.figures["mae_max_10"]
    assert check.figures["estimated_mae_max_10"] == pytest.approx(sound.figures["estimated_mae_max_10"], rel=0.05), "the forecasts themselves do not know"


def test_where_truth_is_late_the_error_is_estimated(made, clean, tmp_path, start):
    telemetry, store = clean
    late = open_store(tmp_path / "store.sqlite")
    late.write("observations", observation_rows(telemetry[telemetry["timestamp"] >= start + (DAYS - 1) * DAY].reset_index(drop=True), start))
    rows = store.read("predictions", "HUB1", start + DAYS * DAY, start + (DAYS + 1) * DAY).to_dict("records")
    late.write("predictions", [r | {"explanation": None, "inputs": None} for r in rows])
    check, whole = checked(late, made["package"], start), checked(store, made["package"], start)
    assert check.performance.empty and np.isnan(check.figures["mae_max_10"]) and loud(check, "performance").empty
    assert check.figures["estimated_mae_max_10"] == pytest.approx(whole.figures["mae_max_10"], rel=0.35)


def test_operators_are_asked_and_their_answers_known(made, clean, start):
    _, store = clean
    check = checked(store, made["package"], start)
    assert len(check.queue) <= PARAMS.queue and set(check.queue["what"]) <= {"missed", "false alarm", "caught"}
    missed = int(check.figures["events"] - check.figures["caught"])
    assert (check.queue["what"] == "missed").sum() == missed and check.queue["open"].all() and len(check.queue)
    first = check.queue.iloc[0]
    store.write("feedback", [{"id": "f", "prediction": first["prediction"] or None, "line": "HUB1", "minute": int(first["start"].timestamp() // 60),
                              "verdict": "false_alarm", "at": start}])
    again = checked(store, made["package"], start).queue.iloc[0]
    assert again["verdict"] == "false_alarm" and not again["open"]


def test_a_service_that_fell_back_or_was_late_is_told(made, clean, tmp_path, start):
    telemetry, store = clean
    since, other = start + DAYS * DAY, open_store(tmp_path / "store.sqlite")
    other.write("observations", observation_rows(telemetry[telemetry["timestamp"] >= since].reset_index(drop=True), since))
    rows = store.read("predictions", "HUB1", since, since + DAY).to_dict("records")
    for i, r in enumerate(rows):
        made_at = since + timedelta(minutes=i + (9 if i % 40 == 0 else 0.1), seconds=i / 1000)
        rows[i] = r | {"made": made_at, "source": "rules" if i < 500 else r["source"], "explanation": None, "inputs": None}
    other.write("predictions", rows[:1200])
    health = checked(other, made["package"], start).health.set_index("name")
    assert health.loc["share_fallback", "value"] == pytest.approx(500 / 1200) and health.loc["share_fallback", "outside"]
    assert health.loc["lag_min", "value"] > 8 and health.loc["answered_share", "value"] == pytest.approx(1200 / 1440)


def test_the_service_itself_is_asked():
    text = "\n".join(['# TYPE amhs_request_seconds histogram', 'amhs_request_seconds_bucket{le="0.1",path="/v1/predict",status="200"} 90.0',
                      'amhs_request_seconds_bucket{le="1.0",path="/v1/predict",status="200"} 96.0',
                      'amhs_request_seconds_bucket{le="+Inf",path="/v1/predict",status="200"} 96.0',
                      'amhs_request_seconds_count{path="/v1/predict",status="200"} 96.0', 'amhs_request_seconds_count{path="/v1/predict",status="500"} 4.0',
                      '# TYPE amhs_model_failures counter', 'amhs_model_failures_total{line="HUB1"} 2.0', 'amhs_model_failures_total{line="HUB2"} 7.0', ''])
    found = monitor.service_health(text, "HUB1", PARAMS).set_index("name")
    assert found.loc["p99_ms", "value"] == 1000 and found.loc["error_share", "value"] == 0.04 and found.loc["model_failures", "value"] == 2
    assert found.loc[["p99_ms", "error_share", "model_failures"], "outside"].all()


def test_without_a_baseline_there_is_a_note(made, clean, start, monkeypatch):
    monkeypatch.setitem(made["package"].__dict__, "baseline", None)
    check = checked(clean[1], made["package"], start)
    assert "baseline" in check.findings["name"].tolist() and check.figures["mae_max_10"] > 0
    assert check.drift.empty and not check.performance["outside"].any() and loud(check, "data_drift", "performance", "capacity").empty


def test_a_baseline_that_was_changed_is_refused(made, tmp_path):
    import shutil

    copy = shutil.copytree(made["packed"], tmp_path / "copy")
    baseline = read_json(copy / "baseline.json")
    baseline["HUB1"]["test_days"] = 99
    write_json(copy / "baseline.json", baseline)
    with pytest.raises(ModelError):
        load_package(copy)


def test_an_empty_store_is_no_error(made, tmp_path, start):
    store = open_store(tmp_path / "store.sqlite")
    check = checked(store, made["package"], start)
    assert check.figures["rows"] == 0 and set(check.findings["kind"]) == {"volume"} and check.queue.empty
    assert monitor.monitoring_records(store).empty and monitor.finding_days(monitor.monitoring_records(store)).empty
    with pytest.raises(InputError, match="source=simulate"):
        monitor.check_days(store, {"HUB1": made["package"]}, PARAMS, start)


def test_a_day_is_on_record_once(made, clean, start):
    _, store = clean
    check, now = checked(store, made["package"], start), start + (DAYS + 2) * DAY
    assert monitor.record(store, "HUB1", check, now) == monitor.record(store, "HUB1", check, now + DAY)
    rows = store.read("decisions", kind="monitoring")
    detail = json.loads(rows["detail"].iloc[0], parse_constant=lambda word: 1 / 0)
    assert len(rows) == 1 and rows["subject"].tolist() == ["HUB1"] and detail["model"] == made["package"].version
    assert {"mae_max_10", "skill_max_10", "balanced_accuracy_10", "event_recall", "false_per_day", "coverage", "psi_max", "rows", "share_fallback",
            "lag_min", "estimated_mae_max_10", "mae_limit"} <= set(detail["figures"])
    assert set(detail["findings"][0] if detail["findings"] else monitor.FINDINGS) == set(monitor.FINDINGS)
    records = monitor.monitoring_records(store, "HUB1")
    assert records["day"].tolist() == ["2026-01-15"] and records["figures"].iloc[0]["rows"] == 1440


def test_the_stage_by_the_runner(made, tmp_path, monkeypatch):
    for key in ("runs", "data", "deployed"):
        monkeypatch.setenv(f"AMHS_{key.upper()}", str(tmp_path / key))
    monkeypatch.setenv("AMHS_LANG", "both")
    deploy(made["packed"])
    quiet = runs.Manner(show=runs.Reporter(lambda line: None))
    result = runs.run_pipeline("operate", "smoke", {"monitor.scenario": "sensor-faults"}, "monitor", "monitor", manner=quiet)
    assert [m["status"] for m in result.manifests] in (["finished"], ["gate failed"]), result.manifests[0]["error"]
    told = read_json(result.folder / "12_monitor/artefacts/monitoring.json")["checks"]
    assert [c["line"] for c in told] == ["HUB1"] and told[0]["figures"]["rows"] > 1300
    korean = (result.folder / "12_monitor/documents/monitoring_report.ko.md").read_text()
    assert korean.startswith("# 모니터링 보고서") and not any(w in korean for w in (" stood still", " lacks ", "severity", "have a row"))
