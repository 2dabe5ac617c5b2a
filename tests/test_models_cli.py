"""`amhs models` as a person types it: one command for each question, exit codes, JSON; and what a run says of its registering."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from fake_runs import fake_run
from toy_project import make_project
from typer.testing import CliRunner

from amhs import cli
from amhs.core import AmhsError, sha256_tree
from amhs.runs import Manner, Reporter, run_pipeline

AMHS = Path(sys.executable).with_name("amhs")
pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, with SQLAlchemy 2.1


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    "A project with four runs that were never registered; the last two may not be used or were never confirmed."
    with pytest.MonkeyPatch.context() as patch:
        root = make_project(tmp_path_factory.mktemp("house"))
        for key in ("AMHS_RUNS", "AMHS_DATA", "AMHS_REGISTRY_ARTIFACTS"):
            patch.delenv(key, raising=False)
        patch.setenv("AMHS_ROOT", str(root))
        patch.setenv("AMHS_REGISTRY", "sqlite:///data/mlflow.sqlite")
        for day, skill, gate in ((16, 0.30, True), (17, 0.38, True), (18, 0.45, False)):
            fake_run(root / "runs", f"run{day}", day, skill, gate=gate)
        fake_run(root / "runs", "failed", 19, confirmed=False, status="error")
        yield root


def models(*words):
    "Exit code and output of `amhs models …` in this process, as its `main` gives them."
    done = CliRunner().invoke(cli.app, ["models", *words])
    if isinstance(done.exception, AmhsError):
        return done.exception.exit_code, f"amhs: {done.exception}"
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.output


def data(*words):
    code, out = models(*words, "--json")
    assert code == 0, out
    return json.loads(out)


def test_a_week_of_decisions(house):
    assert models("ls") == (0, "No model is registered; confirm one (`amhs run develop`), then `amhs models sync`.\n")
    assert [(r["kind"], r["name"]) for r in data("sync")] == [("run", "run16"), ("model", "fab1/1"), ("run", "run17"), ("model", "fab1/2"),
                                                              ("run", "run18"), ("model", "fab1/3"), ("run", "failed")]
    assert models("sync") == (0, "Nothing new; every run is registered.\n")
    assert models("history") == (0, "No version was ever taken into use.\n")

    best, = data("ls", "--best")  # which model was best
    assert (best["version"], best["skill_change_max_10"], best["best"]) == (2, 0.38, True)
    assert models("promote", "1", "--who", "kim") == (0, "fab1/1 is champion now.\n")  # deploy the n-th
    assert models("promote", "best", "--why", "more skill", "--who", "lee") == (0, "fab1/2 is champion now.\n")
    today = data("history")[0]["at"][:10]
    shown = data("show", "today")  # which did I run on that day
    assert (shown["number"], shown["aliases"], [h["who"] for h in shown["history"]]) == (2, ["champion"], ["lee"])
    assert {a["aliases"] for a in data("ls")} == {"champion", "previous", ""}
    assert models("rollback", "--why", "false alarms") == (0, "fab1/1 is champion again.\n")
    said = models("history")[1]
    assert [w in said for w in ("more skill", "false alarms", "kim", today)] == [True] * 4

    code, said = models("promote", "3")
    assert code == 3 and "failed: evaluate.skill_change_max_10" in said
    assert models("promote", "3", "--force")[0] == 2
    assert models("promote", "3", "--force", "--why", "tried by hand") == (0, "fab1/3 is champion now.\n")
    assert "tried by hand" in models("show", "3")[1]
    assert "tried by hand" in models("card", "champion")[1]

    assert ("evaluate.skill_change_max_10", "0.3", "0.38") in [(d["name"], d["fab1/1"], d["fab1/2"]) for d in data("diff", "1", "2")]
    assert models("diff", "1", "1") == (0, "They do not differ.\n")
    assert models("fetch", "2", str(house / "out"))[0] == 0
    assert sha256_tree(house / "out") == sha256_tree(house / "runs/run17/07_evaluate/artefacts/confirmed_model")


def test_a_table_is_read_at_a_glance(house):
    models("sync")
    code, said = models("ls")
    head, _, *rows = said.splitlines()
    assert re.split(r"\s{2,}", head.strip()) == ["model", "version", "aliases", "best", "confirmed", "run", "skill_change_max_10", "gates", "data", "commit"]
    assert [row.split()[1] for row in rows] == ["3", "2", "1"]
    assert "2026-11-17 05:00" in rows[1] and "0.38" in rows[1] and "yes" in rows[1]
    assert models("show", "1")[1].splitlines()[0].startswith("fab1/1: ")


@pytest.mark.parametrize("words", [("show", "9"), ("show", "fab2/1"), ("card", "2026-99-99"), ("promote", "bets"), ("promote", "1", "--alias", "king"),
                                   ("diff", "1", "x y"), ("show", "2020-01-01"), ("fetch", "1", "out", "--part", "engine")])
def test_a_wrong_word_is_exit_code_2_and_says_what_would_be_right(house, words):
    models("sync")
    code, said = models(*words)
    assert code == 2 and said.count(". ") >= 1, said


def test_what_is_left_out_is_told_by_the_exit_code(house):
    bad = house / "runs/run17/07_evaluate/manifest.json"
    text = bad.read_text()
    bad.write_text("{")
    try:
        code, said = models("sync")
        assert code == 1 and "left out" in said and "not a JSON file" in said
    finally:
        bad.write_text(text)


def amhs(*words, **env):
    return subprocess.run([AMHS, *words], env=os.environ | env, capture_output=True, text=True, timeout=300)


def test_typed_in_a_shell(house):
    models("sync")
    done = amhs("models", "ls", "--best", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)[0]["version"] == 2, done.stderr
    again = amhs("models", "ls", "--best", "--json")
    assert again.stdout == done.stdout
    refused = amhs("models", "promote", "3")
    assert refused.returncode == 3 and refused.stderr.startswith("amhs: fab1/3 is not promoted") and refused.stderr.count("\n") == 1
    gone = amhs("models", "ls", AMHS_REGISTRY="http://127.0.0.1:9")
    assert gone.returncode == 1 and "does not answer" in gone.stderr and gone.stderr.count("\n") == 1
    off = amhs("models", "sync", AMHS_REGISTRY="off")
    assert off.returncode == 1 and "the registry is off" in off.stderr


def test_the_quick_answer_is_never_an_old_one(house):
    models("sync")
    models("promote", "1")
    before = data("ls")
    models("promote", "2")
    assert data("ls") != before
    fake_run(house / "runs", "run21", 21, 0.5)
    models("sync")
    assert data("ls")[0]["run"] == "run21"


def test_a_run_is_registered_as_it_ends(house):
    said = []
    result = run_pipeline(last="business", run_id="seen", manner=Manner(show=Reporter(said.append)))
    assert result.exit_code == 0
    assert said[-1].startswith("Registered: ") and "run seen" in said[-1]


def test_a_run_does_not_fail_by_its_registry(house, monkeypatch):
    said, quiet = [], []
    monkeypatch.setenv("AMHS_REGISTRY", "http://127.0.0.1:9")
    result = run_pipeline(last="business", run_id="unseen", forced=True, manner=Manner(show=Reporter(said.append)))
    assert (result.status, result.exit_code) == ("finished", 0)
    assert said[-1].startswith("Not registered: the registry does not answer") and "`amhs models sync` registers them later" in said[-1]
    run_pipeline(last="business", manner=Manner(show=Reporter(quiet.append)))
    assert not [line for line in quiet if "egistered" in line], "nothing was executed, nothing to register"
    monkeypatch.setenv("AMHS_REGISTRY", "sqlite:///data/mlflow.sqlite")
    assert "unseen" in [r["name"] for r in data("sync")]
