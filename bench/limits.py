"""What keeps the forecaster from the oracle: the same model learns three times, and is told more and more of what telemetry does not show.

The oracle forks the simulated hub: it knows how many carriers wait where and for whom, and how long every trip that has begun will still
take. Of the first, telemetry shows sums; of the second, nothing. The model is told

    telemetry   what any user has
    state       besides, how many carriers are in which stage of their way, from where to where, queue by queue, and every fault
    calendar    besides, how many of them end their stage within the next minutes: what the hub has drawn, but nobody could measure

so that "state" less "telemetry" is what better sensors would bring, and one less "calendar" what this model could not learn from these rows
although it was told. Rows, seeds and hyper-parameters are the same each time.

    python bench/limits.py [--days 120] [--points 400] [--every 3]
"""

import argparse
from time import perf_counter

import numpy as np
import pandas as pd
from common import figure, record
from numba import njit
from quality import Place, labelled

from amhs.config import HORIZONS_MIN, settings
from amhs.develop import Labelled, block
from amhs.evaluate import slice_table
from amhs.features import build_features
from amhs.model import make_model
from amhs.oracle import attained_shares, kept_futures, sample_minutes
from amhs.simulate import Simulator

STAGES, PLACES, JOB_BITS = 13, 4, 13  # of the simulator's states
SOON_MIN = np.array([2, 4, 7, 10, 15, 25])
NUMBERS = ("bound", "exiting", "zone_used", "blocked", "commands", "size", "capacity", "burst", "drift", "level", "side_used", "at_crane", "stocked",
           "retrieving", "fab_busy", "hub_busy", "hub_inbound")
TOLD = ("telemetry", "state", "calendar")


@njit
def look(state, soon_min, where, soon):
    "Count carriers by stage, origin and goal, and those that end their stage soon."
    s = state[0]
    for i in range(s.n_events):
        job, left_ms = s.heap[i] & ((1 << JOB_BITS) - 1), (s.heap[i] >> JOB_BITS) - s.now
        stage = s.stage[job]
        if stage > 0:  # sources are none
            where[stage, s.origin[job], s.dest[job]] += 1
            due = np.searchsorted(soon_min, left_ms / 60_000.0)
            if due < len(soon_min):
                soon[stage, s.origin[job], s.dest[job], due] += 1


def seen(sim: Simulator) -> tuple[np.ndarray, np.ndarray]:
    "State and calendar of a hub as it is, as numbers."
    where, soon = np.zeros((STAGES, PLACES, PLACES), "float32"), np.zeros((STAGES, PLACES, PLACES, len(SOON_MIN)), "float32")
    look(sim.state, SOON_MIN, where, soon)
    since = np.where(sim.state["level"][0] > 0, sim.state["minutes"][0] - sim.state["since_min"][0], 0)
    return np.concatenate([where.ravel(), since, *(np.atleast_1d(sim.state[name][0]) for name in NUMBERS)]).astype("float32"), soon.ravel()


def hidden(rows: pd.MultiIndex, place: Place) -> tuple[pd.DataFrame, pd.DataFrame]:
    "State and calendar of a simulated hub at some minutes; what never varies is left out."
    sim, found = Simulator(0, place.scenario, rows[0][0], days=place.days), []
    for time in rows.get_level_values("timestamp"):
        sim.run(int((time - sim.start) / pd.Timedelta(minutes=1)) + 1 - sim.minute)
        found.append(seen(sim))
    tables = (pd.DataFrame(np.stack(part), rows).add_prefix(name) for part, name in zip(zip(*found), ("state_", "calendar_")))
    return tuple(t.loc[:, t.max() > t.min()] for t in tables)


def asked(data: Labelled, every: int, points: int) -> tuple[dict[str, pd.MultiIndex], pd.MultiIndex]:
    "Rows to learn from, to calibrate on, to be judged on; and all of them in the order of time."
    known = build_features(data.telemetry, "hub", data.site).index
    blocks = {name: block(data.targets, data.times, name).index.intersection(known) for name in ("train", "valid", "test")}
    rows = {"train": blocks["train"][::every], "valid": blocks["valid"][::every], "test": sample_minutes(blocks["test"], points)}
    return rows, rows["train"].append([rows["valid"], rows["test"]])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=120)
    parser.add_argument("--points", type=int, default=400, help="minutes the oracle is asked about")
    parser.add_argument("--every", type=int, default=3, help="which minutes are learnt from")
    args = parser.parse_args()
    place = Place("hub", args.days)
    data = labelled(place)
    rows, every = asked(data, args.every, args.points)
    features = build_features(data.telemetry, "hub", data.site).loc[every]
    state, calendar = hidden(every, place)
    tables = dict(zip(TOLD, (features, features.join(state), features.join(state).join(calendar))))
    futures = kept_futures(settings().data / "oracle", rows["test"], place.days, seed=0)
    edges = block(data.targets, data.times, "valid")["now"].quantile([1 / 3, 2 / 3])
    parts = slice_table(data.targets.loc[rows["test"]], data.site, edges, data.truth)[["load", "fault"]]

    found, said = [figure("rows learnt from", len(rows["train"]), "rows"), figure("minutes judged", len(rows["test"]), "minutes")], {}
    for told, table in tables.items():
        began, (learnt, kept) = perf_counter(), ((table.loc[rows[name]], data.targets.loc[rows[name]]) for name in ("train", "valid"))
        model = make_model("hub").fit(*learnt, valid=kept)
        said[told] = model.predict(table.loc[rows["test"]])
        found.append(figure(f"{told}: columns", table.shape[1], ""))
        print(f"{told}: {table.shape[1]} columns, {perf_counter() - began:.0f} s", flush=True)
    shares = attained_shares(said, futures, parts).query("target == 'max'")
    for (by, part), of in shares.groupby(["slice", "part"]):
        for row in of[of["model"].isin(TOLD)].itertuples():
            name = f"{'' if by == 'all' else f'{by} {part}, '}attained share max {row.horizon_min} min, {row.model}"
            found += [figure(name + side, getattr(row, column), "") for side, column in (("", "attained"), (", low", "low"), (", high", "high"))]
    print(shares[shares["slice"] == "all"].pivot(index="model", columns="horizon_min", values="attained")[list(HORIZONS_MIN)].round(3).to_string())
    record("limits", found)


if __name__ == "__main__":
    main()
