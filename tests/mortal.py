"""A night of operation played by processes that die of it: each is a fork of one that has everything imported, killed at a point in the middle of a step.

`python tests/mortal.py` reads orders, a line of JSON each (see `Order`), and answers each with the exit status of the process that carried it out.
"""

import importlib
import json
import os
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from shutil import copytree

import pandas as pd

from amhs import operate
from amhs.alerts import FileChannel
from amhs.rehearsal import Rehearsal, set_up
from amhs.retrain import Retrained
from amhs.schedule import Worker, open_dues, run_due
from amhs.store import Store, observation_rows

PIECE = Rehearsal("capacity-upgrade", days=1, history_days=8, trees=8, lines=2, reference=False)
DUE = PIECE.begin + timedelta(days=1, minutes=30)
EVENING = ("predict", "join", "check", "tell", "decide")  # all jobs but the retraining

# where a process dies -> at the first time that rows of this table or kind are written, or that this is called; before, inside (not committed) or after it
POINTS = {
    "observe, in the middle of a line": ("observations", "inside"),
    "observe, between two lines": ("observations", "after"),
    "predict, in the middle of a line": ("predictions", "inside"),
    "predict, between two lines": ("predictions", "after"),
    "join, in the middle of a line": ("outcomes", "inside"),
    "join, between two lines": ("outcomes", "after"),
    "check, between two lines": ("monitoring", "after"),
    "tell, between two channels": ("amhs.alerts:FileChannel.deliver", "after"),
    "decide, between two lines": ("retraining", "after"),
    "find the cause": ("plan", "after"),
    "train": ("amhs.retrain:successor", "after"),
    "compare": ("amhs.retrain:four_comparisons", "after"),
    "pack": ("amhs.retrain:package_model", "after"),
    "take the package in": ("shutil:copytree", "after"),
    "promote": ("promotion", "after"),
    "deploy, noted and not done": ("amhs.deployment:write_json", "before"),
    "deploy, done and not noted by the job": ("amhs.deployment:write_json", "after"),
}
LONG = ("train", "compare", "pack", "predict, in the middle of a line", "join, in the middle of a line")  # for training itself, or much like others
AFTER_EVENING = list(POINTS)[list(POINTS).index("find the cause"):]


@dataclass(frozen=True)
class Order:
    "What a process is to do."
    home: str  # folder with store, deployments, and the day's telemetry
    point: str = ""  # where it dies; empty: nowhere
    after_s: float = 0.0  # it is killed from outside after so many seconds; 0: never
    learn: bool = False  # train for real; else a stand-in
    jobs: tuple = ()  # only these; none: all
    here: bool = False  # not in a fork: those that follow have compiled what it compiled


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(do, when):
    "A function that kills its process."
    def done(*args, **kw):
        if when == "before":
            die()
        found = do(*args, **kw)
        return die() or found
    return done


def deadly_write(what, when):
    "The store's `write`, deadly for one table or kind of decision."
    write = Store.write

    def written(self, table, rows):
        rows = list(rows)
        if rows and what in (table, rows[0].get("kind")):
            if when == "inside":  # all rows are written, and not committed
                self._direct("writing").set_trace_callback(lambda sql: sql == "COMMIT" and die())
            write(self, table, rows)
            die()
        return write(self, table, rows)
    return written


def arm(point):
    "Have this process die at a point."
    what, when = POINTS[point]
    module, _, name = what.rpartition(":")
    if not module:
        Store.write = deadly_write(what, when)
        return
    owner, (*inner, name) = importlib.import_module(module), name.split(".")
    for part in inner:
        owner = getattr(owner, part)
    setattr(owner, name, deadly(getattr(owner, name), when))


def another(telemetry, plan, current, folder, number, **hyper):
    "A stand-in for training: a package of its own version, better than the current one."
    from amhs.engines import seal, unseal

    copytree(current.folder, folder)
    card = {k: v for k, v in unseal(folder, "package.json").items() if k != "files"}
    seal(folder, "package.json", card | {"number": number, "version": f"{number}-{current.version.rpartition('-')[2]}"})
    rows = [("new", "max", "mae", -1.0), ("new", "class", "balanced_accuracy", 0.1), ("old", "max", "mae", -1.0)]
    return Retrained(folder, pd.DataFrame([{"data": d, "horizon_min": 10, "target": t, "metric": m, "current": 9.0, "new": 9.0 + x, "difference": x,
                                            "low": x, "high": x, "n": 1000} for d, t, m, x in rows]))


def night(order):
    "A day's telemetry comes in, and everything that is due is done."
    home = Path(order.home)
    channels = tuple(FileChannel(name=n, kind="file", path=home / f"{n}.jsonl", least="info") for n in ("desk", "shift"))
    operation = replace(set_up(PIECE, home), channels=channels)
    if not order.learn and not order.here:
        operate.retrain_in_process = another
    jobs, worker = operate.jobs_of(operation, keep=True), Worker(operation.store, lease_s=0.3)
    wanted = [j for j in jobs if not order.jobs or j.name in order.jobs]
    with operation.store as store:
        for line in PIECE.names:
            store.write("observations", observation_rows(pd.read_parquet(home / f"{line}.parquet"), DUE))
        while any(open_dues(store, job, DUE) for job in wanted):
            ran = run_due(worker, jobs, DUE, [j.name for j in wanted])
            assert set(ran["state"]) <= {"done"}, ran
            time.sleep(0.05)  # what a dead process held is free in a moment


def carry_out(order):
    "Fork, play the night, and say how it ended: 0, or minus the signal."
    if order.here:
        return night(order) or 0
    if not (pid := os.fork()):
        try:
            arm(order.point) if order.point else None
            night(order)
            os._exit(0)
        except BaseException:
            sys.excepthook(*sys.exc_info())
            os._exit(1)
    if order.after_s:
        time.sleep(order.after_s)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__":
    for text in sys.stdin:
        print(carry_out(Order(**json.loads(text))), flush=True)
