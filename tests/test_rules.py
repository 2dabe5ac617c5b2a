"""Rules: what a file may say, what fires, what is off, what is blind."""

import operator
from collections.abc import Callable

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from amhs.config import Thresholds, load_site
from amhs.core import ParameterError
from amhs.rules import HYBRIDS, apply_rules, compile_rules, decide, hybrid_score, load_rules, rules_off

PLAIN: dict[str, Callable] = {
    "severe_bottleneck": lambda row: row["hub_free_slots"] < 550,
    "bottleneck": lambda row: row["hub_free_slots"] < 590,
    "transport_delay": lambda row: row["fab_over_4min"] > 40,
    "combined": lambda row: row["hub_free_slots"] < 610 and row["fab_over_4min"] > 35,
    "level": lambda row: row["hub_jobs"] >= 280,
}
SEVERITY = {"severe_bottleneck": 3, "bottleneck": 2, "transport_delay": 2, "combined": 2, "level": 2}


def telemetry(**columns):
    n = len(next(iter(columns.values())))
    time = pd.date_range("2026-01-01", periods=n, freq="min", tz="UTC")
    return pd.DataFrame({"line": "A", "timestamp": time, **{k: np.asarray(v, "float32") for k, v in columns.items()}})


def write(tmp_path, text):
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    return path


near = st.sampled_from([549.0, 550.0, 551.0, 589.0, 590.0, 609.0, 610.0, 700.0, float("nan")])
slow = st.sampled_from([0.0, 35.0, 36.0, 40.0, 41.0, float("nan")])
jobs = st.sampled_from([100.0, 279.0, 280.0, 281.0, float("nan")])


@given(st.lists(st.tuples(near, slow, jobs), min_size=1, max_size=20))
def test_default_rules_are_those_of_the_domain(rows):
    frame = telemetry(hub_free_slots=[r[0] for r in rows], fab_over_4min=[r[1] for r in rows], hub_jobs=[r[2] for r in rows])
    found = apply_rules(frame, load_rules())
    for i, row in enumerate(frame.to_dict("records")):
        expected = [name for name, rule in PLAIN.items() if rule(row)]
        assert [name for name in PLAIN if found[name].iloc[i]] == expected
        assert found["fired"].iloc[i] == ", ".join(expected)
        assert found["severity"].iloc[i] == max((SEVERITY[name] for name in expected), default=0)
        assert found["blind"].iloc[i] == any(np.isnan(row[c]) for c in ("hub_free_slots", "fab_over_4min", "hub_jobs"))


def test_rows_keep_their_line_and_minute():
    frame = pd.concat([telemetry(hub_jobs=[300]), telemetry(hub_jobs=[100]).assign(line="B")], ignore_index=True)
    level = apply_rules(frame, load_rules())["level"]
    assert level.to_dict() == {("A", frame["timestamp"][0]): True, ("B", frame["timestamp"][0]): False}


def test_missing_columns_switch_rules_off_and_it_is_said(caplog):
    frame = telemetry(hub_jobs=[300], hub_free_slots=[500])
    found = apply_rules(frame, load_rules())
    assert list(found) == ["severe_bottleneck", "bottleneck", "level", "severity", "calm", "fired", "blind"]
    assert "transport_delay needs fab_over_4min" in caplog.text
    assert rules_off(frame, load_rules()) == {"transport_delay": ["fab_over_4min"], "combined": ["fab_over_4min"]}


def test_no_rule_left_is_an_answer_too():
    found = apply_rules(telemetry(hub_queue=[1, 2]), load_rules())
    assert list(found["severity"]) == [0, 0] and list(found["fired"]) == ["", ""]


def test_a_site_moves_the_limits_it_names(tmp_path):
    site = load_site().model_copy(update={"thresholds": Thresholds(surge_level=100, free_critical=300)})
    frame = telemetry(hub_jobs=[150], hub_free_slots=[560], fab_over_4min=[0])
    assert apply_rules(frame, load_rules())["fired"].iloc[0] == "bottleneck"
    assert apply_rules(frame, load_rules(site=site))["fired"].iloc[0] == "level"


OPERATOR_NAMES = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


@pytest.mark.parametrize("sign", OPERATOR_NAMES)
def test_operators_at_the_limit(tmp_path, sign):
    rules = load_rules(write(tmp_path, f"rules: {{r: {{when: 'hub_jobs {sign} 5'}}}}"))
    values = [4.0, 5.0, 6.0]
    assert list(apply_rules(telemetry(hub_jobs=values), rules)["r"]) == [OPERATOR_NAMES[sign](v, 5) for v in values]


@pytest.mark.parametrize(("text", "said"), [
    ("rules: {r: {when: [hub_job > 5]}}", "did you mean hub_jobs"),
    ("rules: {r: {when: [hub_jobs <> 5]}}", "no such operator.*use one of <, <=, >, >="),
    ("rules: {r: {when: [hub_jobs > surge_levle]}}", "surge_level"),
    ("rules: {r: {when: [hub_jobs]}}", "column operator limit"),
    ("rules: {r: {when: []}}", "rule `r` has no conditions"),
    ("rules: {r: }", "rule `r` has no conditions"),
    ("rules: {r: {wenn: [hub_jobs > 5]}}", "unknown name.*wenn"),
    ("rules: {r: {severity: high, when: [hub_jobs > 5]}}", "severity is 1, 2 or 3.*high"),
    ("rule: {r: {when: [hub_jobs > 5]}}", "unknown name.*rule"),
    ("name: empty", "has no rules"),
])
def test_a_wrong_file_is_refused_before_use(tmp_path, text, said):
    with pytest.raises(ParameterError, match=said):
        load_rules(write(tmp_path, text))


CALM = """
rules:
  full: {severity: 3, when: [hub_free_slots < 550]}
  slow: {severity: 1, when: [fab_over_4min > 35]}
  level: {when: [hub_jobs >= 280]}
  empty: {says: calm, when: [hub_jobs < 200]}
"""


@pytest.fixture(scope="module")
def calm_rules(tmp_path_factory):
    return load_rules(write(tmp_path_factory.mktemp("rules"), CALM))


@given(st.lists(st.tuples(near, slow, jobs, st.sampled_from([250.0, 290.0, 310.0, float("-inf"), float("nan")])), min_size=1, max_size=12),
       st.sampled_from(sorted(HYBRIDS)))
def test_one_minute_at_a_time_decides_like_the_table(calm_rules, rows, hybrid):
    frame = telemetry(hub_free_slots=[r[0] for r in rows], fab_over_4min=[r[1] for r in rows], hub_jobs=[r[2] for r in rows])
    found = apply_rules(frame, calm_rules)
    table = hybrid_score(pd.Series([r[3] for r in rows], found.index), found, hybrid)
    judge = compile_rules(calm_rules, ["hub_jobs", "fab_over_4min", "hub_free_slots"])
    for i, (free, over, level, score) in enumerate(rows):
        verdict = judge(np.array([level, over, free], "float32"))
        assert verdict.severity == found["severity"].iloc[i] and verdict.calm == found["calm"].iloc[i]
        assert ", ".join(verdict.fired) == found["fired"].iloc[i] and verdict.blind == found["blind"].iloc[i]
        decision = decide(None if np.isnan(score) else score, 290.0, verdict, hybrid)
        assert decision.score == table["score"].iloc[i] and decision.by == table["by"].iloc[i]
        assert decision.alarm == (table["score"].iloc[i] >= 290)


@pytest.mark.parametrize(("hybrid", "alarms"), [
    # free and calm, nothing fires, warned, critical; the model fears every minute but the last
    ("model", [True, True, True, False]), ("rules", [False, False, True, True]), ("shadow", [False, False, True, True]),
    ("rules_first", [False, True, True, True]), ("corrected", [False, True, True, True])])
def test_who_decides(calm_rules, hybrid, alarms):
    frame = telemetry(hub_jobs=[100, 250, 290, 290], hub_free_slots=[700, 700, 700, 500], fab_over_4min=[0, 0, 0, 0])
    found = apply_rules(frame, calm_rules)
    score = pd.Series([300.0, 300.0, 300.0, 100.0], found.index)
    assert list(hybrid_score(score, found, hybrid)["score"] >= 290) == alarms


def test_a_model_overrules_a_warning_only_where_it_is_corrected(calm_rules):
    found = apply_rules(telemetry(hub_jobs=[290], hub_free_slots=[700], fab_over_4min=[0]), calm_rules)
    sees_none = pd.Series([100.0], found.index)
    assert not (hybrid_score(sees_none, found, "corrected")["score"] >= 290).any()
    assert (hybrid_score(sees_none, found, "rules_first")["score"] >= 290).all()


def test_a_changed_limit_is_another_version(tmp_path, calm_rules):
    other = load_rules(write(tmp_path, CALM.replace("550", "551")))
    same = load_rules(write(tmp_path, "# a comment\n" + CALM))
    assert other.version != calm_rules.version == same.version


@pytest.mark.parametrize(("text", "said"), [
    ("rules: {a: {says: clam, when: [hub_jobs < 9]}}", "alarm or calm"),
    ("rules: {a: {says: calm, severity: 2, when: [hub_jobs < 9]}}", "no severity")])
def test_calm_rules_are_checked(tmp_path, text, said):
    with pytest.raises(ParameterError, match=said):
        load_rules(write(tmp_path, text))
