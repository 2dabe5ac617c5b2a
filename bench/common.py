"""What every benchmark does in the end: print its figures and keep them in bench/results/NAME.json."""

import datetime
import os
import platform
import subprocess
from pathlib import Path

from amhs.core import read_json, write_json

BENCH = Path(__file__).resolve().parent


def figure(name: str, value: float, unit: str, goal: str | float | None = None, met: bool | None = None) -> dict:
    "One measured number; `goal` as it was promised, `met` if that can be said."
    known = None if value != value else value  # JSON has no NaN
    return {"name": name, "value": known, "unit": unit, "goal": goal, "met": met}


def machine() -> str:
    "The machine in words: processor, cores, system, Python."
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores, {platform.system()}, Python {platform.python_version()}"


def commit() -> str:
    "The commit that was measured; with a plus when files differ from it."
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=BENCH, capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def shown(value) -> str:
    "A value as a person writes it."
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,.4g}" if isinstance(value, float) and abs(value) < 10_000 else f"{value:,.0f}" if isinstance(value, float) else str(value)


def record(name: str, figures: list[dict]) -> Path:
    "Print figures as a table and write them, with date, commit and machine, to bench/results/NAME.json."
    columns = ("name", "value", "unit", "goal", "met")
    rows = [columns, *(tuple(shown(f.get(c)) for c in columns) for f in figures)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    print("\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip() for row in rows))
    about = {"date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), "commit": commit(), "machine": machine()}
    return write_json(BENCH / "results" / f"{name}.json", {**about, "figures": figures})


def recorded(name: str) -> dict:
    "What a benchmark wrote last."
    return read_json(BENCH / "results" / f"{name}.json")
