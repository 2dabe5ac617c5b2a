"""The house's contracts on notebooks: what is exported, what a stage may hold, how large a cell may be."""

import ast
import json
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

from amhs.config import PARAMS, load_params

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "nbs/lib").glob("*.ipynb"))
STAGES = sorted((ROOT / "nbs/stages").glob("*.ipynb"))


def code_cells(path):
    return [c for c in nbformat.read(path, 4).cells if c.cell_type == "code"]


def exported(path):
    return [c.source for c in code_cells(path) if c.source.startswith("#| export")]


def body_lines(source):
    return [line for line in source.splitlines() if line.strip() and not line.lstrip().startswith("#|")]


def defaults(path):
    "The names and values of a stage's parameters cell."
    cells = [c for c in code_cells(path) if "parameters" in c.metadata.get("tags", [])]
    assert len(cells) == 1, f"{path.name}: {len(cells)} cells tagged parameters"
    space: dict = {}
    exec(cells[0].source, space)
    return {k: v for k, v in space.items() if not k.startswith("__")}


def test_export_leaves_no_diff(tmp_path):
    "amhs/ is what nbs/lib says, to the letter; nothing else lives there."
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    for name in ("pyproject.toml", "settings.ini"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "amhs").mkdir()
    shutil.copy(ROOT / "amhs/__init__.py", tmp_path / "amhs")
    subprocess.run([Path(sys.executable).with_name("nbdev-export")], check=True, cwd=tmp_path)
    fresh = {p.name: p.read_text() for p in (tmp_path / "amhs").glob("*.py")}
    there = {p.name: p.read_text() for p in (ROOT / "amhs").glob("*.py")}
    assert fresh.keys() == there.keys()
    assert [n for n in fresh if fresh[n] != there[n]] == []


def test_the_readme_is_what_its_notebook_says():
    "`make readme` would undo what was written into README.md alone."
    from nbconvert import MarkdownExporter

    assert MarkdownExporter(exclude_input=True).from_filename(ROOT / "nbs/index.ipynb")[0].strip() == (ROOT / "README.md").read_text().strip()


@pytest.fixture(scope="session")
def forks():
    "A process that forks for every notebook: starting anew costs more than most examples."
    helper = Path(__file__).with_name("forked_notebooks.py")
    with subprocess.Popen([sys.executable, helper], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_library_notebook_runs(path, forks, tmp_path):
    "Every example in the library holds."
    forks.stdin.write(f"{path}\t{tmp_path / 'log'}\n")
    forks.stdin.flush()
    assert forks.stdout.readline() == "0\n", (tmp_path / "log").read_text()


@pytest.mark.parametrize("path", [*LIBRARY, *STAGES], ids=lambda p: p.stem)
def test_outputs_kept_are_for_readers(path):
    "Warnings name places of the machine they were made on, and teach nothing."
    streams = [o for c in code_cells(path) for o in c.outputs if o.output_type == "stream" and o.name == "stderr"]
    assert streams == [] and str(ROOT) not in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_library_notebook_opens_with_title_and_summary(path):
    first = nbformat.read(path, 4).cells[0].source
    assert re.match(r"# [^#\s].*\n+> \S", first), first[:80]


def test_exported_cells_are_small():
    sizes = sorted(len(body_lines(s)) for p in LIBRARY for s in exported(p))
    hidden = [s for p in LIBRARY for s in (c.source for c in code_cells(p)) if "#| hide" in s]
    everything = [c for p in LIBRARY for c in code_cells(p)]
    assert statistics.median(sizes) <= 8
    assert sizes[int(0.9 * len(sizes))] <= 20
    assert len(hidden) <= 0.15 * len(everything)


def undocumented(source):
    "Public functions of an exported cell whose docstring or parameter comments are missing."
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if not isinstance(node, ast.FunctionDef) or node.name.startswith("_"):
            continue
        if not ast.get_docstring(node):
            yield f"{node.name}: docstring"
        for arg in [*node.args.args, *node.args.kwonlyargs]:
            if arg.arg not in {"self", "cls"} and "#" not in lines[arg.lineno - 1]:
                yield f"{node.name}: {arg.arg}"


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: p.stem)
def test_exported_functions_have_docments_and_an_example(path):
    cells = code_cells(path)
    shown = "\n".join(c.source for c in cells if not c.source.startswith("#| export"))
    public = [n.name for s in exported(path) for n in ast.parse(s).body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]
    assert [u for s in exported(path) for u in undocumented(s)] == []
    assert [name for name in public if not re.search(rf"\b{name}\b", shown)] == [], "public, and shown in no example"


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_stage_notebook_is_thin(path):
    cells = code_cells(path)
    assert len(cells) <= 15
    assert not any(c.outputs for c in cells), "committed with outputs"
    assert not any(isinstance(n, ast.FunctionDef | ast.ClassDef) for c in cells for n in ast.walk(ast.parse(c.source)))
    assert max(len(body_lines(c.source)) for c in cells) <= 30
    first = nbformat.read(path, 4).cells[0]
    assert first.cell_type == "markdown" and first.source.startswith("# ")


@pytest.mark.parametrize("path", STAGES, ids=lambda p: p.stem)
def test_stage_parameters_agree(path):
    "The notebook, the typed model and the YAML file speak of the same parameters; all values are valid."
    stage = path.stem.split("_", 1)[1]
    model = PARAMS[stage]
    assert set(defaults(path)) == set(model.model_fields)
    model(**defaults(path))
    for profile in ("smoke", "demo", "full"):
        load_params(stage, profile)


def test_parameters_tag_survives_cleaning(tmp_path):
    "nbdev-clean, which the git hooks call, must not strip the tag papermill needs."
    copy = tmp_path / STAGES[0].name
    copy.write_text(STAGES[0].read_text())
    clean = "from nbdev.clean import nbdev_clean; import sys; nbdev_clean(sys.argv[1])"
    subprocess.run([sys.executable, "-c", clean, copy], check=True, cwd=ROOT)
    assert defaults(copy) == defaults(STAGES[0])


def test_a_stage_is_planted_wrong(tmp_path):
    "The checks above can fail: two tagged cells are seen."
    nb = json.loads(STAGES[0].read_text())
    tagged = next(c for c in nb["cells"] if "parameters" in c["metadata"].get("tags", []))
    nb["cells"].append({**tagged, "id": "twice"})
    twice = tmp_path / STAGES[0].name
    twice.write_text(json.dumps(nb))
    with pytest.raises(AssertionError, match="2 cells tagged"):
        defaults(twice)


def test_no_pickle():
    "Nothing in the library, the stages or the tests unpickles."
    unpickles = re.compile(r"^\s*(import|from) (pickle|joblib|dill|cloudpickle)|allow_pickle=True|read_pickle", re.M)
    for path in [*LIBRARY, *STAGES]:
        assert not [c.source for c in code_cells(path) if unpickles.search(c.source)], path
