"""How long `amhs` takes to answer: whole processes without bytecode of our own to help, median of ten."""

import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

from common import figure, record

AMHS = Path(sys.executable).with_name("amhs")
ENV = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}


def seconds(*args: str) -> float:
    "Median wall time of a whole process."
    took = []
    for _ in range(10):
        began = time.perf_counter()
        subprocess.run([AMHS, *args], env=ENV, check=True, stdout=subprocess.DEVNULL)
        took.append(time.perf_counter() - began)
    return round(statistics.median(took), 3)


help_s = seconds("--help")
record("cli", [
    figure("amhs --help", help_s, "s", "< 0.5", help_s < 0.5),
    figure("amhs run --plan", seconds("run", "--plan"), "s"),
    figure("amhs stages", seconds("stages"), "s"),
])
