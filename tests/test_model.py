"""The forecaster through its public interface: contracts of every model, files, explanations, odd data."""

import json
import subprocess
import sys
from functools import cache

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import average_precision_score

import amhs.model as M
from amhs.challengers import lacking
from amhs.config import CLASSES, HORIZONS_MIN, TARGETS
from amhs.core import InputError, ModelError, ParameterError, sha256_json
from amhs.model import MODELS, alarm_level, drawn, heads, load_model, log_loss, make_model, ordered, pick_device, surge_class

SMALL = {"persistence": {}, "linear": {}, "v8": {"trees": 50}, "hub": {"trees": 80, "min_child_weight": 2.0, "early_stopping": 10},
         "lightgbm": {"trees": 80, "min_rows": 5, "early_stopping": 10}, "deep": {"nets": 2, "epochs": 30, "batch": 32, "device": "cpu"}}
SMALL["ensemble"] = {"members": {"hub": {**SMALL["hub"], "ordered": False}, "linear": SMALL["linear"]}}
SPREADS = ("hub", "lightgbm", "ensemble")  # models that say how far the truth may be


def installed(*names):
    "Models as parameters of a test; one that cannot learn here is skipped, and says what is missing."
    return [pytest.param(n, marks=pytest.mark.skipif(bool(lacking(n)), reason=f"{n}: {lacking(n)} not installed")) for n in names]


NAMES = installed(*MODELS)
LEARNING = installed(*(name for name in MODELS if name != "persistence"))


def hub(rows=1200, seed=0, noise=8.0, edges=(10, 40)):
    "Features and targets of a queue that swings, with a column that never changes and a copy among the features."
    rng = np.random.default_rng(seed)
    wave = 40 * np.sin(np.arange(rows + 25) / 30)
    jobs = 200 + wave + np.convolve(rng.normal(size=rows + 25), np.ones(10), "same") * noise / 2
    index = pd.MultiIndex.from_arrays(
        [["HUB1"] * rows, pd.date_range("2026-01-01", periods=rows, freq="min", tz="UTC")], names=["line", "timestamp"])
    noisy = rng.normal(size=(3, rows))
    features = {"hub_jobs_last": jobs[:rows], "slope": np.gradient(wave)[:rows], "constant": np.full(rows, 7.0),
                "wave": wave[:rows], "copy": jobs[:rows], **{f"noise_{i}": x for i, x in enumerate(noisy)}}
    targets = {"now": jobs[:rows]}
    for h in HORIZONS_MIN:
        ahead = np.lib.stride_tricks.sliding_window_view(jobs[1:], h)[:rows] - jobs[:rows, None]
        targets |= {f"change_{t}_{h}": f(ahead, axis=1) for t, f in zip(TARGETS, (np.min, np.mean, np.max), strict=True)}
        targets[f"surge_class_{h}"] = np.digitize(targets[f"change_max_{h}"], edges)
    return [pd.DataFrame(d, index=index, dtype=np.float32) for d in (features, targets)]


def blocks(features, targets, valid=(0.5, 0.75)):
    "Training, validation and test block in the order of time."
    a, b = (int(len(features) * share) for share in valid)
    return [(features.iloc[s], targets.iloc[s]) for s in (slice(0, a), slice(a + 55, b), slice(b + 55, None))]


@cache
def trained(name):
    train, valid, _ = blocks(*hub())
    return make_model(name, **SMALL[name]).fit(*train, valid)


def later():
    "Features of the test block."
    return blocks(*hub())[2][0]


@pytest.mark.parametrize("name", NAMES)
def test_forecast_table(name):
    features = later()
    forecast = trained(name).predict(features)
    per = [[*(f"change_{t}_{h}" for t in TARGETS), *(f"prob_{c}_{h}" for c in CLASSES)] for h in HORIZONS_MIN]
    spreads = [f"spread_{t}_{h}" for h in HORIZONS_MIN for t in TARGETS]
    assert list(forecast.columns) == ["now", *sum(per, []), *spreads, "alarm_change"]
    assert (forecast[spreads] > 0).all(axis=None) and (name in SPREADS) == (forecast[spreads].nunique() > 1).all()
    assert forecast.index.equals(features.index)
    assert set(forecast.dtypes) == {np.dtype("float32")}
    assert forecast.notna().all(axis=None)
    assert (forecast["now"] == features["hub_jobs_last"]).all()
    for h in HORIZONS_MIN:
        probs = forecast[[f"prob_{c}_{h}" for c in CLASSES]]
        assert np.allclose(probs.sum(axis=1), 1, atol=1e-6) and (probs >= 0).all(axis=None)
        assert surge_class(forecast, h).isin([0, 1, 2]).all()


def eventful(rows=12_000, seed=0):
    "A queue that swings; at half of its peaks an event begins, and only `sign` tells at which, on most of the 12 minutes before."
    (features, targets), random = hub(rows, seed), np.random.default_rng(seed)
    peaks = np.arange(47, rows + 188, 188)
    starts = peaks[random.random(len(peaks)) < 0.5]
    left = starts[np.searchsorted(starts, np.arange(rows)).clip(max=len(starts) - 1)] - np.arange(rows)
    event_in = np.where((left >= 0) & (left <= 25), left, 25)
    soon = (event_in > 0) & (event_in <= 12)
    sign = (soon & (random.random(rows) < 0.7)) + 0.1 * random.normal(size=rows)
    return features.assign(sign=sign.astype("float32")), targets.assign(event_in=event_in.astype("float32")), soon


def highest(forecast):
    return forecast["now"] + forecast[[f"change_max_{h}" for h in HORIZONS_MIN]].max(axis=1)


def test_alarms_add_what_tells_of_events_and_forecasts_stay():
    features, targets, soon = eventful()
    train, valid, test = blocks(features, targets)
    model = make_model("hub", trees=20, min_child_weight=2.0).fit(*train, valid)
    forecast, soon = model.predict(test[0]), soon[-len(test[0]):]
    added, sign = alarm_level(forecast) - highest(forecast), test[0]["sign"] > 0.5
    assert added[sign].median() > added[~sign].median() + 5  # jobs
    assert average_precision_score(soon, alarm_level(forecast)) > 2 * average_precision_score(soon, highest(forecast))
    why = model.explain(test[0].iloc[::5], "alarm", 25) - model.explain(test[0].iloc[::5], "max", 25)
    assert np.allclose(why.sum(axis=1), added.iloc[::5], atol=1e-2)
    assert why["sign"][sign.iloc[::5]].mean() > why["sign"][~sign.iloc[::5]].mean() + 5, "and the explanation names it"
    plain = make_model("hub", trees=20, min_child_weight=2.0, alarm_trees=0).fit(*train, valid).predict(test[0])
    assert np.allclose(alarm_level(plain), highest(plain), atol=1e-3)
    pd.testing.assert_frame_equal(plain.drop(columns="alarm_change"), forecast.drop(columns="alarm_change"))


def test_what_alarms_add_is_kept_in_the_folder(tmp_path):
    features, targets, _ = eventful(5000)
    model = make_model("hub", trees=5).fit(features, targets)
    model.save(tmp_path / "model")
    assert model.worth > 0 and load_model(tmp_path / "model").predict(features).equals(model.predict(features))


def test_never_is_not_taken_for_soon():
    "With a short horizon the targets see no further than that: 10 minutes mean 10 or more."
    features, targets, _ = eventful(5000)
    model = make_model("hub", horizons=(10,), trees=5, min_child_weight=2.0).fit(features, targets.assign(event_in=targets["event_in"].clip(upper=10)))
    forecast = model.predict(features)
    added = forecast["alarm_change"] - forecast["change_max_10"]
    assert added[features["sign"] > 0.5].median() > added[features["sign"] < 0.5].median() + 3


@pytest.mark.parametrize("event_in", [None, 25.0, 0.0])
def test_without_events_to_learn_from_alarms_go_by_the_highest_level(event_in):
    features, targets = hub(400)
    model = make_model("hub", trees=5).fit(features, targets if event_in is None else targets.assign(event_in=np.float32(event_in)))
    forecast = model.predict(features)
    assert model.worth == 0 and np.allclose(alarm_level(forecast), highest(forecast), atol=1e-3)


@pytest.mark.parametrize("name", LEARNING)
def test_learning_models_beat_persistence(name):
    features, targets = blocks(*hub())[2]
    error = (trained(name).predict(features) - targets).abs().mean()
    changes = [c for c in heads() if c.startswith("change")]
    assert (error[changes] / targets[changes].abs().mean()).mean() < 0.8


@pytest.mark.parametrize("name", NAMES)
def test_info_says_how_it_was_trained(name):
    info = trained(name).info
    assert info["model"] == name and info["device"] == "cpu" and info["seconds"] >= 0
    assert info["rows"] == {"used": 600, "features_only": 0, "targets_only": 0}
    assert info["rows_valid"]["used"] == 245
    assert info["features"] == len(info["feature_names"]) == (1 if name == "persistence" else 8)
    assert all(abs(sum(b.values()) - 1) < 1e-9 for b in info["class_balance"].values())
    json.dumps(info)


def test_info_counts_trees():
    info = trained("v8").info
    assert set(info["rounds"]) == set(heads()) and set(info["rounds"].values()) == {50}
    assert info["trees"] == 50 * (9 + 3 * 3)
    assert "constant" not in info["features_used"] and "copy" not in info["features_used"]


@pytest.mark.parametrize("name", NAMES)
def test_rows_are_aligned_and_counted(name):
    features, targets = hub(400)
    shuffled = targets.iloc[30:].sample(frac=1, random_state=0)
    model = make_model(name, **SMALL[name]).fit(features.iloc[:370], shuffled)
    assert model.info["rows"] == {"used": 340, "features_only": 30, "targets_only": 30}
    same = make_model(name, **SMALL[name]).fit(features.loc[shuffled.index.intersection(features.index[:370])],
                                               shuffled.loc[shuffled.index.isin(features.index[:370])])
    assert model.predict(features).equals(same.predict(features))


def test_tables_that_share_nothing_or_repeat_rows_are_refused():
    features, targets = hub(200)
    with pytest.raises(InputError, match="share no row"):
        make_model("persistence").fit(features.iloc[:50], targets.iloc[100:])
    with pytest.raises(InputError, match="repeat"):
        make_model("persistence").fit(pd.concat([features, features.iloc[:3]]), targets)


@pytest.mark.parametrize("name", NAMES)
def test_columns_are_found_by_name(name):
    features = later()
    mixed = features.iloc[:, ::-1].assign(unknown=1.0)
    assert trained(name).predict(mixed).equals(trained(name).predict(features))
    with pytest.raises(ModelError, match="hub_jobs_last"):
        trained(name).predict(features.drop(columns="hub_jobs_last"))


def test_missing_features_are_all_named():
    with pytest.raises(ModelError, match="2 feature.*slope, wave"):
        trained("hub").predict(later().drop(columns=["slope", "wave"]))


def test_training_needs_the_level_of_now():
    features, targets = hub(200)
    with pytest.raises(ModelError, match="hub_jobs_last"):
        make_model("linear").fit(features.drop(columns="hub_jobs_last"), targets)


@pytest.mark.parametrize(("name", "hyper", "message"), [
    ("hubb", {}, "hub"), ("v8", {"tres": 3}, "trees"), ("hub", {"trees": 0}, "trees"), ("hub", {"learning_rate": "fast"}, "learning_rate"),
    ("hub", {"objective": "median"}, "absolute"), ("persistence", {"trees": 3}, "trees"), ("linear", {"rdge": 1.0}, "ridge"),
    ("hub", {"horizons": (10, 0)}, "whole minutes"), ("hub", {"horizons": ()}, "whole minutes"),
])
def test_wrong_choices_are_refused_and_named(name, hyper, message):
    with pytest.raises(ParameterError, match=message):
        make_model(name, **hyper)


def test_untrained_models_say_so(tmp_path):
    with pytest.raises(ModelError, match="not been trained"):
        make_model("hub").predict(later())
    with pytest.raises(ModelError, match="not been trained"):
        make_model("hub").save(tmp_path / "m")
    with pytest.raises(ModelError, match="not been trained"):
        make_model("hub").explain(later())


# ---- files

ELSEWHERE = """
import sys, pandas as pd
from amhs.model import load_model
load_model(sys.argv[1]).predict(pd.read_parquet(sys.argv[2])).to_parquet(sys.argv[3])
"""


@pytest.mark.parametrize("name", NAMES)
def test_another_process_predicts_the_same_to_the_bit(name, tmp_path):
    features = later()
    features.to_parquet(tmp_path / "features.parquet")
    folder = trained(name).save(tmp_path / "model")
    subprocess.run([sys.executable, "-c", ELSEWHERE, folder, tmp_path / "features.parquet", tmp_path / "out.parquet"], check=True)
    there, here = pd.read_parquet(tmp_path / "out.parquet"), trained(name).predict(features)
    assert there.columns.equals(here.columns) and there.index.equals(here.index)
    assert there.to_numpy().tobytes() == here.to_numpy().tobytes()
    assert surge_class(there, 10).equals(surge_class(here, 10))


@pytest.mark.parametrize("name", NAMES)
def test_loaded_models_keep_what_is_known(name, tmp_path):
    model, again = trained(name), load_model(trained(name).save(tmp_path / "m"))
    assert (again.name, again.seed, again.horizons, again.hyper) == (model.name, model.seed, model.horizons, model.hyper)
    assert again.info == {k: v for k, v in json.loads(json.dumps(model.info)).items() if k != "seconds"}, "the same training, the same file"
    assert again.explain(later()).equals(model.explain(later()))
    assert {p.suffix for p in (tmp_path / "m").rglob("*") if p.is_file()} <= {".json", ".ubj", ".npz", ".txt"}


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def forge(path):
    card = json.loads(path.read_text())
    card["state"]["calibration"]["10"]["edges"] = [1.0, 2.0]
    path.write_text(json.dumps(card))


@pytest.mark.parametrize(("file", "harm"), [
    ("change_max_10.ubj", flip), ("smooth.npz", flip), ("change_avg_15.ubj", lambda p: p.unlink()),
    ("model.json", forge), ("model.json", lambda p: p.write_text("{")), ("model.json", lambda p: p.write_text("[]")),
    ("model.json", lambda p: p.unlink()),
])
def test_damaged_models_are_refused(file, harm, tmp_path):
    folder = trained("hub").save(tmp_path / "m")
    harm(folder / file)
    with pytest.raises(ModelError, match="model" if file.endswith("json") else file):
        load_model(folder)


def test_a_model_of_another_format_is_refused_by_name(tmp_path):
    folder = trained("linear").save(tmp_path / "m")
    card = json.loads((folder / "model.json").read_text()) | {"format": 1}
    card.pop("seal")
    (folder / "model.json").write_text(json.dumps(card | {"seal": sha256_json(card)}))
    with pytest.raises(ModelError, match="another format"):
        load_model(folder)


def test_damaged_arrays_are_refused(tmp_path):
    folder = trained("linear").save(tmp_path / "m")
    flip(folder / "weights.npz")
    with pytest.raises(ModelError, match="weights.npz"):
        load_model(folder)


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    folder = trained("v8").save(tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr(M.Boosted, "_write", full_disk)
    with pytest.raises(OSError, match="no space"):
        trained("hub").save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


# ---- explanations


@cache
def unordered(name):
    return make_model(name, **SMALL[name], ordered=False).fit(*blocks(*hub())[0])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("horizon_min", HORIZONS_MIN)
def test_contributions_add_up_to_the_change(name, horizon_min):
    features = later()
    model = trained(name) if name in ("persistence", "linear", "v8") else unordered(name)
    forecast = model.predict(features)
    for target in TARGETS if name != "linear" else ["max"]:
        why = model.explain(features, target, horizon_min)
        assert list(why.columns) == [*model.features, "base"] and why.index.equals(features.index)
        raw = forecast[f"change_{target}_{horizon_min}"]
        off = (why.sum(axis=1) - raw).abs()
        assert (off < 1e-3).mean() > (0.5 if name == "linear" else 0.999999)  # linear forecasts are put in order


def test_contributions_to_a_class_are_those_to_the_highest_change():
    "In log-odds: they add up to the probability told, and a feature that lifts the change lifts the surge."
    features, model = later(), make_model("hub", **SMALL["hub"], ordered=False).fit(*blocks(*hub())[0])
    forecast, change = model.predict(features), model.explain(features, "max", 15)
    for klass, side in (("flat", -1), ("surge", 1)):
        why = model.explain(features, klass, 15)
        odds = np.log(forecast[f"prob_{klass}_15"] / (1 - forecast[f"prob_{klass}_15"])).clip(-12, 12)
        assert (why.sum(axis=1) - odds).abs().max() < 0.02
        moved, jobs = why.drop(columns="base").to_numpy(), change.drop(columns="base").to_numpy()
        assert (np.sign(moved) == side * np.sign(jobs))[np.abs(jobs) > 0.1].mean() > 0.95


@pytest.mark.parametrize("name", installed("linear", "v8", "lightgbm", "deep"))
def test_contributions_add_up_to_the_log_odds(name):
    features = later()
    odds = np.stack([trained(name).explain(features, c, 15).sum(axis=1) for c in CLASSES], axis=1)
    forecast = trained(name).predict(features)[[f"prob_{c}_15" for c in CLASSES]].to_numpy()
    probs = np.exp(odds) / np.exp(odds).sum(axis=1, keepdims=True)
    assert np.abs(probs - forecast).max() < 1e-4


def test_features_no_tree_reads_contribute_nothing():
    why = trained("v8").explain(later(), "max", 10)
    assert (why[["constant", "copy"]] == 0).all(axis=None)
    assert why["hub_jobs_last"].abs().mean() > why["noise_0"].abs().mean()


# ---- training


def test_early_stopping_stops_and_keeps_the_best_round():
    features, targets = hub()
    noise = targets.assign(change_max_10=np.random.default_rng(1).normal(size=len(targets)).astype(np.float32))
    train, valid, _ = blocks(features, noise)
    hyper = {"trees": 300, "early_stopping": 5, "learning_rate": 0.3}
    stopped = make_model("hub", **hyper, horizons=(10,)).fit(*train, valid)
    assert stopped.info["rounds"]["change_max_10"] < 50
    every = make_model("hub", **hyper, horizons=(10,)).fit(*train)
    assert set(every.info["rounds"].values()) == {300}


def mean_log_loss(model, features, targets):
    forecast = model.predict(features)
    return np.mean([log_loss(forecast[[f"prob_{c}_{h}" for c in CLASSES]].to_numpy(), targets[f"surge_class_{h}"].to_numpy().astype(int))
                    for h in model.horizons])


def test_calibration_improves_the_probabilities_of_a_classifier():
    "Trees grown too far are too sure of themselves; calibration on one block holds on the next."
    train, valid, test = blocks(*hub(3000, noise=14, edges=(30, 60)), valid=(0.4, 0.7))
    hyper = {"trees": 80, "early_stopping": 0, "smooth": False, "learning_rate": 0.3, "min_child_weight": 1.0, "horizons": (10, 25)}
    plain = make_model("hub", **hyper, calibrate=False).fit(*train, valid)
    calibrated = make_model("hub", **hyper, calibrate=True).fit(*train, valid)
    assert min(plain.shares["10"]) < 0.1
    assert mean_log_loss(calibrated, *test) < 0.95 * mean_log_loss(plain, *test)
    assert all(c["log_loss_after"] < c["log_loss_before"] for c in calibrated.calibration.values())


@pytest.mark.parametrize("calibrate", [True, False])
def test_classes_from_a_distribution_mean_what_they_say(calibrate):
    "With errors counted on the validation block, and with those of rows left out of the smooth fit; better than a classifier that is calibrated."
    train, valid, test = blocks(*hub(3000, noise=14, edges=(30, 60)), valid=(0.4, 0.7))
    hyper = {"trees": 60, "early_stopping": 0, "learning_rate": 0.1, "horizons": (10,)}
    model = make_model("hub", **hyper, calibrate=calibrate).fit(*train, valid)
    forecast, truth = model.predict(test[0]), test[1]["surge_class_10"]
    assert set(model.boosters) == {"change_min_10", "change_avg_10", "change_max_10"}
    for k, name in enumerate(CLASSES):
        assert forecast[f"prob_{name}_10"].mean() == pytest.approx(truth.eq(k).mean(), abs=0.06)
    classifier = make_model("hub", **hyper, smooth=False, calibrate=True).fit(*train, valid)
    assert mean_log_loss(model, *test) < mean_log_loss(classifier, *test)


def test_same_seed_same_forecast_however_many_at_once():
    train, valid, test = blocks(*hub(600))
    one, two, other = (make_model("hub", seed=s, trees=15, jobs=j).fit(*train, valid).predict(test[0])
                       for s, j in ((3, 1), (3, 2), (4, 2)))
    assert one.equals(two)
    assert not one.equals(other)


def test_v8_is_what_the_scikit_learn_interface_trains():
    "Without rows that weigh more, shared bins and separate fits are the same model."
    from xgboost import XGBClassifier, XGBRegressor

    train, _, test = blocks(*hub(800))
    features = [t[0].drop(columns=["constant", "copy"]) for t in (train, test)]
    ours = make_model("v8", trees=30, bins=256, heavy_weight=1.0, horizons=(10,)).fit(features[0], train[1]).predict(features[1])
    v8 = {"n_estimators": 30, "max_depth": 8, "learning_rate": 0.03, "subsample": 0.85, "colsample_bytree": 0.85, "min_child_weight": 2,
          "gamma": 0.05, "reg_alpha": 0.05, "reg_lambda": 0.8, "tree_method": "hist", "random_state": 0, "n_jobs": 1}
    change = XGBRegressor(**v8).fit(features[0], train[1]["change_max_10"]).predict(features[1])
    assert np.allclose(ours["change_max_10"], change, atol=1e-5)
    probs = XGBClassifier(**v8).fit(features[0], train[1]["surge_class_10"]).predict_proba(features[1])
    assert np.allclose(ours[[f"prob_{c}_10" for c in CLASSES]], probs, atol=1e-6)


def test_heavy_rows_weigh_more_in_v8():
    "A feature cannot tell rare big rises from none; the weight pulls the forecast towards them."
    features, targets = hub(1000)
    rare = np.arange(1000) % 10 == 0
    targets = targets.assign(change_max_10=np.where(rare, 60, 0).astype(np.float32))
    blind = features.assign(**{c: np.float32(0) for c in features.columns if c != "hub_jobs_last"}, hub_jobs_last=np.float32(1))
    blind.iloc[0, 0] = 2.0
    hyper = {"trees": 150, "learning_rate": 0.2, "horizons": (10,)}
    means = [make_model("v8", **hyper, heavy_weight=w).fit(blind, targets).predict(blind)["change_max_10"].mean() for w in (1.0, 3.0)]
    assert means[0] == pytest.approx(6, abs=0.5)
    assert means[1] == pytest.approx(60 * 0.3 / 1.2, abs=0.5)


# ---- odd data


@pytest.mark.parametrize("name", LEARNING)
def test_unknown_values_in_features_are_fine(name):
    features, targets = hub()
    holes = features.mask(np.random.default_rng(0).random(features.shape) < 0.1).assign(hub_jobs_last=features["hub_jobs_last"])
    holes["noise_0"] = np.float32(np.nan)
    train, valid, test = blocks(holes, targets)
    forecast = make_model(name, **SMALL[name]).fit(*train, valid).predict(test[0])
    assert forecast.notna().all(axis=None)
    assert (forecast["change_max_25"] - test[1]["change_max_25"]).abs().mean() < 0.9 * test[1]["change_max_25"].abs().mean()


def test_infinite_features_and_unknown_targets_are_refused():
    features, targets = hub(300)
    with pytest.raises(InputError, match="slope"):
        trained("hub").predict(features.assign(slope=np.float32(np.inf)))
    with pytest.raises(InputError, match="change_avg_15"):
        make_model("linear").fit(features, targets.assign(change_avg_15=np.float32(np.nan)))
    with pytest.raises(InputError, match="surge_class_25"):
        make_model("linear").fit(features, targets.drop(columns="surge_class_25"))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("present", [{0}, {0, 1}, {0, 2}, {2}])
def test_classes_that_never_occur_are_never_forecast(name, present):
    features, targets = hub(500)
    for h in HORIZONS_MIN:
        classes = targets[f"surge_class_{h}"].where(targets[f"surge_class_{h}"].isin(present), min(present))
        classes.iloc[0] = max(present)
        targets[f"surge_class_{h}"] = classes
    train, valid, test = blocks(features, targets)
    forecast = make_model(name, **SMALL[name]).fit(*train, valid).predict(test[0])
    for h in HORIZONS_MIN:
        absent = [f"prob_{c}_{h}" for i, c in enumerate(CLASSES) if i not in present]
        assert (forecast[absent] < 0.05).all(axis=None)
        assert set(surge_class(forecast, h)) <= present


@pytest.mark.parametrize("name", NAMES)
def test_a_target_that_never_changes(name):
    features, targets = hub(400)
    targets = targets.assign(change_max_10=np.float32(5))
    train, valid, test = blocks(features, targets)
    hyper = SMALL[name] | ({} if name == "persistence" else {"ordered": False})
    forecast = make_model(name, **hyper).fit(*train, valid).predict(test[0])
    assert np.allclose(forecast["change_max_10"], 0 if name == "persistence" else 5, atol=0.1)


@pytest.mark.parametrize("name", NAMES)
def test_one_feature_is_enough(name):
    features, targets = hub(400)
    train, valid, test = blocks(features[["hub_jobs_last"]], targets)
    assert make_model(name, **SMALL[name]).fit(*train, valid).predict(test[0].iloc[:1]).notna().all(axis=None)


@pytest.mark.parametrize("name", NAMES)
def test_other_horizons(name):
    features, targets = hub(300)
    model = make_model(name, horizons=(15,), **SMALL[name]).fit(features, targets)
    assert [c for c in model.predict(features) if c.startswith("change_max")] == ["change_max_15"]
    with pytest.raises(ParameterError, match="15"):
        model.explain(features, "max", 10)


def test_persistence_votes_for_the_majority():
    features, targets = hub(300)
    targets = targets.assign(surge_class_10=np.float32(np.repeat([1, 0, 2], [150, 100, 50])))
    forecast = make_model("persistence").fit(features, targets).predict(features)
    assert set(surge_class(forecast, 10)) == {1}
    assert forecast["prob_slight_10"].iloc[0] == pytest.approx(0.5)
    assert (forecast.filter(like="change") == 0).all(axis=None)


# ---- decisions and order

PROBS = arrays(np.float64, (20, 3), elements=st.floats(0.01, 1)).map(lambda p: p / p.sum(axis=1, keepdims=True))


def forecast_of(probs):
    return pd.DataFrame(probs, columns=[f"prob_{c}_10" for c in CLASSES])


@given(PROBS)
def test_without_shares_the_most_probable_class_is_taken(probs):
    decided = surge_class(forecast_of(probs), 10).to_numpy()
    assert np.allclose(probs[np.arange(20), decided], probs.max(axis=1), rtol=2e-5)


@given(PROBS, arrays(np.float64, 3, elements=st.floats(0.05, 1)))
def test_a_rarer_class_needs_less_to_be_taken(probs, shares):
    before = surge_class(forecast_of(probs), 10, shares) == 2
    after = surge_class(forecast_of(probs), 10, shares * [1, 1, 0.5]) == 2
    assert (after | ~before).all()


CHANGES = arrays(np.float64, (10, 3, 3), elements=st.floats(-300, 300))


@given(CHANGES, arrays(np.float64, 10, elements=st.floats(0, 500)))
def test_ordered_forecasts_do_not_contradict_each_other(changes, now):
    low, mid, high = np.moveaxis(ordered(changes, now), 2, 0)
    assert (low <= mid).all() and (mid <= high).all()
    assert (np.diff(low, axis=1) <= 0).all() and (np.diff(high, axis=1) >= 0).all()
    assert (low >= -now[:, None]).all()


@given(arrays(np.float32, (6, 3, 3), elements=st.floats(-50, 50, width=32)), arrays(np.int64, 6, elements=st.integers(0, 80)))
def test_levels_are_drawn_towards_whole_numbers(changes, now):
    """A quarter of a job off: whole. Nobody moves further, nobody passes another, and a small difference stays small."""
    before = ordered(changes, now)
    after, near = drawn(before, now), drawn(before + np.array([1, 0, 1]) * 1e-5, now)
    low, mid, high = np.moveaxis(after, 2, 0)
    assert (low <= mid).all() and (mid <= high).all() and (low >= -now[:, None]).all()
    assert (np.diff(low, axis=1) <= 0).all() and (np.diff(high, axis=1) >= 0).all()
    levels, ends = now[:, None, None] + before[..., [0, 2]].astype("float64"), now[:, None, None] + after[..., [0, 2]]
    assert np.abs(ends - levels).max() <= 0.25 + 1e-9 and np.abs(near - after).max() <= 2.1e-5
    close = np.abs(levels - np.rint(levels)) <= 0.25
    assert np.allclose(ends[close], np.rint(levels)[close], atol=1e-9)


@pytest.mark.parametrize("name", ["hub", "linear", "ensemble", "v8"])
def test_only_counted_queues_are_drawn(name):
    """A model knows from its training rows; V8 keeps its own ways."""
    (features, targets), valid = (part for part in blocks(*hub())[:2])
    changes = [c for c in targets if c.startswith("change_max") or c.startswith("change_min")]
    whole = targets.assign(**{c: np.rint(targets[c]) for c in ["now", *changes]})
    counted = make_model(name, **SMALL[name]).fit(features, whole)
    measured = make_model(name, **SMALL[name]).fit(features, whole.assign(now=whole["now"] + 0.5))
    def parts(model): return np.concatenate([(said["now"] + said[c]).to_numpy("float64") % 1 for said in [model.predict(later())] for c in changes])
    assert not measured.info["whole"] and counted.info["whole"] == (name != "v8")
    def close(x): return (np.minimum(x, 1 - x) < 1e-4).mean()
    assert close(parts(measured)) < 0.1 and (close(parts(counted)) > 0.4) == (name != "v8")


@given(CHANGES)
def test_order_that_is_there_is_kept(changes):
    first = ordered(changes, np.full(10, 1e9))
    assert np.array_equal(ordered(first, np.full(10, 1e9)), first)


@pytest.mark.parametrize("name", installed("linear", "hub", "lightgbm", "deep", "ensemble"))
def test_our_forecasts_are_in_order(name):
    forecast = trained(name).predict(later())
    for h in HORIZONS_MIN:
        assert (forecast[f"change_min_{h}"] <= forecast[f"change_avg_{h}"]).all()
        assert (forecast[f"change_avg_{h}"] <= forecast[f"change_max_{h}"]).all()


# ---- devices and imports


def test_device_is_chosen_and_refused(monkeypatch):
    def there(): return True
    def absent(): return False
    assert [pick_device("auto", there), pick_device("auto", absent), pick_device("cpu", there)] == ["cuda", "cpu", "cpu"]
    with pytest.raises(ModelError, match="no CUDA device answers"):
        pick_device("cuda", absent)
    monkeypatch.setenv("AMHS_DEVICE", "cuda")
    with pytest.raises(ModelError, match="no CUDA device answers"):
        pick_device("auto", absent)


def test_a_model_refuses_to_learn_on_a_device_that_is_not_there():
    if pick_device("auto") == "cuda":
        pytest.skip("this machine has a CUDA device")
    with pytest.raises(ModelError, match="no CUDA device answers"):
        make_model("v8", device="cuda").fit(*hub(200))


def test_importing_the_module_is_cheap():
    "XGBoost and scikit-learn are loaded when a model is trained, not before; of scipy only the root, which numba imports."
    code = "import sys, amhs.model; print([m for m in ('xgboost', 'sklearn', 'shap', 'scipy.optimize', 'scipy.linalg', 'matplotlib') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
