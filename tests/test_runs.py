"""The runner through its public interface, on a toy project with the real stages and tiny notebooks."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_project import make_project, write_stage

from amhs import pages, plan, provenance, runs, stages
from amhs.config import load_params, read_yaml
from amhs.core import InputError, ParameterError, StageError, read_json, sha256_tree
from amhs.execute import Limits

QUIET = runs.Manner(fast=False, show=runs.Reporter(lambda line: None))


def noon():
    return datetime(2026, 7, 1, 12)


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A toy project with one finished run of the whole pipeline."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("house")
        for key in ("AMHS_RUNS", "AMHS_DATA", "AMHS_PARAMS", "AMHS_SITES"):
            patch.delenv(key, raising=False)
        patch.setenv("AMHS_ROOT", str(root))
        make_project(root)
        lines = []
        result = runs.run_pipeline(sets={"train.trees": "7"}, run_id="whole", manner=runs.Manner(fast=False, show=runs.Reporter(lines.append)))
        yield root, result, lines


@pytest.fixture
def toy(house, tmp_path, monkeypatch):
    """A copy of that project that a test may spoil."""
    shutil.copytree(house[0], tmp_path / "toy")
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path / "toy"))
    return tmp_path / "toy"


def run(first="business", last=None, **kw):
    return runs.run_pipeline(first=first, last=last or first, **{"manner": QUIET, **kw})


def one(toy, extra, name="business", **kw):
    """Run one stage whose extra cell holds this code; its manifest and folder."""
    write_stage(toy, name, extra)
    result = run(name, run_id="one", **kw)
    return result, result.manifests[0], result.folder / stages.find_stage(name).folder


# --- a run that goes well --------------------------------------------------------------------------------------------


def test_whole_pipeline_leaves_what_the_table_promises(house):
    _, result, lines = house
    assert (result.status, result.exit_code) == ("finished", 0)
    assert [m["stage"] for m in result.manifests] == list(stages.PIPELINES["develop"])
    for stage in map(stages.find_stage, stages.PIPELINES["develop"]):
        folder = result.folder / stage.folder
        assert {p.name for p in (folder / "artefacts").iterdir()} == set(stage.outputs)
        for document in stage.deliverables:
            assert (folder / "documents" / f"{document.name}.md").read_text().startswith(f"# {document.title} ({document.title_ko})")
        assert {"notebook.ipynb", "notebook.html", "manifest.json"} <= {p.name for p in folder.iterdir()}
    assert read_json(result.folder.parent / "latest.json") == {"run_id": "whole", "status": "finished", "report": "whole/index.html"}
    assert "04 data: cell 3 of 7" in lines and not list(result.folder.glob(".*.partial"))


def test_manifest_tells_the_truth(house):
    root, result, _ = house
    manifest = read_json(result.folder / "06_train" / "manifest.json")
    assert manifest["parameters"] == json.loads(load_params("train", sets={"train.trees": 7}).model_dump_json())
    defaults, demo = read_yaml(root / "params/train.yaml"), read_yaml(root / "params/profiles/demo.yaml")["train"]
    assert manifest["overridden"] == {"trees": {"value": 7, "default": defaults["trees"], "from": "--set"},
                                      "rows": {"value": demo["rows"], "default": defaults["rows"], "from": "profile demo"}}
    assert manifest["outputs"]["model"]["sha256"] == sha256_tree(result.folder / "06_train" / "artefacts" / "model")
    made = read_json(result.folder / "04_data" / "manifest.json")["outputs"]
    assert manifest["inputs"]["data"]["artefacts"] == made
    assert manifest["code"]["modules"].keys() == {"stages", "documents", "pages", "config", "core"}
    assert manifest["code"]["modules"]["core"] == sha256_tree(Path(runs.__file__).with_name("core.py"))
    assert manifest["metrics"]["seed_seen"]["value"] == manifest["seed"] == manifest["parameters"]["seed"]
    assert manifest["peak_memory_mb"] > 20 and 0.1 < manifest["duration_s"] < 120
    assert manifest["environment"]["packages"]["pandas"] == pd.__version__
    datetime.fromisoformat(manifest["started"])


def test_executed_notebook_shows_its_parameters(house):
    _, result, _ = house
    cells = stages.read_cells(result.folder / "06_train" / "notebook.ipynb")
    assert [c["id"] for c in cells[:4]] == ["title", "parameters-table", "params", "injected-parameters"]
    assert re.search(r"\| `trees` \| \*\*7\*\* \| \d+ \| \*\*--set\*\* \|", cells[1]["source"])
    text = (result.folder / "06_train" / "notebook.ipynb").read_text()
    assert str(result.folder) not in text, "an executed notebook names no folder of this machine in its metadata"


class Loads(HTMLParser):
    """Collects everything a page would fetch or link to."""

    def __init__(self, text):
        super().__init__()
        self.loads, self.links, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.loads += [attrs[k] for k in ("src", "srcset", "data", "poster") if attrs.get(k)]
        if tag == "link":
            self.loads.append(attrs.get("href"))
        elif attrs.get("href"):
            self.links.append(attrs["href"])


def test_pages_work_without_a_network(house):
    _, result, _ = house
    pages = list(result.folder.rglob("*.html"))
    documents = sum(len(s.deliverables) for s in map(stages.find_stage, stages.PIPELINES["develop"]))
    assert len(pages) == 1 + len(stages.PIPELINES["develop"]) + 2 * documents  # every document in English and Korean
    for path in pages:
        text = path.read_text()
        found = Loads(text)
        assert not re.search(r"@import|url\(\s*['\"]?(?!data:)", text), path
        inside = [s for s in found.loads if s.startswith("data:image/")]
        beside = [s for s in found.loads if not s.startswith("data:")]
        assert all((path.parent / s).is_file() for s in beside), path
        assert path.name == "index.html" or not beside, f"{path} must be one file"
        assert "documents" not in path.parts or inside, f"{path} lost its picture"
        for link in found.links:
            place, _, anchor = link.partition("#")
            assert (path.parent / place).exists() if place else anchor in found.ids or not anchor, (path, link)


def test_run_page_says_what_a_reviewer_needs(house):
    text = (house[1].folder / "index.html").read_text()
    for said in ("finished", "데이터 수집 및 검토", "change_mae_ratio", "trees = 7", "Experiment report", "seed seen"):
        assert said in text


# --- parts of a pipeline ---------------------------------------------------------------------------------------------


def test_from_takes_earlier_artefacts_from_the_newest_good_run(toy):
    part = run("train", "evaluate", run_id="part", forced=True)
    assert part.status == "finished"
    assert read_json(part.folder / "run.json")["sources"] == dict.fromkeys(("business", "poc", "prototype", "data", "develop"), "whole")
    assert part.manifests[0]["inputs"]["data"]["run_id"] == "whole" and part.manifests[1]["inputs"]["train"]["run_id"] == "part"
    again = run("evaluate", run_id="again", forced=True)
    assert again.manifests[0]["inputs"]["train"]["run_id"] == "part", "a run's trail leads through the run it took inputs from"
    assert again.manifests[0]["inputs"]["data"]["run_id"] == "whole"
    assert "../whole/index.html" in (part.folder / "index.html").read_text()


def test_going_on_in_a_run_replaces_its_stage(toy):
    old = read_json(toy / "runs/whole/07_evaluate/manifest.json")
    result = run("evaluate", within="whole", sets={"evaluate.bootstrap": 11})
    assert result.run_id == "whole" and result.manifests[0]["parameters"]["bootstrap"] == 11 != old["parameters"]["bootstrap"]
    assert read_json(toy / "runs/whole/07_evaluate/manifest.json") == result.manifests[0]
    assert sorted(p.name for p in result.folder.glob(".*")) == [".lock"]


def test_an_artefact_that_was_changed_is_refused(toy):
    (toy / "runs/whole/04_data/artefacts/labelled").write_text("touched up")
    with pytest.raises(InputError, match="artefact `labelled` of stage data is not what that stage wrote"):
        run("train")


def test_without_earlier_runs_a_part_is_refused(toy):
    shutil.rmtree(toy / "runs")
    with pytest.raises(InputError, match="run the earlier stages first"):
        run("train")


def test_order_of_stages_is_checked(toy):
    with pytest.raises(ParameterError, match="comes after"):
        run("train", "data")


# --- what is refused before a kernel starts --------------------------------------------------------------------------


@pytest.mark.parametrize(("sets", "said"), [
    ({"train.tress": "7"}, "unknown name `tress`; did you mean trees"),
    ({"trian.trees": "7"}, "use one of train"),
    ({"train.trees": "many"}, "trees"),
    ({"train.trees": "0"}, "greater than or equal to 1"),
    ({"evaluate.explained_rows": "1.5"}, "explained_rows"),
])
def test_bad_parameters_start_nothing(toy, sets, said):
    before = set((toy / "runs").iterdir())
    with pytest.raises(ParameterError, match=re.escape(said)):
        runs.run_pipeline(sets=sets, manner=QUIET)
    assert set((toy / "runs").iterdir()) == before


def test_scientific_notation_is_a_number(toy):
    assert plan.plan_run(last="poc", sets={"poc.min_skill": "1e-3"}).steps[1].params.min_skill == 0.001


@pytest.mark.parametrize(("spoil", "said"), [
    ({"tags": ()}, "0 cells tagged `parameters`"),
    ({"defaults": "seed = 0"}, "the parameters cell lacks"),
    ({"defaults": "seed = load()"}, "plain value"),
    ({"defaults": "import os"}, "may only assign"),
])
def test_a_spoilt_parameters_cell_is_refused(toy, spoil, said):
    write_stage(toy, "evaluate", **spoil)
    with pytest.raises(ParameterError, match=said):
        runs.run_pipeline(manner=QUIET)


def test_a_parameter_the_model_does_not_know_is_refused(toy):
    write_stage(toy, "poc", defaults="\n".join(f"{k} = {v!r}" for k, v in load_params("poc")) + "\nskipp = True")
    with pytest.raises(ParameterError, match="skipp.*did you mean skip"):
        plan.plan_run()


# --- every way a stage can end ---------------------------------------------------------------------------------------


def test_failing_cell_keeps_the_notebook_and_the_run_can_go_on_from_there(toy):
    write_stage(toy, "poc", "rows = 0\nrun.metric('before', 1)\n1 / rows")
    result = run("poc", "prototype", run_id="bad")
    manifest, folder = result.manifests[0], result.folder / "02_poc"
    error = manifest["error"]
    assert (result.status, result.exit_code, len(result.manifests)) == ("error", 1, 1)
    assert (error["name"], error["cell"], error["cell_id"]) == ("ZeroDivisionError", 5, "extra") and "1 / rows" in error["traceback"]
    assert manifest["metrics"]["before"]["value"] == 1, "what was said before the failure stays said"
    assert not (folder / "artefacts").exists() and manifest["outputs"] == {}
    page = (folder / "notebook.html").read_text()
    assert "papermill-error-cell" in page and "ZeroDivisionError" in page and 'href="#cell-id=extra"' in page
    states = {c["id"]: c["metadata"].get("papermill", {}).get("status") for c in stages.read_cells(folder / "notebook.ipynb")}
    assert (states["reads"], states["extra"], states["over"]) == ("completed", "failed", "pending")
    said = runs.failure_report(result)
    assert "Stage poc, code cell 5: ZeroDivisionError: division by zero" in said and "rows = 0" in said
    assert "amhs run --resume bad" in said and not list(result.folder.glob("03_*"))
    write_stage(toy, "poc")
    again = run("poc", within="bad")
    assert again.status == "finished" and (folder / "artefacts" / "poc_model").exists()


def test_failed_gate_without_reenter_is_on_record_and_the_run_goes_on(toy):
    write_stage(toy, "poc", "run.gate('signal', float('nan'), 0.1, why='toy')")
    result = run("poc", "prototype")
    assert (result.status, result.exit_code, [m["status"] for m in result.manifests]) == ("gate failed", 3, ["gate failed", "finished"])
    assert "stage poc failed gate signal (–, asked >= 0.1)" in result.verdict


def test_failed_gate_of_training_refuses_and_names_the_stage_to_re_enter(toy):
    write_stage(toy, "train", "run.gate('r2', 0.1, 0.5)")
    result = run("train", "evaluate")
    assert (result.status, result.exit_code, [m["stage"] for m in result.manifests]) == ("refused", 3, ["train"])
    assert "Re-enter stage develop" in result.verdict
    assert runs.again_command(result) == "amhs run develop --profile demo --from develop"
    assert stages.find_sources([stages.find_stage("train")], toy / "runs")["train"] == result.run_id, "its artefacts are whole all the same"


def test_skipped_stage_has_its_reason_and_runs_no_further_cell(toy):
    result, manifest, folder = one(toy, "run.skip('a base model exists')")
    assert (result.exit_code, manifest["status"], manifest["reason"]) == (0, "skipped", "a base model exists")
    assert "Skipped: a base model exists" in (result.folder / "index.html").read_text()
    counts = {c["id"]: c.get("execution_count") for c in stages.read_cells(folder / "notebook.ipynb")}
    assert counts["extra"] and not counts["over"]


@pytest.mark.parametrize(("code", "status", "said"), [
    ("import sys; sys.exit(0)", "error", "SystemExit"),
    ("import os; os._exit(3)", "dead kernel", "exit code 3"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "dead kernel", "signal 9 (SIGKILL), most often for want of memory"),
    ("import time; time.sleep(60)", "timed out", "longer than the time-out"),
    ("run.finish = print", "error", "without `run.finish()`"),
    ("seed = 5\nrun = stages.begin('business', globals())", "error", "seed: 5, not 0"),
])
def test_status_is_what_happened(toy, code, status, said):
    result, manifest, folder = one(toy, code, manner=replace(QUIET, limits=Limits(cell_timeout_s=5)))
    assert (manifest["status"], result.exit_code) == (status, 1)
    assert said in f"{manifest['error']['name']}: {manifest['error']['message']}"
    assert (folder / "notebook.html").is_file() and not (folder / "artefacts").exists()


def test_what_was_declared_must_be_handed_over(toy):
    _, manifest, _ = one(toy, "run.output = lambda name: run.folder / 'elsewhere'")
    assert "did not hand over artefact scope.json, artefact criteria.json" in manifest["error"]["message"]


# --- crashes, signals, several at once -------------------------------------------------------------------------------

HALF = """import time
run.output(run.stage.outputs[0]).write_text('half')
(stages.project_root() / 'reached').write_text(str(__import__('os').getpid()))
time.sleep(120)"""


def _hear_ctrl_c():
    """A shell that starts the tests in the background has them ignore Ctrl-C; the process under test must not inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def begin_and_hang(toy, *args):
    """Start `amhs run` in a process of its own; return it once the stage has written half an artefact."""
    (toy / "reached").unlink(missing_ok=True)
    command = [Path(sys.executable).with_name("amhs"), "run", "develop", *args]
    process = subprocess.Popen(command, cwd=toy, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=_hear_ctrl_c)
    until = time.monotonic() + 60
    while not (toy / "reached").exists() or not (toy / "reached").read_text():
        assert time.monotonic() < until and process.poll() is None, process.communicate()
        time.sleep(0.05)
    return process, int((toy / "reached").read_text())


def gone(pid, within_s=20):
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.1)
    return False


def test_kill_9_leaves_the_old_artefact_or_none_and_the_next_run_recovers(toy):
    write_stage(toy, "evaluate", HALF)
    old = sha256_tree(toy / "runs/whole/07_evaluate")
    process, kernel = begin_and_hang(toy, "--resume", "whole", "--from", "evaluate")
    process.kill(), process.communicate()
    assert sha256_tree(toy / "runs/whole/07_evaluate") == old
    process, kernel = begin_and_hang(toy, "--run-id", "new", "--from", "evaluate")
    process.kill(), process.communicate()
    assert not (toy / "runs/new/07_evaluate").exists()
    assert gone(kernel), "the kernel must not outlive its runner"
    write_stage(toy, "evaluate")
    assert run("evaluate", run_id="next").status == "finished"
    assert (read_json(toy / "runs/new/run.json")["status"], read_json(toy / "runs/whole/run.json")["status"]) == ("killed", "killed")
    manifest = read_json(toy / "runs/new/07_evaluate/manifest.json")
    assert manifest["status"] == "killed" and not (toy / "runs/new/07_evaluate/artefacts").exists()
    assert (toy / "runs/new/07_evaluate/notebook.html").is_file()
    assert sha256_tree(toy / "runs/whole/07_evaluate") == old


def test_a_run_whose_runner_was_killed_as_it_began_can_be_begun_again(toy):
    (toy / "runs/new").mkdir()
    (toy / "runs/new/.lock").touch()
    assert run(run_id="new").run_id == "new"
    with pytest.raises(ParameterError, match="a run of this name already"):
        run(run_id="new")


def test_ctrl_c_is_recorded(toy):
    write_stage(toy, "business", HALF)
    process, kernel = begin_and_hang(toy, "--run-id", "stopped", "--to", "poc")
    with pytest.raises(StageError, match="another process is working in this run"):
        run("business", within="stopped")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130 and "interrupted" in err
    manifest = read_json(toy / "runs/stopped/01_business/manifest.json")
    assert (manifest["status"], read_json(toy / "runs/stopped/run.json")["status"]) == ("interrupted", "interrupted")
    assert manifest["error"]["cell_id"] == "extra" and not (toy / "runs/stopped/01_business/artefacts").exists()
    assert gone(kernel)


def test_runs_of_the_same_second_get_different_folders(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda _: stages.new_run(tmp_path, "demo", noon), range(16)))
    assert len(set(made)) == 16 and all(p.is_dir() for p in made)


def test_a_name_that_is_taken_or_strange_is_refused(toy):
    for name in ("whole", "../up", "scratch", ".hidden"):
        with pytest.raises(ParameterError):
            run(run_id=name)


# --- by hand, as in JupyterLab ---------------------------------------------------------------------------------------


def test_figures_are_seen_in_the_executed_notebook(toy):
    _, manifest, folder = one(toy, "from matplotlib.figure import Figure\nfig = Figure((2, 1)); fig.subplots().plot([1, 2]); fig")
    assert manifest["status"] == "finished" and "data:image/png;base64," in (folder / "notebook.html").read_text()


def test_by_hand_equals_batch(toy, monkeypatch):
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.delenv("AMHS_ROOT")
    path = toy / stages.find_stage("train").notebook
    book = NotebookClient(nbformat.read(path, 4), resources={"metadata": {"path": str(path.parent)}}).execute()
    assert book.cells[-1].outputs, "the last cell shows what was handed over"
    by_hand = read_json(toy / "runs/scratch/06_train/results.json")
    batch = read_json(toy / "runs/whole/06_train/manifest.json")
    assert by_hand["finished"] and by_hand["metrics"] == batch["metrics"] and by_hand["outputs"] == batch["outputs"]


def test_a_stage_reads_and_writes_only_what_the_table_says(house):
    train = stages.begin("train", load_params("train").model_dump())
    with pytest.raises(StageError, match="does not read"):
        train.input("poc", "poc_model")
    with pytest.raises(StageError, match="left no such artefact.*labelled"):
        train.input("data", "labels")
    with pytest.raises(StageError, match="declares no such artefact"):
        train.output("poc_model")
    with pytest.raises(StageError, match="declares no such document"):
        train.document("feasibility")


@pytest.mark.parametrize(("value", "op", "limit", "passed"), [
    (1, ">=", 1, True), (0.9, ">=", 1, False), (1, "<=", 1, True), (2, "<", 2, False), (3, ">", 2, True), (2, "==", 2, True),
    (float("nan"), "<=", 1, False), (float("nan"), ">=", 1, False), (float("inf"), ">=", 1, False), (None, ">=", 0, False),
])
def test_gates_judge_by_their_limit(house, value, op, limit, passed):
    stage = stages.begin("business", load_params("business").model_dump())
    assert stage.gate("g", value, limit, op=op) is passed
    assert stage.gates().loc["g", "verdict"] == ("pass" if passed else "FAIL")
    json.loads((stage.folder / "results.json").read_text(), parse_constant=pytest.fail)


# --- documents -------------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=12), st.floats(), st.integers()), min_size=1, max_size=4))
def test_any_table_survives_as_markdown(rows):
    frame = pd.DataFrame(rows, columns=["name", "a | b", "count"])
    found = pages.markdown_html(pages.markdown_table(frame))
    assert (found.count("<th "), found.count("<td ")) == (3, 3 * len(rows))


def test_numbers_are_short():
    frame = pd.DataFrame({"rows": [259200, 2026], "share": [0.123456, 1234.5], "big": [123456.7, float("nan")], "ok": [True, False]})
    assert pages.markdown_table(frame).splitlines()[2:] == ["| 259,200 | 0.1235 | 123,457 | True |", "| 2026 | 1234 | – | False |"]


def test_documents_do_not_run_what_they_quote():
    assert "<script>" not in pages.markdown_html("<script>alert(1)</script>")


def test_confirmed_models_are_numbered(toy):
    say = "run.output('confirmed_model').write_text(str(stages.confirmed_number(run.input('train', 'model'))))"
    write_stage(toy, "evaluate", say)

    def confirmed():
        return (run("evaluate", forced=True).folder / "07_evaluate/artefacts/confirmed_model").read_text()
    assert confirmed() == "1"
    assert confirmed() == "1", "the same model again is still the first"
    write_stage(toy, "train", "run.output('model').write_text('another')\nrun.output = lambda name: run.folder / 'unused'")
    run("train")
    assert confirmed() == "2"


def test_a_run_is_refused_if_library_and_notebooks_differ(tmp_path):
    root = Path(runs.__file__).parents[1]
    for part in ("nbs/lib", "amhs"):
        shutil.copytree(root / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(root / "pyproject.toml", tmp_path)
    with open(tmp_path / "amhs/core.py", "a") as f:
        f.write("\nedited = 'by hand'\n")
    (tmp_path / "amhs/stray.py").write_text("")
    with pytest.raises(InputError, match="nbdev-export") as refused:
        provenance.refuse_drift(tmp_path)
    said = str(refused.value)
    assert "amhs/core.py differs from its notebook" in said and "amhs/stray.py has no notebook" in said
    assert "runs.py" not in said
