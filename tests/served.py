"""Small packages and a desk to answer from them, for tests of the service."""

import fcntl
import os
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd

from amhs.config import HORIZONS_MIN, PURGE_GAP_MIN, load_params, load_site
from amhs.deployment import deploy
from amhs.develop import Labelled, block_times, fitted, package_model
from amhs.messages import Window
from amhs.model import make_model
from amhs.package import build_engines, candidate_table, proof_rows, prove, time_engines, validation_rows, write_package
from amhs.serve import Desk, Serving
from amhs.simulate import simulate
from amhs.store import open_store
from amhs.targets import build_targets, time_split

SITE = load_site("simulated")


def labelled(days=4, seed=0) -> Labelled:
    telemetry = simulate(days, seed=seed).telemetry
    targets = build_targets(telemetry, HORIZONS_MIN, SITE)
    times = block_times(targets.index, time_split(targets.index, 0.25, 0.25, PURGE_GAP_MIN))
    return Labelled(telemetry, targets, times, pd.DataFrame(columns=["line", "kind", "start", "end"]), SITE)


def make_package(home, data: Labelled, number=1, model="hub", engine="forest", trees=8):
    "A sealed package of a model that learnt little."
    forecaster = fitted(data, make_model(model, trees=trees, seed=number))
    gates = pd.DataFrame({"value": [0.5], "op": [">="], "limit": [0.2], "why": ["a test"]}, pd.Index(["skill"], name="criterion"))
    confirmed = package_model(home / f"confirmed_{number}_{engine}", forecaster, data, gates, number)
    params = load_params("inference").model_copy(update={"proof_rows": 50, "hole_rows": 10, "timing_repeats": 20})
    built = build_engines(forecaster, ["boosters", engine])
    engines = built[0] if isinstance(built, tuple) else built
    rows = proof_rows(validation_rows(data, forecaster)[0], params)
    table = candidate_table(prove(engines, forecaster, rows), time_engines(engines, rows, 20))
    return write_package(home / f"package_{number}_{engine}", confirmed, data, engines[engine], table, load_params("business"), params, number)


def small_package(factory, number=1, model="hub", engine="forest", trees=8) -> Path:
    "A package of three days, made once for all tests of all workers; they must not change it."
    base = factory.getbasetemp()
    home = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "packages" / f"{model}_{trees}"
    home.mkdir(parents=True, exist_ok=True)
    with open(home / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = home / f"package_{number}_{engine}"
        return found if found.is_dir() else make_package(home, labelled(days=3), number, model, engine, trees)


class Clock:
    "A clock that stands still until it is set."

    def __init__(self, now: datetime):
        self.now = now.timestamp()

    def __call__(self):
        return self.now

    def at(self, moment):
        self.now = pd.Timestamp(moment).timestamp()


def window_at(telemetry: pd.DataFrame, end: int, minutes=30, **changes) -> Window:
    "The window of some telemetry whose newest row is number `end`."
    rows = telemetry.iloc[end + 1 - minutes : end + 1]
    columns = [c for c in telemetry if c not in ("line", "timestamp")]
    values = [[None if np.isnan(v) else v for v in row] for row in rows[columns].to_numpy(float).tolist()]
    end = rows["timestamp"].iloc[-1].to_pydatetime().astimezone(UTC)
    return Window(**{"line": rows["line"].iloc[-1], "end": end, "columns": columns, "rows": values, "replay": True} | changes)


def make_desk(home, packages, serving=None, clock=None, line="HUB1", **changes) -> Desk:
    "A desk that answers for one line from the last of some packages."
    folder = home / "deployed"
    for package in packages:
        deploy(package, [line], folder=folder, **changes)
    count = iter(range(10**9))
    clock = clock or Clock(datetime(2026, 1, 2, tzinfo=UTC))
    desk = Desk(open_store(f"sqlite:///{home}/store.sqlite"), serving or Serving(), folder, clock, lambda: f"id{next(count)}")
    desk.refresh()
    return desk
