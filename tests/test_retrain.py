"""Retraining: decided on evidence and never on garbage, the cause named, the plan obeyed, a worse model refused, the old champion kept."""

import json
from datetime import UTC, datetime, timedelta

import numpy as np
import pandas as pd
import pytest

from amhs import retrain, runs
from amhs.config import load_params
from amhs.core import InputError, ParameterError, read_json
from amhs.deployment import deploy, deployment_records, read_deployment, rollback
from amhs.develop import fitted, four_comparisons, package_model
from amhs.inference import load_package
from amhs.model import make_model
from amhs.rehearsal import Rehearsal, hub_of
from amhs.retrain import FINDING_COLUMNS, Facts, Plan, decide, design, find_cause, promotion
from amhs.simulate import simulate
from amhs.store import observation_rows, open_store

NOW = datetime(2026, 3, 10, 1, tzinfo=UTC)
DAY = pd.Timedelta(days=1)
NOTHING = pd.DataFrame(columns=list(FINDING_COLUMNS))
POLICY = retrain.load_policy()


def found(kind, days, severity="warning", last=NOW):
    "Findings of one kind, one on each of these days before the newest (0: the newest)."
    when = [pd.Timestamp(last).floor("D") - (1 + d) * DAY for d in sorted(days, reverse=True)]
    rows = [{"day": d, "line": "HUB1", "kind": kind, "name": "x", "severity": severity, "value": 2.0, "low": 0.0, "high": 1.0, "since": d, "what": "off"}
            for d in when]
    return pd.DataFrame(rows, columns=list(FINDING_COLUMNS))


def all_of(*tables):
    return pd.concat([t for t in tables if len(t)], ignore_index=True)


# ---- the decision

def test_one_bad_day_is_not_enough_and_two_are():
    assert not decide(found("performance", [0]), Facts(NOW), POLICY).retrain
    assert decide(found("performance", [1, 0]), Facts(NOW), POLICY).reasons == ("performance",)
    assert decide(found("performance", [0], "critical"), Facts(NOW), POLICY).retrain


def test_a_good_day_between_breaks_the_row():
    days = [pd.Timestamp(NOW).floor("D") - n * DAY for n in (3, 2, 1)]
    assert not decide(found("data_drift", [2, 0]), Facts(NOW), POLICY, days).retrain


def test_the_calendar_asks_once_although_the_new_model_was_refused():
    old = Facts(NOW, last_trained=NOW - timedelta(days=40))
    assert decide(NOTHING, old, POLICY).reasons == ("schedule",)
    assert not decide(NOTHING, Facts(NOW, old.last_trained, retrainings=(NOW - timedelta(days=10),)), POLICY).retrain


@pytest.mark.parametrize("kind", ["stuck", "missing", "telemetry_gap"])
def test_garbage_never_triggers(kind):
    "Every day broken, every day drifting and worse: that is for those who repair sensors."
    verdict = decide(all_of(found(kind, range(5)), found("data_drift", range(5)), found("performance", range(5), "critical")), Facts(NOW), POLICY)
    assert (verdict.retrain, verdict.cause) == (False, "data_quality")
    assert "repair" in verdict.sentence


def test_a_broken_day_neither_confirms_nor_acquits():
    drift = found("data_drift", [2, 0])
    assert decide(all_of(drift, found("stuck", [1])), Facts(NOW), POLICY).retrain


def test_capacity_triggers_at_once_unless_switched_off():
    table = found("capacity", [0])
    assert decide(table, Facts(NOW), POLICY).cause == "capacity_change"
    assert not decide(table, Facts(NOW), POLICY.model_copy(update={"on_capacity_change": False})).retrain


@pytest.mark.parametrize(("facts", "reason"), [
    (Facts(NOW, last_trained=NOW - timedelta(days=31)), "schedule"),
    (Facts(NOW, manual="new rails"), "manual"),
    (Facts(NOW, changed=NOW - timedelta(days=4.5), retrainings=(NOW - timedelta(days=2.5),)), "follow_up"),
])
def test_other_reasons(facts, reason):
    assert decide(NOTHING, facts, POLICY).reasons == (reason,)


def test_volume_and_what_was_followed_up_already():
    assert decide(NOTHING, Facts(NOW, new_rows=5000), POLICY.model_copy(update={"new_rows": 4000})).reasons == ("volume",)
    done = Facts(NOW, changed=NOW - timedelta(days=5), retrainings=(NOW - timedelta(hours=23.9),))
    assert not decide(NOTHING, done, POLICY.model_copy(update={"cooldown_days": 0})).retrain


@pytest.mark.parametrize(("facts", "change", "said"), [
    (Facts(NOW, retrainings=(NOW - timedelta(hours=5),), new_rows=5000), {"new_rows": 4000}, "less than"),
    (Facts(NOW, retrainings=tuple(NOW - timedelta(days=d) for d in range(2, 8)), new_rows=5000), {"new_rows": 4000}, "budget"),
    (Facts(NOW, last_trained=NOW - timedelta(days=60)), {"quiet_hours": ("22:00-06:00",)}, "quiet"),
])
def test_what_holds_a_retraining_back_but_never_a_person(facts, change, said):
    policy = POLICY.model_copy(update=change)
    held = decide(NOTHING, facts, policy)
    assert not held.retrain and said in " ".join(held.held) and "Keep for now" in held.sentence
    asked = Facts(**{**facts.__dict__, "manual": "now"})
    assert decide(NOTHING, asked, policy).retrain


def test_what_came_before_a_retraining_is_forgotten():
    facts = Facts(NOW, retrainings=(NOW - timedelta(days=2),))
    assert not decide(found("performance", [5, 4, 3]), facts, POLICY).retrain


def test_a_mistyped_policy_is_refused(tmp_path):
    (tmp_path / "p.yaml").write_text((retrain.settings().params / "trigger.yaml").read_text().replace("quiet_hours: []", "quiet_hours: ['22-6']"))
    with pytest.raises(ParameterError, match="22:00-06:00"):
        retrain.load_policy(tmp_path / "p.yaml")


def test_decisions_are_kept_once_whatever_they_were(tmp_path):
    keep, again = decide(NOTHING, Facts(NOW), POLICY), decide(found("performance", [1, 0]), Facts(NOW), POLICY)
    with open_store(f"sqlite:///{tmp_path}/s.sqlite") as store:
        for _ in range(2):
            retrain.record_verdict(store, keep, "HUB1", NOW)
            retrain.record_verdict(store, again, "HUB2", NOW)
        rows = store.read("decisions", kind="retraining").sort_values("subject")
    assert len(rows) == 2 and [json.loads(d)["retrain"] for d in rows["detail"]] == [False, True]


# ---- the cause

@pytest.fixture(scope="module")
def histories():
    "Sixteen days of each scenario; what changes at once changes on day 10."
    def until(scenario, seed, days):
        return simulate(20, seed, scenario).telemetry.iloc[: days * 1440]

    plain = simulate(20, 5).telemetry
    spoilt = simulate(20, 5, "sensor-faults").telemetry
    cut = plain["timestamp"].iloc[10 * 1440]
    mixed = pd.concat([plain[plain["timestamp"] < cut], spoilt[spoilt["timestamp"] >= cut]], ignore_index=True)
    return {"none": plain.iloc[: 13 * 1440], "concept_change": until("new-route", 5, 12), "capacity_change": until("capacity-upgrade", 5, 11),
            "covariate_shift": until("season", 5, 18), "data_quality": mixed[mixed["timestamp"] < cut + 2 * DAY]}


@pytest.mark.parametrize("cause", ["none", "concept_change", "capacity_change", "covariate_shift", "data_quality"])
def test_the_cause_is_named(histories, cause):
    telemetry = histories[cause]
    since = telemetry["timestamp"].iloc[0] + (15 if cause == "covariate_shift" else 10) * DAY
    named = find_cause(NOTHING, telemetry, since, old_days=10)
    assert named.name == cause, named.evidence
    assert (named.since is None) == (cause == "none")


def test_far_from_what_it_learnt_from_a_regression_proves_nothing():
    "The end of a season: queue and flows no longer follow from a state that never was, and nothing but the state has changed."
    telemetry = pd.concat(hub_of(Rehearsal("season", days=20, seed=15), "HUB1"), ignore_index=True)
    named = find_cause(NOTHING, telemetry, telemetry["timestamp"].iloc[-1] - 3 * DAY)
    tests = named.evidence.set_index("test")
    assert named.name == "covariate_shift" and tests.loc["other_states", "value"] > 5 and tests.loc["concept_change", "value"] > 2.6


def test_the_columns_that_carry_it_are_named(histories):
    since = histories["concept_change"]["timestamp"].iloc[10 * 1440]
    route, lifts = (find_cause(NOTHING, histories[c], since) for c in ("concept_change", "capacity_change"))
    assert {"hub_to_neighbor_jobs", "neighbor_to_hub_jobs"} & set(route.columns)
    assert set(lifts.columns) >= {"upper_lifter_capacity", "lower_lifter_capacity"}


def test_when_it_began_comes_from_the_findings(histories):
    telemetry = histories["concept_change"]
    began = telemetry["timestamp"].iloc[10 * 1440]
    table = found("performance", [1, 0], last=telemetry["timestamp"].iloc[-1] + pd.Timedelta(minutes=1)).assign(since=began)
    named = find_cause(table, telemetry)
    assert (named.name, named.since) == ("concept_change", began)


def test_too_little_to_say_anything_is_said(histories):
    with pytest.raises(InputError, match="too little"):
        find_cause(NOTHING, histories["none"].head(500))


# ---- the plan and what is learnt from

def test_plans_by_cause(histories):
    telemetry, since = histories["concept_change"], histories["concept_change"]["timestamp"].iloc[10 * 1440]
    concept = design(find_cause(NOTHING, telemetry, since), telemetry)
    assert concept.retrain and concept.weight_new > 1 and concept.keep_old and not concept.old_counts
    broken = design(find_cause(NOTHING, histories["data_quality"], since), histories["data_quality"])
    assert not broken.retrain
    due = design(find_cause(NOTHING, histories["none"], since), histories["none"], forced=True)
    assert due.retrain and due.weight_new == 1 and due.old_counts


def test_blocks_of_a_plan_are_apart_and_tests_unseen(histories):
    telemetry, since = histories["concept_change"], histories["concept_change"]["timestamp"].iloc[10 * 1440]
    plan = design(find_cause(NOTHING, telemetry, since), telemetry)
    broken = (since + pd.Timedelta(hours=1), since + pd.Timedelta(hours=3))
    data = retrain.compose(telemetry, plan.model_copy(update={"exclude": (broken,)}))
    spans = [(a, b) for a, b, _ in data.learn] + [data.old_test, tuple(data.times["valid"]), tuple(data.times["test"])]
    spans = sorted((pd.Timestamp(a), pd.Timestamp(b)) for a, b in spans)
    assert all(b[0] - a[1] >= pd.Timedelta(minutes=55) for a, b in zip(spans, spans[1:], strict=False))
    assert not data.telemetry["timestamp"].between(*broken, inclusive="left").any()


@pytest.fixture(scope="module")
def round_trip(histories, tmp_path_factory):
    "A package from before the route changed, and its successor."
    home, telemetry = tmp_path_factory.mktemp("retrain"), histories["concept_change"]
    since = telemetry["timestamp"].iloc[10 * 1440]
    before = telemetry[telemetry["timestamp"] < since - 3 * DAY].reset_index(drop=True)
    start = Plan(cause="none", retrain=True, since=before["timestamp"].iloc[0], until=since - 3 * DAY, changed=since - 5 * DAY)
    data = retrain.compose(before, start)
    model = fitted(data, make_model("hub", feature_set="v8", trees=25, depth=4, learning_rate=0.3, early_stopping=6))
    quick = load_params("inference", "smoke").model_copy(update={"engines": ("forest",), "timing_repeats": 20, "proof_rows": 200, "hole_rows": 50})
    gates = retrain._as_gates(four_comparisons(model, model, data, n_draws=5))
    confirmed = package_model(home / "confirmed", model, data, gates, 1)
    live = load_package(retrain.pack(home / "live", confirmed, model, data, load_params("business").criteria, quick, 1))
    plan = design(find_cause(NOTHING, telemetry, since), telemetry)
    done = retrain.retrain_in_process(telemetry, plan, live, home / "next", 2, params=quick, n_draws=50)
    return home, telemetry, plan, live, done


def test_a_successor_is_packed_and_compared_four_times(round_trip):
    _, _, plan, live, done = round_trip
    new = load_package(done.folder)
    assert new.number == 2 and new.version != live.version and new.forecaster.hyper.depth == live.forecaster.hyper.depth
    assert set(done.comparisons["data"]) == {"old", "new"}
    mae = done.comparisons.query("metric == 'mae' and data == 'new' and target == 'max' and horizon_min == 10").iloc[0]
    assert np.isclose(mae["new"] - mae["current"], mae["difference"], atol=1e-6) and mae["low"] <= mae["difference"] <= mae["high"]


def test_a_worse_model_is_refused_and_nothing_moves(round_trip, tmp_path, monkeypatch):
    home, _, plan, live, done = round_trip
    monkeypatch.setenv("AMHS_DEPLOYED", str(tmp_path / "deployed"))
    deploy(live.folder, ["HUB1"])
    worse = done.comparisons.assign(current=done.comparisons["new"], new=done.comparisons["current"] + 1, difference=1.0, low=0.5, high=1.5)
    verdict = promotion(worse, POLICY, plan.old_counts)
    assert verdict.verdict == "refuse" and "worse" in verdict.sentence
    with open_store(f"sqlite:///{tmp_path}/s.sqlite") as store:
        record = retrain.take_over(store, verdict, worse, plan, live.folder, done.folder, load_params("promotion"), "run")
        kept = store.read("decisions", kind="promotion")
    assert read_deployment().lines["HUB1"].live == live.version and record["verdict"] == "refuse" and len(kept) == 1


@pytest.mark.parametrize(("how", "verdict", "answers"), [("automatic", "promote", 2), ("approval", "wait", 1)])
def test_a_better_model_takes_over_or_waits_and_the_old_one_stays_at_hand(round_trip, tmp_path, monkeypatch, how, verdict, answers):
    home, _, plan, live, done = round_trip
    monkeypatch.setenv("AMHS_DEPLOYED", str(tmp_path / "deployed"))
    deploy(live.folder, ["HUB1"])
    mae = done.comparisons["metric"].eq("mae")
    better = done.comparisons.assign(difference=-1.0, low=np.where(mae, -1.5, -0.1), high=np.where(mae, -0.5, 0.1))
    found = promotion(better, POLICY.model_copy(update={"promotion": how}), plan.old_counts)
    assert found.verdict == verdict
    with open_store(f"sqlite:///{tmp_path}/s.sqlite") as store:
        retrain.take_over(store, found, better, plan, live.folder, done.folder, load_params("promotion"), "run")
    line, new = read_deployment().lines["HUB1"], load_package(done.folder).version
    assert line.live == {1: live.version, 2: new}[answers]
    if answers == 2:
        assert line.previous == live.version and rollback("HUB1").live == live.version


def test_a_promotion_carried_out_again_changes_nothing(round_trip, tmp_path, monkeypatch):
    "A stage that was killed after it deployed runs again as a whole."
    home, _, plan, live, done = round_trip
    monkeypatch.setenv("AMHS_DEPLOYED", str(tmp_path / "deployed"))
    deploy(live.folder, ["HUB1"])
    with open_store(f"sqlite:///{tmp_path}/s.sqlite") as store:
        for _ in range(2):
            retrain.take_over(store, retrain.Promotion("promote", "better"), done.comparisons, plan, live.folder, done.folder, load_params("promotion"), "run")
        assert len(store.read("decisions", kind="promotion")) == 1
    assert len(deployment_records()) == 2 and read_deployment().lines["HUB1"].previous == live.version


def test_cannot_be_told_is_not_a_win(round_trip):
    _, _, _, live, done = round_trip
    assert promotion(done.comparisons.assign(difference=-0.1, low=-0.5, high=0.3), POLICY).verdict == "refuse"


def test_the_labelled_set_of_a_plan_survives_the_disk(round_trip, tmp_path):
    from amhs.develop import load_labelled, save_labelled

    _, telemetry, plan, live, _ = round_trip
    data = retrain.compose(telemetry, plan, live.site)
    again = load_labelled(save_labelled(tmp_path / "labelled", data))
    assert (again.learn, again.old_test, again.times) == (data.learn, data.old_test, data.times)


# ---- the pipeline

@pytest.mark.full
def test_the_pipeline_retrains_from_the_store_and_puts_the_better_model_in_charge(tmp_path, monkeypatch):
    "Thirteen days as before, three with a new route; monitoring complained; the model in use knows the first week."
    for name in ("runs", "data", "deployed"):
        monkeypatch.setenv(f"AMHS_{name.upper()}", str(tmp_path / name))
    monkeypatch.setenv("AMHS_STORE", f"sqlite:///{tmp_path}/store.sqlite")
    telemetry = simulate(24, 1, "new-route").telemetry
    start, quiet = telemetry["timestamp"].iloc[0], runs.Manner(show=runs.Reporter(lambda line: None))
    learnt = Plan(cause="none", retrain=True, since=start, until=start + 7 * DAY, changed=start + 3 * DAY)
    data = retrain.compose(telemetry.iloc[: 7 * 1440], learnt)
    model = fitted(data, make_model("hub", feature_set="v8", trees=30, depth=4, learning_rate=0.3, early_stopping=8))
    quick = load_params("inference", "smoke").model_copy(update={"engines": ("forest",), "timing_repeats": 20})
    confirmed = package_model(tmp_path / "confirmed", model, data, retrain._as_gates(four_comparisons(model, model, data, n_draws=5)), 1)
    deploy(retrain.pack(tmp_path / "live", confirmed, model, data, load_params("business").criteria, quick, 1), ["HUB1"])
    until = start + 15 * DAY
    with open_store() as store:
        store.write("observations", observation_rows(telemetry[telemetry["timestamp"] < until], until.to_pydatetime()))
        for day in (12, 13, 14):
            first = start + day * DAY
            told = {"kind": "performance", "name": "mae_max_10", "severity": "warning", "value": 9.0, "since": (start + 12 * DAY).isoformat(), "what": "worse"}
            detail = json.dumps({"window": [first.isoformat(), (first + DAY).isoformat()], "findings": [told]})
            store.write("decisions", [{"id": f"m{day}", "at": (first + DAY).to_pydatetime(), "kind": "monitoring", "subject": "HUB1", "detail": detail}])
    triggered = runs.run_pipeline("operate", "smoke", first="trigger", last="trigger", manner=quiet)
    assert triggered.exit_code == 0, runs.failure_report(triggered)
    assert runs.run_pipeline("develop", "smoke", last="business", manner=quiet).exit_code == 0
    again = runs.run_pipeline("retrain", "smoke", run_id="again", manner=quiet)
    assert again.exit_code == 0, again.verdict
    decided = read_json(again.folder / "14_redesign/artefacts/plan.json"), read_json(again.folder / "15_promotion/artefacts/promotion.json")
    assert decided[0]["cause"] == "concept_change" and decided[1]["verdict"] == "promote"
    line = read_deployment().lines["HUB1"]
    assert (line.live, line.previous) == (decided[1]["new"], decided[1]["current"])
    with open_store() as store:
        assert {"monitoring", "retraining", "plan", "promotion"} <= set(store.read("decisions")["kind"])
    assert not runs.run_pipeline("retrain", "smoke", last="evaluate", manner=quiet).executed, "nothing new was observed: nothing runs again"
