"""Runs library notebooks as `nbdev-test` does, each in a fork of one process that has imported what most of them need.

A line in: a notebook, a tab, a file for what it prints. A line out: 0 if every cell ran.
"""

import gc
import importlib
import os
import sys
from pathlib import Path

from nbdev.test import test_nb as run_notebook

AHEAD = ("matplotlib.pyplot", "pyarrow.parquet", "xgboost", "sklearn.linear_model", "fastcore.test", "amhs.api", "amhs.develop", "amhs.monitor", "amhs.plots")


def attempt(notebook: str, log: str) -> int:
    "In the fork: run, and leave what was printed."
    with open(log, "w") as out:
        for stream in (1, 2):
            os.dup2(out.fileno(), stream)
    found, _ = run_notebook(Path(notebook))
    sys.stdout.flush()
    return 0 if found else 1


def main():
    for name in AHEAD:
        importlib.import_module(name)
    gc.freeze()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os._exit(attempt(*line.rstrip("\n").split("\t")))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
