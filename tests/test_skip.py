"""Nothing runs twice: what is skipped, what runs again, and the reasons given."""

import json
import os
import time
from dataclasses import replace

import pytest
from toy_project import own_copy, own_project, write_stage

from amhs import answers, grids, runs, stages
from amhs.core import ParameterError, read_json, write_json
from amhs.plan import plan_run, reasons

QUIET = runs.Manner(fast=False, show=runs.Reporter(lambda line: None))
ALL = stages.PIPELINES["develop"]


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A toy project with one finished run of the whole pipeline."""
    with own_project(tmp_path_factory) as root:
        (root / "requirements.lock").write_text("numpy==1\n")
        assert runs.run_pipeline(run_id="first", manner=QUIET).status == "finished"
        yield root


@pytest.fixture
def toy(house, tmp_path, monkeypatch):
    return own_copy(house, tmp_path, monkeypatch)


def why(**asked) -> dict[str, str]:
    """Stages a plan would run, with the reasons."""
    return {s.stage.name: reasons(s) for s in plan_run(**asked).steps if s.action == "run"}


def test_asked_again_nothing_runs_and_no_run_is_made(toy):
    again = runs.run_pipeline(manner=QUIET)
    assert (again.run_id, again.executed, again.exit_code) == ("first", (), 0) and len(again.manifests) == len(ALL)
    assert [p.name for p in stages.list_runs()] == ["first"]


def test_prose_and_outputs_do_not_count(toy):
    path = toy / stages.find_stage("train").notebook
    book = read_json(path)
    book["cells"][0]["source"] += "\n\nMore prose."
    book["cells"][-1].update(outputs=[{"output_type": "stream", "name": "stdout", "text": "seen"}], execution_count=7)
    path.write_text(json.dumps(book))
    assert why() == {}


def test_a_changed_parameter_runs_its_stage_and_what_reads_a_changed_result(toy):
    said = why(sets={"train.trees": 7})
    default = read_json(toy / "runs/first/06_train/manifest.json")["parameters"]["trees"]
    assert said == {"train": f"train.trees changed {default} → 7", "evaluate": "train runs before it; skipped if that changes nothing it reads",
                    "inference": "evaluate runs before it; skipped if that changes nothing it reads",
                    "integration": "evaluate runs before it; skipped if that changes nothing it reads; "
                                   "inference runs before it; skipped if that changes nothing it reads"}
    done = runs.run_pipeline(sets={"train.trees": 7}, manner=QUIET)
    assert done.executed == ("train",), "the toy's model came out the same, so evaluating it again would change nothing"
    assert read_json(done.folder / "run.json")["sources"].keys() == {*ALL} - {"train"}
    assert runs.run_pipeline(sets={"train.trees": 7}, manner=QUIET).run_id == done.run_id
    assert runs.run_pipeline(manner=QUIET).run_id == "first", "the older answer is still there"


def test_a_changed_result_runs_what_read_it(toy):
    write_stage(toy, "data", "run.output('labelled').write_text('other labels')\nrun.output = lambda name: run.folder / 'unused'")
    done = runs.run_pipeline(manner=QUIET)
    assert done.executed == ("data", "develop", "train", "evaluate", "inference", "integration") and why() == {}
    assert read_json(done.folder / "run.json")["steps"]["develop"]["why"] == ["input data/labelled changed"]


def test_code_library_lock_and_python_count(toy):
    write_stage(toy, "poc", "1 + 1")
    path = toy / "runs/first/06_train/manifest.json"
    manifest = read_json(path)
    manifest["code"]["modules"]["core"] = "0" * 64
    manifest["environment"]["python"] = "3.9.1"
    write_json(path, manifest)
    said = why()
    assert said["poc"] == "the code of nbs/stages/02_poc.ipynb changed"
    assert "amhs/core.py changed" in said["train"] and "Python changed 3.9.1 →" in said["train"]
    (toy / "requirements.lock").write_text("numpy==2\n")
    assert all("requirements.lock changed" in text for text in why().values()) and len(why()) == len(ALL)


def test_files_from_outside_count_by_content(toy):
    (toy / "export.csv").write_text("1")
    write_stage(toy, "poc", "run.depends_on('export.csv')".replace("'export.csv'", f"'{toy / 'export.csv'}'"))
    assert runs.run_pipeline(last="poc", manner=QUIET).executed == ("poc",)
    os.utime(toy / "export.csv")
    assert why(last="poc") == {}, "touched, not changed"
    (toy / "export.csv").write_text("2")
    assert why(last="poc") == {"poc": "export.csv changed"}
    (toy / "export.csv").unlink()
    assert why(last="poc") == {"poc": "export.csv is gone"}


def test_a_damaged_artefact_is_made_again(toy):
    (toy / "runs/first/02_poc/artefacts/poc_model").write_text("touched up")
    assert why() == {"poc": "its artefacts in first are damaged"}


def test_a_stage_that_failed_has_nothing_to_offer(toy):
    write_stage(toy, "poc", "1 / 0")
    assert runs.run_pipeline(last="poc", manner=QUIET).exit_code == 1
    assert "poc" in why(last="poc")


def test_a_refusal_is_remembered_too(toy):
    write_stage(toy, "train", "run.gate('r2', 0.1, 0.5)")
    first = runs.run_pipeline(manner=QUIET)
    assert (first.status, first.executed) == ("refused", ("train",))
    again = runs.run_pipeline(manner=QUIET)
    assert (again.status, again.executed, again.run_id) == ("refused", (), first.run_id)


def test_force_runs_everything(toy):
    assert why(last="prototype", forced=True) == dict.fromkeys(("business", "poc", "prototype"), "asked for")
    assert runs.run_pipeline(last="poc", forced=True, manner=QUIET).executed == ("business", "poc")


def test_resume_goes_on_from_the_failed_stage(toy):
    from amhs.plan import resumed

    write_stage(toy, "prototype", "1 / 0")
    bad = runs.run_pipeline(sets={"poc.min_skill": 0.01}, run_id="bad", manner=QUIET)
    assert bad.status == "error" and bad.executed == ("poc", "prototype")
    write_stage(toy, "prototype")
    asked = resumed("bad")
    assert asked["first"] == "prototype" and asked["sets"] == {"poc.min_skill": 0.01} and asked["within"] == "bad"
    good = runs.run_pipeline(**asked, manner=QUIET)
    assert (good.run_id, good.status, good.executed) == ("bad", "finished", ("prototype",))


def test_independent_stages_run_side_by_side(toy):
    meet = "import time\n(stages.project_root() / '{me}').touch()\nend = time.time() + 40\n" \
           "while not (stages.project_root() / '{other}').exists() and time.time() < end: time.sleep(0.05)\n" \
           "assert (stages.project_root() / '{other}').exists()"
    write_stage(toy, "poc", meet.format(me="a", other="b"))
    write_stage(toy, "prototype", meet.format(me="b", other="a"))
    done = runs.run_pipeline(last="prototype", manner=replace(QUIET, jobs=2))
    assert done.status == "finished" and set(done.executed) == {"poc", "prototype"}


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_grid_shares_what_it_can(toy, jobs):
    made = grids.run_grid({"poc.seed": "1,2", "prototype.seed": [3, 4]}, {"last": "prototype"}, manner=replace(QUIET, jobs=jobs))
    executed = [name for r in made.results for name in r.executed]
    assert sorted(executed) == ["poc", "poc", "prototype", "prototype"] and made.exit_code == 0
    assert [c["poc.seed"] for c in made.combinations] == [1, 1, 2, 2]
    page = made.report.read_text()
    assert all(r.run_id in page for r in made.results) and "poc.seed" in page


def test_a_named_grid_gives_its_name_to_its_page_and_its_runs_and_takes_nobody_elses(toy):
    made = grids.run_grid({"business.seed": "1,2"}, {"last": "business"}, "seeds", replace(QUIET, jobs=2))
    assert made.folder.name == "seeds" and [r.run_id for r in made.results] == ["seeds-1", "seeds-2"]
    before = sorted((toy / "runs").rglob("*"))
    for name in ("seeds", "first"):
        (toy / "runs" / f"{name}-2").mkdir(exist_ok=True)
        with pytest.raises(ParameterError, match="of this name already"):
            grids.run_grid({"business.seed": "1,2"}, {"last": "business"}, name, QUIET)
    (toy / "runs/first-2").rmdir()
    assert sorted((toy / "runs").rglob("*")) == before


def test_a_grid_with_a_wrong_value_starts_nothing(toy):
    before = stages.list_runs()
    with pytest.raises(ParameterError, match="trees"):
        grids.run_grid({"train.trees": "5,many"}, {}, manner=QUIET)
    assert stages.list_runs() == before


def test_an_answer_holds_until_a_file_it_rests_on_changes(toy):
    found = runs.run_pipeline(manner=QUIET)
    answers.remember("asked", 1, runs.rests_on(found))
    assert answers.recall("asked") == 1
    for file in ("settings.ini", "params/train.yaml", "nbs/stages/06_train.ipynb", "runs/first/04_data/artefacts/labelled"):
        before = (toy / file).stat()
        time.sleep(0.01)
        os.utime(toy / file)
        assert answers.recall("asked") is None, file
        os.utime(toy / file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert answers.recall("asked") == 1
    (toy / "runs/first/06_train/artefacts/model").unlink()
    assert answers.recall("asked") is None
