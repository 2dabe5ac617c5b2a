"""Is the cause named right? Every scenario of the simulator on seeds that no limit was chosen on.

Ten ordinary days, then the change; two days of it (one of a capacity upgrade, three of the newest after a season that creeps in), as stage 14
gets them when the trigger has noticed. And the end of a season after five weeks, when it is far from what was: the newest three days against
four weeks. Seeds 0 to 9 and 41 to 48 were looked at when the limits of the tests were chosen; these were not.

    python bench/redesign.py [--seeds 51 52 53 54 55 56 57 58 59 60]
"""

import argparse
from collections import Counter

import pandas as pd
from common import figure, record

from amhs.rehearsal import Rehearsal, hub_of
from amhs.retrain import FINDING_COLUMNS, find_cause
from amhs.simulate import simulate

DAY = pd.Timedelta(days=1)
RIGHT = {"normal": "none", "new-route": "concept_change", "capacity-upgrade": "capacity_change", "season": "covariate_shift",
         "season, at its end": "covariate_shift", "sensor-faults": "data_quality"}
CHANGE, AFTER = {"season": 15}, {"normal": 3, "new-route": 2, "capacity-upgrade": 1, "season": 3, "sensor-faults": 2}


def history(scenario: str, seed: int) -> tuple[pd.DataFrame, pd.Timestamp]:
    "Telemetry up to the day on which somebody asks, and when the change began."
    if scenario == "season, at its end":
        found = pd.concat(hub_of(Rehearsal("season", days=20, seed=seed), "HUB1"), ignore_index=True)
        return found, found["timestamp"].iloc[-1] - 3 * DAY
    found = simulate(20, seed, scenario).telemetry
    since = found["timestamp"].iloc[0] + CHANGE.get(scenario, 10) * DAY
    if scenario == "sensor-faults":  # they are there from the first day; before it, the same hub with sound sensors
        sound = simulate(20, seed).telemetry
        found = pd.concat([sound[sound["timestamp"] < since], found[found["timestamp"] >= since]], ignore_index=True)
    return found[found["timestamp"] < since + AFTER[scenario] * DAY].reset_index(drop=True), since


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(51, 61)))
    seeds, found, nothing = parser.parse_args().seeds, [], pd.DataFrame(columns=list(FINDING_COLUMNS))
    for scenario, right in RIGHT.items():
        named = Counter()
        for seed in seeds:
            telemetry, since = history(scenario, seed)
            cause = find_cause(nothing, telemetry, since)
            named[cause.name] += 1
            if cause.name != right:
                print(scenario, seed, cause.name, cause.evidence[["test", "value", "limit", "columns"]].round(2).to_string(), sep="\n", flush=True)
        print(scenario, dict(named), flush=True)
        share = named[right] / len(seeds)
        found.append(figure(f"{scenario}: {right} named, of {len(seeds)} seeds", share, "", ">= 0.9", share >= 0.9))
        found += [figure(f"{scenario}: {name} named", n / len(seeds), "") for name, n in named.items() if name != right]
    record("redesign", found)


if __name__ == "__main__":
    main()
