"""What keeping rows costs: rows per second, latency of acknowledged observations, latency and CPU added to who hands in predictions.

Every figure stands beside one commit per row on the same SQLite file with the same settings (WAL, synchronous=FULL). Arrival is
open-loop: row i is due at i / rate, and its latency counts from then, so waiting counts. The caller of the predictions has 100 us
of other work per row, as a service has; its time for both is measured with no store, with `post`, and with one commit per row.

    python bench/store.py [--seconds 10] [--rate 1000]
"""

import argparse
import os
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from common import figure, record

from amhs.store import GroupCommit, Store, StoreBusy, open_store

NOW = datetime(2026, 3, 1, tzinfo=UTC)
VALUES = np.zeros(31, np.float32)
ANSWER, INPUTS = os.urandom(1500), os.urandom(4000)  # as a service's JSON and window


def observation(i: int) -> dict:
    return {"line": f"L{i % 8}", "minute": i // 8, "received": NOW, "values": VALUES}


def prediction(i: int) -> dict:
    return {"id": f"{i:032x}", "line": f"L{i % 8}", "minute": i // 8, "made": NOW, "source": "model", "model": "3-0123abcd", "role": "live",
            "alarm": False, "answer": ANSWER, "inputs": INPUTS}


def flood(store: Store, seconds: float) -> float:
    "Rows per second when rows are handed in as fast as they are taken."
    begun, i = time.perf_counter(), 0
    with GroupCommit(store) as commits:
        while time.perf_counter() - begun < seconds:
            try:
                commits.post("observations", observation(i))
                i += 1
            except StoreBusy:
                time.sleep(0.001)
    return i / (time.perf_counter() - begun)


def arrivals(n: int, rate: float):
    "Yield (i, the time it is due), each when it is due."
    begun = time.perf_counter() + 0.01
    for i in range(n):
        due = begun + i / rate
        if (ahead := due - time.perf_counter()) > 0:
            time.sleep(ahead)
        yield i, due


def percentiles(seconds: list[float]) -> tuple[float, float]:
    "p50 and p99, ms."
    return tuple(1000 * np.percentile(seconds, (50, 99)))


def acknowledged(store: Store, n: int, rate: float, wait_ms: float) -> tuple[list[float], int]:
    "Seconds from due to on disk, by group commit; and how many transactions it took."
    took = [0.0] * n
    with GroupCommit(store, wait_ms=wait_ms) as commits:
        for i, due in arrivals(n, rate):
            commits.put("observations", observation(i)).add_done_callback(lambda _, i=i, due=due: took.__setitem__(i, time.perf_counter() - due))
    return took, commits.commits


def one_by_one(store: Store, n: int, rate: float) -> list[float]:
    "The same with a commit per row."
    took = []
    for i, due in arrivals(n, rate):
        store.write("observations", [observation(i)])
        took.append(time.perf_counter() - due)
    return took


def busy(seconds: float) -> None:
    "Work that holds the interpreter, as a request does."
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def calling(keep, n: int, rate: float) -> tuple[list[float], float]:
    "Seconds from due to done of a caller who works 100 us and keeps a row; CPU seconds of the process."
    took, cpu = [], time.process_time()
    for i, due in arrivals(n, rate):
        busy(100e-6)
        keep(i)
        took.append(time.perf_counter() - due)
    return took, time.process_time() - cpu


def per_call(do, n: int = 2000) -> float:
    "us per call, best of five."
    best = float("inf")
    for _ in range(5):
        begun = time.perf_counter()
        for i in range(n):
            do(i)
        best = min(best, time.perf_counter() - begun)
    return 1e6 * best / n


def measure(folder: Path, seconds: float, rate: float) -> list[dict]:
    n, found = int(seconds * rate), []
    store = open_store(folder / "store.sqlite")
    found.append(figure("observations handed in to group commit", flood(store, seconds), "rows/s"))
    begun = time.perf_counter()
    singles = int(seconds * 500)
    for i in range(singles):
        store.write("observations", [observation(-1 - i)])
    found.append(figure("observations with a commit each", singles / (time.perf_counter() - begun), "rows/s"))
    for wait_ms in (0.0, 1.0):
        took, commits = acknowledged(store, n, rate, wait_ms)
        p50, p99 = percentiles(took)
        found += [figure(f"acknowledged at {rate:,.0f}/s, group commit waiting {wait_ms:.0f} ms, p50", p50, "ms"), figure("  p99", p99, "ms"),
                  figure("  rows in a transaction", n / commits, "rows")]
    p50, p99 = percentiles(one_by_one(store, n, rate))
    found += [figure(f"acknowledged at {rate:,.0f}/s, a commit each, p50", p50, "ms"), figure("  p99", p99, "ms")]
    return found + callers(store, n, rate) + calls(store)


def callers(store: Store, n: int, rate: float) -> list[dict]:
    "What predictions at a rate cost who hands them in."
    none, cpu_none = calling(lambda i: None, n, rate)
    cpu = time.process_time()
    with GroupCommit(store) as commits:
        posted, _ = calling(lambda i: commits.post("predictions", prediction(i)), n, rate)
    cpu_posted = time.process_time() - cpu
    single, cpu_single = calling(lambda i: store.write("predictions", [prediction(n + i)]), n, rate)
    found = []
    for name, took, cpu_s in (("no store", none, cpu_none), ("post", posted, cpu_posted), ("a commit each", single, cpu_single)):
        p50, p99 = percentiles(took)
        found += [figure(f"caller at {rate:,.0f} predictions/s, {name}, p50", p50, "ms"), figure("  p99", p99, "ms"),
                  figure("  CPU beyond no store", 1e6 * (cpu_s - cpu_none) / n, "us/row")]
    added = float(np.median(posted) - np.median(none)) * 1000
    return [*found, figure("latency that keeping a prediction adds, median", added, "ms", "< 0.05 ms", bool(added < 0.05))]


def calls(store: Store) -> list[dict]:
    "Single calls in the path of a request."
    with GroupCommit(store, limit=10**6, wait_ms=60_000, post_ms=60_000) as commits:
        put = per_call(lambda i: commits.put("observations", observation(i)), 500)
        post = per_call(lambda i: commits.post("predictions", prediction(i)), 500)
    return [figure("put, one call", put, "us"), figure("post, one call", post, "us"),
            figure("newest, 64 minutes", per_call(lambda i: store.newest("L1", 64)), "us"),
            figure("newest, 30 minutes", per_call(lambda i: store.newest("L1", 30)), "us")]


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=10)
    options.add_argument("--rate", type=float, default=1000)
    given = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record("store", measure(Path(folder), given.seconds, given.rate))
