"""Offline inference: what the service would have said, once per line and day, in whole files."""

import json
from datetime import UTC, datetime

import msgspec
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import SITE, labelled, make_desk, small_package, window_at

from amhs import offline, runs
from amhs.config import load_params
from amhs.core import InputError, read_json
from amhs.deployment import assign, deploy
from amhs.inference import AlarmPolicy, load_package
from amhs.messages import Answer
from amhs.serve import horizons_of, teller_of
from amhs.simulate import simulate
from amhs.store import observation_rows, open_store

PARAMS = load_params("offline", "smoke")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    data = labelled(days=3)
    packed, other = small_package(tmp_path_factory), small_package(tmp_path_factory, number=2, model="v8")
    return {"telemetry": data.telemetry, "packed": packed, "package": load_package(packed), "other": load_package(other)}


@pytest.fixture(scope="module")
def holed(made):
    "History with missing minutes, a long hole, and unknown values."
    rows = made["telemetry"].copy()
    random = np.random.default_rng(7)
    for column in ("hub_free_slots", "lower_to_hub_jobs", "hub_queue"):
        rows.loc[random.choice(len(rows), 60, replace=False), column] = np.nan
    gone = {*random.choice(np.arange(100, len(rows)), 40, replace=False).tolist(), *range(2000, 2050)}
    return rows.drop(index=list(gone)).reset_index(drop=True)


@pytest.mark.parametrize("hybrid", ["model", "rules", "shadow", "rules_first", "corrected"])
def test_every_sampled_minute_is_what_the_desk_says(made, holed, tmp_path, hybrid):
    "Windows of all the history up to a minute, holes and all, asked one by one; levels, probabilities, decision, reasons for it."
    package, desk = made["package"], make_desk(tmp_path, [made["packed"]], hybrid=hybrid)
    scored = offline.score_rows(package, holed, hybrid)
    busy = np.flatnonzero(scored["alarm"].to_numpy())[:10].tolist()
    sample = sorted({*np.linspace(40, len(holed) - 1, 25).astype(int).tolist(), *busy, *range(1955, 1990, 6)})
    whole = holed.set_index("timestamp")
    for at in sample:
        end = holed["timestamp"].iloc[at]
        rows = whole[:end].drop(columns="line").asfreq("min").reset_index().assign(line="HUB1")
        answer = desk.predict(window_at(rows, len(rows) - 1, minutes=len(rows)))
        row = scored.iloc[at]
        assert (answer.alarm.on, answer.alarm.by, ", ".join(answer.alarm.rules)) == (row["alarm"], row["by"], row["fired"]), at
        assert answer.source == row["source"] and (row["source"] == "rules" or answer.alarm.hybrid == hybrid)
        if not np.isnan(row["now"]):
            assert answer.horizons == horizons_of(teller_of(package), row[package.columns].to_numpy("float32"))
            assert [h.surge.decision for h in answer.horizons] == [("flat", "slight", "surge")[int(row[f"surge_class_{h}"])] for h in package.horizons]
    assert scored["now"].isna().sum() > 30, "there were holes"


def test_lines_do_not_mix(made):
    package, one = made["package"], made["telemetry"].tail(500).reset_index(drop=True)
    two = simulate(1, seed=9, line="HUB2").telemetry.head(400)
    both = offline.score_rows(package, pd.concat([one, two], ignore_index=True))
    pd.testing.assert_frame_equal(both.loc[["HUB1"]], offline.score_rows(package, one))
    pd.testing.assert_frame_equal(both.loc[["HUB2"]], offline.score_rows(package, two))


@given(st.lists(st.integers(0, 10), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 4))
def test_an_alarm_ends_below_its_limit_less_the_width(scores, limit, width):
    on, wanted = False, []
    for s in scores:
        on = s >= limit or (on and s >= limit - width)
        wanted.append(on)
    assert offline._held(np.array(scores, float), AlarmPolicy(limit, width, budget=1)).tolist() == wanted


def test_days_that_are_done_are_not_done_again(made, tmp_path):
    package, rows = made["package"], made["telemetry"]
    assert offline.score_line(package, rows, tmp_path)["rows"] == len(rows)
    stamps = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")}
    assert offline.score_line(package, rows, tmp_path) == {"days": 3, "done_before": 3, "rows": 0, "alarms": 0}
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.parquet")} == stamps
    longer = pd.concat([rows, simulate(4, seed=0).telemetry.iloc[len(rows) :]], ignore_index=True)
    assert offline.score_line(package, longer, tmp_path)["done_before"] == 3, "a new day makes no old one old"


@pytest.mark.parametrize("change", ["value", "package", "hybrid", "reasons", "missing"])
def test_days_made_from_something_else_are_done_again(made, tmp_path, change):
    package, rows = made["other"], made["telemetry"].copy()  # looks back half an hour
    offline.score_line(package, rows, tmp_path)
    hybrid, reasons = ("model", 0) if change == "hybrid" else ("rules_first", 2 if change == "reasons" else 0)
    if change == "value":
        rows.loc[2000, "hub_jobs"] += 1  # noon of the second day
    elif change == "missing":
        (tmp_path / "line=HUB1/day=2026-01-02/predictions.parquet").unlink()
    elif change == "package":
        package = made["package"]
    again = offline.score_line(package, rows, tmp_path, hybrid, reasons=reasons)
    assert again["done_before"] == (2 if change in ("value", "missing") else 0)
    fresh = offline.score_rows(package, rows, hybrid)
    pd.testing.assert_frame_equal(offline.read_predictions(tmp_path)[list(fresh)], fresh, check_index_type=False)


def test_a_kill_leaves_whole_files_and_the_rest_is_done_later(made, tmp_path, monkeypatch):
    package, rows, real, calls = made["package"], made["telemetry"], offline.pq.write_table, []

    def dies(table, path, **more):
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"PAR1 half a file")
            raise KeyboardInterrupt
        return real(table, path, **more)

    monkeypatch.setattr(offline.pq, "write_table", dies)
    with pytest.raises(KeyboardInterrupt):
        offline.score_line(package, rows, tmp_path)
    monkeypatch.setattr(offline.pq, "write_table", real)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["predictions.parquet"]
    assert len(offline.read_predictions(tmp_path)) == 1440
    assert offline.score_line(package, rows, tmp_path)["done_before"] == 1
    pd.testing.assert_frame_equal(offline.read_predictions(tmp_path), offline.score_rows(package, rows), check_index_type=False)


def test_work_in_parts_is_work_at_once(made, tmp_path, monkeypatch):
    monkeypatch.setattr(offline, "DAYS_AT_ONCE", 1)
    offline.score_line(made["package"], made["telemetry"], tmp_path)
    known = offline.score_rows(made["package"], made["telemetry"])
    pd.testing.assert_frame_equal(offline.read_predictions(tmp_path), known, check_index_type=False)


def test_a_line_may_have_any_name(made, tmp_path):
    rows = made["telemetry"].head(100).assign(line="허브 1/A")
    offline.score_line(made["package"], rows, tmp_path)
    assert len(offline.read_predictions(tmp_path, ["허브 1/A"])) == 100


def test_reasons_are_named_for_alarms(made, tmp_path):
    package, rows = made["package"], made["telemetry"]
    scored = offline.score_rows(package, rows).assign(alarm=lambda t: t["score"] > t["score"].quantile(0.995))
    told = offline.reason_rows(package, rows, scored, 2)
    named = scored["alarm"] & scored["now"].notna()
    assert ((told["reasons"] != "") == named).all() and ((told["causes"] != "") == named).all() and named.sum() > 5
    assert all(len(json.loads(t)) == 2 for t in told.loc[named, "reasons"])
    assert all(1 <= len(json.loads(t)) <= 2 for t in told.loc[named, "causes"])


def test_reasons_are_what_the_desk_says(made, holed, tmp_path):
    package, desk = made["package"], make_desk(tmp_path, [made["packed"]], hybrid="model")
    scored = offline.score_rows(package, holed, "model")
    told = offline.reason_rows(package, holed, scored, 3)
    whole = holed.set_index("timestamp")
    busy = np.flatnonzero(told["causes"].to_numpy() != "")
    for at in busy[np.linspace(0, len(busy) - 1, 6).astype(int)]:
        rows = whole[: holed["timestamp"].iloc[at]].drop(columns="line").asfreq("min").reset_index().assign(line="HUB1")
        alarm = desk.predict(window_at(rows, len(rows) - 1, minutes=len(rows))).alarm
        assert json.loads(told["reasons"].iloc[at]) == [[r.feature, r.jobs] for r in alarm.reasons]
        assert [c["group"] for c in json.loads(told["causes"].iloc[at])] == [c.group for c in alarm.causes]


@pytest.mark.parametrize("which", ["alarms", "all"])
def test_the_store_gets_each_prediction_once(made, tmp_path, which):
    rows = made["telemetry"].tail(1440 + 60).reset_index(drop=True)
    rows.loc[1400, "hub_free_slots"] = 500
    params = PARAMS.model_copy(update={"store": which})
    with open_store(tmp_path / "store.sqlite") as store:
        for folder in ("one", "two"):  # a second folder: everything is done again, nothing is kept twice
            offline.score_period(rows, {"HUB1": (made["package"], "rules_first")}, params, tmp_path / folder, store)
        kept = store.read("predictions", role="offline")
    scored = offline.read_predictions(tmp_path / "one")
    assert len(kept) == (scored["alarm"].sum() if which == "alarms" else len(scored)) > 0
    answers = [json.loads(a) for a in kept[kept["alarm"]]["answer"]]
    assert {(a["role"], a["model"]) for a in answers} == {("offline", made["package"].version)}
    assert sum("severe_bottleneck" in a["alarm"]["rules"] for a in answers) == 1


def test_a_minute_whose_level_nobody_knows_has_no_answer(made, tmp_path):
    package, rows = made["package"], made["telemetry"].copy()
    rows.loc[2000:2030, "hub_jobs"] = np.nan
    told = list(offline.answers_of(package, offline.score_rows(package, rows), rows, "rules_first", datetime(2026, 5, 1, tzinfo=UTC)))
    answers = [msgspec.json.decode(row["answer"], type=Answer) for row in told]
    minutes = rows["timestamp"]
    assert {a.at for a in answers} & set(minutes[2000:2031]) == set(minutes[2000:2003]), "taken as it was for three minutes"
    assert len(answers) == len(rows) - 28


def test_a_period_is_cut_to_what_is_wanted(made, tmp_path, monkeypatch):
    monkeypatch.setenv("AMHS_STORE", f"sqlite:///{tmp_path}/store.sqlite")
    with open_store() as store:
        store.write("observations", observation_rows(made["telemetry"].tail(200), datetime(2026, 1, 4, tzinfo=UTC)))
    found = offline.read_source(PARAMS.model_copy(update={"source": "store", "since": "2026-01-03T22:00:00Z", "until": "2026-01-03T23:00:00Z"}), tmp_path)
    assert len(found) == 60 and found["timestamp"].iloc[0] == pd.Timestamp("2026-01-03T22:00Z")
    assert np.array_equal(found["hub_jobs"], made["telemetry"].set_index("timestamp").loc[found["timestamp"], "hub_jobs"])
    with pytest.raises(InputError, match="widen the period"):
        offline.read_source(PARAMS.model_copy(update={"source": "store", "lines": ("HUB7",)}), tmp_path)


def test_an_export_is_scored_as_it_was_imported(made, tmp_path):
    rows = made["telemetry"].head(300)
    export = rows.rename(columns={c: s.source for c, s in SITE.columns.items()} | {"timestamp": SITE.time.column})
    export.to_csv(tmp_path / "export.csv", index=False)
    found = offline.read_source(PARAMS.model_copy(update={"source": str(tmp_path / "export.csv")}), tmp_path / "data")
    pd.testing.assert_frame_equal(offline.score_rows(made["package"], found)[["now", "score"]], offline.score_rows(made["package"], rows)[["now", "score"]])


def test_lines_nobody_answers_for_are_left_out(made, tmp_path):
    deploy(made["packed"], ["HUB1"], folder=tmp_path)
    assign("HUB2", tmp_path)
    found = offline.packages_for(["HUB1", "HUB2", "HUB3"], PARAMS, tmp_path)
    assert list(found) == ["HUB1"] and found["HUB1"][1] == "rules_first"
    everywhere = offline.packages_for(["HUB2"], PARAMS.model_copy(update={"package": str(made["packed"]), "hybrid": "model"}), tmp_path)
    assert everywhere["HUB2"][1] == "model"
    with pytest.raises(InputError, match="amhs deploy put"):
        offline.packages_for(["HUB3"], PARAMS, tmp_path)


def test_the_stage_by_the_runner(made, tmp_path, monkeypatch):
    "Stage 11 as `amhs run operate` runs it, into a folder that already has one of its two days."
    for key in ("runs", "data", "deployed"):
        monkeypatch.setenv(f"AMHS_{key.upper()}", str(tmp_path / key))
    monkeypatch.setenv("AMHS_LANG", "both")
    monkeypatch.setenv("AMHS_REGISTRY", "off")
    deploy(made["packed"])
    offline.score_line(made["package"], simulate(1, seed=0).telemetry, tmp_path / "kept")
    quiet = runs.Manner(show=runs.Reporter(lambda line: None))
    result = runs.run_pipeline("operate", "smoke", {"offline.out": str(tmp_path / "kept")}, "offline", "offline", manner=quiet)
    assert [m["status"] for m in result.manifests] == ["finished"], result.manifests[0]["error"]
    summary = read_json(result.folder / "11_offline/artefacts/summary.json")
    assert (summary["rows"], summary["lines"][0]["done_before"]) == (2880, 1)
    korean = (result.folder / "11_offline/documents/prediction_log.ko.md").read_text()
    assert korean.startswith("# 추론 기록") and "| 라인 |" in korean
