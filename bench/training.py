"""The whole `v8` set of models: ours (`make_model("v8").fit`) against twelve separate fits by XGBoost's scikit-learn interface.

Same rows, same hyper-parameters, same run; both are judged on the days that follow the training days. The baseline gets float32
arrays, its quickest input, and XGBoost's default of all cores. Wall time counts when the machine is otherwise idle; the ratio of
processor seconds holds on a busy one, too.

    python bench/training.py                    180 days, 250 trees per head: half an hour or more on 2 cores
    python bench/training.py --days 20          a quick look (written to bench/results/training-20d.json)
"""

import argparse
from time import perf_counter, process_time

import numpy as np
import pandas as pd
from common import figure, record

from amhs.config import CLASSES, HORIZONS_MIN, PURGE_GAP_MIN, load_site
from amhs.features import build_features
from amhs.model import align, heads, log_loss, make_model, surge_class
from amhs.simulate import simulate
from amhs.targets import build_targets

GOAL = 0.6  # of the baseline's time
SAME = 1.01  # errors within 1 % count as the same


def tables(days: int, later_days: int, seed: int) -> tuple:
    "Features and targets of the training days and of the days after them, a purge gap between."
    telemetry, site = simulate(days + later_days, seed=seed).telemetry, load_site("simulated")
    features, targets, _ = align(build_features(telemetry, "v8", site=site), build_targets(telemetry, site=site))
    cut = days * 1440 - PURGE_GAP_MIN
    return features.iloc[:cut], targets.iloc[:cut], features.iloc[days * 1440 :], targets.iloc[days * 1440 :]


def timed(task) -> tuple:
    "What a task returns, its wall seconds and its processor seconds."
    wall, processor = perf_counter(), process_time()
    return task(), perf_counter() - wall, process_time() - processor


def twelve_fits(features: pd.DataFrame, targets: pd.DataFrame, later: pd.DataFrame, trees: int) -> pd.DataFrame:
    "The baseline: a fit per head, everything from the start each time; its forecasts of the later days."
    from xgboost import XGBClassifier, XGBRegressor

    v8 = {"n_estimators": trees, "max_depth": 8, "learning_rate": 0.03, "subsample": 0.85, "colsample_bytree": 0.85, "min_child_weight": 2,
          "gamma": 0.05, "reg_alpha": 0.05, "reg_lambda": 0.8, "tree_method": "hist", "random_state": 0}
    X, X_later, forecast = features.to_numpy(), later.to_numpy(), {}
    for head in heads():
        h = head.rpartition("_")[2]
        heavy = np.where(targets[f"change_max_{h}"].abs() >= 50, 3.0, 1.0)
        if head.startswith("change"):
            forecast[head] = XGBRegressor(**v8).fit(X, targets[head], sample_weight=heavy).predict(X_later)
        else:
            probs = XGBClassifier(**v8).fit(X, targets[head].astype(int)).predict_proba(X_later)
            forecast |= {f"prob_{c}_{h}": p for c, p in zip(CLASSES, probs.T, strict=True)}
        print(f"  {head} done", flush=True)
    return pd.DataFrame(forecast, index=later.index)


def errors(forecast: pd.DataFrame, truth: pd.DataFrame) -> pd.Series:
    "MAE of every change, log loss of every classifier."
    found = {c: (forecast[c] - truth[c]).abs().mean() for c in heads() if c.startswith("change")}
    for h in HORIZONS_MIN:
        found[f"log_loss_{h}"] = log_loss(forecast[[f"prob_{c}_{h}" for c in CLASSES]].to_numpy(), truth[f"surge_class_{h}"].to_numpy(int))
    return pd.Series(found)


def balanced_accuracy(forecast: pd.DataFrame, truth: pd.DataFrame, horizon_min: int) -> float:
    "Mean recall of the classes."
    said, true = surge_class(forecast, horizon_min).to_numpy(), truth[f"surge_class_{horizon_min}"].to_numpy(int)
    return float(np.mean([(said[true == k] == k).mean() for k in range(len(CLASSES))]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=180, help="simulated training days")
    parser.add_argument("--later-days", type=int, default=20, help="days after them that both are judged on")
    parser.add_argument("--trees", type=int, default=250, help="rounds per head")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    features, targets, later, truth = tables(args.days, args.later_days, args.seed)
    print(f"{len(features):,} rows x {features.shape[1]} features, judged on {len(later):,} later rows", flush=True)
    model, wall, processor = timed(lambda: make_model("v8", trees=args.trees).fit(features, targets))
    print(f"ours: {wall:.0f} s, {processor:.0f} processor s, {len(model.info['features_used'])} columns", flush=True)
    theirs, base_wall, base_processor = timed(lambda: twelve_fits(features, targets, later, args.trees))
    ours = model.predict(later)
    off, base_off = errors(ours, truth), errors(theirs, truth)
    ratio = off / base_off
    print(pd.DataFrame({"ours": off, "twelve fits": base_off, "ratio": ratio}).round(4).to_string())
    full = args.days == 180 and args.trees == 250
    record("training" if full else f"training-{args.days}d", [
        figure("rows", len(features), "rows"), figure("trees per head and class", args.trees, "trees"),
        figure("ours", wall, "s"), figure("twelve scikit-learn-API fits", base_wall, "s"),
        figure("time, ours / twelve fits", wall / base_wall, "ratio", GOAL, wall / base_wall <= GOAL),
        figure("processor time, ours / twelve fits", processor / base_processor, "ratio", GOAL, processor / base_processor <= GOAL),
        figure("mean error ratio over the 12 heads", float(ratio.mean()), "ratio", SAME, bool(ratio.mean() <= SAME)),
        figure("worst error ratio", float(ratio.max()), "ratio", SAME, bool(ratio.max() <= SAME)),
        figure("MAE change_max_10, ours", float(off["change_max_10"]), "jobs"),
        figure("MAE change_max_10, twelve fits", float(base_off["change_max_10"]), "jobs"),
        figure("balanced accuracy 10 min, ours", balanced_accuracy(ours, truth, 10), "share"),
        figure("balanced accuracy 10 min, twelve fits", balanced_accuracy(theirs, truth, 10), "share"),
        figure("quantising once and training, columns used", len(model.info["features_used"]), "columns"),
    ])


if __name__ == "__main__":
    main()
