"""The search the shipped hyper-parameters come from: on the simulated hub and on New York's flights, in their training blocks alone.

Each place is searched for itself, by the functions of stage 05. Then the best of each, and the defaults, are scored on both: what helps one
place alone is not shipped. A study is kept under data/studies; asked again, the search goes on.

    python bench/search.py [--minutes 12] [--trials 200] [--days 120] [--flight-days 365] [--best 3]
"""

import argparse

import numpy as np
import pandas as pd
from common import figure, record
from quality import Place, labelled

from amhs.config import DevelopParams, settings
from amhs.model import make_model
from amhs.tuning import SEARCHED, fold_score, search, training_tables


def searched(place: Place, params: DevelopParams) -> tuple[tuple[pd.DataFrame, pd.DataFrame], pd.DataFrame]:
    "Features and targets of a place's training block, and what was tried there."
    tables = training_tables(labelled(place), ("hub",), params.sample_share)["hub"]
    trials = search(*tables, params, folder=settings().data / "studies")
    print(place.name, f"{len(tables[0])} rows, {len(trials)} trials", trials.head(5).round(4).to_string(), sep="\n", flush=True)
    return tables, trials


def scored(candidates: dict[str, dict], tables: dict[str, tuple], params: DevelopParams) -> pd.DataFrame:
    "Mean fold score of every configuration at every place, divided by that of the defaults."
    rows = {name: {place: np.mean(fold_score(*of, params.folds, params.seed, (10,), trees=params.trees, **hyper)) for place, of in tables.items()}
            for name, hyper in candidates.items()}
    scores = pd.DataFrame(rows).T
    return (scores / scores.loc["defaults"]).assign(mean=lambda t: t.mean(axis=1))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="per place")
    parser.add_argument("--trials", type=int, default=200, help="per place, at most")
    parser.add_argument("--days", type=int, default=120, help="of the simulated hub")
    parser.add_argument("--flight-days", type=int, default=365, help="of one airport")
    parser.add_argument("--best", type=int, default=3, help="configurations of each place that are scored on both")
    args = parser.parse_args()
    params = DevelopParams(seed=0, feature_sets=("hub",), folds=3, trials=args.trials, minutes=args.minutes, trees=400, sample_share=0.25)
    places = (Place("hub", args.days), Place("flights LGA", args.flight_days, "nycflights", "nycflights", line="LGA"))
    tables, found = {}, []
    candidates = {"defaults": {name: make_model("hub").hyper.model_dump()[name] for name in SEARCHED}}
    for place in places:
        tables[place.name], trials = searched(place, params)
        default = trials.loc[trials["origin"].eq("default"), "score"].iloc[0]
        found += [figure(f"{place.name}: trials", len(trials), ""), figure(f"{place.name}: given up early", int(trials["state"].eq("pruned").sum()), ""),
                  figure(f"{place.name}: best / defaults", trials["score"].iloc[0] / default, "")]
        candidates |= {f"{place.name}, {i + 1}": {n: trials[n].iloc[i].item() for n in SEARCHED} for i in range(min(args.best, len(trials)))}
    ratios = scored(candidates, tables, params).sort_values("mean")
    print(ratios.round(4).join(pd.DataFrame(candidates).T.round(3)).to_string(), flush=True)
    for name, row in ratios.iterrows():
        found += [figure(f"{name}: score / defaults, {place}", value, "") for place, value in row.items()]
        found += [figure(f"{name}: {n}", candidates[name][n], "") for n in SEARCHED]
    record("search", [*found, figure("defaults / best on both", 1 / ratios["mean"].iloc[0], "x", "<= 1.005", 1 / ratios["mean"].iloc[0] <= 1.005)])


if __name__ == "__main__":
    main()
