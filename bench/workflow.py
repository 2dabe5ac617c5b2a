"""What the runner costs: nothing to do, one stage in each mode, five trivial stages; beside other tools on the same work.

A trivial stage has ten cells of a few milliseconds. Others are measured when told where they are installed; what is absent is said.

    python bench/workflow.py [--ploomber VENV] [--kedro VENV]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

from common import figure, record

from amhs import runs, stages
from amhs.core import project_root, read_json, write_json
from amhs.execute import run_stage
from amhs.plan import plan_run

BIN = Path(sys.executable).parent
NAMES = ("business", "poc", "prototype", "data", "develop")
IMPORTS = "import numpy as np\nimport pandas as pd\nimport sklearn.linear_model\nimport xgboost"
WORK = ["table = pd.DataFrame({'a': np.arange(1000), 'b': np.arange(1000) % 7})", "table.groupby('b')['a'].sum()", "table.describe()", "print(len(table))",
        "x = table.to_numpy(float)", "x.T @ x", "table.head()", "sum(range(10_000))"]
CELLS = [IMPORTS, *WORK]


@contextmanager
def project(cells: list[str]):
    "A project of toy stages in an empty folder, and this process in it."
    house, before = project_root(Path(__file__).parent), Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "settings.ini").write_text((house / "settings.ini").read_text())
        (root / "params").symlink_to(house / "params")
        for name in NAMES:
            stages.toy_stage(root, name, *cells, "run.skip('trivial')")
        os.environ |= {"AMHS_ROOT": folder, "AMHS_REGISTRY": "off"}
        os.chdir(root)
        yield root
        os.chdir(before)


def seconds(task, repeat: int = 5) -> float:
    "Median wall time of a task."
    found = []
    for _ in range(repeat):
        began = time.perf_counter()
        task()
        found.append(time.perf_counter() - began)
    return statistics.median(found)


def call(*words: object) -> None:
    "Run a command that must succeed."
    subprocess.run([str(w) for w in words], check=True, capture_output=True)


def scripts(root: Path, cells: list[str]) -> Path:
    "The same code as a plain script."
    path = root / "script.py"
    path.write_text("\n".join(cells))
    return path


def stage_seconds(root: Path, fast: bool) -> float:
    "A stage of a run that has begun: papermill and, in the fast mode, the worker are there."
    plan, folder = plan_run(last="business"), stages.new_run(root / "runs", "bench")
    with runs.warm_worker(runs.Manner(fast=fast)) as warm:
        pages: list = []
        run_stage(plan.steps[0], folder, plan, {}, warm=warm)
        found = []
        for _ in range(7):
            found.append(seconds(lambda: run_stage(plan.steps[0], folder, plan, {}, warm=warm, pages=pages), 1))
            for page in pages:
                page()
            pages.clear()
    return statistics.median(found)


def loaded_seconds() -> float:
    "The same code in a process that has imported everything."
    code = "\n".join(CELLS).replace("print(len(table))", "len(table)")
    exec(code, {})
    return seconds(lambda: exec(code, {}), 7)


def whole_runs() -> dict[str, float]:
    "Five stages by command: everything, with and without the warm worker, then nothing to do."
    def run(*more): call(BIN / "amhs", "run", "--to", NAMES[-1], *more)
    found = {"forced": seconds(lambda: run("--force"), 3), "isolated": seconds(lambda: run("--force", "--isolated"), 3)}
    run()
    return found | {"nothing": seconds(run, 9)}


def papermills(root: Path) -> tuple[float, float]:
    "papermill's command five times, and its API in one process."
    books = [root / stages.find_stage(n).notebook for n in NAMES]
    plain = []
    for book in books:
        bare = root / f"bare-{book.name}"
        cells = [c for c in stages.read_cells(book) if "stages.begin" not in c["source"] and "run.skip" not in c["source"]]
        write_json(bare, {**read_json(book), "cells": cells})
        plain.append(bare)
    command = seconds(lambda: [call(BIN / "papermill", b, root / "out.ipynb") for b in plain], 1)
    code = "import papermill, sys\nfor b in sys.argv[1:]: papermill.execute_notebook(b, 'out.ipynb', progress_bar=False)"
    return command, seconds(lambda: call(sys.executable, "-c", code, *plain), 1)


def ploomber(venv: Path, root: Path) -> tuple[float, float]:
    "The same five notebooks as a ploomber pipeline: everything, then nothing to do."
    folder = root / "ploomber"
    folder.mkdir()
    tasks = []
    for name in NAMES:
        cells = ["# + tags=['parameters']\nupstream = None\nproduct = None", *(f"# +\n{c}" for c in CELLS)]
        (folder / f"{name}.py").write_text("\n\n".join(cells))
        tasks.append(f"  - source: {name}.py\n    product: out/{name}.ipynb")
    (folder / "pipeline.yaml").write_text("tasks:\n" + "\n".join(tasks) + "\n")
    def build(*more): subprocess.run([venv / "bin/ploomber", "build", *more], cwd=folder, check=True, capture_output=True)
    return seconds(lambda: build("--force"), 1), seconds(build, 3)


def kedro(venv: Path, root: Path) -> float:
    "The same code as five Kedro nodes; Kedro has no skipping, so nothing to do takes as long."
    code = "\n    ".join("\n".join(CELLS).split("\n"))
    nodes = ", ".join(f"node(stage, None, 'o{i}', name='n{i}')" for i in range(5))
    script = root / "kedro_run.py"
    script.write_text("from kedro.io import DataCatalog\nfrom kedro.pipeline import node, pipeline\nfrom kedro.runner import SequentialRunner\n"
                      f"def stage():\n    {code}\n    return 1\nSequentialRunner().run(pipeline([{nodes}]), DataCatalog())\n")
    return seconds(lambda: call(venv / "bin/python", script), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ploomber", type=Path, help="environment that has ploomber")
    parser.add_argument("--kedro", type=Path, help="environment that has kedro")
    args = parser.parse_args()
    with project(CELLS) as root:
        script = scripts(root, CELLS)
        plain = seconds(lambda: call(sys.executable, script))
        isolated, fast, loaded = stage_seconds(root, fast=False), stage_seconds(root, fast=True), loaded_seconds()
        whole = whole_runs()
        command, api = papermills(root)
        figures = [
            figure("nothing to do, 5 stages, whole process", whole["nothing"], "s", "<= 0.3", whole["nothing"] <= 0.3),
            figure("plain script, whole process", plain, "s"), figure("stage, isolated kernel", isolated, "s"),
            figure("overhead of a stage, isolated", isolated - plain, "s", "<= 1.5", isolated - plain <= 1.5),
            figure("same code, everything imported", loaded, "s"), figure("stage, forked kernel", fast, "s"),
            figure("overhead of a stage, forked", fast - loaded, "s", "<= 0.15", fast - loaded <= 0.15),
            figure("5 stages, amhs run", whole["forced"], "s"), figure("5 stages, amhs run --isolated", whole["isolated"], "s"),
            figure("5 notebooks, papermill command", command, "s"), figure("5 notebooks, papermill API in one process", api, "s"),
        ]
        if args.ploomber:
            everything, nothing = ploomber(args.ploomber, root)
            figures += [figure("5 notebooks, ploomber build --force", everything, "s"), figure("nothing to do, ploomber", nothing, "s")]
        if args.kedro:
            figures.append(figure("5 nodes without notebooks, Kedro (always all)", kedro(args.kedro, root), "s"))
    record("workflow", figures)
    for name, given in (("ploomber", args.ploomber), ("kedro", args.kedro)):
        if not given:
            print(f"{name}: not measured, say --{name} VENV")


if __name__ == "__main__":
    main()
