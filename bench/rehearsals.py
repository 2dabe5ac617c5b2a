"""The whole loop on scenarios and seeds nobody has looked at: when it notices, what it names, what it decides, what the forecasts gain.

Each piece is `amhs operate --simulate SCENARIO`: an ordinary history, then days of operation with a change half-way (`normal` and
`sensor-faults`: none that a model should learn). Its error counts from the fourth day after the change, beside that of a model trained on
the new traffic alone.

    python bench/rehearsals.py [--seeds 11 12] [--days 20] [--clean-days 60] [--scenarios season,new-route,...]
"""

import argparse
import json
import tempfile
from pathlib import Path

from common import figure, record

from amhs.core import read_json
from amhs.rehearsal import Rehearsal, play
from amhs.store import open_store

SCENARIOS = ("season", "new-route", "capacity-upgrade", "sensor-faults", "normal")
STEADY = ("sensor-faults", "normal")  # nothing that a model should learn anew
CALM = {"schedule", "follow_up", "manual", "volume"}  # reasons that say nothing about traffic or forecasts


def told(piece: Rehearsal, facts: dict) -> list[dict]:
    "What came of a piece, as figures."
    where, settled = f"{piece.scenario}, seed {piece.seed}", facts["error"].get("from the fourth day on", {})
    found = [figure(f"{where}: days", piece.days, "days"), figure(f"{where}: retrainings decided", facts["retrainings"], ""),
             figure(f"{where}: models promoted", facts["promoted"], ""), figure(f"{where}: models refused", facts["refused"], "")]
    if piece.scenario in STEADY:
        limit, false = 1 if piece.scenario == "normal" else 0, sum(not set(reasons) <= CALM for reasons in facts["reasons"])
        return [*found, figure(f"{where}: retrainings of a model that nothing was wrong with", false, "", f"<= {limit}", false <= limit)]
    early, late = facts["retrainings_before"], facts["noticed_after_days"]
    found += [figure(f"{where}: retrainings before the change", early, "", "0", early == 0),
              figure(f"{where}: noticed after", float("nan") if late is None else late, "days")]
    found += [figure(f"{where}: error from the fourth day on, {name.replace('_', ' ')}", value, "jobs") for name, value in settled.items()]
    best = facts["of_the_best"]
    return found if best is None else [*found, figure(f"{where}: error with the loop / of a model of the new traffic", best, "x", "<= 1.10", best <= 1.10)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12])
    parser.add_argument("--days", type=int, default=20, help="of operation")
    parser.add_argument("--clean-days", type=int, default=60, help="of operation of `normal`, for the first seed alone")
    parser.add_argument("--trees", type=int, default=60)
    args, found = parser.parse_args(), []
    for scenario in args.scenarios.split(","):
        for seed in args.seeds[:1] if scenario == "normal" else args.seeds:
            piece = Rehearsal(scenario, days=args.clean_days if scenario == "normal" else args.days, seed=seed, trees=args.trees)
            with tempfile.TemporaryDirectory(prefix="rehearsal-") as folder:
                home = play(piece, Path(folder) / "piece").parent
                decided = [json.loads(d) for d in open_store(home / "store.sqlite").read("decisions", kind="retraining")["detail"]]
                facts = read_json(home / "story.json") | {"reasons": [d["reasons"] for d in decided if d["retrain"]]}
            print(f"{scenario}, seed {seed}: asked for by {facts['reasons']}", *facts["causes"], sep="\n  ", flush=True)
            found += told(piece, facts)
    record("rehearsals", found)


if __name__ == "__main__":
    main()
