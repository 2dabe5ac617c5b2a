"""Quality of every model, next to named baselines on the same rows, on the simulated hub and on New York's flights.

Thresholds, early stopping and calibration are chosen on validation rows; the test rows are the newest and are only judged.

    python bench/quality.py [--days 60] [--flight-days 120] [--trees 250] [--full]
"""

import argparse
import tempfile
from pathlib import Path

import pandas as pd
from common import figure, record

from amhs.config import HORIZONS_MIN, TARGETS, EvaluateParams, load_params, load_site
from amhs.develop import Labelled, block_times, collect, fitted, judge
from amhs.evaluate import Evaluation
from amhs.model import make_model
from amhs.targets import build_targets, time_split


def labelled(site: str, source: str, line: str, days: int) -> Labelled:
    "The oldest days of a site, labelled and split as stage 04 does."
    business = load_params("business", "full", {"business.site": site, "business.source": source, "business.line": line, "business.days": str(days)})
    with tempfile.TemporaryDirectory() as folder:
        found = collect(business, sample_days=days, folder=Path(folder) / site)
    targets = build_targets(found.telemetry, site=site)
    return Labelled(found.telemetry, targets, block_times(targets.index, time_split(targets.index)), found.truth, load_site(site))


def evaluated(data: Labelled, trees: int, params: EvaluateParams) -> Evaluation:
    "All models on the same blocks."
    models = {name: make_model(name, **({"trees": trees} if name == "v8" else {})) for name in ("persistence", "linear", "v8", "hub")}
    return judge(data, {name: fitted(data, model) for name, model in models.items()}, params)


def number(table: pd.DataFrame, model: str, metric: str, horizon_min: int, target: str) -> float:
    "One number of one model."
    at = table.query("model == @model and metric == @metric and horizon_min == @horizon_min and target == @target")
    return float(at["value"].iloc[0])


def errors(evaluation: Evaluation, where: str) -> list[dict]:
    "MAE of every model per horizon and target; goal: hub below v8 everywhere."
    found = []
    for h in HORIZONS_MIN:
        for t in TARGETS:
            mae = {m: number(evaluation.levels, m, "mae", h, t) for m in ("persistence", "linear", "v8", "hub")}
            found += [figure(f"{where}: MAE {t} {h} min, {m}", v, "jobs") for m, v in mae.items() if m != "hub"]
            found.append(figure(f"{where}: MAE {t} {h} min, hub", mae["hub"], "jobs", f"< v8's {mae['v8']:.3g}", mae["hub"] < mae["v8"]))
    return found


def goals(evaluation: Evaluation, where: str, with_alarms: bool) -> list[dict]:
    "The goals of the foundation issue."
    head = evaluation.headline(10, 1)
    skill = float(head.loc["hub", "skill_max_10"])
    found = [figure(f"{where}: skill max 10 min, {m}", float(head.loc[m, "skill_max_10"]), "") for m in ("linear", "v8")]
    found.append(figure(f"{where}: skill max 10 min, hub", skill, "", ">= 0.30", skill >= 0.30))
    for m in ("persistence", "linear", "v8", "hub"):
        value = float(head.loc[m, "balanced_accuracy"])
        goal = (">= 0.60", value >= 0.60) if m == "hub" else (None, None)
        found.append(figure(f"{where}: surge balanced accuracy 10 min, {m}", value, "", *goal))
    for m in head.index:
        goal = [(">= 0.80", head.loc[m, "event_recall"] >= 0.8), (">= 8", head.loc[m, "median_lead_min"] >= 8)]
        goal = goal if m == "hub" and with_alarms else [(None, None)] * 2
        found.append(figure(f"{where}: event recall at <= 1 false a day, {m}", float(head.loc[m, "event_recall"]), "", *goal[0]))
        found.append(figure(f"{where}: median lead, {m}", float(head.loc[m, "median_lead_min"]), "min", *goal[1]))
        found.append(figure(f"{where}: false episodes, {m}", float(head.loc[m, "false_per_day"]), "/day"))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=60, help="of the simulated hub")
    parser.add_argument("--flight-days", type=int, default=120, help="of one airport")
    parser.add_argument("--trees", type=int, default=250, help="of the v8 baseline")
    parser.add_argument("--full", action="store_true", help="180 days, all flights of the airport")
    asked = parser.parse_args()
    days, flight_days = (180, 365) if asked.full else (asked.days, asked.flight_days)
    params, figures = load_params("evaluate", "demo"), []
    for where, site, source, line, n in (("hub", "simulated", "simulate", "", days), ("flights LGA", "nycflights", "nycflights", "LGA", flight_days)):
        found = evaluated(labelled(site, source, line, n), asked.trees, params)
        print(found.headline().round(3).T.to_string(), flush=True)
        figures += [figure(f"{where}: days", n, "days"), *goals(found, where, with_alarms=site == "simulated"), *errors(found, where)]
    record("quality", [{**f, "met": None if f["met"] is None else bool(f["met"])} for f in figures])
