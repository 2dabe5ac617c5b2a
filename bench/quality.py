"""Quality of every model, next to named baselines on the same rows: the simulated hub, its other scenarios, New York's flights.

Thresholds, early stopping and calibration are chosen on validation rows; the test rows are the newest and are only judged. The champion, whom
the goals are asked of, is chosen there, too: as stage 06 does, the one that errs least among those that answer in time. On the simulated hub
the oracle says how much was possible; its answers are kept under data/oracle.

    python bench/quality.py [--days 60] [--flight-days 120] [--trees 250] [--points 400] [--scenarios busy,season] [--challengers] [--full]
"""

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

import pandas as pd
from common import figure, record

from amhs.challengers import lacking
from amhs.config import HORIZONS_MIN, TARGETS, EvaluateParams, load_params, load_site, settings
from amhs.contest import scored, trade_table
from amhs.develop import Labelled, block, block_times, collect, fitted, forecast_block, judge
from amhs.evaluate import Evaluation, alarm_score, alarms_at_budgets, slice_table
from amhs.events import find_events
from amhs.model import Forecaster, make_model
from amhs.oracle import attained_shares, kept_futures, oracle_forecast, sample_minutes
from amhs.simulate import SCENARIOS
from amhs.targets import build_targets, time_split

MODELS, CHALLENGERS = ("persistence", "linear", "v8", "hub"), ("lightgbm", "deep", "ensemble")


@dataclass(frozen=True)
class Place:
    "What is judged, and where its telemetry comes from."

    name: str
    days: int
    site: str = "simulated"
    source: str = "simulate"
    scenario: str = "normal"
    line: str = ""


def labelled(place: Place) -> Labelled:
    "The oldest days of a place, labelled and split as stage 04 does."
    asked = {"site": place.site, "source": place.source, "line": place.line, "days": str(place.days), "scenario": place.scenario, "seed": "0"}
    business = load_params("business", "full", {f"business.{name}": value for name, value in asked.items()})
    with tempfile.TemporaryDirectory() as folder:
        found = collect(business, sample_days=place.days, folder=Path(folder) / place.site)
    targets = build_targets(found.telemetry, site=place.site)
    return Labelled(found.telemetry, targets, block_times(targets.index, time_split(targets.index)), found.truth, load_site(place.site))


def trained(data: Labelled, names: tuple[str, ...], trees: int = 0) -> tuple[dict[str, Forecaster], dict[str, float]]:
    "All models on the same blocks, and the seconds each took, those of its members included; `trees` are those of v8."
    models, seconds = {}, {}
    for name in names:
        began = perf_counter()
        model = make_model(name, **({"trees": trees} if name == "v8" else {}))
        models[name] = fitted(data, model.take(models) if name == "ensemble" else model)  # its members have learnt by then
        seconds[name] = perf_counter() - began + sum(seconds.get(member, 0) for member in getattr(model, "members", ()))
    return models, seconds


def contest(data: Labelled, models: dict[str, Forecaster], where: str) -> tuple[str, list[dict]]:
    "Who goes on, and what validation rows say of everybody."
    table = trade_table({name: scored(model, data) for name, model in models.items()}, {}, load_params("train", "full").max_row_ms)
    print(table.round(4).to_string(), flush=True)
    units = {"mae_ratio": "of persistence", "row_ms": "ms"}
    return table.index[table["champion"]][0], [figure(f"{where}: validation, {column}, {name}", float(value), unit)
                                               for column, unit in units.items() for name, value in table[column].items()]


def shares(data: Labelled, models: dict[str, Forecaster], place: Place, points: int) -> pd.DataFrame:
    "How far each model has gone from persistence to the oracle."
    rows = sample_minutes(block(data.targets, data.times, "test").index, points)
    futures = kept_futures(settings().data / "oracle", rows, place.days, seed=0, scenario=place.scenario)
    said = {name: forecast_block(data, model, "test")[0].loc[rows] for name, model in models.items()}
    edges = block(data.targets, data.times, "valid")["now"].quantile([1 / 3, 2 / 3])
    parts = slice_table(data.targets.loc[rows], data.site, edges, data.truth)
    return attained_shares(said, futures, parts[["load", "shift", "week", "fault"]])


LIMIT_FUTURES, WATCHED = 32, 0.06  # of each minute; share of minutes, those with the highest alarm score


def alarm_limit(data: Labelled, model: Forecaster, place: Place) -> list[dict]:
    """What alarms could do at best: those of somebody who knows the hub's state to the last job, with the threshold chosen in hindsight.

    The oracle is asked only about minutes before events and those the model finds most alarming; elsewhere it raises no alarm."""
    telemetry = block(data.telemetry, data.times, "test")
    score = alarm_score(forecast_block(data, model, "test")[0], data.site)
    starts, minutes = find_events(telemetry, data.site)["start"], score.index.get_level_values("timestamp")
    soon = minutes.isin([start - pd.Timedelta(minutes=m) for start in starts for m in range(1, data.site.alarms.max_lead + 1)])
    rows = score.index[(soon | (score >= score.quantile(1 - WATCHED))) & (score > float("-inf"))]
    futures = kept_futures(settings().data / "oracle", rows, place.days, seed=0, scenario=place.scenario, n=LIMIT_FUTURES)
    best = alarm_score(oracle_forecast(futures, data.site), data.site).reindex(score.index, fill_value=float("-inf"))
    found = [figure("hub: minutes the oracle's alarms are made of", len(rows), "")]
    for name, scores in (("oracle", best), (model.name, score)):
        row = alarms_at_budgets(scores, telemetry, data.site, budgets=(0.5,)).iloc[0]
        print(name, row.to_string(), sep="\n", flush=True)
        found += [figure(f"hub: event recall at <= 0.5 false a day, in hindsight, {name}", row["recall"], ""),
                  figure(f"hub: false episodes, in hindsight, {name}", row["false_per_day"], "/day"),
                  figure(f"hub: median lead, in hindsight, {name}", row["median_lead_min"], "min")]
    return found


def number(table: pd.DataFrame, model: str, horizon_min: int, target: str, column: str = "value", **where) -> float:
    "One number of one model."
    at = table.query("model == @model and horizon_min == @horizon_min and target == @target")
    for name, value in where.items():
        at = at[at[name] == value]
    return float(at[column].iloc[0])


def attained(table: pd.DataFrame, place: Place, champion: str) -> list[dict]:
    "Attained shares and the least possible error; goal: 0.80 on the highest change."
    table, slices, found = table[table["slice"] == "all"], table[table["slice"] != "all"], []
    for h in HORIZONS_MIN:
        for t in TARGETS:
            found += [figure(f"{place.name}: MAE {t} {h} min on the oracle's minutes, {m}", number(table, m, h, t, "mae"), "jobs")
                      for m in table["model"].unique()]
            found += [figure(f"{place.name}: attained share {t} {h} min, {m}", number(table, m, h, t, "attained"), "")
                      for m in table["model"].unique() if m not in ("oracle", "persistence", champion)]
            value, goal = number(table, champion, h, t, "attained"), t == "max" and place.scenario == "normal"
            name = f"{place.name}: attained share {t} {h} min, {champion}"
            found.append(figure(name, value, "", *((">= 0.80", value >= 0.80) if goal else (None, None))))
            found += [figure(f"{name}, {side}", number(table, champion, h, t, side), "") for side in ("low", "high")]
    return found + of_slices(slices.query("target == 'max'"), place, champion)


def of_slices(table: pd.DataFrame, place: Place, champion: str) -> list[dict]:
    "The least possible error and the attained share of the highest change, slice by slice."
    found = []
    for (by, part, h), rows in table.groupby(["slice", "part", "horizon_min"]):
        least, own = (rows[rows["model"] == m].iloc[0] for m in ("oracle", champion))
        name = f"{place.name}, {by} {part}"
        found += [figure(f"{name}: MAE max {h} min on the oracle's minutes, oracle{side}", least[c], "jobs")
                  for side, c in (("", "mae"), (", low", "mae_low"), (", high", "mae_high"))]
        found += [figure(f"{name}: attained share max {h} min, {champion}{side}", own[c], "")
                  for side, c in (("", "attained"), (", low", "low"), (", high", "high"))]
    return found


def errors(evaluation: Evaluation, where: str, names: tuple[str, ...]) -> list[dict]:
    "MAE of every model per horizon and target; goal: the champion a tenth below v8 everywhere."
    found = []
    for h in HORIZONS_MIN:
        for t in TARGETS:
            mae = {m: number(evaluation.levels, m, h, t, metric="mae") for m in names}
            found += [figure(f"{where}: MAE {t} {h} min, {m}", v, "jobs") for m, v in mae.items()]
            ratio = mae[evaluation.model] / mae["v8"]
            found.append(figure(f"{where}: MAE {t} {h} min, {evaluation.model} / v8", ratio, "", "<= 0.90", ratio <= 0.90))
    return found


def alarms(evaluation: Evaluation, where: str, judged: bool) -> list[dict]:
    "Classes at 10 minutes, and alarms at half a false episode a day."
    head, found = evaluation.headline(10, 0.5), []
    for m in head.index:
        own = m == evaluation.model
        value = float(head.loc[m, "balanced_accuracy"])
        if value == value:
            found.append(figure(f"{where}: surge balanced accuracy 10 min, {m}", value, "", *((">= 0.70", value >= 0.70) if own else (None, None))))
        for name, column, unit, goal in (("event recall at <= 0.5 false a day", "event_recall", "", 0.9), ("median lead", "median_lead_min", "min", 10)):
            value = float(head.loc[m, column])
            found.append(figure(f"{where}: {name}, {m}", value, unit, *((f">= {goal}", value >= goal) if own and judged else (None, None))))
        found.append(figure(f"{where}: false episodes, {m}", float(head.loc[m, "false_per_day"]), "/day"))
    return found


def intervals(evaluation: Evaluation, where: str) -> list[dict]:
    "How often the champion's intervals hold, on all rows and in the worst slice of a day's rows and more; goal: 90 % within 2 points."
    table, found = evaluation.intervals.query("model == @evaluation.model and n >= 1440"), []
    for (h, t), rows in table.groupby(["horizon_min", "target"]):
        whole, worst = rows[rows["slice"] == "all"].iloc[0], rows.loc[(rows["coverage"] - 0.9).abs().idxmax()]
        name, off = f"{where}: 90 % interval of {t} {h} min", abs(worst["coverage"] - 0.9)
        found += [figure(f"{name}, share within", whole["coverage"], ""), figure(f"{name}, mean width", whole["width"], "jobs"),
                  figure(f"{name}, share within in the worst slice ({worst['slice']} {worst['part']})", worst["coverage"], "", "0.90 +- 0.02", off <= 0.02)]
    return found


def judged(place: Place, names: tuple[str, ...], trees: int, params: EvaluateParams, points: int) -> tuple[list[dict], str]:
    "Everything about one place; its champion."
    data, simulated = labelled(place), place.source == "simulate"
    models, seconds = trained(data, names, trees)
    champion, found = contest(data, models, place.name)
    models[champion] = models.pop(champion)  # the last one is judged together with rules
    found += [figure(f"{place.name}: days", place.days, "days"), *(figure(f"{place.name}: training, {m}", s, "s") for m, s in seconds.items())]
    if simulated and place.days == 180:
        found.append(figure(f"training of the champion for 180 days, {champion}", seconds[champion], "s", "<= 300", seconds[champion] <= 300))
    evaluation = judge(data, models, params)
    print(evaluation.headline(10, 0.5).round(3).T.to_string(), flush=True)
    found += [*alarms(evaluation, place.name, simulated), *errors(evaluation, place.name, names), *intervals(evaluation, place.name)]
    if simulated:
        found += told(shares(data, models, place, points), place, champion) + alarm_limit(data, models[champion], place)
    return found, champion


def told(table: pd.DataFrame, place: Place, champion: str) -> list[dict]:
    "Print the attained shares, then give their figures."
    wide = table[table["slice"] == "all"].pivot(index="model", columns=["target", "horizon_min"], values="attained")
    print(place.name, wide.round(3).to_string(), sep="\n", flush=True)
    return attained(table, place, champion)


def elsewhere(place: Place, champion: str, points: int) -> list[dict]:
    "Attained shares of the hub's champion in another scenario."
    data = labelled(place)
    return told(shares(data, trained(data, ("linear", champion))[0], place, points), place, champion)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--days", type=int, default=60, help="of the simulated hub")
    parser.add_argument("--flight-days", type=int, default=120, help="of one airport")
    parser.add_argument("--trees", type=int, default=250, help="of the v8 baseline")
    parser.add_argument("--points", type=int, default=400, help="minutes the oracle is asked about, per scenario")
    parser.add_argument("--scenarios", default="", help="others to ask it about, with commas")
    parser.add_argument("--challengers", action="store_true", help="also judge those that can be trained here")
    parser.add_argument("--full", action="store_true", help="180 days, all flights of the airport, all scenarios with sound sensors, challengers")
    asked = parser.parse_args()
    days, flight_days = (180, 365) if asked.full else (asked.days, asked.flight_days)
    others = [s for s in SCENARIOS if s != "normal" and not SCENARIOS[s].sensors] if asked.full else [s for s in asked.scenarios.split(",") if s]
    lack = lacking(*CHALLENGERS) if (wanted := asked.full or asked.challengers) else {}
    names = MODELS + (CHALLENGERS if wanted and not lack else ())
    if lack:
        print(f"challengers are left out; not installed: {', '.join(lack)}", flush=True)
    params = load_params("evaluate", "demo")
    figures, champion = judged(Place("hub", days), names, asked.trees, params, asked.points)
    figures += judged(Place("flights LGA", flight_days, "nycflights", "nycflights", line="LGA"), names, asked.trees, params, asked.points)[0]
    for scenario in others:
        figures += elsewhere(Place(scenario, min(days, 60), scenario=scenario), champion, asked.points)
    record("quality", [{**f, "met": None if f["met"] is None else bool(f["met"])} for f in figures])
