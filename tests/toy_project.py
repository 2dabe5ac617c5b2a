"""A project with the real table of stages and the real parameters, but notebooks that take a second each."""

import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from amhs.config import load_params
from amhs.core import project_root
from amhs.stages import STAGES, find_stage

HOUSE = project_root(Path(__file__).parent)


def _cell(kind: str, ident: str, source: str, tags=()) -> dict:
    code = {"outputs": [], "execution_count": None} if kind == "code" else {}
    return {"cell_type": kind, "id": ident, "metadata": {"tags": list(tags)}, "source": source, **code}


DECIDES_NOTHING = '{"toy": "%s", "role": "none", "verdict": "refuse"}'  # what the command line reads of a deployment and of a promotion


def _hand_over(name: str) -> str:
    stage = find_stage(name)
    lines = [f"run.output({o!r}).write_text({DECIDES_NOTHING if o.endswith('.json') else '%s'!r} % ('{name} {o} ' + str(run.seed)))" for o in stage.outputs]
    lines += [f"run.document({d.name!r}, **{{p: figure for p in placeholders({d.name!r}, 'en')}})" for d in stage.deliverables]
    lines += [f"run.gate({g!r}, 1.0, 0.5, why='a toy')" for g in stage.gates]
    return "\n".join(lines)


FIGURE = """from amhs.documents import placeholders

class figure:
    def savefig(path, **kw):
        import base64
        path.write_bytes(base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=='))"""


def write_stage(root: Path, name: str, extra: str = "pass", tags=("parameters",), defaults: str | None = None) -> Path:
    """Write a stage's notebook; `extra` is a cell of its own between the beginning and the handing over."""
    stage = find_stage(name)
    values = "\n".join(f"{k} = {v!r}" for k, v in load_params(name).model_dump().items())
    reads = "\n".join(f"run.input({i!r}, {find_stage(i).outputs[0]!r}).read_text()" for i in stage.inputs) or "'reads nothing'"
    cells = [
        _cell("markdown", "title", f"# {stage.number} {stage.title}\n\nA toy. {stage.title_ko}"),
        _cell("code", "params", defaults if defaults is not None else values, tags),
        _cell("code", "begin", f"from amhs import stages\nrun = stages.begin({name!r}, globals())"),
        _cell("code", "reads", reads),
        _cell("code", "extra", extra),
        _cell("code", "over", f"{FIGURE}\n{_hand_over(name)}\nrun.metric('seed_seen', run.seed, headline=True)"),
        _cell("code", "finish", "run.finish()"),
    ]
    path = root / stage.notebook
    path.parent.mkdir(parents=True, exist_ok=True)
    kernel = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python 3"}}
    path.write_text(json.dumps({"cells": cells, "metadata": kernel, "nbformat": 4, "nbformat_minor": 5}))
    return path


def copy_settings(root: Path) -> None:
    """The house's settings, without the registry: toys are registered nowhere."""
    text = (HOUSE / "settings.ini").read_text()
    (root / "settings.ini").write_text(re.sub("^registry = .*", "registry = off", text, flags=re.M))


def make_project(root: Path) -> Path:
    """A whole toy project in an empty folder."""
    copy_settings(root)
    shutil.copytree(HOUSE / "params", root / "params")
    for stage in STAGES:
        write_stage(root, stage.name)
    return root


@contextmanager
def own_project(tmp_path_factory):
    """A whole toy project, and the settings of nobody else, for as long as a module's tests take."""
    with pytest.MonkeyPatch.context() as patch:
        root = tmp_path_factory.mktemp("house")
        for key in ("AMHS_RUNS", "AMHS_DATA", "AMHS_PARAMS", "AMHS_SITES", "AMHS_LANG"):
            patch.delenv(key, raising=False)
        patch.setenv("AMHS_ROOT", str(root))
        yield make_project(root)


def own_copy(root: Path, tmp_path: Path, monkeypatch) -> Path:
    """A copy of a toy project that a test may change."""
    shutil.copytree(root, tmp_path / "toy")
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path / "toy"))
    return tmp_path / "toy"
