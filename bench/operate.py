"""What operating costs: a line's day step by step, days of a rehearsal in a minute, and how it grows from 1 to 10 to 100 lines.

The steps are those of `amhs operate`: score every minute, join outcomes, check the day, tell people, decide. Retraining is timed
by itself, once: cause, plan, training, four comparisons, package. The model is small (`--trees`), the checks are the real ones.

    python bench/operate.py [--lines 1 10 100] [--trees 60] [--history 14]
"""

import argparse
import os
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

from common import figure, record

from amhs import operate
from amhs.deployment import deploy
from amhs.rehearsal import Rehearsal, hub_of, set_up
from amhs.simulate import simulate
from amhs.store import observation_rows, open_store

STEPS = ("predict", "join", "check", "tell", "judge_lines")


def cpu(work) -> tuple[float, float]:
    "Seconds by the clock, and of the processor."
    began, used = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - began, time.process_time() - used


def a_day(operation, home: Path, lines: int) -> dict[str, tuple[float, float]]:
    "One day of so many lines, step by step."
    names = [f"HUB{i + 1}" for i in range(lines)]
    begin = Rehearsal().begin
    own = replace(operation, store=open_store(home / f"lines{lines}.sqlite"), folder=home / f"deployed{lines}", retrain=None)
    deploy(home / "first", names, folder=own.folder)
    days = [simulate(2.05, seed=1, line=name, start=str((begin - timedelta(days=1)).date())).telemetry for name in names]
    due = begin + timedelta(days=1, minutes=30)
    found = {"observe": cpu(lambda: [own.store.write("observations", observation_rows(d[d["timestamp"] < due], due)) for d in days])}
    operate.predict(own, begin)
    return found | {step: cpu(lambda: getattr(operate, step)(own, due)) for step in STEPS}


def a_retraining(operation, history, later, due, trees: int) -> tuple[float, float]:
    "One retraining, asked for by a person."
    operation.store.write("observations", observation_rows(history, due))
    operation.store.write("observations", observation_rows(later[later["timestamp"] < due], due))
    return cpu(lambda: operate.retrain_here(operation, "HUB1", {"reasons": ["manual"]}, due, trees=trees))


def bench(lines: list[int], trees: int, history_days: int) -> list[dict]:
    busy, rows = os.getloadavg()[0], []
    with tempfile.TemporaryDirectory() as tmp:
        home = Path(tmp)
        piece = Rehearsal("normal", days=4, history_days=history_days, trees=trees, reference=False)
        first = cpu(lambda: set_up(piece, home))
        operation = set_up(piece, home)
        for n in lines:
            steps = a_day(operation, home, n)
            wall, used = (sum(s[i] for s in steps.values()) for i in (0, 1))
            if n == lines[0]:
                rows += [figure(f"a line's day: {name}", s[1] / n, "CPU s") for name, s in steps.items()]
                rows.append(figure("a line's check of a day", steps["check"][0] / n, "s", "<= 5", steps["check"][0] / n <= 5))
            rows.append(figure(f"a line's day, of {n} lines", used / n, "CPU s"))
            rows.append(figure(f"simulated days a minute, {n} lines", 60 / wall, "days/min"))
        history, later = hub_of(piece, "HUB1")
        trained = a_retraining(operation, history, later, piece.begin + timedelta(days=4), trees)
    return [figure("load of the machine when it began", busy, "processes"), figure("trees", float(trees), ""),
            figure("days of history", float(history_days), "days"),
            figure("the first model, packed", first[1], "CPU s"), *rows, figure("a retraining in process", trained[1], "CPU s")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, nargs="+", default=[1, 10, 100])
    parser.add_argument("--trees", type=int, default=60, help="rounds of every model")
    parser.add_argument("--history", type=int, default=14, help="days the first model learns of")
    args = parser.parse_args()
    record("operate", bench(args.lines, args.trees, args.history))
