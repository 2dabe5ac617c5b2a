"""Rules learnt: what was planted is found, what is written is valid, what is approved is in use whole and on record."""

import re
import threading
from datetime import datetime

import numpy as np
import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from amhs import distil
from amhs.config import load_site
from amhs.core import InputError, ParameterError, sha256_file
from amhs.rules import OPERATORS, WARNING, Condition, Rule, RuleSet, apply_rules, load_rules
from amhs.telemetry import COLUMNS

SITE = load_site("simulated")
LEVEL = RuleSet("operators", (Rule("level", WARNING, (Condition("hub_jobs", ">=", 280.0),)),))


def hub(days, seed, noise=1.0):
    "Every third hour the queue surges; a slow lifter, or many commands at a full room, comes 18 minutes earlier."
    rng, n = np.random.default_rng(seed), days * 1440
    columns = {"hub_jobs": (200, 10), "hub_free_slots": (650, 15), "hub_commands": (160, 12), "lower_lifter_capacity": (9.8, 0.2), "hub_oht_util": (70, 8)}
    made = {name: rng.normal(mean, spread * noise, n) for name, (mean, spread) in columns.items()}
    for i, start in enumerate(range(300, n - 200, 180)):
        before = slice(start - 18, start + 20)
        if i % 2:
            made["lower_lifter_capacity"][before] -= 5
        else:
            made["hub_commands"][before] += 110
            made["hub_free_slots"][before] -= 90
        made["hub_jobs"][start : start + 30] += 120
    time = pd.date_range("2026-01-01", periods=n, freq="min", tz="UTC").as_unit("us")
    return pd.DataFrame({"line": "HUB1", "timestamp": time} | {k: v.astype("float32") for k, v in made.items()})


def teacher(telemetry):
    "What a good model would say of these minutes, outside events."
    on = (telemetry["lower_lifter_capacity"] < 7) | (telemetry["hub_commands"] > 220)
    return pd.Series(on.to_numpy(), pd.MultiIndex.from_frame(telemetry[["line", "timestamp"]]))[(telemetry["hub_jobs"] <= 280).to_numpy()]


def learn(train, valid, in_use=LEVEL, budget=1, **more):
    return distil.learn_rules(train, valid, teacher(train), SITE, in_use, budget, 8, **more)


@pytest.fixture(scope="module")
def learnt():
    return learn(hub(8, 0), hub(4, 1))


def test_planted_rules_are_found(learnt):
    "On days nobody has seen the rules announce nearly all, early, within the budget, and read no column that means nothing."
    leads, false = outcome(learnt.proposed, hub(6, 7))
    assert np.isfinite(leads).mean() > 0.95 and np.nanmedian(leads) >= 15 and false <= 1
    assert 1 <= len(learnt.learnt.rules) <= 5
    assert "lower_lifter_capacity" in learnt.learnt.columns and "hub_oht_util" not in learnt.learnt.columns


def outcome(rules, telemetry):
    "Lead of each event in minutes, NaN if missed; false episodes a day."
    return distil.make_ground([telemetry], SITE, 1, 8).judges[0]((apply_rules(telemetry, rules)["severity"] >= WARNING).to_numpy())


@pytest.mark.parametrize("noise", [0.9, 1.1])
def test_other_days_and_a_little_noise_give_rules_of_the_same_kind_and_worth(learnt, noise):
    other = learn(hub(8, 3, noise), hub(4, 4, noise), seed=1)
    leads, false = outcome(other.proposed, hub(6, 7))
    assert np.isfinite(leads).mean() > 0.95 and np.nanmedian(leads) >= 15 and false <= 1
    danger = {"hub_jobs": ">=", "hub_commands": ">=", "hub_free_slots": "<=", "lower_lifter_capacity": "<="}
    assert all(danger[c.column] == c.operator for p in (learnt, other) for r in p.learnt.rules for c in r.when)


def test_a_model_that_says_nothing_teaches_nothing():
    train = hub(4, 0)
    found = distil.learn_rules(train, hub(3, 1), teacher(train) & False, SITE, LEVEL, 1, 8)
    assert not found.changes and found.proposed == LEVEL and found.sets == {}


def test_no_room_for_learnt_rules_none_are_learnt():
    assert not learn(hub(4, 0), hub(3, 1), at_most=0).changes
    assert len(learn(hub(4, 0), hub(3, 1), at_most=1).learnt.rules) == 1


def test_what_stands_stays_and_what_the_budget_has_no_room_for_becomes_a_notice():
    nervous = Rule("nervous", WARNING, (Condition("hub_oht_util", ">=", 92.0),))
    severe, calm = Rule("severe", 3, (Condition("hub_free_slots", "<", 500.0),)), Rule("calm", 0, (Condition("hub_jobs", "<", 120.0),))
    off = Rule("off", WARNING, (Condition("fab_over_4min", ">", 40.0),))
    in_use = RuleSet("operators", (severe, nervous, calm, off))
    found = {r.name: r for r in learn(hub(8, 0), hub(4, 1), in_use).proposed.rules}
    assert (found["severe"], found["calm"], found["off"]) == (severe, calm, off), "a rule that cannot run here is not judged"
    assert found["nervous"].severity == 1 and found["nervous"].when == nervous.when


def test_learnt_rules_of_before_have_to_hold_their_place(learnt):
    old = Rule("learnt_1", WARNING, (Condition("hub_oht_util", ">=", 92.0),))
    again = learn(hub(8, 0), hub(4, 1), RuleSet("operators", (*LEVEL.rules, old)))
    assert old not in again.proposed.rules and "learnt_1" not in {r.name for r in again.learnt.rules}
    assert not learn(hub(8, 0), hub(4, 1), learnt.proposed).changes, "what was approved is not proposed again"


OURS = """# ours
name: operators
rules:
  level: {severity: 2, when: [hub_jobs >= surge_level]}  # as ever
  full:
    when: hub_free_slots < 590
"""
columns = st.sampled_from(COLUMNS)
limits = st.floats(-1e4, 1e4, allow_nan=False, width=32)
whens = st.lists(st.tuples(columns, st.sampled_from(list(OPERATORS)), limits), min_size=1, max_size=3, unique_by=lambda c: c[0])


@given(st.lists(whens, min_size=1, max_size=5))
@examples(max_examples=15)
def test_every_proposal_is_a_rule_file(tmp_path_factory, found):
    "Whatever is learnt can be written, is read back as the same rules, and the diff says how to get there."
    folder = tmp_path_factory.mktemp("rules")
    in_use, path = folder / "rules.yaml", folder / "proposed.yaml"
    in_use.write_text(OURS)
    rules = [Rule(f"learnt_{i}", WARNING, tuple(Condition(c, o, distil.readable(x, c, SITE)) for c, o, x in when)) for i, when in enumerate(found, 1)]
    before = load_rules(in_use, SITE)
    proposed = RuleSet("operators", (before.rules[0], Rule("full", 1, before.rules[1].when), *rules))
    diff = distil.write_proposal(path, distil.Proposal(before, RuleSet("learnt", tuple(rules)), proposed), SITE, in_use)
    assert load_rules(path, SITE) == proposed
    assert path.read_text().startswith("# ours\n") and "# as ever" in path.read_text()
    assert patched(in_use.read_text().splitlines(), diff.splitlines()) == path.read_text().splitlines()


@pytest.mark.parametrize("text", [
    "{name: ours, rules: {level: {when: hub_jobs >= 280}}}\n",
    "rules:  # by line\n  level:\n    when: [hub_jobs >= 280]\nname: ours\n",
    "rules: {level: {severity: 2, when: hub_jobs >= 280}}\n",
])
def test_however_a_rule_file_is_laid_out(tmp_path, text, learnt):
    in_use, path = tmp_path / "ours.yaml", tmp_path / "proposed.yaml"
    in_use.write_text(text)
    before = load_rules(in_use, SITE)
    found = distil.Proposal(before, learnt.learnt, RuleSet(before.name, (*before.rules, *learnt.learnt.rules)))
    distil.write_proposal(path, found, SITE, in_use)
    assert load_rules(path, SITE) == found.proposed


def test_lines_stay_apart_and_what_is_missing_fires_nothing():
    train, valid = (pd.concat([hub(4, s), hub(4, s + 10).assign(line="HUB2", lower_lifter_capacity=np.float32("nan"))], ignore_index=True) for s in (0, 1))
    found = learn(train.sample(frac=1, random_state=0), valid)
    leads, false = outcome(found.proposed, hub(4, 7).assign(line="HUB3"))
    assert found.changes and np.isfinite(leads).mean() > 0.9 and false <= 1


def patched(lines, diff):
    "A unified diff of one hunk, applied by hand."
    start = int(re.match(r"@@ -(\d+)", diff[2])[1]) - 1
    old, new = ([d[1:] for d in diff[3:] if d[0] in signs] for signs in (" -", " +"))
    assert lines[start : start + len(old)] == old
    return lines[:start] + new + lines[start + len(old) :]


@given(columns, limits)
def test_limits_are_short_and_near(column, value):
    limit = distil.readable(value, column, SITE)
    assert abs(limit - value) <= 0.05 * abs(value) + 1e-12
    text = distil.condition_text(Condition(column, ">=", limit), SITE)
    assert load_text(text).limit == limit


def load_text(text):
    from amhs.rules import parse_condition

    return parse_condition(text, SITE.thresholds)


@pytest.fixture
def desk(tmp_path):
    "A rule file in use, a proposal against it, and how to put a file in use."
    in_use, new = tmp_path / "rules.yaml", tmp_path / "proposed.yaml"
    in_use.write_text("name: operators\nrules:\n  level: {when: hub_jobs >= 280}\n")
    new.write_text("name: operators\nrules:\n  level: {when: hub_jobs >= 270}\n")
    base = sha256_file(in_use)

    def adopt(path=new, who="kim", why="earlier", base=base):
        noon = datetime.fromisoformat("2026-03-01T12:00:00+00:00")
        return distil.adopt_rules(path, who, why, base, "a run", in_use, tmp_path / "kept", lambda: noon)

    return in_use, new, adopt, tmp_path / "kept"


def test_an_approval_is_on_record_and_can_be_taken_back(desk):
    in_use, new, adopt, kept = desk
    old = in_use.read_text()
    version = adopt().version
    assert in_use.read_text() == new.read_text() and load_rules(in_use).version == version
    row = distil.rules_history(kept).iloc[0]
    assert (row["who"], row["why"], row["after"], row["run"]) == ("kim", "earlier", version, "a run")
    adopt(distil.kept_rules(row["before"], kept), why="too many", base=None)
    assert in_use.read_text() == old and len(distil.rules_history(kept)) == 2


def test_a_stale_or_nameless_or_broken_approval_changes_nothing(desk):
    in_use, new, adopt, kept = desk
    in_use.write_text(in_use.read_text() + "  more: {when: hub_jobs >= 300}\n")
    before = in_use.read_text()
    with pytest.raises(InputError, match="have changed since"):
        adopt()
    for who, why in (("", "because"), ("kim", " ")):
        with pytest.raises(ParameterError, match="a person and a reason"):
            adopt(who=who, why=why, base=None)
    new.write_text("rules:\n  level: {when: hub_job >= 270}\n")
    with pytest.raises(ParameterError, match="did you mean hub_jobs"):
        adopt(base=None)
    assert in_use.read_text() == before and distil.rules_history(kept).empty


def test_of_two_approvals_of_one_base_one_wins(desk):
    "Readers meanwhile see the old file or the new one, never a part of either."
    in_use, new, adopt, kept = desk
    other = new.with_name("other.yaml")
    other.write_text(new.read_text().replace("270", "260"))
    whole, seen, said, done = {in_use.read_text(), new.read_text(), other.read_text()}, set(), [], threading.Event()

    def read():
        while not done.is_set():
            seen.add(in_use.read_text())

    def approve(path):
        try:
            said.append(adopt(path).version)
        except InputError as e:
            said.append(str(e))

    reader, *writers = [threading.Thread(target=read), *(threading.Thread(target=approve, args=(p,)) for p in (new, other))]
    reader.start()
    for w in writers:
        w.start()
    for w in writers:
        w.join()
    done.set()
    reader.join()
    assert seen <= whole and sum("have changed since" in s for s in said) == 1 and len(distil.rules_history(kept)) == 1
    assert yaml.safe_load(in_use.read_text())
