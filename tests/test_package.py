"""The package a service loads: proven or not written, whole or not there, refused when touched, the same answers as the confirmed model."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from reviewed import QUIET, own_settings
from toy_project import HOUSE, make_project

from amhs import package as packing
from amhs import runs
from amhs.config import load_params, load_site
from amhs.core import ModelError, read_json, sha256_tree
from amhs.develop import Labelled, block, block_times, package_model
from amhs.engines import Engine, make_engine
from amhs.evaluate import interval_bounds, interval_offsets, within
from amhs.features import build_features
from amhs.inference import TOLERANCE, load_package
from amhs.model import make_model, surge_class
from amhs.rules import load_rules
from amhs.simulate import simulate
from amhs.targets import build_targets, time_split
from amhs.telemetry import minute_numbers

SITE = load_site("simulated")
PARAMS = load_params("inference", "smoke")
CRITERIA = load_params("business", "smoke").criteria
GATES = pd.DataFrame([{"criterion": "skill", "value": 0.3, "op": ">=", "limit": 0.2, "why": "a test"}]).set_index("criterion")


def labelled(days=3, drop=(), holes=False):
    "A labelled data set; with holes: minutes gone, short and long, and single values unknown."
    telemetry = simulate(days, seed=2).telemetry.drop(columns=list(drop))
    if holes:
        random = np.random.default_rng(0)
        gone = np.isin(np.arange(len(telemetry)), [*range(3700, 3702), *range(3900, 3950)])
        telemetry.loc[random.choice(len(telemetry), 60, replace=False), "hub_free_slots"] = np.nan
        telemetry = telemetry[~gone].reset_index(drop=True)
    targets = build_targets(telemetry, site=SITE)
    return Labelled(telemetry, targets, block_times(targets.index, time_split(targets.index, 0.25, 0.2)), pd.DataFrame(), SITE)


def trained(data, name="hub", **hyper):
    features = build_features(data.telemetry, hyper.get("feature_set", "v8"), SITE)
    return make_model(name, **hyper).fit(*((block(t, data.times, "train")) for t in (features, data.targets)),
                                         valid=tuple(block(t, data.times, "valid") for t in (features, data.targets)))


SMALL = {"feature_set": "v8", "trees": 25, "depth": 4, "early_stopping": 8}


@pytest.fixture(scope="module")
def data():
    return labelled()


@pytest.fixture(scope="module")
def made(data, tmp_path_factory):
    "A small confirmed model, its engines, and the package made of it."
    folder, model = tmp_path_factory.mktemp("made"), trained(data, **SMALL)
    confirmed = package_model(folder / "confirmed", model, data, GATES, number=7)
    engines, refused = packing.build_engines(model)
    rows = packing.proof_rows(packing.validation_rows(data, model)[0], PARAMS)
    proof = packing.prove(engines, model, rows)
    table = packing.candidate_table(proof, packing.time_engines(engines, rows, 20), refused)
    return {"folder": folder, "model": model, "confirmed": confirmed, "engines": engines, "rows": rows, "proof": proof, "table": table}


def write(made, data, folder, engine="forest", table=None, **changed):
    return packing.write_package(folder, made["confirmed"], data, made["engines"][engine], made["table"] if table is None else table,
                                 CRITERIA, PARAMS.model_copy(update=changed), number=7)


@pytest.fixture(scope="module")
def folder(made, data):
    return write(made, data, made["folder"] / "package")


@pytest.fixture(scope="module")
def package(folder):
    return load_package(folder)


# --- proof -----------------------------------------------------------------------------------------------------------


def test_every_form_is_proven_on_real_rows_and_on_rows_with_holes(made):
    proof, rows = made["proof"], made["rows"]
    assert set(proof.index) == {"boosters", "merged", "onnx", "forest"} and proof["proven"].all()
    assert (proof["rows"] == len(rows)).all() and rows.isna().any(axis=1).sum() > 100
    assert proof.loc["forest", "level_error"] == 0


class Wrong(Engine):
    "An engine that is fast, and off by what it is told."

    kind = "wrong"

    def __init__(self, model, truth, spoil, **finish):
        super().__init__(model.features, model.horizons, truth.finish._replace(**finish), truth.smooth)
        self.truth, self.spoil = truth, spoil

    def _margins(self, wide):
        return self.spoil(self.truth._margins(wide).astype("float64"))


def shifted(by, column):
    def spoil(margins):
        margins[:, column] += by
        return margins
    return spoil


def only_last_row(margins):
    margins[-1, 2] += 1
    return margins


def broken(margins):
    margins[5:6, 0] = np.nan
    return margins


@pytest.mark.parametrize("spoil", [shifted(0.01, 2), shifted(3.0, 7), shifted(50.0, 12), only_last_row, broken])
def test_a_wrong_engine_is_never_chosen_nor_packed(made, data, spoil, tmp_path):
    engines = {"wrong": Wrong(made["model"], make_engine("forest", made["model"]), spoil), **made["engines"]}
    proof = packing.prove(engines, made["model"], made["rows"])
    assert not proof.loc["wrong", "proven"] and proof.loc["forest", "proven"]
    times = pd.DataFrame(1000.0, proof.index, ["p50_us", "p99_us", "p50_us_64", "p99_us_64"])
    times.loc["wrong"] = 0.1
    table = packing.candidate_table(proof, times)
    assert not table.loc["wrong", "chosen"] and table["chosen"].sum() == 1
    with pytest.raises(ModelError, match="not proven"):
        packing.write_package(tmp_path / "p", made["confirmed"], data, engines["wrong"], table, CRITERIA, PARAMS, 7)
    assert not list(tmp_path.iterdir())


def test_a_difference_within_the_limit_passes_and_classes_count(made):
    tiny = Wrong(made["model"], make_engine("forest", made["model"]), shifted(3e-5, 2))
    proof = packing.prove({"tiny": tiny}, made["model"], made["rows"], limit=1e-4)
    assert proof.loc["tiny", "proven"] and 2e-5 < proof.loc["tiny", "level_error"] < 8e-5, "drawing levels doubles it at most"
    truth = make_engine("forest", made["model"])
    classes = Wrong(made["model"], truth, lambda margins: margins, edges=truth.finish.edges + 20)
    found = packing.prove({"classes": classes}, made["model"], made["rows"]).loc["classes"]
    assert found["level_error"] == 0 and found["other_classes"] > 0 and not found["proven"]


def test_the_fastest_proven_one_is_chosen(made):
    times = pd.DataFrame({"p50_us": {"boosters": 9.0, "merged": 5.0, "onnx": 2.0, "forest": 3.0}, "p99_us": 1.0, "p50_us_64": 1.0, "p99_us_64": 1.0})
    table = packing.candidate_table(made["proof"], times, {"other": "no such operator"})
    assert table.index[table["chosen"]].tolist() == ["onnx"]
    assert table.loc["other", "what"] == "no such operator"


def test_a_form_that_cannot_be_built_is_out_with_its_reason(data):
    engines, refused = packing.build_engines(trained(data, "v8", trees=2, depth=14, min_child_weight=0.0, gamma=0.0, feature_set="v8"), ("forest", "merged"))
    assert list(engines) == ["merged"] and "too deep" in refused["forest"]


def test_times_are_taken_side_by_side(made):
    ticks = iter(range(10**6))
    table = packing.time_engines({k: made["engines"][k] for k in ("forest", "onnx")}, made["rows"], repeats=20, clock=lambda: next(ticks))
    assert (table == 1e6).all(axis=None), "a call lasts one tick of this clock"


# --- what is in it ---------------------------------------------------------------------------------------------------


def test_it_answers_like_the_confirmed_model(package, data, made):
    features, _ = packing.validation_rows(data, made["model"])
    known = made["model"].predict(features)
    said = package.forecasts(np.ascontiguousarray(features, "float32"))
    assert package.columns == list(known.columns) and np.abs(said - known.to_numpy()).max() < TOLERANCE
    assert np.array_equal(package.surge_class(said), np.stack([surge_class(known, h) for h in package.horizons], axis=1))
    assert np.array_equal(package.surge_class(said[3]), package.surge_class(said)[3])


@pytest.mark.parametrize("feature_set", ["v8", "hub"])
def test_windows_give_what_the_history_gives_gaps_and_all(tmp_path, feature_set):
    data = labelled(4, holes=True)
    model = trained(data, "hub", **SMALL | {"feature_set": feature_set, "trees": 10})
    confirmed = package_model(tmp_path / "confirmed", model, data, GATES, number=1)
    engines, _ = packing.build_engines(model, ("forest",))
    table = packing.candidate_table(packing.prove(engines, model, packing.validation_rows(data, model)[0]), pd.DataFrame({"p50_us": {"forest": 1.0}}))
    loaded = load_package(packing.write_package(tmp_path / "package", confirmed, data, engines["forest"], table, CRITERIA, PARAMS, 1))
    found = packing.replay(loaded, data, n=400)
    assert found["rows"] > 350 and found["level_error"] == 0 and found["other_classes"] == 0


def test_the_same_model_gives_the_same_package_to_the_byte(made, data, folder, tmp_path):
    assert sha256_tree(write(made, data, tmp_path / "again")) == sha256_tree(folder)


def test_the_version_changes_with_what_answers_depend_on(made, data, package, tmp_path):
    assert package.version.startswith("7-") and package.number == 7
    assert load_package(write(made, data, tmp_path / "h", interval_share=0.8)).version != package.version
    assert load_package(write(made, data, tmp_path / "e", engine="merged")).version != package.version


def test_the_proof_travels_with_it_candidates_that_lost_too(made, data, tmp_path):
    table = packing.candidate_table(made["proof"], pd.DataFrame({"p50_us": {"forest": 1.0, "onnx": 2.0}}), {"other": "no such operator"})
    folder = write(made, data, tmp_path / "p", table=table)
    proof = {row["engine"]: row for row in json.loads((folder / "proof.json").read_text(), parse_constant=lambda word: 1 / 0)}
    assert proof["forest"]["chosen"] and proof["forest"]["rows"] == len(made["rows"]) and proof["onnx"]["level_error"] > 0
    assert proof["other"]["what"] == "no such operator" and not proof["other"]["proven"] and proof["other"]["level_error"] is None


def test_rules_travel_as_numbers(package):
    assert package.rules.version == load_rules(site=SITE).version
    assert "surge_level" not in (package.folder / "rules.yaml").read_text()


def test_alarm_and_intervals_come_from_the_validation_block(package, data, made):
    features, targets = packing.validation_rows(data, made["model"])
    forecast = made["model"].predict(features)
    known = packing.choose_alarms(forecast, data, CRITERIA)[""]
    assert package.alarm_of("HUB1").threshold == pytest.approx(known.threshold, abs=TOLERANCE) and package.alarm_of("HUB1").budget == CRITERIA.max_false_per_day
    held = within(interval_bounds(forecast, package.intervals.model), targets).mean()
    assert (held >= 0.9).all() and (held < 0.95).all() and package.intervals.rows == len(targets)
    still = (targets["change_max_10"]).between(*package.intervals.level["change_max_10"][0][1:]).mean()
    assert 0.9 <= still < 0.95


@given(st.integers(1, 400), st.floats(0.05, 0.99), st.integers(0, 2**32 - 1))
def test_intervals_hold_at_least_their_share(rows, share, seed):
    errors = np.random.default_rng(seed).standard_cauchy(rows)
    (_, low, high), = interval_offsets(pd.DataFrame({"change_max_10": np.zeros(rows)}), pd.DataFrame({"change_max_10": errors}), share)["change_max_10"]
    held = ((errors >= low) & (errors <= high)).mean()
    assert held >= min(share, 1 - 2 / (rows + 1)) - 1e-9
    if rows > 100:
        assert held <= share + 4 / rows + 1e-9, "no wider than it must be"


def test_contributions_name_features_and_shap_comes_from_the_model(package, data, made):
    x = np.ascontiguousarray(packing.validation_rows(data, made["model"])[0].iloc[5], "float32")
    found = package.strongest(package.contributions(x, 15, "avg"), 4)
    assert 0 < len(found) <= 4 and all(n in made["model"].features for n, _ in found)
    assert [abs(v) for _, v in found] == sorted((abs(v) for _, v in found), reverse=True)
    shap = package.explain(x, 15, "avg")
    assert shap.sum() == pytest.approx(made["engines"]["boosters"].margins(x[None])[0, 1, 1], abs=1e-3)


def test_a_line_with_enough_events_has_an_alarm_of_its_own(data, made, monkeypatch):
    """One line shares with nobody; of two, the one with enough events on validation rows is judged by itself."""
    one = packing.choose_alarms(made["model"].predict(packing.validation_rows(data, made["model"])[0]), data, CRITERIA)
    assert list(one) == [""]
    calm = data.telemetry.assign(line="HUB2", hub_jobs=lambda t: t["hub_jobs"] / 2)
    both = replace(data, telemetry=pd.concat([data.telemetry, calm], ignore_index=True))
    forecast = made["model"].predict(packing.validation_rows(data, made["model"])[0])
    other = forecast.rename(index={"HUB1": "HUB2"}, level="line")
    monkeypatch.setattr(packing, "ENOUGH_EVENTS", 1)
    found = packing.choose_alarms(pd.concat([forecast, other]), both, CRITERIA)
    assert set(found) == {"", "HUB1"} and found["HUB1"] == one[""], "the calm line has no event to choose by"
    assert packing.alarm_table(found).index.tolist() == ["other lines", "HUB1"]


def test_licences_of_what_answering_needs_are_listed(folder):
    found = {r["name"].lower(): r["licence"] for r in read_json(folder / "licences.json")}
    assert {"numpy", "numba", "pandas", "pydantic"} <= found.keys() and all(found.values())
    assert "jupyterlab" not in found and "onnxruntime" in {r["name"] for r in packing.licences("onnx")}


def test_a_forecaster_without_trees_is_packed_as_it_is(data, tmp_path):
    model = trained(data, "linear", feature_set="v8")
    confirmed = package_model(tmp_path / "confirmed", model, data, GATES, number=1)
    engines, _ = packing.build_engines(model)
    features, _ = packing.validation_rows(data, model)
    table = packing.candidate_table(packing.prove(engines, model, features), packing.time_engines(engines, features, 20))
    loaded = load_package(packing.write_package(tmp_path / "p", confirmed, data, engines["original"], table, CRITERIA, PARAMS, 1))
    assert np.abs(loaded.forecasts(features.to_numpy()) - model.predict(features).to_numpy()).max() < TOLERANCE
    assert loaded.strongest(loaded.contributions(features.to_numpy()[0], 10), 3)


def test_a_site_with_few_columns_is_packed(tmp_path):
    data = labelled(drop=[c for c in simulate(1).telemetry.columns[3:] if c not in ("hub_free_slots", "hub_queue")])
    model = trained(data, **SMALL)
    confirmed = package_model(tmp_path / "confirmed", model, data, GATES, number=1)
    engines, _ = packing.build_engines(model, ("forest",))
    table = packing.candidate_table(packing.prove(engines, model, packing.validation_rows(data, model)[0]), pd.DataFrame({"p50_us": {"forest": 1.0}}))
    loaded = load_package(packing.write_package(tmp_path / "p", confirmed, data, engines["forest"], table, CRITERIA, PARAMS, 1))
    assert set(loaded.kernel.columns) == {"hub_jobs", "hub_free_slots", "hub_queue"}
    window = data.telemetry[list(loaded.kernel.columns)].to_numpy("float32").T[:, -30:]
    assert np.isfinite(loaded.forecast(loaded.features(window, int(minute_numbers(data.telemetry)[-1])))).all()


# --- what is refused -------------------------------------------------------------------------------------------------


def parts(folder):
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def test_any_changed_file_is_refused(folder, tmp_path):
    for name in parts(folder):
        copy = shutil.copytree(folder, tmp_path / "copy")
        with open(copy / name, "ab") as f:
            f.write(b" ")
        if name != "package.json":  # a blank at its end changes nothing it says
            with pytest.raises(ModelError, match=name.rpartition("/")[2]):
                load_package(copy)
        (copy / name).unlink()
        with pytest.raises(ModelError):
            load_package(copy)
        shutil.rmtree(copy)


def test_a_damaged_confirmed_model_is_not_packed(made, data, tmp_path):
    copy = shutil.copytree(made["confirmed"], tmp_path / "confirmed")
    (copy / "site.json").write_text("{}")
    with pytest.raises(ModelError, match="site.json"):
        packing.write_package(tmp_path / "p", copy, data, made["engines"]["forest"], made["table"], CRITERIA, PARAMS, 7)


def test_what_fails_while_writing_leaves_the_old_package(made, data, tmp_path, monkeypatch):
    folder = write(made, data, tmp_path / "p")
    before = sha256_tree(folder)
    monkeypatch.setattr(packing, "licences", lambda engine: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write(made, data, tmp_path / "p", interval_share=0.7)
    assert sha256_tree(folder) == before and [p.name for p in tmp_path.iterdir()] == ["p"]


def test_a_validation_block_without_a_whole_window_says_so(made, data):
    scattered = replace(data, telemetry=data.telemetry.iloc[::2].reset_index(drop=True))
    with pytest.raises(ModelError, match="no window without a gap"):
        packing.example_window(scattered, ["hub_jobs"], 30)


def test_loading_reads_no_training_library_and_is_quick(folder):
    code = f"""
import sys, time, numpy, pandas, numba, amhs.inference
began = time.perf_counter()
package = amhs.inference.load_package({str(folder)!r})
took = time.perf_counter() - began
heavy = {{'xgboost', 'shap', 'sklearn', 'onnx', 'onnxruntime', 'matplotlib', 'mlflow', 'bentoml'}} & set(sys.modules)
print(took, heavy or '')
"""
    for _ in range(2):  # the first may compile, the second finds it compiled
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    took, *heavy = done.stdout.split(maxsplit=1)
    assert not heavy and float(took) < 10, "a second on a quiet machine"


def test_stage_08_is_skipped_when_the_model_was_refused(tmp_path, monkeypatch):
    "Its real notebook, behind stages that confirmed nothing."
    own_settings(monkeypatch, tmp_path)
    make_project(tmp_path)
    shutil.copy(HOUSE / "nbs/stages/08_inference.ipynb", tmp_path / "nbs/stages")
    result = runs.run_pipeline(run_id="toy", last="inference", manner=QUIET)
    found = result.manifests[-1]
    assert (found["stage"], found["status"], result.exit_code) == ("inference", "skipped", 0)
    assert "refused" in found["reason"] and not found["outputs"] and "evaluation.json" in found["inputs"]["evaluate"]["artefacts"]
