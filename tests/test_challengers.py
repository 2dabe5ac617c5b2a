"""Challengers: what is said where a library is missing, who wins a contest, and a package made from each answers like its model."""

import sys
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest

from amhs.challengers import answers_with, lacking
from amhs.config import load_params, load_site
from amhs.contest import compete, entrants, trade_table
from amhs.core import ModelError, ParameterError, read_json, sha256_json, write_json
from amhs.develop import Labelled, block_times, fitted, package_model, planned
from amhs.features import build_features
from amhs.inference import load_package
from amhs.model import load_model, make_model
from amhs.package import build_engines, candidate_table, proof_rows, prove, replay, time_engines, validation_rows, write_package
from amhs.simulate import simulate
from amhs.targets import build_targets, time_split

CHOICE = {"model": "hub", "feature_set": "v8", "hyper": {"depth": 4}, "score": 0.7, "default_score": 0.7}
SMALL = {"lightgbm": {"trees": 10, "feature_set": "v8"}, "deep": {"nets": 2, "epochs": 2, "device": "cpu"},
         "ensemble": {"members": {"hub": {"trees": 10, "feature_set": "v8", "smooth": False}, "linear": {}}}}


def needs(*names):
    "Models as parameters; one that cannot learn here is skipped, and says what is missing."
    return [pytest.param(n, marks=pytest.mark.skipif(bool(lacking(n)), reason=f"{n}: {lacking(n)} not installed")) for n in names]


def params(**sets):
    return load_params("train", "smoke", {f"train.{name}": value for name, value in sets.items()})


@cache
def labelled():
    telemetry = simulate(2.5, seed=1).telemetry
    targets = build_targets(telemetry)
    return Labelled(telemetry, targets, block_times(targets.index, time_split(targets.index, 0.25, 0.2)), pd.DataFrame(), load_site("simulated"))


# ---- what is not installed


@pytest.mark.parametrize(("name", "module", "extra"), [("lightgbm", "lightgbm", "challengers"), ("deep", "torch", "deep")])
def test_a_missing_library_is_named_with_its_extra(name, module, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    assert lacking(name, "hub") == {name: extra}
    features = build_features(labelled().telemetry.head(300), make_model(name).feature_set)
    targets = labelled().targets.loc[labelled().targets.index.intersection(features.index)]
    with pytest.raises(ModelError, match=rf"{name} needs {module}.*amhs\[{extra}\]"):
        make_model(name).fit(features, targets)


def test_a_missing_challenger_leaves_the_others_to_compete(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    names, absent = entrants(params(challengers="[lightgbm, ensemble, persistence]", members="[hub, deep, lightgbm]"))
    assert names == ["hub", "persistence"]
    assert absent == {"lightgbm": "not installed: challengers", "ensemble": "not installed: challengers, deep"}
    table = trade_table({"hub": {"mae_ratio": 0.5, "row_ms": 0.1}}, absent, 1.0)
    assert table["champion"].to_dict() == {"hub": True, "lightgbm": False, "ensemble": False}


# ---- the contest


def test_the_least_error_wins_and_the_members_are_trained_once():
    found = compete(labelled(), CHOICE, params(challengers="[persistence, linear, ensemble]", members="[hub, linear]", trees="20", max_row_ms="1000"))
    ratios = found.table["mae_ratio"]
    assert set(ratios.index) == {"hub", "persistence", "linear", "ensemble"} and ratios["persistence"] == pytest.approx(1)
    assert found.champion.name == ratios.idxmin() and found.table["allowed"].all()
    assert ratios["ensemble"] <= ratios[["hub", "linear"]].min() + 0.005, "its weights were fitted to these rows"


def test_who_is_too_slow_cannot_win():
    scores = {"slow": {"mae_ratio": 0.4, "row_ms": 20.0}, "fast": {"mae_ratio": 0.5, "row_ms": 0.2}}
    table = trade_table(scores, {}, 10)
    assert table["champion"].idxmax() == "fast" and table.loc["slow", "note"] == "too slow"
    with pytest.raises(ModelError, match="max_row_ms"):
        trade_table(scores, {}, 0.1)


def test_an_ensemble_takes_only_members_that_are_as_it_wants_them():
    data, pair = labelled(), SMALL["ensemble"]
    models = {"linear": fitted(data, make_model("linear")), "hub": fitted(data, make_model("hub", trees=5, feature_set="v8"))}
    taken = fitted(data, make_model("ensemble", **pair).take(models))
    assert taken.members["linear"] is models["linear"] and taken.members["hub"] is not models["hub"]


def test_what_one_member_has_learnt_of_events_counts_in_full(tmp_path):
    """Who knows nothing about events has no say about them; an ensemble saved before that answers as it did."""
    soon = (labelled().targets["change_max_10"] > 30) & (np.arange(len(labelled().targets)) % 20 > 0)
    data = replace(labelled(), targets=labelled().targets.assign(event_in=np.where(soon, 5.0, 60.0)))
    members = {"hub": {"trees": 5, "feature_set": "v8", "ordered": False}, "linear": {}}
    team = fitted(data, make_model("ensemble", feature_set="v8", ordered=False, members=members))
    rows = validation_rows(data, team)[0]
    def added(model): return (said := model.predict(rows))["alarm_change"] - said.filter(like="change_max").max(axis=1)
    raised = added(team.members["hub"])
    assert raised.abs().max() > 0.1 and np.allclose(added(team), raised, atol=1e-3)
    card = read_json(team.save(tmp_path / "team") / "model.json")
    share = team.weights["changes"][0]
    del card["state"]["alarms"], card["seal"]
    write_json(tmp_path / "team/model.json", card | {"seal": sha256_json(card)})
    assert np.allclose(added(load_model(tmp_path / "team")), share * raised, atol=1e-3)


def test_members_must_read_what_the_team_has():
    with pytest.raises(ParameterError, match="feature set `wide`"):
        fitted(labelled(), make_model("ensemble", feature_set="hub", members={"linear": {}, "hub": {}}))


def test_stage_06_plans_every_model():
    chosen = planned(CHOICE, params(trees="7"), "hub").hyper
    assert (chosen.depth, chosen.trees, chosen.feature_set) == (4, 7, "v8")
    team = planned(CHOICE, params(members="[hub, deep]", device="cpu"), "ensemble")
    assert team.members["hub"].hyper.depth == 4 and team.members["deep"].hyper.device == "cpu"
    few = planned(CHOICE, params(members="[hub, deep]", rows="500"), "ensemble").members
    assert (few["hub"].hyper.rows, few["deep"].hyper.rows) == (500, make_model("deep").hyper.rows), "trees learn from few rows, networks do not"


# ---- a package of each


@pytest.mark.parametrize("name", needs("lightgbm", "deep", "ensemble"))
def test_a_package_answers_like_its_model(name, tmp_path):
    data, asked = labelled(), load_params("inference", "smoke")
    model = fitted(data, make_model(name, **SMALL[name]))
    gates = pd.DataFrame({"value": [1.0], "op": [">="], "limit": [0.0], "why": ["made for a test"]}, index=pd.Index(["skill"], name="criterion"))
    confirmed = package_model(tmp_path / "confirmed", model, data, gates, 1)
    engines, refused = build_engines(load_model(confirmed / "model"))
    rows = proof_rows(validation_rows(data, model)[0], asked)
    table = candidate_table(prove(engines, model, rows), time_engines(engines, rows, 5), refused)
    assert list(engines) == (["members", "original"] if name == "ensemble" else ["original"]) and table["proven"].all()
    chosen = engines[table.index[table["chosen"]][0]]
    criteria = load_params("business", "smoke").criteria
    package = load_package(write_package(tmp_path / "package", confirmed, data, chosen, table, criteria, asked, 1))
    replayed = replay(package, data, 20)
    assert replayed["level_error"] < 1e-4 and replayed["other_classes"] == 0
    row = rows.iloc[0].to_numpy(np.float32)
    reasons = package.strongest(package.contributions(row, 10), 3)
    assert len(reasons) == 3 and {feature for feature, _ in reasons} <= set(model.features)
    assert set(answers_with(model)) == ({"lightgbm"} if name == "lightgbm" else set())


@pytest.mark.parametrize("name", needs("lightgbm", "deep", "ensemble"))
def test_the_same_seed_gives_the_same_model(name):
    first, second, other = (make_model(name, seed=seed, **SMALL[name]) for seed in (3, 3, 4))
    X = validation_rows(labelled(), fitted(labelled(), first))[0]
    said = [first.predict(X), *(fitted(labelled(), model).predict(X) for model in (second, other))]
    assert said[0].equals(said[1]) and not said[0].equals(said[2])
