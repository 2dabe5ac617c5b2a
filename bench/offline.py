"""Offline inference of half a year of one line, from telemetry to files: 259,200 rows in at most 20 s on two cores.

The package is of V8's size (12 models, 4,500 trees of depth 6). Timed is the whole way: features, forecasts, rules,
decisions, one Parquet file a day; then once more, when everything is done already. The service's way, one window at a
time through the desk, stands beside it for some minutes of the same history.

    python bench/offline.py [--days 180] [--trees 250] [--threads 2]
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import pandas as pd
from common import BENCH, figure, record

sys.path.insert(0, str(BENCH.parent / "tests"))
from served import labelled, make_desk, make_package, window_at

from amhs.config import WINDOW_MIN
from amhs.inference import load_package
from amhs.offline import forecast_rows, score_line
from amhs.simulate import simulate


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def one_by_one(home: Path, packed: Path, rows: pd.DataFrame, minutes: int) -> float:
    "Seconds of one window through the desk, on average."
    desk = make_desk(home, [packed])
    windows = [window_at(rows, WINDOW_MIN + i) for i in range(minutes)]
    desk.predict(windows[0])
    return seconds(lambda: [desk.predict(w) for w in windows]) / minutes


def bench(days: int, trees: int, threads: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as tmp:
        home = Path(tmp)
        packed = make_package(home, labelled(8, seed=1), model="v8", trees=trees)
        package, rows = load_package(packed), simulate(days, seed=2).telemetry
        forecast_rows(package, rows.head(2000), threads)  # compiled
        busy = os.getloadavg()[0]
        first = seconds(lambda: score_line(package, rows, home / "out", threads=threads))
        again = seconds(lambda: score_line(package, rows, home / "out", threads=threads))
        alone, grown = one_by_one(home, packed, rows, 300), float(package.forecaster.info["trees"])
    return [figure("trees", grown, ""), figure("rows", float(len(rows)), "rows"),
            figure("threads", float(threads), ""), figure("load of the machine when it began", busy, "processes"),
            figure("from telemetry to files", first, "s", "<= 20 (180 days, two free cores)", first <= 20 if days == 180 else None),
            figure("rows a second", len(rows) / first, "rows/s"), figure("once more, all done", again, "s"),
            figure("share of the first time", again / first, "", "<= 0.2", again / first <= 0.2),
            figure("a window through the desk", 1000 * alone, "ms"),
            figure("times as fast as window by window", alone * len(rows) / first, "x", ">= 2", alone * len(rows) / first >= 2)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=180)
    parser.add_argument("--trees", type=int, default=250, help="rounds of every model")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    record("offline", bench(args.days, args.trees, args.threads))
