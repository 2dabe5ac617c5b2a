"""Runs after they ended: nothing goes that another run stands on, and a zip is all a reviewer needs."""

import json
import shutil
import subprocess
import sys
import threading
import zipfile
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from reviewed import check_pages, own_settings

from amhs import archive, reports, runs
from amhs.config import load_params
from amhs.core import StageError, read_json, write_json
from amhs.stages import STAGES, begin, find_stage, identify, keep_runs, lock_run, stage_manifest, toy_stage

AMHS = Path(sys.executable).with_name("amhs")
EVERY = {"monday", "tuesday", "wednesday", "thursday"}


@pytest.fixture
def mine(week, tmp_path, monkeypatch):
    "A copy of the week's runs that a test may change."
    for part in ("settings.ini", "params"):
        source = week.parent / part
        shutil.copytree(source, tmp_path / part) if source.is_dir() else shutil.copy(source, tmp_path)
    shutil.copytree(week, tmp_path / "runs")
    own_settings(monkeypatch, tmp_path)
    return tmp_path / "runs"


def going(folder, keep=1, **kw):
    return {f.run.name for f in archive.plan_removal(folder, keep, **kw) if not f.kept}


def left(folder):
    return {p.parent.name for p in folder.glob("*/run.json")}


def amhs(folder, *args):
    return subprocess.run([AMHS, "runs", *args], cwd=folder.parent, capture_output=True, text=True, timeout=120)


# --- what a run stands on --------------------------------------------------------------------------------------------


def test_the_trail_leads_to_every_run_below(mine):
    assert [p.name for p in archive.trail(mine / "wednesday")] == ["wednesday", "monday", "tuesday"]
    assert archive.stands_on(mine / "tuesday") == {"monday"} and archive.stands_on(mine / "thursday") == set()


def test_a_run_in_short_tells_of_all_its_stages(mine):
    facts = archive.run_facts(mine / "tuesday")
    assert {s["stage"]: s["run_id"] for s in facts["stages"]}.items() >= {
        "business": "monday", "data": "monday", "develop": "monday", "train": "tuesday", "evaluate": "tuesday"}.items()
    train = next(s for s in facts["stages"] if s["stage"] == "train")
    assert (train["parameters"]["trees"], train["metrics"]["mae"], facts["status"]) == (9, 3.0, "refused")
    assert all((mine / s["notebook"]).is_file() for s in facts["stages"])


# --- thinning out ----------------------------------------------------------------------------------------------------


def test_the_newest_stay_and_all_they_stand_on(mine):
    assert going(mine, keep=1) == {"monday", "tuesday", "wednesday"}
    assert going(mine, keep=2) == set(), "wednesday stands on the other two"
    shutil.rmtree(mine / "thursday")
    assert going(mine, keep=1) == set()
    shutil.rmtree(mine / "wednesday")
    why = {f.run.name: f.kept for f in archive.plan_removal(mine, 1)}
    assert why == {"tuesday": "one of the newest 1", "monday": "run tuesday stands on it"}


def test_what_an_artefact_came_from_counts_even_if_the_record_forgot(mine):
    "A stage that was run again elsewhere leaves no source in the record; the manifests of later stages still name what they read."
    record = read_json(mine / "tuesday/run.json")
    write_json(mine / "tuesday/run.json", record | {"sources": {}})
    assert archive.stands_on(mine / "tuesday") == {"monday"}


def test_a_run_somebody_works_in_stays(mine):
    with lock_run(mine / "monday"):
        assert "monday" not in going(mine)
    fates = archive.plan_removal(mine, 1)
    with lock_run(mine / "monday"):
        gone = archive.remove_runs(fates)
    assert {f.run.name for f in gone} == {"tuesday", "wednesday"} and (mine / "monday/run.json").is_file(), "begun after the plan was made"


def test_what_a_run_has_begun_to_stand_on_meanwhile_stays(mine):
    fates = archive.plan_removal(mine, 1)
    (mine / "friday").mkdir()
    write_json(mine / "friday/run.json", read_json(mine / "thursday/run.json") | {"run_id": "friday", "sources": {"data": "monday"}})
    gone = archive.remove_runs(fates)
    assert {f.run.name for f in gone} == {"tuesday", "wednesday"} and left(mine) == {"monday", "thursday", "friday"}


def test_who_removes_waits_for_who_looks_for_something_to_build_on(mine):
    fates, done = archive.plan_removal(mine, 1), []
    removing = threading.Thread(target=lambda: done.extend(archive.remove_runs(fates)))
    with keep_runs(mine):
        removing.start()
        removing.join(0.3)
        assert removing.is_alive() and left(mine) == EVERY
        (mine / "friday").mkdir()
        write_json(mine / "friday/run.json", read_json(mine / "thursday/run.json") | {"run_id": "friday", "sources": {"train": "tuesday"}})
    removing.join(20)
    assert {f.run.name for f in done} == {"wednesday"}, "tuesday stands on monday"


@pytest.mark.parametrize("where", ["_open_record", "run_stage"])
def test_a_run_does_not_lose_what_it_begins_to_build_on(mine, monkeypatch, where):
    """Somebody removes all they can just before the new run is on record, and while its first stage runs."""
    real, removing = getattr(runs, where), []

    def meanwhile(*args, **kw):
        removing.append(threading.Thread(target=lambda: archive.remove_runs(archive.plan_removal(mine, 0))))
        removing[-1].start()
        removing[-1].join(0.3 if where == "_open_record" else 20)
        return real(*args, **kw)

    for stage in STAGES:
        toy_stage(mine.parent, stage.name, "run.skip('trivial')")
    with monkeypatch.context() as patch:
        patch.setattr(runs, where, meanwhile)
        result = runs.run_pipeline(first="data", last="data", manner=runs.Manner(fast=False, show=runs.Reporter(lambda line: None)))
    removing[-1].join(20)
    assert result.executed == ("data",) and result.manifests[0]["status"] == "skipped"
    sources = read_json(result.folder / "run.json")["sources"]
    assert sources and set(sources.values()) <= left(mine) < EVERY | {result.run_id}


def test_what_a_notebook_run_by_hand_reads_from_stays(mine):
    "The newest of each stage, and a copy that was opened; what it stands on stays too. Begun after the plan was made counts as well."
    fates = archive.plan_removal(mine, 1)
    shutil.rmtree(mine / "thursday/06_train", ignore_errors=True)
    run = begin("evaluate", load_params("evaluate").model_dump())
    read = {Path(s).parts[2] for s in run.sources.values()}
    assert read and read <= EVERY - {"thursday"}
    assert not read & {f.run.name for f in archive.remove_runs(fates)} and read <= left(mine)
    why = {f.run.name: f.kept for f in archive.plan_removal(mine, 1)}
    assert {why[name] for name in read} == {"scratch/07_evaluate reads from it"}
    shutil.rmtree(mine / "scratch")
    assert read <= going(mine)


def test_a_confirmed_model_stays_unless_asked_for(mine):
    path = mine / "monday/07_evaluate/manifest.json"
    manifest = read_json(path)
    write_json(path, manifest | {"outputs": manifest["outputs"] | {"confirmed_model": {"sha256": "0", "bytes": 1}}})
    assert going(mine) == {"tuesday", "wednesday"}
    assert going(mine, confirmed_too=True) == {"monday", "tuesday", "wednesday"}


def test_only_old_runs_go_when_asked(mine):
    began = {r["run_id"]: datetime.fromisoformat(r["started"]) for r in reports.run_records(mine)}

    def later(**span):
        return lambda: began["tuesday"] + timedelta(**span)

    assert going(mine, older_than_days=1, clock=later(hours=20)) == set()
    old = read_json(mine / "wednesday/run.json")
    write_json(mine / "wednesday/run.json", old | {"started": (began["tuesday"] - timedelta(days=3)).isoformat()})
    assert going(mine, older_than_days=1, clock=later(hours=20)) == {"wednesday"}
    assert going(mine, older_than_days=1, clock=later(days=9)) == {"monday", "tuesday", "wednesday"}


def test_what_remains_is_whole(mine):
    gone = archive.remove_runs(archive.plan_removal(mine, 1))
    assert {f.run.name for f in gone} == {"monday", "tuesday", "wednesday"} and left(mine) == {"thursday"}
    assert all(f.n_bytes > 10_000 for f in gone) and not (mine / ".trash").exists()
    assert check_pages(mine) and "monday" not in (mine / "index.html").read_text()


def test_a_crash_while_removing_leaves_no_half_run(mine, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(archive.shutil, "rmtree", lambda *a, **k: (_ for _ in ()).throw(KeyboardInterrupt))
        archive.remove_runs(archive.plan_removal(mine, 1))
    assert left(mine) == {"thursday"} and [r["run_id"] for r in reports.run_records(mine)] == ["thursday"]
    archive.remove_runs(archive.plan_removal(mine, 1))
    assert not (mine / ".trash").exists()


def test_the_command_says_what_would_go_and_then_does_it(mine):
    dry = amhs(mine, "gc", "--keep", "1", "--dry-run")
    assert dry.returncode == 0 and "Would remove 3 of 4 runs" in dry.stdout and left(mine) == EVERY
    assert any(line.split()[0] == "thursday" and "one of the newest 1" in line for line in dry.stdout.splitlines() if line.strip())
    done = amhs(mine, "gc", "--keep", "1")
    assert done.stdout.splitlines()[-1] == dry.stdout.splitlines()[-1].replace("Would remove", "Removed") and left(mine) == {"thursday"}
    assert amhs(mine, "gc", "--keep", "0").returncode == 2 and amhs(mine, "gc").returncode == 2


# --- one zip ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def unpacked(week, tmp_path, monkeypatch):
    "Wednesday's run, packed where it was made and opened elsewhere."
    own_settings(monkeypatch, week.parent)
    with zipfile.ZipFile(archive.export_run(week / "wednesday", tmp_path / "out/w.zip")) as packed:
        packed.extractall(tmp_path / "elsewhere")
    return tmp_path / "elsewhere/wednesday"


def test_the_zip_reads_anywhere(unpacked):
    assert left(unpacked) == {"monday", "tuesday", "wednesday"} and check_pages(unpacked) > 12
    assert "thursday" not in (unpacked / "index.html").read_text()
    assert "../tuesday/index.html#train" in (unpacked / "wednesday/index.html").read_text()


def test_a_reviewer_with_only_the_zip_can_say_what_was_done(unpacked):
    "Data, code, parameters, metrics and verdict, from the manifests that came along."
    record = read_json(unpacked / "tuesday/run.json")
    manifest = stage_manifest(unpacked / "tuesday", find_stage("train"))
    data = stage_manifest(unpacked / "monday", find_stage("data"))
    assert manifest["inputs"]["data"]["artefacts"] == data["outputs"] and manifest["inputs"]["data"]["run_id"] == "monday"
    assert manifest["code"]["notebook_sha256"] and manifest["environment"]["packages"]["pandas"] and manifest["parameters"]["trees"] == 9
    assert manifest["metrics"]["mae"]["value"] == 3.0 and record["verdict"].startswith("Refused by stage evaluate")


def test_nothing_of_this_machine_goes_along(week, unpacked):
    "The failing cell printed its folder, and its traceback leads into the library."
    places = [str(week.parent), str(Path(archive.__file__).parents[1]), sys.prefix, sys.base_prefix]
    log = (week / "wednesday/07_evaluate/notebook.ipynb").read_text()
    assert places[0] in log and places[1] in log, "otherwise this test shows nothing"
    for path in (p for p in unpacked.rglob("*") if p.is_file()):
        text = path.read_text(errors="replace")
        assert not [place for place in places if place in text], path
    for path in (*unpacked.rglob("*.json"), *unpacked.rglob("*.ipynb")):
        json.loads(path.read_text())


def test_artefacts_come_along_when_wanted(mine, tmp_path):
    plain, full = (archive.export_run(mine / "tuesday", tmp_path / f"{flag}.zip", flag) for flag in (False, True))
    assert not any("/artefacts/" in n for n in zipfile.ZipFile(plain).namelist())
    zipfile.ZipFile(full).extractall(tmp_path / "full")
    for run, stage in (("monday", "data"), ("tuesday", "train")):
        folder = tmp_path / "full/tuesday" / run / find_stage(stage).folder
        for name, known in read_json(folder / "manifest.json")["outputs"].items():
            assert identify(folder / "artefacts" / name) == known


def test_names_in_the_zip_are_safe_and_the_same_run_gives_the_same_zip(mine, tmp_path):
    first, second = (archive.export_run(mine / "tuesday", tmp_path / f"{i}.zip") for i in (1, 2))
    assert first.read_bytes() == second.read_bytes()
    names = zipfile.ZipFile(first).namelist()
    assert all(n.startswith("tuesday/") and ".." not in n and "/." not in n for n in names) and len(names) == len(set(names))
    assert {f"tuesday/tuesday/{s.folder}/manifest.json" for s in STAGES if (mine / "tuesday" / s.folder).exists()} <= set(names)


def test_a_zip_is_whole_or_not_there(mine, tmp_path):
    out = archive.export_run(mine / "thursday", tmp_path / "zips/t.zip")
    before = out.read_bytes()
    with lock_run(mine / "tuesday"), pytest.raises(StageError, match="another process is working in this run"):
        archive.export_run(mine / "tuesday", out)
    (mine / "tuesday/07_evaluate/manifest.json").write_text('{"cut off')
    with pytest.raises(Exception, match="not a JSON file"):
        archive.export_run(mine / "tuesday", out)
    assert out.read_bytes() == before and [p.name for p in out.parent.iterdir()] == ["t.zip"]


# --- the commands ----------------------------------------------------------------------------------------------------


def test_ls_and_show_speak_to_people_and_to_programs(mine):
    listed = amhs(mine, "ls")
    assert [line.split()[2] for line in listed.stdout.splitlines()[2:]] == ["thursday", "wednesday", "tuesday", "monday"]
    records = json.loads(amhs(mine, "ls", "--json").stdout)
    assert [r["run_id"] for r in records] == ["thursday", "wednesday", "tuesday", "monday"] and records[2]["status"] == "refused"
    shown = amhs(mine, "show", "tues").stdout
    assert shown.startswith("tuesday: refused. Refused by stage evaluate") and "train mae: 3.0 jobs" in shown
    assert shown.splitlines()[-1] == "Report: runs/tuesday/index.html"
    assert json.loads(amhs(mine, "show", "tuesday", "--json").stdout) == archive.run_facts(mine / "tuesday")
    wrong = amhs(mine, "show", "friday")
    assert wrong.returncode == 2 and wrong.stderr.startswith("amhs: no such run") and wrong.stdout == ""


def test_export_writes_beside_whoever_asks(mine):
    done = amhs(mine, "export", "wed")
    assert done.returncode == 0 and (mine.parent / "wednesday.zip").is_file()
    assert done.stdout.startswith("Written: wednesday.zip (") and "open wednesday/index.html" in done.stdout
    assert amhs(mine, "export", "thursday", "--out", "deep/x.zip", "--with-artefacts").returncode == 0
    assert any("/artefacts/" in n for n in zipfile.ZipFile(mine.parent / "deep/x.zip").namelist())
