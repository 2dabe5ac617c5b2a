"""What each group of features of set `hub` is worth: the same model without it, on time-ordered folds of the training block.

On the simulated hub and on one of New York's airports. A ratio above 1 is what is lost without the group; the lowest and the highest fold
say how far to trust it. Cross-line load, which set `hub` does not have, is asked about the other way round: the queues of the two other
airports are added.

    python bench/ablation.py [--days 120] [--flight-days 365] [--share 0.12] [--trees 200]
"""

import argparse

import numpy as np
import pandas as pd
from common import figure, record
from quality import Place, labelled

from amhs.develop import Labelled
from amhs.features import build_features, feature_table
from amhs.tuning import fold_score, training_tables

FOLDS, HORIZONS, QUEUE = 3, (10, 25), ("target",)
NOW = "hub_jobs_last"  # what changes are added to; no model goes without


def parts() -> dict[str, list[str]]:
    "Group -> its features. Every other column, leaner, is one group; what looks back further than half an hour is one more."
    table = feature_table("hub").set_index("name")
    own = {"balance": "flow balance", "capacity": "flow against capacity, and faults", "checks": "Little's law, collectors that disagree",
           "clock": "clock and calendar", "profile": "the last seven days", "room": "room", "upstream": "work on its way"}
    named = table["group"].map(own).where(~table["group"].isin(QUEUE), "the queue itself").fillna("every other column")
    found = {name: list(rows.index) for name, rows in table.groupby(named)}
    return found | {"longer than half an hour, the last days aside": list(table.index[table["history_min"].gt(30) & table["group"].ne("profile")])}


def beside(data: Labelled, line: str, rows: pd.Index) -> pd.DataFrame:
    "Queue features of all other lines at the minutes of one."
    queue = [name for name, group in feature_table("hub").set_index("name")["group"].items() if group in QUEUE]
    table, found = build_features(data.telemetry, "hub", data.site), []
    for other in sorted(set(table.index.get_level_values("line")) - {line}):
        own = table.loc[other, [c for c in queue if c in table]].add_prefix(f"{other}_")
        found.append(own.reindex(rows.get_level_values("timestamp")).set_axis(rows))
    return pd.concat(found, axis=1)


def told(name: str, found: np.ndarray) -> list[dict]:
    print(f"{name:<75} {found.mean():.4f}  ({found.min():.4f} to {found.max():.4f})", flush=True)
    return [figure(name, found.mean(), "x"), figure(f"{name}, lowest fold", found.min(), "x"), figure(f"{name}, highest fold", found.max(), "x")]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=120, help="of the simulated hub")
    parser.add_argument("--flight-days", type=int, default=365, help="of the airports")
    parser.add_argument("--share", type=float, default=0.12, help="of the training block's minutes")
    parser.add_argument("--trees", type=int, default=200)
    args, found = parser.parse_args(), []
    for place in (Place("hub", args.days), Place("flights LGA", args.flight_days, "nycflights", "nycflights", line="LGA")):
        features, targets = training_tables(labelled(place), ("hub",), args.share)["hub"]
        whole = fold_score(features, targets, FOLDS, horizons=HORIZONS, trees=args.trees)
        for group, names in parts().items():
            if gone := [n for n in names if n in features and n != NOW]:
                less = fold_score(features.drop(columns=gone), targets, FOLDS, horizons=HORIZONS, trees=args.trees)
                found += told(f"{place.name}: without {group} ({len(gone)} of {features.shape[1]})", np.divide(less, whole))
    others = beside(labelled(Place("flights", args.flight_days, "nycflights", "nycflights")), "LGA", features.index)
    more = fold_score(features.join(others), targets, FOLDS, horizons=HORIZONS, trees=args.trees)
    found += told(f"{place.name}: with the queues of the other airports ({others.shape[1]})", np.divide(more, whole))
    record("ablation", found)


if __name__ == "__main__":
    main()
