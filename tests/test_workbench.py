"""Stages by hand: a stage opened as it ran, the same results as in a run, notebooks that are saved clean."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from by_hand import ROOT, copy_project, handed_over, plain_environment, run_by_hand, run_in_batch
from hypothesis import given
from hypothesis import strategies as st
from papermill.translators import PythonTranslator
from toy_project import make_project, write_stage

from amhs import runs, stages, workbench
from amhs.core import InputError, ParameterError, read_json, sha256_tree, write_json

QUIET = runs.Manner(fast=False, show=runs.Reporter(lambda line: None))
AMHS = Path(sys.executable).with_name("amhs")
BREAKS = "assert run.params.trees != 23, f'{run.params.trees} trees'"


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    """A toy project: run `night` with a poc that fails, run `day` that goes on from its business."""
    with pytest.MonkeyPatch.context() as patch:
        for key in [k for k in os.environ if k.startswith("AMHS_")]:
            patch.delenv(key)
        root = make_project(tmp_path_factory.mktemp("house"))
        patch.setenv("AMHS_ROOT", str(root))
        write_stage(root, "poc", BREAKS)
        assert runs.run_pipeline(last="poc", run_id="night", sets={"poc.trees": 23, "business.days": 21}, manner=QUIET).status == "error"
        result = runs.run_pipeline(first="poc", last="poc", run_id="day", sets={"poc.trees": 24}, manner=QUIET)
        assert (result.status, read_json(result.folder / "run.json")["sources"]) == ("finished", {"business": "night"})
    return root


@pytest.fixture
def toy(house, tmp_path, monkeypatch):
    """A copy of that project that a test may spoil."""
    for key in [k for k in os.environ if k.startswith("AMHS_")]:
        monkeypatch.delenv(key)
    shutil.copytree(house, tmp_path / "toy")
    monkeypatch.chdir(tmp_path / "toy")
    return tmp_path / "toy"


# --- opening ---

def test_a_failed_stage_opens_with_its_parameters_and_inputs_and_fails_there_again(toy):
    before = sha256_tree(toy / "runs/night")
    opened = workbench.open_stage("night", "poc")
    assert opened.notebook == toy / "runs/scratch/night-poc/02_poc.ipynb" and opened.said == ()
    nb = run_by_hand(opened.notebook, allow_errors=True)
    errors = [(i, o.evalue) for i, c in enumerate(c for c in nb.cells if c.cell_type == "code") for o in c.outputs if o.output_type == "error"]
    failed = read_json(toy / "runs/night/02_poc/manifest.json")["error"]
    assert errors[0] == (failed["cell"] - 1, "23 trees")
    assert sha256_tree(toy / "runs/night") == before, "opening and running must not change the run"


def test_a_finished_stage_of_a_run_that_took_its_inputs_elsewhere(toy):
    (toy / "runs/night/01_business/run_again").write_text("newer than anything")  # what is newest does not matter
    opened = workbench.open_stage("day", "02")
    run_by_hand(opened.notebook)
    scratch = opened.notebook.parent
    assert handed_over(scratch / "results.json") == handed_over(toy / "runs/day/02_poc/manifest.json")
    assert "scratch of day" in next((scratch / "documents").glob("*.md")).read_text()


def test_a_stage_is_found_along_the_trail(toy):
    opened = workbench.open_stage("day", "business")
    assert opened.said == ("Run day took this stage from run night.",)
    assert "days = 21" in workbench.read_cells(opened.notebook)[3]["source"]


def test_mending_goes_on_where_it_was_left(toy):
    notebook = workbench.open_stage("night", "poc").notebook
    book = read_json(notebook)
    for cell in book["cells"]:
        cell["source"] = "".join(cell["source"]).replace("trees = 23", "trees = 25")
    write_json(notebook, book)
    run_by_hand(notebook)
    kept = workbench.open_stage("night", "poc")
    assert kept.said == ("Your edited copy from last time is kept; --fresh replaces it.",)
    assert "trees = 25" in notebook.read_text() and read_json(notebook.parent / "results.json")["finished"]
    assert workbench.open_stage("night", "poc", fresh=True).said == ()
    assert "trees = 23" in notebook.read_text() and not (notebook.parent / "results.json").exists()


def test_outputs_alone_are_no_edit(toy):
    notebook = workbench.open_stage("day", "poc").notebook
    run_by_hand(notebook)
    assert workbench.open_stage("day", "poc").said == ()
    assert not (notebook.parent / "results.json").exists()


def test_a_second_try_begins_empty(toy):
    notebook = workbench.open_stage("day", "poc").notebook
    run_by_hand(notebook)
    (notebook.parent / "artefacts/leftover").write_text("from an earlier try")
    run_by_hand(notebook)
    assert set(read_json(notebook.parent / "results.json")["outputs"]) == {"poc_model"}


def test_code_that_changed_is_said_and_used(toy):
    write_stage(toy, "poc", "run.metric('new', 1)")
    opened = workbench.open_stage("night", "poc")
    assert opened.said == ("nbs/stages/02_poc.ipynb changed since that run; this is the current one.",)
    assert "run.metric('new', 1)" in opened.notebook.read_text() and "trees = 23" in opened.notebook.read_text()


@pytest.mark.parametrize(("spoil", "said"), [
    (lambda p: p.write_text("other"), "is no longer what it read"),
    (lambda p: p.unlink(), "is gone"),
    (lambda p: shutil.rmtree(p.parent.parent.parent), "is gone"),
])
def test_inputs_that_are_not_what_they_were_are_refused(toy, spoil, said):
    spoil(toy / "runs/night/01_business/artefacts" / stages.find_stage("business").outputs[0])
    with pytest.raises(InputError, match=said):
        workbench.open_stage("day", "poc")
    assert not (toy / "runs/scratch/day-poc").exists()


def test_what_does_not_exist_is_named(toy):
    with pytest.raises(InputError, match="no stage train that ended.*01_business, 02_poc"):
        workbench.open_stage("night", "train")
    with pytest.raises(ParameterError, match="no such run"):
        workbench.open_stage("nigth", "poc")
    with pytest.raises(ParameterError, match="no such stage"):
        workbench.open_stage("night", "pok")


def test_a_folder_opened_for_another_stage_is_refused(toy):
    folder = workbench.open_stage("day", "poc").notebook.parent
    shutil.copy(toy / "nbs/stages/01_business.ipynb", folder)
    nb = run_by_hand(folder / "01_business.ipynb", allow_errors=True)
    assert "its folder was opened for poc" in json.dumps(nb.cells)


def test_somebody_elses_stage_json_means_nothing(toy):
    """A file of that name without our mark: the stage goes to its own scratch folder, and nothing beside the notebook is removed."""
    write_json(toy / "nbs/stages/stage.json", {"stage": "business"})
    (toy / "nbs/stages/artefacts").mkdir()
    run_by_hand(toy / "nbs/stages/01_business.ipynb")
    assert (toy / "nbs/stages/artefacts").is_dir() and (toy / "runs/scratch/01_business/results.json").is_file()


def test_command_prints_the_path_and_exits_2_for_what_it_cannot_open(toy):
    def said(*args):
        return subprocess.run([AMHS, "open", *args, "--no-lab"], cwd=toy, env=plain_environment(), capture_output=True, text=True, timeout=60)

    done = said("nig", "poc")
    assert (done.returncode, done.stdout, done.stderr) == (0, "runs/scratch/night-poc/02_poc.ipynb\n", "")
    (toy / "runs/night/01_business/artefacts" / stages.find_stage("business").outputs[0]).unlink()
    done = said("night", "poc")
    assert done.returncode == 2 and done.stderr.startswith("amhs: ") and "is gone" in done.stderr and not done.stdout


def test_runs_kept_elsewhere_are_served_from_there(toy, tmp_path, monkeypatch):
    shutil.move(toy / "runs", tmp_path / "elsewhere")
    monkeypatch.setenv("AMHS_RUNS", str(tmp_path / "elsewhere"))
    command = workbench.lab_command(workbench.open_stage("day", "poc").notebook, browser=False, more=["--port=9"])
    assert f"--ServerApp.root_dir={tmp_path / 'elsewhere'}" in command and command[-2:] == ["--no-browser", "--port=9"]
    assert "--LabApp.default_url=/lab/tree/scratch/day-poc/02_poc.ipynb" in command


value = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), st.text(max_size=20))


@given(st.dictionaries(st.sampled_from(["days", "line", "rate", "names"]), st.one_of(value, st.lists(value, max_size=3)), min_size=1))
def test_parameters_arrive_as_papermill_would_bring_them(params):
    tagged = {"cell_type": "code", "id": "a", "metadata": {"tags": ["parameters"]}, "source": "days = 1"}
    reads = {"cell_type": "code", "id": "b", "metadata": {}, "source": "days"}
    cells = workbench.inject_parameters([tagged, reads], params)
    assert cells[::2] == [tagged, reads] and cells[1]["metadata"] == {"tags": ["injected-parameters"]}
    ours, theirs = {}, {}
    exec(cells[1]["source"], ours)
    exec(PythonTranslator.codify(params), theirs)
    assert {k: ours[k] for k in params} == {k: theirs[k] for k in params} == params


# --- by hand as in a run ---

def test_by_hand_is_the_same_as_in_a_run_toy(toy):
    """From the notebook's defaults, on the newest good inputs, in a scratch run."""
    notebook = toy / "nbs/stages/03_prototype.ipynb"
    sets = {f"prototype.{k}": v for k, v in stages.notebook_defaults(notebook).items()}
    result = runs.run_pipeline(first="prototype", last="prototype", sets=sets, manner=QUIET)
    run_by_hand(notebook)
    assert handed_over(toy / "runs/scratch/03_prototype/results.json") == handed_over(result.folder / "03_prototype/manifest.json")


@pytest.mark.parametrize("names", [("business",), pytest.param(("business", "poc"), marks=pytest.mark.full)], ids=["business", "poc"])
def test_by_hand_is_the_same_as_in_a_run_real(tmp_path, names):
    """The real stages, as the project has them; test_lab.py does stage 02 in a browser."""
    root, folder = run_in_batch(copy_project(tmp_path / "project"), *names), stages.find_stage(names[-1]).folder
    run_by_hand(root / f"nbs/stages/{folder}.ipynb")
    assert handed_over(root / f"runs/scratch/{folder}/results.json") == handed_over(root / f"runs/batch/{folder}/manifest.json")


# --- clean notebooks ---

@pytest.mark.parametrize("path", sorted((ROOT / "nbs").rglob("[!.]*.ipynb")), ids=lambda p: p.stem)
def test_committed_notebooks_are_as_they_would_be_saved(path):
    """What JupyterLab's hook and `make export` leave of a notebook is the notebook: saving it makes no difference."""
    if any(part.startswith(".") for part in path.relative_to(ROOT).parts):
        pytest.skip("a checkpoint of JupyterLab")
    text = path.read_text()
    model = {"type": "notebook", "content": json.loads(text)}
    workbench.clean_on_save(model=model, path=path.relative_to(ROOT).as_posix(), contents_manager=None)
    saved = json.dumps(model["content"], indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    assert saved == text, "clean it with `make export`"


def test_hook_and_nbdev_agree(tmp_path):
    notebook = tmp_path / "12_pages.ipynb"
    nb = nbformat.read(ROOT / "nbs/lib/12_pages.ipynb", 4)
    nb.metadata["language_info"], nb.cells[2].metadata["scrolled"] = {"version": "3.99"}, True
    book = workbench.clean_notebook(json.loads(nbformat.writes(nb)))
    notebook.write_text(json.dumps(book, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
    before = notebook.read_text()
    subprocess.run([Path(sys.executable).with_name("nbdev-clean"), "--fname", notebook], cwd=ROOT, check=True)
    assert notebook.read_text() == before == (ROOT / "nbs/lib/12_pages.ipynb").read_text()


# --- packages of the system ---

SCRIPT = ROOT / "scripts/system-packages.sh"


def install(tmp_path, apt_get=None, **more):
    """Run the script where there is no chromium and this apt-get."""
    for tool in ("bash", "env", "id", "sleep", "timeout"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    if apt_get:
        (tmp_path / "apt-get").write_text(f"#!/bin/bash\n{apt_get}\n")
        (tmp_path / "apt-get").chmod(0o755)
    return subprocess.run(["bash", SCRIPT], env={"PATH": str(tmp_path), **more}, capture_output=True, text=True, timeout=30)


def test_system_packages_are_no_reason_to_fail_or_wait(tmp_path):
    done = install(tmp_path)
    assert done.returncode == 0 and "not installed: chromium " in done.stdout and "(there is no apt-get here)" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="apt-get is only called as root here")
@pytest.mark.parametrize("apt_get", ["sleep 100", "exit 100"], ids=["hangs", "fails"])
def test_apt_get_that_hangs_or_fails_is_given_up(tmp_path, apt_get):
    done = install(tmp_path, apt_get, LIMIT_S="1")
    assert done.returncode == 0 and "not installed: chromium " in done.stdout and "(apt-get could not)" in done.stdout


@pytest.mark.skipif(os.geteuid() != 0, reason="apt-get is only called as root here")
def test_apt_get_is_asked_for_what_is_missing_and_asks_nothing_back(tmp_path):
    done = install(tmp_path, f'echo "$DEBIAN_FRONTEND $*" >>{tmp_path}/asked; read -r answer && exit 1; exit 0')
    asked = (tmp_path / "asked").read_text()
    assert done.returncode == 0 and "not installed" not in done.stdout
    assert asked.startswith("noninteractive -qq -y ") and "install --no-install-recommends chromium" in asked
