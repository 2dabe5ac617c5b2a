"""The commands around the service, as typed: deploy, keys, rules, serve."""

import shutil

import pytest
from served import labelled, small_package
from typer.testing import CliRunner

from amhs.cli import app
from amhs.core import InputError, ParameterError, project_root, write_json
from amhs.inference import load_package
from amhs.serving import find_package, service_environment
from amhs.stages import identify, outside_name
from amhs.telemetry import write_dataset


@pytest.fixture(scope="module")
def data():
    return labelled(days=3)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return small_package(tmp_path_factory)


@pytest.fixture
def amhs(tmp_path, monkeypatch):
    for name in ("DEPLOYED", "KEYS", "RUNS"):
        monkeypatch.setenv(f"AMHS_{name}", str(tmp_path / name.lower()))

    def call(*words):
        done = CliRunner().invoke(app, list(map(str, words)), env={"COLUMNS": "200"})
        if isinstance(done.exception, Exception) and not isinstance(done.exception, SystemExit):
            raise done.exception
        return done.stdout

    return call


def test_a_life_of_a_deployment(amhs, package):
    version = load_package(package).version
    assert "no line is deployed yet" in amhs("deploy", "ls")
    assert version in amhs("deploy", "put", package, "--why", "first")
    assert "HUB2: rules alone, rules" in amhs("deploy", "assign", "HUB2", "--hybrid", "rules", "--why", "new line")
    amhs("deploy", "put", version, "--line", "HUB2", "--as", "shadow", "--who", "kim")
    shown = amhs("deploy", "ls")
    assert shown.count(version) == 3 and "HUB1" in shown and "shadow" in shown
    amhs("deploy", "assign", "HUB1", "--live", "", "--hybrid", "rules")
    with pytest.raises(InputError, match="no earlier model"):
        amhs("deploy", "rollback", "HUB1")
    amhs("deploy", "retire", "HUB2", "--why", "line closed")
    history = amhs("deploy", "history")
    assert [word in history for word in ("first", "new line", "kim", "line closed")] == [True] * 4
    with pytest.raises(ParameterError, match="no such package is deployed"):
        amhs("deploy", "assign", "HUB1", "--live", "9-00000000")


def test_the_latest_package_is_the_newest_runs(amhs, package, tmp_path):
    with pytest.raises(InputError, match="no run has a package yet"):
        find_package("latest")
    home = tmp_path / "runs/20260301-090000-demo/08_inference/artefacts/package"
    shutil.copytree(package, home)
    assert find_package("latest") == find_package("20260301-090000-demo") == home
    assert load_package(package).version in amhs("deploy", "put")


def test_the_nth_model_is_one_command(amhs, package, tmp_path, monkeypatch):
    from amhs import registry

    asked = []

    def fetched(ref, folder, part="model"):
        asked.append((ref, part))
        return shutil.copytree(package, folder, dirs_exist_ok=True)

    monkeypatch.setattr(registry, "fetch_version", fetched)
    monkeypatch.setenv("AMHS_DATA", str(tmp_path))
    monkeypatch.setenv("AMHS_REGISTRY", f"sqlite:///{tmp_path}/mlflow.sqlite")
    assert load_package(package).version in amhs("deploy", "put", "3")
    assert load_package(package).version in amhs("deploy", "put", "simulated/champion")
    assert asked == [("3", "package"), ("simulated/champion", "package")]
    monkeypatch.setenv("AMHS_REGISTRY", "off")
    with pytest.raises(InputError, match="no such package"):
        amhs("deploy", "put", "3")


def test_keys_are_shown_once(amhs, tmp_path):
    assert "no key was made yet" in amhs("keys", "ls")
    key = amhs("keys", "add", "line monitor").strip()
    shown = amhs("keys", "ls")
    assert key.startswith("amhs_") and "line monitor" in shown and key.split("_")[2] not in shown
    assert "line monitor: revoked" in amhs("keys", "revoke", key.split("_")[1])
    with pytest.raises(ParameterError, match="needs a name"):
        amhs("keys", "add", " ")


def test_rules_are_checked_and_judged(amhs, data, tmp_path):
    write_dataset(data.telemetry, tmp_path / "telemetry")
    assert "operators-" in amhs("rules", "check") and "hub_free_slots < 590" in amhs("rules", "check")
    mine = tmp_path / "mine.yaml"
    mine.write_text("rules:\n  always: {when: [hub_jobs >= 0]}\n")
    shown = amhs("rules", "judge", mine, "--data", tmp_path / "telemetry")
    assert "mine-" in shown and "level rule" in shown and "HUB1" in shown
    mine.write_text("rules:\n  always: {when: [hub_job >= 0]}\n")
    with pytest.raises(ParameterError, match="did you mean hub_jobs"):
        amhs("rules", "check", mine)


def test_what_a_run_proposes_is_shown_approved_and_taken_back(amhs, tmp_path, monkeypatch):
    params, stage = tmp_path / "params", tmp_path / "runs/20260301-090000-demo/07_evaluate"
    monkeypatch.setenv("AMHS_PARAMS", str(params))
    shutil.copytree(project_root() / "params", params)
    in_use, proposed = params / "rules.yaml", stage / "artefacts/rules.proposed.yaml"
    old = in_use.read_text()
    proposed.parent.mkdir(parents=True)
    proposed.write_text(old + "  learnt_1: {severity: 2, when: [hub_commands >= 240]}\n")
    write_json(stage.parent / "run.json", {"started": "2026-03-01T09:00:00+00:00", "sources": {}})
    known = {"outputs": {proposed.name: identify(proposed)}, "files": {outside_name(in_use): identify(in_use)}, "status": "finished"}
    write_json(stage / "manifest.json", known)
    assert "+  learnt_1: {severity: 2, when: [hub_commands >= 240]}" in amhs("rules", "diff", "20260301")
    assert amhs("rules", "approve", "20260301-090000-demo", "--who", "kim") == "" and in_use.read_text() == old, "no reason, no change"
    assert "is in use now" in amhs("rules", "approve", "20260301-090000-demo", "--who", "kim", "--why", "earlier by 4 min")
    assert in_use.read_text() == proposed.read_text() and "in use already" in amhs("rules", "diff", "20260301")
    with pytest.raises(InputError, match="have changed since"):
        amhs("rules", "approve", "20260301", "--why", "again")
    before = next(p.stem for p in (tmp_path / "deployed/rules").glob("*.yaml") if p.read_text() == old)
    amhs("rules", "restore", before, "--who", "lee", "--why", "too many alarms")
    history = amhs("rules", "history")
    assert in_use.read_text() == old and [word in history for word in ("kim", "lee", "earlier by 4 min", before)] == [True] * 4
    proposed.write_text(old)
    with pytest.raises(InputError, match="is not what that stage wrote"):
        amhs("rules", "approve", "20260301", "--why", "tampered with")


def test_the_service_gets_the_environment_it_needs():
    told = service_environment({"OMP_NUM_THREADS": "3", "HOME": "/home/kim"})
    assert told["OMP_NUM_THREADS"] == "3" and told["BENTOML_DO_NOT_TRACK"] == "True" and told["HOME"] == "/home/kim"
