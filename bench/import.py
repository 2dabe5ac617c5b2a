"""How fast a million rows are imported, and in how much memory: clean, messy, packed, and once more."""

import gzip
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
from common import figure, record

from amhs.quality import review
from amhs.telemetry import COLUMNS, check_telemetry, fill_gaps

ROWS = int(sys.argv[1]) if len(sys.argv) > 1 else 1_000_000
SITE = {"name": "bench", "timezone": "Asia/Seoul", "line": {"column": "라인"}, "time": {"column": "측정시각", "format": "%Y%m%d%H%M"},
        "columns": {name: f"{name.upper()} 값" for name in COLUMNS}}
CHILD = """
import json, pathlib, sys, time
from amhs.config import Site
from amhs.telemetry import import_files
site, path, out = json.loads(sys.argv[1]), sys.argv[2], sys.argv[3]
wall, cpu = time.perf_counter(), time.process_time()
report = import_files(path, Site(**site), out)
found = {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu, "rows": report.rows_in,
         "dropped": sum(report.dropped.values()), "repaired": report.repaired, "change": report.change._asdict()}
status = dict(line.split(":", 1) for line in pathlib.Path("/proc/self/status").read_text().splitlines())
print(json.dumps(found | {"peak_gb": int(status["VmHWM"].split()[0]) / 2 ** 20}))  # of this process alone
"""


def million() -> pa.Table:
    "One line's minutes, all 31 columns: counts as whole numbers, times and shares with two decimals."
    rng = np.random.default_rng(0)
    times = pd.date_range("2024-01-01", periods=ROWS, freq="min").strftime("%Y%m%d%H%M")
    values = {f"{name.upper()} 값": rng.integers(0, 1500, ROWS) if "jobs" in name or "queue" in name else (rng.random(ROWS) * 90).round(2)
              for name in COLUMNS}
    return pa.table({"측정시각": times, "라인": np.full(ROWS, "허브1"), **values})


def messy(clean: bytes) -> bytes:
    "The same with a hundredth of the lines cut, repeated, with a text number, with seconds or with no value; CP949."
    rng, lines = np.random.default_rng(1), clean.decode().splitlines()
    for i in rng.choice(np.arange(1, len(lines)), len(lines) // 100, replace=False):
        line, fields = lines[i], lines[i].split(",")
        lines[i] = (line[:40], f"{line}\n{line}", ",".join([*fields[:5], '"1,234"', *fields[6:]]), line.replace('",', '30",', 1),
                    ",".join([*fields[:-1], "N/A"]))[i % 5]
    return "\n".join(lines).encode("cp949")


def run(path: Path, out: Path) -> dict:
    "Import in a process of its own."
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(SITE), path, out], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


with tempfile.TemporaryDirectory() as folder:
    home, table, figures = Path(folder), million(), []
    pa.csv.write_csv(table, home / "clean.csv")
    pq.write_table(table, home / "clean.parquet")
    del table
    (home / "messy.csv.gz").write_bytes(gzip.compress(messy((home / "clean.csv").read_bytes()), 1))
    for name, path, out in (("clean CSV", "clean.csv", "a"), ("the same again", "clean.csv", "a"),
                            ("messy CP949 CSV in gz", "messy.csv.gz", "b"), ("Parquet", "clean.parquet", "c")):
        found = run(home / path, home / out)
        figures += [figure(f"{name}: {found['rows']:,} rows, wall", round(found["wall"], 1), "s", "at most 30", found["wall"] <= 30),
                    figure(f"{name}: CPU", round(found["cpu"], 1), "s"),
                    figure(f"{name}: peak memory", round(found["peak_gb"], 2), "GB", "at most 2", found["peak_gb"] <= 2)]

half_year = pd.DataFrame({"line": "HUB1", "timestamp": pd.date_range("2026-01-01", periods=259_200, freq="min", tz="UTC"),
                          **{name: np.arange(259_200, dtype="float32") % 97 for name in COLUMNS}})
holes = check_telemetry(half_year[np.random.default_rng(0).random(259_200) > 0.05])
holes.loc[::7, "hub_queue"] = np.nan
for name, call, goal in (("fill gaps, 180 days of 31 columns", lambda: fill_gaps(holes), 1), ("review of the same", lambda: review(holes), None),
                         ("check_telemetry of the same", lambda: check_telemetry(holes), None)):
    began = time.process_time()
    call()
    took = round(time.process_time() - began, 2)
    figures.append(figure(f"{name}: CPU", took, "s", f"at most {goal}" if goal else None, took <= goal if goal else None))
record("import", figures)
