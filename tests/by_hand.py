"""A copy of the project to work in, and notebooks run as a person runs them in JupyterLab."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from toy_project import copy_settings

from amhs.core import read_json
from amhs.stages import find_stage, notebook_defaults

ROOT = Path(__file__).parent.parent


def copy_project(root: Path) -> Path:
    """The project as it stands, without its runs."""
    root.mkdir()
    for name in ("amhs", "nbs", "params"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for name in ("pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, root)
    copy_settings(root)
    return root


def plain_environment(**more: str) -> dict[str, str]:
    """The environment of a person's shell: none of this project's variables."""
    return {k: v for k, v in os.environ.items() if not k.startswith("AMHS_")} | more


def run_by_hand(notebook: Path, allow_errors: bool = False):
    """Run All: a kernel started in the notebook's folder, every cell, saved in place."""
    nb = nbformat.read(notebook, 4)
    client = NotebookClient(nb, timeout=300, kernel_name="python3", allow_errors=allow_errors, resources={"metadata": {"path": str(notebook.parent)}})
    client.execute(env=plain_environment())
    nbformat.write(nb, notebook)
    return nb


def run_in_batch(root: Path, *names: str, **other: str) -> Path:
    """Run stages in a run called `batch`, with the values their notebooks have as defaults; `other` is for stage 01."""
    defaults = {name: notebook_defaults(root / find_stage(name).notebook) for name in names}
    sets = [word for name, found in defaults.items() for k, v in found.items() for word in ("--set", f"{name}.{k}={json.dumps(v)}")]
    sets += [word for k, v in other.items() for word in ("--set", f"business.{k}={v}")]
    command = [Path(sys.executable).with_name("amhs"), "run", "develop", "--to", names[-1], "--run-id", "batch", *sets]
    done = subprocess.run(command, cwd=root, env=plain_environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode in (0, 3), done.stderr
    return root


def handed_over(record: Path) -> dict:
    """What must be the same by hand and in a run: metrics, gates, artefacts by content; from a manifest or from results."""
    found = read_json(record)
    assert found["outputs"] and found["gates"]
    return {k: found[k] for k in ("metrics", "gates", "outputs")}
