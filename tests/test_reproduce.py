"""A run executed again from its record: what is the same, what differs, and why."""

import json
import re
import shutil

import pytest
from test_cli import amhs
from toy_project import own_copy, own_project, write_stage

from amhs import runs, stages
from amhs.core import InputError, read_json
from amhs.reproduce import reproduce, reproduction_text

QUIET = runs.Manner(fast=False, show=runs.Reporter(lambda line: None))


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A toy project with a run of its first stages, and one that began in the middle."""
    with own_project(tmp_path_factory) as root:
        write_stage(root, "business", "run.metric('rate', 3, unit='jobs/min')")
        runs.run_pipeline(last="poc", run_id="first", sets={"business.seed": 5, "business.line": '"A: 1"'}, manner=QUIET)
        runs.run_pipeline(first="poc", last="poc", run_id="middle", forced=True, manner=QUIET)
        yield root


@pytest.fixture
def toy(house, tmp_path, monkeypatch):
    return own_copy(house, tmp_path, monkeypatch)


def test_nothing_changed_and_all_is_the_same(toy):
    found = reproduce("first", QUIET)
    assert found.same and not found.why and {r["stage"] for r in found.rows} == {"business", "poc"}
    assert "every artefact to the bit" in reproduction_text(found)
    assert read_json(found.again.folder / "01_business/manifest.json")["parameters"]["line"] == "A: 1"


def test_parameters_are_those_of_the_run_whatever_the_files_say_by_now(toy):
    path = toy / "params/business.yaml"
    path.write_text(re.sub("(?m)^days: .*", "days: 77", path.read_text()))
    found = reproduce("first", QUIET)
    assert found.same and read_json(found.again.folder / "01_business/manifest.json")["parameters"]["days"] != 77


def test_a_run_that_began_in_the_middle_reads_what_it_read_then(toy):
    runs.run_pipeline(last="business", run_id="newer", sets={"business.seed": 9}, forced=True, manner=QUIET)
    found = reproduce("middle", QUIET)
    assert found.same and read_json(found.again.folder / "run.json")["sources"]["business"] == "first"


def test_what_changed_since_is_named(toy):
    write_stage(toy, "business", "run.metric('rate', 4, unit='jobs/min')")
    (toy / "requirements.lock").write_text("numpy==2\n")
    found = reproduce("first", QUIET)
    said = reproduction_text(found)
    assert not found.same and "business: metric rate was 3, is 4" in said and "not reproducible" not in said
    assert found.why["business"] == ["the code of nbs/stages/01_business.ipynb changed", "requirements.lock changed"]
    assert "Code: no git then" in said


def test_a_stage_that_asks_the_clock_is_told_apart_from_those_that_read_it(toy):
    write_stage(toy, "business", "import time\nrun.metric('now', time.time_ns())\nrun.seed = time.time_ns()")
    runs.run_pipeline(last="poc", run_id="restless", manner=QUIET)
    said = reproduction_text(reproduce("restless", QUIET))
    assert "business: its code" in said and "poc: its code" not in said


def test_a_run_that_lost_its_sources_is_refused(toy):
    shutil.rmtree(toy / "runs/first")
    with pytest.raises(InputError, match="run first does not hold stage business"):
        reproduce("middle", QUIET)


def test_by_command(toy):
    done = amhs(toy, "runs", "reproduce", "first")
    assert done.returncode == 0 and "every artefact to the bit" in done.stdout
    write_stage(toy, "poc", "run.metric('more', 1)")
    done = amhs(toy, "runs", "reproduce", "first")
    assert done.returncode == 3 and "the code of nbs/stages/02_poc.ipynb changed" in done.stdout
    assert json.loads((toy / "runs/latest.json").read_text())["run_id"] in done.stdout
    assert stages.find_stage("poc").notebook in done.stdout


def test_a_time_out_of_the_second_run_is_not_the_stages_nature(toy):
    write_stage(toy, "poc", "import os, time\ntime.sleep(0 if os.environ.get('QUICK') else 60)")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUICK", "1")
        runs.run_pipeline(last="poc", run_id="quick", manner=QUIET)
    done = amhs(toy, "runs", "reproduce", "quick", "--cell-timeout", "3")
    assert done.returncode == 3 and "poc: status was finished, is timed out" in done.stdout and "not reproducible" not in done.stdout
