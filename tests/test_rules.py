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
from amhs.rules import apply_rules, load_rules, rules_off

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
    assert list(found) == ["severe_bottleneck", "bottleneck", "level", "severity", "fired", "blind"]
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
