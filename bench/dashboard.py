"""How quickly the dashboard stands before a reader: 30 days of 10 lines in the store, a real browser, `python bench/dashboard.py`.

The store is filled with observations, answers, outcomes, checks and alerts in bulk; the server is `amhs dashboard`; first paint is
the time from the request to the moment the tiles of all lines and the large figure are on the screen.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgspec
import numpy as np
from common import figure, record

from amhs import sections
from amhs.board import Board
from amhs.messages import Alarm, Answer, Horizon, Level, Reason, Surge
from amhs.store import Store, minute_of, open_store
from amhs.telemetry import COLUMNS

SHARE = {"flat": 0.7, "slight": 0.2, "surge": 0.1}


def course(days: float, seed: int) -> np.ndarray:
    "A queue's level, minute by minute: the day's rhythm, slow noise, and surges."
    rng, n = np.random.default_rng(seed), int(1440 * days)
    t = np.arange(n)
    slow = np.convolve(rng.normal(size=n + 120), np.ones(121) / 11, "valid")[:n]
    level = 190 + 30 * np.sin(2 * np.pi * (t / 1440 - 0.3 + seed / 40)) + 8 * slow + rng.normal(size=n)
    for at in rng.integers(0, n, max(int(2 * days), 1)):
        level[at : at + 50] += np.hanning(100)[25:75][: len(level[at : at + 50])] * rng.uniform(50, 130)
    return np.maximum(level, 5).round(1)


def told(line: str, minute: int, level: float, ahead: np.ndarray, number: int) -> Answer:
    "An answer like those of the service."
    at = datetime.fromtimestamp(60 * minute, UTC)
    horizons = []
    for h, most in zip((10, 15, 25), ahead.tolist()):
        levels = [Level(round(v, 2), round(max(v - h / 2, 0), 2), round(v + h / 2, 2)) for v in (min(level, most) - 3, (level + most) / 2, most)]
        horizons.append(Horizon(h, *levels, Surge("flat", **SHARE)))
    on = bool(ahead.max() > 262)
    reasons = [Reason("hub_jobs_slope", 12.3), Reason("upper_to_hub_jobs_last", 6.1), Reason("hub_free_slots_min", -4.2)] if on else []
    alarm = Alarm(on, "model" if number % 5 else "rules", "rules_first", 262.0, float(ahead.max()), "none", [] if number % 5 else ["bottleneck"], reasons)
    made = at + timedelta(seconds=1.5 + number % 7)
    source = "rules" if number % 400 < 6 else "hybrid"
    return Answer(f"{line}-{minute}", line, at, made, at + timedelta(minutes=5), source, "12-4f3a9c21", "live", level, horizons, alarm)


def observation_values(level: np.ndarray) -> np.ndarray:
    "Rows of all columns; only the level has a course."
    values = np.full((len(level), len(COLUMNS)), 100, "<f4")
    values[:, 0] = level
    return values


def fill_line(store: Store, line: str, days: float, until: datetime, seed: int, observed: bool = True) -> int:
    "Observations, answers and outcomes of a line; how many rows."
    level, last = course(days, seed), minute_of(until)
    first, n = last - len(level), len(level)
    ahead = np.stack([np.max([np.roll(level, -i) for i in range(1, h + 1)], axis=0) for h in (10, 15, 25)], axis=1)
    ahead = ahead + np.random.default_rng(seed).normal(0, 4, (n, 3))
    values = observation_values(level)
    rows = store.write("observations", ({"line": line, "minute": first + i, "received": until, "values": values[i].tobytes()} for i in range(n)))
    answers = (told(line, first + i, float(level[i]), ahead[i], i) for i in range(n))
    encode = msgspec.json.encode
    rows += store.write("predictions", ({"id": a.id, "line": line, "minute": first + i, "made": a.made, "source": a.source, "model": a.model, "role": a.role,
                                         "alarm": a.alarm.on, "answer": encode(a)} for i, a in enumerate(answers)))
    joined = until
    return rows + store.write("outcomes", ({"line": line, "minute": first + i, "horizon_min": h, "level_min": 1.0, "level_avg": 2.0, "level_max": 3.0,
                                            "surge_class": 0, "joined": joined} for i in range(n) for h in (10, 15, 25)))


def found(line: str, day: int, psi: float) -> list[dict]:
    "Findings of a check: some columns drift from the 20th day on, a sensor is stuck for two days."
    rows = []
    if psi > 0.25:
        rows += [{"line": line, "kind": "data_drift", "name": c, "severity": "warning", "value": round(psi - 0.02 * i, 3), "low": None, "high": 0.25,
                  "what": f"{c} is spread differently than in training: PSI {psi - 0.02 * i:.2f}, limit 0.25"} for i, c in enumerate(COLUMNS[8:11])]
        rows.append({"line": line, "kind": "performance", "name": "mae_max_10", "severity": "critical" if psi > 0.4 else "warning",
                     "value": round(8 + 20 * psi, 1), "low": 6.1, "high": 11.8,
                     "what": f"The forecast of the next 10 minutes errs by {8 + 20 * psi:.1f} jobs; 6.1 to 11.8 are usual"})
    if day in (9, 10):
        rows.append({"line": line, "kind": "stuck", "name": "hub_oht_util", "severity": "warning", "value": 240.0, "low": None, "high": 60.0,
                     "what": "hub_oht_util stood still for 240 minutes"})
    return rows


def checks(lines: list[str], days: int, until: datetime) -> list[dict]:
    "Daily checks of all lines, and what was decided on them."
    rows, rng = [], np.random.default_rng(1)
    end = until.replace(hour=0, minute=0, second=0, microsecond=0)
    for day in range(days):
        at = end - timedelta(days=days - 1 - day)
        for n, line in enumerate(lines):
            psi = float(abs(rng.normal(0.08, 0.03)) + (0.02 * max(day - 20, 0) * (n < 3) if day < 27 else 0))
            mae = 8 + rng.normal(0, 0.5) + 12 * max(psi - 0.15, 0)
            numbers = {"mae_max_10": mae, "mae_limit": 11.8, "skill_max_10": 0.42 - (mae - 8) / 30, "balanced_accuracy_10": 0.71 - (mae - 8) / 60,
                       "event_recall": float(np.clip(0.82 - (mae - 8) / 20, 0, 1)), "false_per_day": float(rng.poisson(0.8)), "coverage": 0.9 - (mae - 8) / 50,
                       "psi_max": psi, "rows": 1440, "share_fallback": 0.015, "lag_min": 0.6, "estimated_mae_max_10": mae * 1.05}
            window = [(at - timedelta(1)).isoformat(), at.isoformat()]
            detail = {"findings": found(line, day, psi), "figures": numbers, "window": window, "model": "12-4f3a9c21"}
            rows.append({"id": f"monitoring-{line}-{day}", "at": at + timedelta(minutes=5), "kind": "monitoring", "subject": line, "who": "monitor",
                         "detail": json.dumps(detail)})
        retrain = day in (24, 26)
        why = "two days of drift on HUB01, HUB02, HUB03" if retrain else "nothing found that lasts"
        rows.append({"id": f"retraining-{day}", "at": at + timedelta(minutes=9), "kind": "retraining", "subject": lines[0], "who": "policy",
                     "why": why, "detail": json.dumps({"retrain": retrain})})
        if day in (23, 24, 26):
            title = {"title": f"{lines[0]}: forecasts err more than usual"}
            rows.append({"id": f"alert-{day}", "at": at + timedelta(minutes=7), "kind": "alert", "subject": lines[0], "who": "monitor",
                         "detail": json.dumps(title)})
    rows.append({"id": "promotion-1", "at": end - timedelta(days=2, hours=-3), "kind": "promotion", "subject": lines[0], "who": "kim",
                 "why": "wins on new data, loses nothing on old: MAE 8.1 against 11.9", "detail": json.dumps({"verdict": "promote"})})
    return rows


def write_deployment(folder: Path, lines: list[str], until: datetime) -> None:
    "Who answered when, as `amhs deploy` records it."
    folder.mkdir(parents=True, exist_ok=True)
    empty = {"live": "", "canary": "", "canary_share": 0.0, "shadow": "", "previous": "", "hybrid": "rules_first", "site": "simulated"}
    steps = [(28, {"live": "11-09ab33ef"}, "first model of this site"), (12, {"live": "11-09ab33ef", "shadow": "12-4f3a9c21"}, "listens"),
             (5, {"live": "12-4f3a9c21"}, "better for a week in the shadow")]
    entries = [{"at": (until - timedelta(days=d)).isoformat(), "line": line, "who": "kim", "why": why, "before": empty, "after": empty | after}
               for d, after, why in steps for line in lines]
    (folder / "history.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (folder / "lines.json").write_text(json.dumps({"lines": dict.fromkeys(lines, empty)}))


def fill(home: Path, lines: int = 10, days: int = 30, until: datetime | None = None) -> dict:
    "A data folder as after so many days; rows and seconds."
    began, until = time.perf_counter(), (until or datetime.now(UTC)).replace(second=0, microsecond=0)
    names = [f"HUB{i + 1:02d}" for i in range(lines)]
    home.mkdir(parents=True, exist_ok=True)
    with open_store(f"sqlite:///{home}/store.sqlite") as store:
        rows = sum(fill_line(store, line, days, until, seed) for seed, line in enumerate(names))
        rows += store.write("decisions", checks(names, days, until))
    write_deployment(home / "deployed", names, until)
    return {"rows": rows, "seconds": time.perf_counter() - began, "lines": names}


class Served:
    "`amhs dashboard` on a data folder."

    def __init__(self, home: Path, *more: str):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        env = os.environ | {"AMHS_STORE": f"sqlite:///{home}/store.sqlite", "AMHS_DEPLOYED": str(home / "deployed")}
        self.log, self.address = open(home / "dashboard.log", "w+"), f"http://127.0.0.1:{self.port}"  # noqa: SIM115 (closed with the server)
        began = time.perf_counter()
        command = [Path(sys.executable).with_name("amhs"), "dashboard", "--port", str(self.port), "--no-browser", *more]
        self.process = subprocess.Popen(command, env=env, stdout=self.log, stderr=self.log)
        while not self._answers():
            if self.process.poll() is not None or time.perf_counter() - began > 120:
                self.log.seek(0)
                raise RuntimeError(f"the dashboard did not start: {self.log.read()}")
            time.sleep(0.1)
        self.ready_s = time.perf_counter() - began

    def _answers(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.address}/liveness", timeout=2).status == 200
        except OSError:
            return False

    def memory_mb(self) -> float:
        return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{self.process.pid}/status").read_text())[1]) / 1024

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


PAINTED = """() => {
  const deep = (root, all) => { for (const e of root.querySelectorAll('*')) { all.push(e); if (e.shadowRoot) deep(e.shadowRoot, all) } return all };
  const all = deep(document, []);
  const tiles = all.filter(e => e.classList && e.classList.contains('tile') && e.getBoundingClientRect().height > 20).length;
  const drawn = all.filter(e => e.tagName === 'CANVAS' && e.width > 50).length;
  return tiles >= %d && drawn >= %d;
}"""


def cpu_s(processes: list) -> float:
    "Seconds of the processor that processes have used."
    times = [p.cpu_times() for p in processes if p.is_running()]
    return sum(t.user + t.system for t in times)


def paint(browser, served: Served, tiles: int, query: str = "", whole: int = 14) -> dict[str, float]:
    "Seconds until tiles and the large figures are on the screen of a browser that was never here, the same in CPU, and until all is drawn."
    import psutil

    def busy():
        chromium = [p for p in psutil.Process().children(recursive=True) if "chrom" in p.name()]
        return cpu_s([psutil.Process(served.process.pid), *chromium])
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page, before, began = context.new_page(), busy(), time.perf_counter()
    page.goto(f"{served.address}/{query}", wait_until="commit")
    page.wait_for_function(PAINTED % (tiles, 2), timeout=120_000, polling=20)
    first, cpu = time.perf_counter() - began, busy() - before
    page.wait_for_function(PAINTED % (tiles, whole), timeout=120_000, polling=20)
    spent = time.perf_counter() - began
    page.wait_for_timeout(1000)
    context.close()
    return {"first": first, "cpu": cpu, "all": spent}


def sections_s(home: Path, hours: float) -> dict[str, float]:
    "Seconds each section takes to be made, read anew."
    os.environ["AMHS_DEPLOYED"] = str(home / "deployed")
    found = {}
    with open_store(f"sqlite:///{home}/store.sqlite") as store:
        for name, make in sections.SECTIONS.items():
            board = Board(store, home / "deployed")
            view, began = board.view(hours=hours), time.perf_counter()
            make(board, view, sections.load_words("en"))
            found[name] = time.perf_counter() - began
    return found


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--days", type=int, default=30)
    options.add_argument("--lines", type=int, default=10)
    options.add_argument("--home", type=Path, help="keep the store here, and use it again")
    asked = options.parse_args()
    home = asked.home or Path(tempfile.mkdtemp())
    size = f"{asked.days} days of {asked.lines} lines"
    filled = {} if (home / "store.sqlite").exists() else fill(home, asked.lines, asked.days)
    figures = [figure(f"store filled, {size}", filled["rows"], "rows"), figure("store filled", filled["seconds"], "s")] if filled else []
    figures.append(figure("load of the machine before, jobs per core", os.getloadavg()[0] / (os.cpu_count() or 1), ""))
    figures.append(figure("size of the store", (home / "store.sqlite").stat().st_size / 1e6, "MB"))
    from playwright.sync_api import sync_playwright

    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))))
    with Served(home) as served, sync_playwright() as p:
        browser = p.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"])
        figures.append(figure("server ready", served.ready_s, "s"))
        seen = [paint(browser, served, asked.lines) for _ in range(5)]
        for name, value in ((f"very first reader, {size}", seen[0]["first"]), ("median of 5", float(np.median([s["first"] for s in seen]))),
                            ("slowest of 5", max(s["first"] for s in seen))):
            figures.append(figure(f"first paint, {name}", value, "s", 3, value <= 3))
        figures.append(figure("first paint, CPU of server and browser, median", float(np.median([s["cpu"] for s in seen])), "s"))
        figures.append(figure("everything drawn, 24 hours, median", float(np.median([s["all"] for s in seen])), "s"))
        for name, query in (("one line, 30 days", "?line=HUB03&hours=720"), ("all lines, 30 days", "?hours=720")):
            once = paint(browser, served, asked.lines, query)
            figures += [figure(f"first paint, {name}", once["first"], "s"), figure(f"everything drawn, {name}", once["all"], "s")]
        figures.append(figure("memory of the server after 7 readers", served.memory_mb(), "MB"))
        began = time.perf_counter()
        text = urllib.request.urlopen(f"{served.address}/metrics").read().decode()
        figures.append(figure("numbers for Prometheus", time.perf_counter() - began, "s"))
        figures.append(figure("numbers for Prometheus", sum(1 for x in text.splitlines() if not x.startswith("#")), "samples"))
        browser.close()
    for hours in (24, 720):
        figures += [figure(f"section {name}, all lines, {hours} h", s, "s") for name, s in sections_s(home, hours).items()]
    record("dashboard", figures)
    if not asked.home:
        shutil.rmtree(home)


if __name__ == "__main__":
    main()
