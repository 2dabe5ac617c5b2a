"""A copy of the project to work in, and notebooks run as a person runs them in JupyterLab."""

import os
import shutil
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


def copy_project(root: Path) -> Path:
    """The project as it stands, without its runs."""
    root.mkdir()
    for name in ("amhs", "nbs", "params"):
        shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns(".*", "__pycache__"))
    for name in ("settings.ini", "pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, root)
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
