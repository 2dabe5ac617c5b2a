"""What one forecast costs in each form of a forecaster of V8's size: 12 models, 4,500 trees of depth 6, 222 features.

All forms answer the same rows in one process, in turns, with one thread: V8's way (a table, model after model), the boosters
on arrays, one merged booster, one ONNX graph, the compiled forest. Each is compared with the forecaster before it is timed.
Beside them: the features of one window, the whole way from window to forecast, the reasons.

    python bench/inference.py [--days 8] [--trees 250] [--repeats 2000]
"""

import argparse
import time

import numpy as np
import pandas as pd
from common import figure, record

from amhs.config import load_params, load_site
from amhs.engines import make_engine
from amhs.features import build_features, compile_features
from amhs.model import Forecaster, make_model
from amhs.package import build_engines, proof_rows, prove, time_engines
from amhs.simulate import simulate
from amhs.targets import build_targets
from amhs.telemetry import minute_numbers


class Table:
    "V8's way: a table of one row, model after model."

    def __init__(self, model: Forecaster, index: pd.MultiIndex):
        self.model, self.index = model, index

    def forecasts(self, X: np.ndarray):
        return self.model.predict(pd.DataFrame(X, self.index[: len(X)], self.model.features))

    def forecast(self, x: np.ndarray):
        return self.forecasts(x[None])


def trained(days: int, trees: int) -> tuple[Forecaster, pd.DataFrame, pd.DataFrame]:
    "A forecaster of the given size, telemetry, and features of rows it has not seen."
    site, telemetry = load_site("simulated"), simulate(days, seed=1).telemetry
    features, targets = build_features(telemetry, "v8", site), build_targets(telemetry, site=site)
    rows = targets.index.intersection(features.index)
    seen, unseen = rows[: len(rows) // 2], rows[len(rows) // 2 :]
    model = make_model("v8", trees=trees, depth=6, min_child_weight=20.0).fit(features.loc[seen], targets.loc[seen])
    return model, telemetry, features.loc[unseen, model.features]


def microseconds(work, cases: list) -> tuple[float, float]:
    "p50 and p99 of a call."
    found = []
    for case in [cases[0], *cases]:
        began = time.perf_counter()
        work(case)
        found.append((time.perf_counter() - began) * 1e6)
    return tuple(np.percentile(found[1:], [50, 99]).tolist())


def windows(telemetry: pd.DataFrame, feature_set: str, n: int) -> tuple:
    "A feature kernel, and windows as long as it looks back."
    kernel = compile_features(feature_set, telemetry.columns, "simulated")
    values, minutes = telemetry[list(kernel.columns)].to_numpy("float32").T, minute_numbers(telemetry)
    ends = np.linspace(min(kernel.memory_min, values.shape[1] // 2), values.shape[1], n).astype(int)
    return kernel, [(np.ascontiguousarray(values[:, max(0, e - kernel.memory_min) : e]), int(minutes[e - 1])) for e in ends]


def bench(days: int, trees: int, repeats: int) -> list[dict]:
    model, telemetry, features = trained(days, trees)
    rows = proof_rows(features, load_params("inference", "demo"))
    engines, refused = build_engines(model)
    proof = prove(engines, model, rows)
    times = time_engines({"table": Table(model, rows.index), **engines}, rows, repeats)
    found = [figure("trees", float(model.info["trees"]), "", 4500, model.info["trees"] == 4500),
             figure("rows of the proof", float(len(rows)), "rows", ">= 5000", len(rows) >= 5000),
             figure("forms that could not be built", float(len(refused)), "", 0, not refused)]
    for kind, row in proof.iterrows():
        found += [figure(f"{kind}: furthest level", row["level_error"], "jobs", "<= 1e-4", bool(row["level_error"] <= 1e-4)),
                  figure(f"{kind}: other classes", float(row["other_classes"]), "", 0, bool(row["other_classes"] == 0))]
    for kind, row in times.iterrows():
        found += [figure(f"{kind}: one row, {p[:3]}", row[p], "µs") for p in ("p50_us", "p99_us")]
        found += [figure(f"{kind}: 64 rows, {p[:3]}", row[p], "µs") for p in ("p50_us_64", "p99_us_64")]
    single = times["p50_us"]
    for other, goal in (("table", 100), ("boosters", 50), ("merged", 5), ("onnx", 2)):
        ratio = float(single[other] / single["forest"])
        found.append(figure(f"forest, times as fast as {other}, one row", ratio, "x", f">= {goal}", ratio >= goal))
    x, forest = np.ascontiguousarray(rows.iloc[:repeats], "float32"), engines["forest"]
    for feature_set in ("v8", "hub"):
        kernel, cases = windows(telemetry, feature_set, min(repeats, 300))
        p50, p99 = microseconds(lambda c, kernel=kernel: kernel.row(*c), cases)
        found += [figure(f"features of one window, {feature_set}, p50", p50, "µs"), figure(f"features of one window, {feature_set}, p99", p99, "µs")]
    kernel, cases = windows(telemetry, "v8", min(repeats, 300))
    p50, p99 = microseconds(lambda c: forest.forecast(kernel.row(*c)), cases)
    found += [figure("window to forecast, v8, p50", p50, "µs"), figure("window to forecast, v8, p99", p99, "µs")]
    found.append(figure("reasons by paths, one output, p50", microseconds(lambda r: forest.weigh(r, 2), list(x))[0], "µs"))
    found.append(figure("exact SHAP, one output, p50", microseconds(lambda i: model.explain(rows.iloc[[i]], "max", 10), list(range(30)))[0], "µs"))
    began = time.perf_counter()
    make_engine("forest", model)
    return [*found, figure("building the forest", time.perf_counter() - began, "s")]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=int, default=8)
    parser.add_argument("--trees", type=int, default=250)
    parser.add_argument("--repeats", type=int, default=2000)
    record("inference", bench(**vars(parser.parse_args())))
