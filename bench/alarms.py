"""Alarms: what a model that has learnt from events adds to the highest level foreseen.

The simulated hub is judged on half years of other seeds, on which nothing was chosen, because a test block holds too few events; New York's
airports on their test blocks. Thresholds are chosen on validation rows, and once more in hindsight, to tell a score from its threshold.

    python bench/alarms.py [--days 180] [--seeds 201 202 203]
"""

import argparse

import pandas as pd
from common import figure, record
from quality import Place, labelled, trained

from amhs.challengers import lacking
from amhs.develop import Labelled, block, forecast_block
from amhs.evaluate import alarm_score, alarms_at_budgets, wilson
from amhs.features import build_features
from amhs.model import Forecaster
from amhs.simulate import simulate

BUDGETS, AIRPORTS, MODELS = (0.5, 1.0), ("LGA", "EWR", "JFK"), ("hub", "ensemble")


def scores(forecast: pd.DataFrame, data: Labelled, model: str) -> dict[str, pd.Series]:
    "The alarm scores of a forecast: the highest level, and with what was learnt."
    return {f"{model}, highest level": alarm_score(forecast.drop(columns="alarm_change"), data.site), model: alarm_score(forecast, data.site)}


def judged(model: Forecaster, data: Labelled, forecast: pd.DataFrame, telemetry: pd.DataFrame) -> pd.DataFrame:
    "Both scores on some minutes, per budget, with the threshold chosen on the validation block and in hindsight."
    valid, before, found = scores(forecast_block(data, model, "valid")[0], data, model.name), block(data.telemetry, data.times, "valid"), []
    for name, score in scores(forecast, data, model.name).items():
        for choice in ((valid[name], before), (None, None)):
            table = alarms_at_budgets(score, telemetry, data.site, *choice, budgets=BUDGETS, widths=data.site.alarms.widths)
            found.append(table.assign(score=name))
    return pd.concat(found, ignore_index=True)


def pooled(parts: list[pd.DataFrame]) -> pd.DataFrame:
    "Several periods as one; median leads are those of the periods, weighted by their events."
    rows = []
    for (score, chosen, budget), part in pd.concat(parts).groupby(["score", "chosen_on", "budget"], sort=False):
        events, caught, days = (part[c].sum() for c in ("events", "caught", "days"))
        low, high = wilson(int(caught), int(events))
        rows.append({"score": score, "chosen_on": chosen, "budget": budget, "events": events, "recall": caught / events, "recall_low": low,
                     "recall_high": high, "timely": (part["timely"] * part["events"]).sum() / events, "false_per_day": part["false"].sum() / days,
                     "median_lead_min": (part["median_lead_min"] * part["caught"]).sum() / caught})
    return pd.DataFrame(rows)


def figures(table: pd.DataFrame, place: str, goal: bool) -> list[dict]:
    "What there is to say of a place; the goal is that of the alarms the product gives, chosen beforehand."
    print(place, table.round(3).to_string(index=False), sep="\n", flush=True)
    found = []
    for row in table.to_dict("records"):
        at = f"{place}, {row['score']}, at <= {row['budget']:g} false a day chosen on {row['chosen_on']}"
        own = goal and row["score"] in MODELS and row["chosen_on"] == "validation" and row["budget"] == 0.5
        def said(what, value, unit, limit, met, at=at, own=own):
            return figure(f"{at}: {what}", value, unit, *((limit, bool(met)) if own else (None, None)))
        found += [said("recall", row["recall"], "", ">= 0.9", row["recall"] >= 0.9), figure(f"{at}: recall, low", row["recall_low"], ""),
                  figure(f"{at}: recall, high", row["recall_high"], ""), figure(f"{at}: share of the wanted lead", row["timely"], ""),
                  said("false episodes", row["false_per_day"], "/day", "<= 0.5", row["false_per_day"] <= 0.5),
                  said("median lead", row["median_lead_min"], "min", ">= 10", row["median_lead_min"] >= 10)]
    return [*found, figure(f"{place}: events", int(table["events"].iloc[0]), "")]


def hub(days: int, seeds: list[int], names: tuple[str, ...]) -> list[dict]:
    "One hub's models on other hubs' half years."
    data = labelled(Place("hub", days))
    models, parts = trained(data, names)[0].values(), []
    for seed in seeds:
        telemetry = simulate(180, seed=seed).telemetry
        parts += [judged(model, data, model.predict(build_features(telemetry, model.feature_set, data.site)), telemetry) for model in models]
    return figures(pooled(parts), "simulated hub, other seeds", goal=True)


def airport(line: str, names: tuple[str, ...]) -> list[dict]:
    "An airport's own models on its test block."
    data = labelled(Place(line, 365, "nycflights", "nycflights", line=line))
    telemetry = block(data.telemetry, data.times, "test")
    parts = [judged(model, data, forecast_block(data, model, "test")[0], telemetry) for model in trained(data, names)[0].values()]
    return figures(pooled(parts), line, goal=False)


if __name__ == "__main__":
    asked = argparse.ArgumentParser(description=__doc__)
    asked.add_argument("--days", type=int, default=180, help="that are learnt from, and more")
    asked.add_argument("--seeds", type=int, nargs="+", default=[201, 202, 203])
    args = asked.parse_args()
    lack = lacking("deep")  # a member of the ensemble
    if lack:
        print(f"the ensemble is left out; not installed: {', '.join(lack)}", flush=True)
    names = MODELS[:1] if lack else MODELS
    record("alarms", [*hub(args.days, args.seeds, names), *(f for line in AIRPORTS for f in airport(line, names))])
