"""How the error grows when a sensor fails: each column in turn missing, stuck, or 10 % off, on rows the model has never seen.

    python bench/robustness.py [--days 40] [--hours 60]
"""

import argparse

import numpy as np
import pandas as pd
from common import figure, record

from amhs.config import load_site
from amhs.develop import Labelled, block, block_times, fitted
from amhs.features import build_features
from amhs.model import Forecaster, make_model
from amhs.simulate import simulate
from amhs.targets import build_targets, time_split
from amhs.telemetry import COLUMNS

SPOILT = {
    "missing": lambda values: np.full_like(values, np.nan),
    "stuck": lambda values: np.full_like(values, values[0]),
    "10 % high": lambda values: values * np.float32(1.1),
    "10 % low": lambda values: values * np.float32(0.9),
}


def error(model: Forecaster, telemetry: pd.DataFrame, targets: pd.DataFrame) -> float:
    "MAE of the highest change in 10 minutes, jobs."
    features = build_features(telemetry, model.feature_set)
    rows = targets.index.intersection(features.index)
    return float((model.predict(features.loc[rows])["change_max_10"] - targets.loc[rows, "change_max_10"]).abs().mean())


def spoilt(telemetry: pd.DataFrame, since: pd.Timestamp, column: str, how: str) -> pd.DataFrame:
    "Telemetry whose sensor fails at a minute and stays so."
    table, at = telemetry.copy(), (telemetry["timestamp"] >= since).to_numpy()
    table.loc[at, column] = SPOILT[how](table.loc[at, column].to_numpy())
    return table


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=40, help="of the simulated hub")
    parser.add_argument("--hours", type=int, default=60, help="of the test block that are judged")
    asked = parser.parse_args()
    telemetry = simulate(asked.days).telemetry
    targets = build_targets(telemetry)
    data = Labelled(telemetry, targets, block_times(targets.index, time_split(targets.index)), None, load_site())
    test = block(targets, data.times, "test")
    since = test.index[0][1]
    test = test[test.index.get_level_values("timestamp") < since + pd.Timedelta(hours=asked.hours)]
    week = telemetry[(telemetry["timestamp"] >= since - pd.Timedelta(days=8)) & (telemetry["timestamp"] < since + pd.Timedelta(hours=asked.hours, minutes=30))]
    still = float(test["change_max_10"].abs().mean())
    figures = [figure("days simulated", asked.days, "days"), figure("hours judged", asked.hours, "h"), figure("persistence: MAE", still, "jobs")]
    for name, model in (("hub", make_model("hub")), ("hub without smooth", make_model("hub", smooth=False))):
        model = fitted(data, model)
        sound = error(model, week, test)
        grown = pd.DataFrame({how: {c: error(model, spoilt(week, since, c, how), test) / sound for c in COLUMNS if c != "hub_jobs"} for how in SPOILT})
        print(name, f"{sound:.2f} jobs; nothing changes: {still:.2f}", grown.round(2).to_string(), sep="\n", flush=True)
        figures.append(figure(f"{name}: MAE, sound sensors", sound, "jobs"))
        for how in SPOILT:
            worst = grown[how].idxmax()
            most = float(grown[how].max())
            figures += [figure(f"{name}: {how}, median growth of the error", float(grown[how].median()), "x"),
                        figure(f"{name}: {how}, worst ({worst})", most, "x", *(("error below persistence's", most * sound <= still) if name == "hub" else ()))]
    record("robustness", [{**f, "met": None if f["met"] is None else bool(f["met"])} for f in figures])
