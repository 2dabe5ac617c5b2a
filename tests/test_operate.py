"""The loop as a whole: a hub changes, and the system notices, decides, retrains and deploys by itself; killed in the middle of
each step it neither loses nor doubles anything; after days off it catches up."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import mortal
import numpy as np
import pandas as pd
import psutil
import pytest
from toy_project import make_project, write_stage

from amhs import operate, runs
from amhs.alerts import FileChannel, alert_table
from amhs.core import ParameterError, StageError, read_json
from amhs.deployment import assign, deployed_versions, deployment_records, read_deployment
from amhs.monitor import monitoring_records
from amhs.operate import jobs_of, lines_of
from amhs.rehearsal import Rehearsal, changed_at, hub_of, play, set_up, timeline
from amhs.schedule import Worker, job_table, run_due
from amhs.stages import PIPELINES, find_stage
from amhs.store import minute_of, observation_rows, open_store

PIECE = Rehearsal("capacity-upgrade", days=3, history_days=8, trees=8, reference=False)
DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    "A rehearsal from beginning to end."
    home = tmp_path_factory.mktemp("played") / "home"
    play(PIECE, home, say=lambda text: None)
    return home


@pytest.fixture(scope="module")
def hub():
    return hub_of(PIECE, "HUB1")[1]


@pytest.fixture
def fresh(played, tmp_path):
    "The first model deployed, and a day of history in an empty store."
    shutil.copytree(played / "first", tmp_path / "home" / "first")
    operation = set_up(PIECE, tmp_path / "home")
    history = hub_of(replace(PIECE, history_days=8), "HUB1")[0].tail(1440)
    operation.store.write("observations", observation_rows(history, PIECE.begin))
    yield operation
    operation.store.close()


def due(day):
    return PIECE.begin + day * DAY + timedelta(minutes=30)


def feed(operation, hub, first, last):
    "The minutes of some days come in."
    rows = hub[(hub["timestamp"] >= due(first)) & (hub["timestamp"] < due(last))] if first else hub[hub["timestamp"] < due(last)]
    operation.store.write("observations", observation_rows(rows, due(last)))


def night(operation, day):
    return run_due(Worker(operation.store), jobs_of(operation, keep=True), due(day))


# ---- the loop

def test_the_loop_notices_decides_retrains_and_tells_the_story(played):
    facts = read_json(played / "story.json")
    assert facts["changed"] == changed_at(PIECE).isoformat()
    assert 0 < facts["noticed_after_days"] <= 1.6, "with the check of the first whole day after it"
    assert facts["retrainings"] >= 1 and facts["promoted"] + facts["refused"] >= 1
    assert facts["retrainings_before"] == 0
    with open_store(played / "store.sqlite") as store:
        told = timeline(store, PIECE.begin, due(4))
        assert set(job_table(store)["state"]) == {"done"}
    assert list(dict.fromkeys(told["what"])) == ["noticed", "decision", "cause", "new model"]
    assert "capacity" in " ".join(told["said"]).lower()
    assert [json.loads(line)["what"] for line in (played / "alerts.jsonl").read_text().splitlines()][0] == "open"


def test_the_error_is_told_with_and_without_the_loop(played):
    errors = pd.read_csv(played / "errors.csv", parse_dates=["day"])
    assert len(errors) == PIECE.days and errors[["with_loop", "left_alone"]].notna().all(axis=None)
    before = errors["day"] < pd.Timestamp(changed_at(PIECE))
    assert (errors["with_loop"] - errors["left_alone"])[before].abs().max() < 0.05, "nothing but what rounding does, as long as the model is the same"


@pytest.mark.parametrize(("page", "words"), [("story.html", ("What became of the model", "kept", "What happened")),
                                             ("story.ko.html", ("모델에 일어난 일", "예측 오차", "일어난 일"))])
def test_the_page_stands_alone(played, page, words):
    text = (played / page).read_text(encoding="utf-8")
    assert all(w in text for w in words) and "data:image/png;base64" in text
    assert "http" not in text.split("</head>")[1] and "{{" not in text and "None" not in text


def test_who_takes_over_keeps_the_old_champion(played):
    line = read_deployment(played / "deployed").lines["HUB1"]
    moves = [r for r in deployment_records(played / "deployed") if r["after"]["live"] != (r["before"] or {}).get("live", "")]
    if len(moves) > 1:
        assert line.previous == moves[-2]["after"]["live"] and line.live == moves[-1]["after"]["live"]
    with open_store(played / "store.sqlite") as store:
        promoted = sum(json.loads(d)["verdict"] == "promote" for d in store.read("decisions", kind="promotion")["detail"])
    assert len(moves) == 1 + promoted


def test_played_again_nothing_is_done_twice(played):
    before = (played / "errors.csv").read_bytes(), (played / "alerts.jsonl").read_bytes()
    said = []
    play(PIECE, played, say=said.append)
    assert said == [] and before == ((played / "errors.csv").read_bytes(), (played / "alerts.jsonl").read_bytes())


def test_another_piece_is_refused(played):
    with pytest.raises(ParameterError, match="another rehearsal"):
        play(replace(PIECE, seed=1), played)


# ---- kill -9 in the middle of each step

@pytest.fixture(scope="module")
def obeyed(tmp_path_factory):
    "Have processes play a night: their orders, one after the other; the exit status of each."
    log = tmp_path_factory.mktemp("mortal") / "log.txt"
    one = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # a process of one thread can be forked
    with open(log, "w") as said:
        parent = subprocess.Popen([sys.executable, mortal.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True, env=one)

    def obey(home, *points, **order):
        found = []
        for point in points:
            parent.stdin.write(json.dumps({"home": str(home), "point": point, **order}) + "\n")
            parent.stdin.flush()
            found.append(int(parent.stdout.readline()))
        assert 1 not in found, log.read_text()[-3000:]
        return found

    yield obey
    parent.stdin.close()
    parent.wait(60)


@pytest.fixture(scope="module")
def morning(played, tmp_path_factory):
    "Two lines with a history and a model, each to be retrained; a day's telemetry on its way, the newest minutes of one line lost."
    home = tmp_path_factory.mktemp("mortal") / "home"
    shutil.copytree(played / "first", home / "first")
    with set_up(mortal.PIECE, home).store as store:
        for line in mortal.PIECE.names:
            history, day = hub_of(mortal.PIECE, line)
            store.write("observations", observation_rows(history, mortal.PIECE.begin))
            until = mortal.DUE - timedelta(minutes=20 if line == "HUB2" else 0)
            day[day["timestamp"] < until].to_parquet(home / f"{line}.parquet")
            operate.ask_for_retraining(store, line, "new rails", "kim", mortal.DUE - timedelta(hours=3))
    return home


def on_record(home):
    "All that is kept of a night, but for who did which job, and at which attempt."
    with open_store(home / "store.sqlite") as store:
        tables = {name: store.read(name) for name in ("observations", "predictions", "outcomes", "decisions")}
    jobs = tables["decisions"]["kind"].eq("job")
    tables["jobs"], tables["decisions"] = tables["decisions"].loc[jobs, ["id", "at", "subject", "why"]], tables["decisions"][~jobs]
    found = {name: table.sort_values(list(table.columns[:2]), ignore_index=True) for name, table in tables.items()}
    files = {name: (home / name).read_text() for name in ("desk.jsonl", "shift.jsonl", "deployed/history.jsonl", "deployed/lines.json")}
    return found, files, deployed_versions(home / "deployed")


def assert_same(home, other):
    (tables, files, versions), (others, other_files, other_versions) = on_record(home), on_record(other)
    for name, table in tables.items():
        pd.testing.assert_frame_equal(table, others[name], obj=name)
    assert (files, versions) == (other_files, other_versions)


@pytest.fixture(scope="module")
def undisturbed(morning, obeyed):
    "The night as nothing happens to it; beside it, the same with the retraining still to come."
    @cache
    def nights(learn):
        evening = shutil.copytree(morning, morning.with_name(f"evening-{learn}"))
        assert obeyed(evening, "", jobs=mortal.EVENING, here=True) == [0]
        over = shutil.copytree(evening, morning.with_name(f"over-{learn}"))
        assert obeyed(over, "", learn=learn) == [0]
        return evening, over
    return nights


def test_an_undisturbed_night_leaves_something_of_everything(undisturbed):
    "So that what is compared below is not nothing."
    (tables, files, versions), day = on_record(undisturbed(False)[1]), 1440
    assert len(tables["observations"]) == 2 * (9 * day + 30) - 20
    assert len(tables["predictions"]) == 2 * 1.5 * day - 20, "all that is looked back on"
    assert len(tables["outcomes"]) > 6 * day
    assert tables["decisions"]["kind"].value_counts().to_dict() == {"request": 2, "monitoring": 2, "alert": 1, "retraining": 2, "plan": 2, "promotion": 2}
    assert set(tables["jobs"]["why"]) == {"done"} and len(tables["jobs"]) == 6
    assert files["desk.jsonl"] == files["shift.jsonl"] and "HUB2/silent" in files["desk.jsonl"]
    assert len(files["deployed/history.jsonl"].splitlines()) == 4 and len(versions) == 2


def test_killed_in_the_middle_of_every_step_of_one_night(morning, undisturbed, obeyed, tmp_path):
    "The short form: training is a stand-in, and one night dies of everything, one after the other."
    home, points = shutil.copytree(morning, tmp_path / "home"), [p for p in mortal.POINTS if p not in mortal.LONG]
    assert obeyed(home, *points, "") == [*[-signal.SIGKILL] * len(points), 0]
    assert_same(home, undisturbed(False)[1])


@pytest.mark.full
@pytest.mark.parametrize("point", mortal.POINTS)
def test_killed_at_one_point_the_night_is_as_if_nothing_had_been(morning, undisturbed, obeyed, tmp_path, point):
    learn = not point.startswith("deploy")  # what is learnt from a few days need not be better
    evening, over = undisturbed(learn)
    home = shutil.copytree(evening if point in mortal.AFTER_EVENING else morning, tmp_path / "home")
    assert obeyed(home, point, "", learn=learn) == [-signal.SIGKILL, 0]
    assert_same(home, over)


@pytest.mark.full
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_any_moment_the_night_is_as_if_nothing_had_been(morning, undisturbed, obeyed, tmp_path, seed):
    home, moments = shutil.copytree(morning, tmp_path / "home"), np.random.default_rng(seed).uniform(0.1, 6, 8)
    ended = [obeyed(home, "", learn=True, after_s=float(after_s))[0] for after_s in moments]
    assert ended.count(-signal.SIGKILL) >= 3 and obeyed(home, "", learn=True) == [0]
    assert_same(home, undisturbed(True)[1])


# ---- the same, of a retraining by the pipeline

def test_a_retraining_sees_as_many_processors_as_it_may_use():
    params = operate.OperateParams(threads=1, nice=15)
    said = subprocess.run([*operate.stand_back(params), sys.executable, "-c", "import os; print(len(os.sched_getaffinity(0)), os.nice(0))"],
                          capture_output=True, text=True, check=True).stdout
    assert said.split() == ["1", str(os.nice(0) + 15)]


OPERATOR = """
from datetime import UTC, datetime
from types import SimpleNamespace
from amhs import operate

# beforehand
operation = SimpleNamespace(params=operate.OperateParams(profile="smoke"))
print(operate.retrain_apart(operation, "HUB1", {}, datetime(2026, 3, 2, 0, 30, tzinfo=UTC)))
"""
HANGS_ONCE = """
import os, time
from pathlib import Path

said = Path("STAGE.txt").resolve()
with open(said, "a") as f: print(os.getpid(), os.getppid(), file=f)
if len(said.read_text().splitlines()) == 1: time.sleep(300)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "A project of notebooks that take a second each, its business defined."
    for key in ("AMHS_RUNS", "AMHS_DATA", "AMHS_PARAMS", "AMHS_SITES", "AMHS_LANG"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path))
    monkeypatch.setenv("AMHS_STORE", f"sqlite:///{tmp_path}/store.sqlite")
    make_project(tmp_path)
    assert runs.run_pipeline("develop", "smoke", last="business", manner=runs.Manner(show=runs.Reporter(lambda line: None))).exit_code == 0
    return tmp_path


def is_over(pid):
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def killed_in(folder, stage, operator=OPERATOR):
    "Operate until a stage is at work, then kill -9 the operator; what it started must end with it."
    operator = subprocess.Popen([sys.executable, "-c", operator], cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said, end = folder / f"{stage}.txt", time.monotonic() + 90
    while not said.exists() or not said.read_text().endswith("\n"):
        assert operator.poll() is None and time.monotonic() < end, operator.stderr.read()[-2000:]
        time.sleep(0.05)
    family = [int(pid) for pid in said.read_text().split()] + [p.pid for p in psutil.Process(operator.pid).children(recursive=True)]
    operator.kill()
    operator.communicate()
    while not all(map(is_over, family)):
        assert time.monotonic() < end, "a retraining outlived its operator"
        time.sleep(0.05)


def test_a_retraining_ends_with_whoever_started_it(tmp_path, monkeypatch):
    "The short form: one process instead of a pipeline."
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path))
    command = f"operate.pipeline_command = lambda *_: [{sys.executable!r}, '-c', {HANGS_ONCE.replace('STAGE', 'work')!r}]"
    killed_in(tmp_path, "work", OPERATOR.replace("# beforehand", command))


def test_the_command_goes_on_with_a_retraining_that_was_begun(toy):
    "The short form: nothing is killed, and the command only says its plan."
    operation, when = SimpleNamespace(params=operate.OperateParams(profile="smoke")), datetime(2026, 3, 2, 0, 30, tzinfo=UTC)

    def planned():
        command = [*operate.pipeline_command(operation, "HUB1", when), "--plan"]
        said = subprocess.run(command, cwd=toy, capture_output=True, text=True, check=True).stdout
        return dict(re.findall(r"^\d\d  (\w+) +(\w+)", said, re.M))

    assert planned() == dict.fromkeys(PIPELINES["retrain"], "run")
    quiet = runs.Manner(show=runs.Reporter(lambda line: None))
    sets = {"data.source": "store", "redesign.line": "HUB1"}
    begun = runs.run_pipeline("retrain", "smoke", sets, last="redesign", run_id="retrain-HUB1-20260302-0030", manner=quiet)
    assert begun.exit_code == 0 and planned() == {"data": "skip", "redesign": "skip"}


@pytest.mark.full
def test_killed_in_the_middle_of_each_stage_a_retraining_goes_on_from_there(toy):
    stages = PIPELINES["retrain"]
    for stage in stages:
        write_stage(toy, stage, HANGS_ONCE.replace("STAGE", stage))
    for stage in stages:
        killed_in(toy, stage)
    done = subprocess.run([sys.executable, "-c", OPERATOR], cwd=toy, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert [len((toy / f"{stage}.txt").read_text().splitlines()) for stage in stages] == [2] * len(stages), "begun twice, and no more"
    run, = (toy / "runs").glob("retrain-HUB1-*")
    manifests = [read_json(run / find_stage(stage).folder / "manifest.json") for stage in PIPELINES["retrain"]]
    assert read_json(run / "run.json")["status"] == "finished" and {m["status"] for m in manifests} == {"finished"}
    began = [m["started"] for m in manifests]
    assert began == sorted(began), "no stage ran again after a later one"


# ---- days off, gaps, late telemetry

@pytest.fixture
def quick_check(monkeypatch):
    "The check of a day as a stand-in: what it looks at is tried elsewhere."
    def check(operation, due):
        since, until = operate.day_before(due)
        told = operation.store.read("predictions", "HUB1", since, until, columns=["minute"])
        detail = {"findings": [], "figures": {"rows": len(told)}, "window": [since.isoformat(), until.isoformat()], "model": "1"}
        operation.store.write("decisions", [{"id": f"check {since}", "at": due, "kind": "monitoring", "subject": "HUB1", "detail": json.dumps(detail)}])
        return len(told)
    monkeypatch.setattr(operate, "check", check)


def test_after_three_days_off_everything_is_made_up_for(fresh, hub, quick_check):
    operation = replace(fresh, params=fresh.params.model_copy(update={"look_back_days": 3.5}), retrain=None)
    night(operation, 0)
    feed(operation, hub, 0, 3)  # the service observed, but nobody operated
    ran = night(operation, 3)
    assert ran.query("job == 'check'")["due"].dt.day.tolist() == [due(d).day for d in (1, 2, 3)]
    assert ran["job"].value_counts()[["predict", "join", "tell"]].tolist() == [1, 1, 1], "the newest is enough for these"
    days = monitoring_records(operation.store)
    assert [f["rows"] for f in days["figures"]][1:] == [1440, 1440, 1440]
    told = operation.store.read("predictions", "HUB1", minute_of(PIECE.begin), columns=["minute"], role="live")["minute"]
    assert sorted(told) == list(range(minute_of(PIECE.begin), minute_of(due(3)))), "a forecast of each minute of the days off"
    assert night(operation, 3).empty


def test_telemetry_that_comes_late_is_forecast_and_joined_late(fresh, hub, quick_check):
    operation = replace(fresh, retrain=None, params=fresh.params.model_copy(update={"look_back_days": 2.5}))
    late = (hub["timestamp"] >= due(0) + timedelta(hours=5)) & (hub["timestamp"] < due(0) + timedelta(hours=8))
    feed(operation, hub[~late], 0, 1)
    night(operation, 1)
    feed(operation, hub, 0, 2)
    night(operation, 2)
    begin, end = minute_of(due(0) + timedelta(hours=5)), minute_of(due(0) + timedelta(hours=8))
    assert set(operation.store.read("predictions", "HUB1", begin, end, columns=["minute"])["minute"]) == set(range(begin, end))
    assert len(operation.store.read("outcomes", "HUB1", begin, end)) == 3 * 180


def test_a_line_that_goes_silent_is_an_alert_and_so_is_its_return(fresh, hub, tmp_path):
    channel = FileChannel(name="file", kind="file", path=tmp_path / "told.jsonl")
    operation = replace(fresh, retrain=None, channels=(channel,))
    feed(operation, hub[hub["timestamp"] < due(1) - timedelta(hours=2)], 0, 1)
    operate.tell(operation, due(1))
    feed(operation, hub, 0, 1)
    operate.tell(operation, due(1) + timedelta(minutes=5))
    told = [json.loads(line) for line in (tmp_path / "told.jsonl").read_text().splitlines()]
    assert [(t["key"], t["what"]) for t in told] == [("HUB1/silent", "open"), ("HUB1/silent", "over")]


def test_a_line_whose_package_is_broken_stops_no_other(fresh, hub):
    operation = replace(fresh, retrain=None)
    version = lines_of(operation)["HUB1"].live
    packages = operation.folder / "packages"
    shutil.copytree(packages / version, packages / "broken")
    (packages / "broken" / "site.json").write_text("{}")
    assign("HUB2", operation.folder, live="broken")
    feed(operation, hub, 0, 1)
    operation.store.write("observations", observation_rows(hub[hub["timestamp"] < due(1)].assign(line="HUB2"), due(1)))
    for step in (operate.predict, operate.join, operate.check):
        with pytest.raises(StageError, match="HUB2"):
            step(operation, due(1))
    assert monitoring_records(operation.store)["line"].tolist() == ["HUB1"]


def test_a_job_that_is_given_up_is_an_alert(fresh):
    operation = replace(fresh, retrain=None)
    clock = [1000.0]
    worker = Worker(operation.store, "kim", 60, lambda: clock[0])
    jobs = [replace(j, do=lambda due: 1 / 0) if j.name == "join" else j for j in jobs_of(operation, keep=True)]
    for _ in range(6):
        run_due(worker, jobs, due(1))
        clock[0] += 4000
    operate.tell(operation, due(1) + timedelta(minutes=1))
    assert "jobs/join" in set(alert_table(operation.store)["key"])


# ---- decisions

def test_a_persons_wish_is_obeyed_once(fresh, hub, quick_check):
    wished = []
    operation = replace(fresh, retrain=lambda op, line, asked, at: wished.append((line, asked["reasons"])) or "done")
    feed(operation, hub, 0, 2)
    night(operation, 1)
    operate.ask_for_retraining(operation.store, "HUB1", "new rails", "kim", due(1) + timedelta(hours=3))
    night(operation, 2)
    assert [w for w in wished if "manual" in w[1]] == [("HUB1", ["manual"])]


def test_a_promotion_on_record_is_deployed_after_a_crash_and_only_then(fresh, played):
    "The process died after the new model was on record and before it was deployed."
    version = lines_of(fresh)["HUB1"].live
    new = next((p for p in (played / "deployed" / "packages").iterdir() if p.name != version), None)
    if new is None:
        pytest.skip("no new model in the rehearsal")
    shutil.copytree(new, fresh.folder / "packages" / new.name)
    detail = {"verdict": "promote", "current": version, "new": new.name}
    fresh.store.write("decisions", [{"id": "promotion-1", "at": due(2), "kind": "promotion", "subject": "HUB1", "why": "better", "detail": json.dumps(detail)}])
    for _ in range(2):
        assert operate.retrain_here(fresh, "HUB1", {"reasons": ["manual"]}, due(2)) == "better"
    assert lines_of(fresh)["HUB1"].live == new.name and lines_of(fresh)["HUB1"].previous == version
    assert len(deployment_records(fresh.folder)) == 2


# ---- as typed

def amhs(*words, **env):
    import os
    return subprocess.run([Path(sys.executable).with_name("amhs"), *words], capture_output=True, text=True, timeout=300, env={**os.environ, **env})


def test_once_does_what_is_due_and_ends(tmp_path):
    env = {"AMHS_STORE": f"sqlite:///{tmp_path}/store.sqlite", "AMHS_DEPLOYED": str(tmp_path / "deployed")}
    first = amhs("operate", "--once", **env)
    assert first.returncode == 0 and "predict" in first.stdout, first.stderr
    listed = amhs("jobs", **env)
    assert "done" in listed.stdout
