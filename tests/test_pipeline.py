"""The real stages, run by the real runner on a small simulated hub: what a data scientist gets from `make run`, in small."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml

from amhs import develop, runs, stages
from amhs.config import SourceColumn, load_site
from amhs.core import read_json, sha256_file
from amhs.features import build_features
from amhs.inference import load_package
from amhs.model import load_model
from amhs.plan import plan_run
from amhs.simulate import simulate
from amhs.telemetry import SCHEMA

QUIET = runs.Manner(show=runs.Reporter(lambda line: None))
AMHS = Path(sys.executable).with_name("amhs")


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    "Runs and data of these tests go into a folder of their own; documents come in both languages."
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("pipeline")
        patch.setenv("AMHS_RUNS", str(root / "runs"))
        patch.setenv("AMHS_DATA", str(root / "data"))
        patch.setenv("AMHS_LANG", "both")
        yield root


@pytest.fixture(scope="module")
def smoke(house):
    "One run of the whole pipeline, shared by the tests below."
    return runs.run_pipeline("develop", "smoke", run_id="smoke", manner=QUIET)


def manifest(result, stage):
    return next(m for m in result.manifests if m["stage"] == stage)


def test_every_stage_finishes(smoke):
    assert [m["stage"] for m in smoke.manifests] == list(stages.PIPELINES["develop"])
    assert {m["status"] for m in smoke.manifests} <= {"finished", "gate failed"}, [m["error"] for m in smoke.manifests]


def test_documents_open_offline_with_their_pictures(smoke):
    for stage in map(stages.find_stage, stages.PIPELINES["develop"]):
        for owed in stage.deliverables:
            page = (smoke.folder / stage.folder / "documents" / f"{owed.name}.html").read_text()
            assert owed.title_ko in page
            assert not re.search(r'(src|href)="https?:', page)
    report = (smoke.folder / "07_evaluate/documents/experiment_report.html").read_text()
    assert report.count("data:image/png;base64,") >= 3


def test_korean_documents_speak_korean(smoke):
    "Every heading and head of a table, every verdict and reason: real tables hold no English but names of columns, models and artefacts."
    for stage in map(stages.find_stage, stages.PIPELINES["develop"]):
        for owed in stage.deliverables:
            text = (smoke.folder / stage.folder / "documents" / f"{owed.name}.ko.md").read_text(encoding="utf-8")
            heads = [line for line in text.splitlines() if line.startswith("#")]
            assert heads and all(re.search("[가-힣]", line) for line in heads)
            prose = re.sub(r"`[^`]*`|\(\S+\.png\)", "", text)
            assert not re.search(r"[A-Za-z]+ [a-z]+ [a-z]+|\b(pass|FAIL|True|False|verdict|nan|None)\b", prose), (owed.name, prose)
            tables = re.findall(r"(?m)^\|(.+)\|\n\| *:?--", text)
            plain = {"", "#", "v8", "hub", "MAE", "depth", "learning_rate", "min_child_weight", "subsample", "colsample"}
            assert [h for t in tables for h in map(str.strip, t.split("|")) if not re.search("[가-힣]", h) and h not in plain] == [], owed.name


def test_changing_a_criterion_makes_no_data_and_no_model_old(smoke):
    "Who asks for more events caught states it anew in stage 01; data, search and training stand."
    asked = {"business.min_event_recall": "0.3", "business.max_false_per_day": "2"}
    again = runs.run_pipeline("develop", "smoke", asked, last="train", run_id="stricter", manner=QUIET)
    assert again.executed == ("business",)
    assert plan_run("develop", "smoke", asked).steps[-1].why == ("input business/criteria.json changed",)


def test_every_plot_is_followed_by_a_conclusion():
    "In the stage notebooks a reviewer finds a sentence after each table or plot he has to judge."
    for path in Path(__file__).parent.parent.glob("nbs/stages/*.ipynb"):
        cells = nbformat.read(path, 4).cells
        for i, cell in enumerate(cells):
            if cell.cell_type == "code" and "plots." in cell.source and "import" not in cell.source:
                assert any(c.cell_type == "markdown" and c.source.startswith("*") for c in cells[i + 1 : i + 2]), f"{path.name}: {cell.source}"


def test_report_and_manifest_tell_data_code_parameters_metrics_verdict(smoke):
    found = read_json(smoke.folder / "07_evaluate/manifest.json")
    assert found["parameters"]["bootstrap"] == 50
    assert found["metrics"]["verdict"]["value"] in ("confirmed", "refused")
    assert {g["name"] for g in found["gates"]} >= {"skill_change_max_10", "event_recall", "false_per_day", "leaks"}
    assert "labelled" in json.dumps(found["inputs"])


def test_baselines_stand_beside_the_model(smoke):
    tables = read_json(smoke.folder / "07_evaluate/artefacts/evaluation.json")
    skill = {(r["model"], r["horizon_min"]): r["value"] for r in tables["levels"] if r["metric"] == "skill" and r["target"] == "max"}
    assert {m for m, _ in skill} == {"persistence", "linear", "v8", "hub"}
    assert all(skill["persistence", h] == 0 for h in (10, 15, 25))
    assert skill["hub", 10] > 0


def test_same_seed_same_numbers(smoke):
    again = runs.run_pipeline("develop", "smoke", first="train", last="train", forced=True, manner=QUIET)
    first, second = manifest(smoke, "train"), again.manifests[0]
    assert [g["value"] for g in first["gates"]] == [g["value"] for g in second["gates"]]
    files = [sorted((f / "06_train/artefacts/model").glob("*.ubj")) for f in (smoke.folder, again.folder)]
    assert [sha256_file(p) for p in files[0]] == [sha256_file(p) for p in files[1]]


def test_confirmed_package_answers_by_itself(smoke):
    "The package alone, without the run, forecasts new telemetry."
    folder = smoke.folder / "07_evaluate/artefacts/confirmed_model"
    if manifest(smoke, "evaluate")["metrics"]["verdict"]["value"] == "refused":
        assert not folder.exists()
        pytest.skip("the smoke model was refused, so there is no package to ask")
    contents = read_json(folder / "contents.json")
    assert all(sha256_file(folder / name) == known for name, known in contents.items())
    model, interface = load_model(folder / "model"), read_json(folder / "interface.json")
    fresh = simulate(1, seed=99).telemetry
    forecast = model.predict(build_features(fresh, interface["feature_set"], load_site("simulated")))
    assert list(forecast.columns) == interface["gives"] and len(forecast)


def test_the_deployment_package_says_what_the_confirmed_model_says(smoke):
    "What a service loads, alone: its answers, its proof, and where it stands in the run."
    if manifest(smoke, "evaluate")["metrics"]["verdict"]["value"] == "refused":
        assert manifest(smoke, "inference")["status"] == "skipped"
        pytest.skip("the smoke model was refused, so there is no package to ask")
    package = load_package(smoke.folder / "08_inference/artefacts/package")
    model = load_model(smoke.folder / "07_evaluate/artefacts/confirmed_model/model")
    features = build_features(simulate(9, seed=99).telemetry, package.feature_set, package.site).tail(500)
    said = package.forecasts(features[list(package.engine.features)].to_numpy("float32"))
    assert abs(said - model.predict(features).to_numpy()).max() < 1e-4
    proof = {row["engine"]: row for row in read_json(package.folder / "proof.json")}
    assert set(proof) == {"boosters", "merged", "onnx", "forest"} and proof[package.engine.kind]["proven"] and proof[package.engine.kind]["chosen"]
    found = manifest(smoke, "inference")
    assert {g["name"] for g in found["gates"]} == {"parity", "replay", "latency"} and found["metrics"]["version"]["value"] == package.version


@pytest.mark.full
def test_a_refused_model_leaves_no_package(smoke):
    asked = {"business.min_skill_change_max": "0.99"}
    runs.run_pipeline("develop", "smoke", asked, last="data", run_id="strict", manner=QUIET)
    result = runs.run_pipeline("develop", "smoke", asked, first="develop", within="strict", manner=QUIET)
    assert result.exit_code == 3 and "develop" in result.verdict
    assert not (result.folder / "07_evaluate/artefacts/confirmed_model").exists()


def test_a_skipped_poc_is_on_record(house):
    sets = {"poc.skip": "true", "poc.skip_reason": "V8 is in use"}
    result = runs.run_pipeline("develop", "smoke", sets, last="poc", manner=QUIET)
    found = manifest(result, "poc")
    assert (found["status"], found["reason"]) == ("skipped", "V8 is in use")
    assert "V8 is in use" in (result.folder / "index.html").read_text()


def own_export(folder: Path, days: int) -> tuple[Path, Path]:
    "A site's own CSV in CP949 with Korean names and few columns, and a profile for it."
    names = {"hub_jobs": "허브 작업수", "hub_free_slots": "허브 여유", "hub_queue": "대기열", "upper_to_hub_jobs": "상층 유입",
             "hub_to_upper_jobs": "상층 유출", "fab_over_4min": "4분 초과"}
    table = simulate(days, seed=5).telemetry
    out = table[list(names)].rename(columns=names)
    out.insert(0, "시각", table["timestamp"].dt.tz_convert("Asia/Seoul").dt.strftime("%Y%m%d%H%M"))
    (folder / "export.csv").write_bytes(out.to_csv(index=False).encode("cp949"))
    columns = {k: SourceColumn(source=v).source for k, v in names.items()}
    profile = {"name": "mysite", "timezone": "Asia/Seoul", "line": "M14", "time": {"column": "시각", "format": "%Y%m%d%H%M"}, "columns": columns}
    simulated = load_site("simulated")
    profile |= {"thresholds": {"surge_level": simulated.thresholds.surge_level}, "classes": {h: list(e) for h, e in simulated.classes.items()}}
    (folder / "mysite.yaml").write_text(yaml.safe_dump(profile, allow_unicode=True), encoding="utf-8")
    return folder / "export.csv", folder / "mysite.yaml"


def test_own_csv_becomes_a_model(house, tmp_path):
    "Import a site's export by command line, then train on it: works with the columns there are, names the rest."
    export, profile = own_export(tmp_path, days=15)
    done = subprocess.run([AMHS, "import", export, "--site", profile, "--out", tmp_path / "data"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    sets = {"business.site": str(profile), "business.source": str(tmp_path / "data"), "business.days": "15"}
    result = runs.run_pipeline("develop", "smoke", sets, last="train", run_id="own", manner=QUIET)
    assert {m["status"] for m in result.manifests} <= {"finished", "gate failed"}, [m["error"] for m in result.manifests]
    report = (result.folder / "03_prototype/documents/prototype_fit.md").read_text()
    assert all(c.name in report for c in SCHEMA)
    assert manifest(result, "prototype")["metrics"]["columns_missing_at_site"]["value"] == len(SCHEMA) - 6
    labelled = develop.load_labelled(result.folder / "04_data/artefacts/labelled")
    assert set(labelled.telemetry["line"]) == {"M14"}
    assert labelled.telemetry["timestamp"].dt.tz is not None
    assert {str(profile), str(tmp_path / "data")} < manifest(result, "data")["files"].keys()
    profile.write_text(profile.read_text() + "gaps: {fill_up_to_min: 2}\n")
    for stage in ("business", "prototype", "data"):
        assert f"{profile} changed" in plan_run("develop", "smoke", sets, stage, stage, within="own").steps[0].why


@pytest.mark.full
def test_flights_go_the_whole_way(house):
    "Real queues nobody here wrote, one airport, through the same stages."
    sets = {"business.site": "nycflights", "business.source": "nycflights", "business.line": "LGA", "business.days": "365"}
    result = runs.run_pipeline("develop", "smoke", sets, run_id="flights", manner=QUIET)
    assert {m["status"] for m in result.manifests} <= {"finished", "gate failed"}, [m["error"] for m in result.manifests]
    tables = read_json(result.folder / "07_evaluate/artefacts/evaluation.json")
    skill = pd.DataFrame(tables["levels"]).query("metric == 'skill' and target == 'max' and horizon_min == 10").set_index("model")["value"]
    assert skill["hub"] > skill["persistence"]
