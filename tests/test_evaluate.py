"""Evaluation: every number against a slow plain reference or scikit-learn; alarms, blocks, leaks."""

import json
from functools import partial

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import lfilter
from sklearn import metrics

from amhs.config import CLASSES, Alarms, Thresholds, load_site
from amhs.core import InputError, ParameterError
from amhs.evaluate import (
    alarm_curve,
    alarm_outcome,
    alarm_score,
    alarm_tables,
    alarms_at_budgets,
    average_precision,
    choose_threshold,
    class_scores,
    confusion,
    evaluate,
    find_episodes,
    future_leaks,
    interval_scores,
    leak_check,
    level_scores,
    make_blocks,
    match_alarms,
    paired_difference,
    reliability,
    rule_score,
    same_rows,
    slice_scores,
    slice_table,
    split_leaks,
    suspicious_features,
    worst_slice,
)
from amhs.events import find_events
from amhs.features import build_features
from amhs.model import surge_class
from amhs.rules import load_rules
from amhs.simulate import simulate
from amhs.targets import build_targets, time_split

START = pd.Timestamp("2026-03-02 00:00", tz="UTC")
LEVEL = 280


def site_with(**alarms):
    return load_site().model_copy(update={"alarms": Alarms(**alarms), "thresholds": Thresholds(surge_level=LEVEL)})


def minutes(line, at, **columns):
    time = (START + pd.to_timedelta(np.asarray(at, dtype="int64"), unit="min")).as_unit("us")
    return pd.DataFrame({"line": line, "timestamp": time, **{k: np.asarray(v, "float32") for k, v in columns.items()}})


def index_of(frame):
    return pd.MultiIndex.from_frame(frame[["line", "timestamp"]])


def queue(days=4, seed=0, line="A"):
    rng, n = np.random.default_rng(seed), days * 1440
    level = np.full(n, 230.0)
    for start in rng.choice(n - 120, 4 * days):
        level[start : start + 120] += rng.uniform(40, 110) * np.sin(np.linspace(0, np.pi, 120))
    return minutes(line, np.arange(n), hub_jobs=(level + rng.normal(0, 4, n)).round())


def guess(targets, noise, seed=0):
    "A forecast that knows the future up to noise; noise None: persistence."
    rng, found = np.random.default_rng(seed), targets[["now"]].copy()
    for h in (10, 15, 25):
        for t in ("min", "avg", "max"):
            found[f"change_{t}_{h}"] = 0.0 if noise is None else targets[f"change_{t}_{h}"] + rng.normal(0, noise, len(found))
        prob = rng.dirichlet([1, 1, 1], len(found)) * (1 + 4 * (targets[f"surge_class_{h}"].to_numpy()[:, None] == np.arange(3)))
        found[[f"prob_{c}_{h}" for c in CLASSES]] = prob / prob.sum(1, keepdims=True)
    return found.astype("float32")


@pytest.fixture(scope="module")
def world():
    site = site_with(min_duration=3, merge_gap=10, max_lead=30)
    telemetry = pd.concat([queue(10), queue(10, seed=1, line="B")], ignore_index=True)
    targets = build_targets(telemetry, site=site)
    split = time_split(targets.index)
    return site, telemetry, targets.iloc[split.valid], targets.iloc[split.test]


# Alarms against a plain reference ------------------------------------------------------------------------------------


def plain_runs(on):
    "Maximal runs of consecutive minutes in a set of minutes."
    return [(m, next(e for e in range(m, m + 10_000) if e + 1 not in on)) for m in sorted(on) if m - 1 not in on]


def plain_join(runs, gap):
    joined = []
    for start, end in runs:
        if joined and start - joined[-1][1] - 1 < gap:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return joined


def plain_events(levels, duration, gap):
    "levels: minute -> jobs, missing minutes absent"
    runs = plain_runs({m for m, v in levels.items() if v > LEVEL})
    return plain_join([(a, b) for a, b in runs if b - a + 1 >= duration], gap)


def plain_episodes(score, threshold, gap, width=0.0):
    on, alarm, before = set(), False, None
    for m, v in sorted(score.items()):
        if before is not None and m - before > max(gap, 1):
            alarm = False
        alarm = v >= threshold or (alarm and v >= threshold - width)
        on |= {m} if alarm else set()
        before = m
    return plain_join(plain_runs(on), gap)


def plain_leads(events, episodes, max_lead):
    before = [[s - b for b, _ in episodes if 1 <= s - b <= max_lead] for s, _ in events]
    return [max(leads) if leads else None for leads in before]


def plain_false(events, episodes, max_lead):
    return [not any(b <= s <= b + max_lead or (s <= e and b <= t) for s, t in events) for b, e in episodes]


def as_minutes(spans, line):
    own = spans[spans["line"] == line]
    start, end = ((own[at] - START) // pd.Timedelta("1min") for at in ("start", "end"))
    return list(zip(start, end, strict=True))


# three kinds of values on a stretch of minutes, some of them missing
feed = st.lists(st.sampled_from([200.0, 280.0, 281.0, 320.0, None]), min_size=1, max_size=120)
times = st.tuples(st.integers(1, 5), st.integers(0, 6), st.integers(1, 20))


def feeds(values):
    return {m: v for m, v in enumerate(values) if v is not None}


@settings(max_examples=80, deadline=None)
@given(feed, feed, times, st.floats(250, 310), st.sampled_from([0.0, 5.0, 60.0]))
def test_events_episodes_and_verdicts_as_a_slow_reference_has_them(a, b, times, threshold, width):
    duration, gap, lead = times
    site, lines = site_with(min_duration=duration, merge_gap=gap, max_lead=lead), {"A": feeds(a), "B": feeds(b)}
    telemetry = pd.concat([minutes(k, list(v), hub_jobs=list(v.values())) for k, v in lines.items()], ignore_index=True)
    if telemetry.empty:
        return
    score = pd.Series(telemetry["hub_jobs"].to_numpy()[::-1], index_of(telemetry))  # any other series of the same minutes
    events, episodes = find_events(telemetry, site), find_episodes(score, threshold, site, width)
    judged, alarms = match_alarms(events, episodes, site)
    for line, levels in lines.items():
        scores = {(t - START) // pd.Timedelta("1min"): v for (k, t), v in score.items() if k == line}
        expected, alarmed = plain_events(levels, duration, gap), plain_episodes(scores, threshold, gap, width)
        assert as_minutes(events, line) == expected
        assert as_minutes(episodes, line) == alarmed
        found = judged[judged["line"] == line]["lead_min"]
        assert [None if np.isnan(v) else v for v in found] == plain_leads(expected, alarmed, lead)
        assert alarms[alarms["line"] == line]["false"].tolist() == plain_false(expected, alarmed, lead)


@settings(max_examples=40, deadline=None)
@given(feed, times)
def test_the_curve_as_a_slow_reference_has_it(values, times):
    duration, gap, lead = times
    site, levels = site_with(min_duration=duration, merge_gap=gap, max_lead=lead), feeds(values)
    if not levels:
        return
    telemetry = minutes("A", list(levels), hub_jobs=list(levels.values()))
    curve = alarm_curve(rule_score(telemetry), telemetry, site)
    assert sorted(curve["threshold"]) == sorted(set(levels.values()))
    events = plain_events(levels, duration, gap)
    could = [any(m in levels for m in range(s - lead, s)) for s, _ in events]
    for row in curve.itertuples():
        episodes = plain_episodes(levels, row.threshold, gap)
        leads = [v for v, ok in zip(plain_leads(events, episodes, lead), could, strict=True) if ok]
        caught = [v for v in leads if v is not None]
        assert (row.events, row.caught) == (len(leads), len(caught))
        assert row.false_per_day == pytest.approx(sum(plain_false(events, episodes, lead)) / (len(levels) / 1440))
        assert np.isnan(row.median_lead_min) if not caught else row.median_lead_min == np.median(caught)


def test_missing_minutes_and_breaks_neither_make_nor_merge_events():
    site = site_with(min_duration=3, merge_gap=10, max_lead=30)
    rows_apart = minutes("A", [0, 1, 500, 501], hub_jobs=[300] * 4)  # four rows in a row, but two blips hours apart
    assert find_events(rows_apart, site).empty
    two = minutes("A", [0, 1, 2, 500, 501, 502], hub_jobs=[300] * 6)
    assert find_events(two, site)["minutes"].tolist() == [3, 3]
    lines = pd.concat([minutes("A", [0, 1], hub_jobs=[300] * 2), minutes("B", [2, 3], hub_jobs=[300] * 2)], ignore_index=True)
    assert find_events(lines, site).empty
    nan = minutes("A", range(6), hub_jobs=[300, 300, np.nan, 300, 300, 300])
    assert find_events(nan, site)["minutes"].tolist() == [3]


def test_an_event_nobody_could_have_announced_is_not_counted():
    site = site_with(min_duration=3, merge_gap=10, max_lead=30)
    levels = np.full(300, 200.0)
    levels[:20] = levels[200:220] = 300  # one from the first minute on, one later
    telemetry = minutes("A", range(300), hub_jobs=levels)
    whole = alarm_outcome(rule_score(telemetry), telemetry, site, 250).iloc[-1]
    assert whole["events"] == 1
    after_outage = rule_score(telemetry).iloc[200:]
    assert alarm_outcome(after_outage, telemetry, site, 250).iloc[-1]["events"] == 0


def test_a_forecast_is_silent_above_the_level_and_announces_the_next_event_anew():
    site, levels = site_with(min_duration=3, merge_gap=10, max_lead=30), np.full(200, 200.0)
    levels[50:80] = levels[100:130] = 300  # the second event begins 20 minutes after the first ends
    telemetry = minutes("A", range(200), hub_jobs=levels)
    soon = pd.DataFrame({"now": levels, "change_max_10": 0.0, "change_max_25": 0.0}, index_of(telemetry))
    soon.loc[soon.index[40:130], "change_max_25"] = 120.0 - (soon["now"].iloc[40:130] - 200)  # expects 320 from minute 40 on
    assert alarm_score(soon, site)[levels > 280].eq(-np.inf).all()
    found = alarm_outcome(alarm_score(soon, site), telemetry, site, 300).iloc[-1]
    assert (found["events"], found["caught"], found["false"]) == (2, 2, 0)
    assert alarm_outcome((soon["now"] + soon["change_max_25"]).rename("score"), telemetry, site, 300).iloc[-1]["caught"] == 1


def test_lines_are_pooled_by_their_counts(world):
    site, telemetry, _, _ = world
    table = alarm_outcome(rule_score(telemetry), telemetry, site, 270).set_index("line")
    for column in ("events", "caught", "episodes", "false", "days"):
        assert table.loc["all", column] == pytest.approx(table.loc[["A", "B"], column].sum())
    assert table.loc["all", "false_per_day"] == pytest.approx(table.loc["all", "false"] / table.loc["all", "days"])


@settings(max_examples=60, deadline=None)
@given(feed, st.integers(0, 10_000))
def test_average_precision_as_scikit_learn_has_it(values, seed):
    site, levels = site_with(min_duration=2, merge_gap=3, max_lead=15), feeds(values)
    if not levels:
        return
    telemetry = minutes("A", list(levels), hub_jobs=list(levels.values()))
    score = pd.Series(np.random.default_rng(seed).integers(5, size=len(telemetry)), index_of(telemetry))
    events = plain_events(levels, 2, 3)
    outside = [m for m in levels if not any(s <= m <= e for s, e in events)]
    soon = [any(m < s <= m + 15 for s, _ in events) for m in outside]
    found = average_precision(score, telemetry, site)
    if not any(soon):
        assert np.isnan(found)
    else:
        own = dict(zip(levels, score, strict=True))
        assert found == pytest.approx(metrics.average_precision_score(soon, [own[m] for m in outside]))


def test_the_threshold_is_chosen_on_validation_alone(world):
    site, telemetry, valid, test = world
    chosen = [alarms_at_budgets(alarm_score(guess(test, noise), site), telemetry, site, alarm_score(guess(valid, 5), site)) for noise in (2, 60)]
    assert chosen[0]["threshold"].tolist() == chosen[1]["threshold"].tolist()
    assert set(chosen[0]["chosen_on"]) == {"validation"}
    assert set(alarms_at_budgets(alarm_score(guess(test, 2), site), telemetry, site)["chosen_on"]) == {"hindsight"}


def test_hindsight_chooses_on_the_minutes_it_judges(world):
    """Also where validation minutes have telemetry of their own: no threshold does better within the budget."""
    site, telemetry, valid, test = world
    both = [guess(part, 20) for part in (valid, test)]
    cut = test.index.get_level_values("timestamp").min()
    before, after = telemetry[telemetry["timestamp"] < cut], telemetry[telemetry["timestamp"] >= cut]
    scores = [{"model": alarm_score(f, site)} for f in both]
    alarms = alarm_tables(scores[1], after, site, scores[0], before)["alarms"].set_index("chosen_on")
    best, chosen = alarms.loc["hindsight"], alarms.loc["validation"]
    kept = chosen[chosen["false_per_day"].to_numpy() <= chosen["budget"].to_numpy()]
    assert (best["recall"] > 0).all() and (best["false_per_day"] <= best["budget"]).all() and (best["valid_recall"] == best["recall"]).all()
    assert (best.set_index("budget")["timely"].loc[kept["budget"]].to_numpy() >= kept["timely"].to_numpy()).all()


def test_the_chosen_threshold_keeps_the_budget_and_catches_most(world):
    site, telemetry, valid, _ = world
    curve = alarm_curve(alarm_score(guess(valid, 10), site), telemetry, site)
    for budget in (0.5, 1, 3):
        chosen, within = choose_threshold(curve, budget), curve[curve["false_per_day"] <= budget]
        assert chosen["false_per_day"] <= budget and chosen["timely"] == within["timely"].max()
    assert choose_threshold(curve[curve["false"] > 0], 0)["threshold"] == curve[curve["false"] > 0]["threshold"].max()


def test_a_hysteresis_is_taken_only_if_it_earns_more(world):
    """Of widths that earn the same the narrowest is chosen; what is judged is what was chosen."""
    site, telemetry, valid, test = world
    score, said = alarm_score(guess(valid, 10), site), alarm_score(guess(test, 10), site)
    plain, wide = (alarm_curve(score, telemetry, site, widths=widths) for widths in ((0.0,), (0.0, 5.0, 20.0)))
    assert len(wide) == 3 * len(plain) and set(wide["hysteresis"]) == {0.0, 5.0, 20.0}
    for budget in (0.5, 1, 3):
        chosen = choose_threshold(wide, budget)
        assert chosen["timely"] >= choose_threshold(plain, budget)["timely"]
        best = wide[(wide["false_per_day"] <= budget) & (wide["timely"] == chosen["timely"]) & (wide["recall"] == chosen["recall"])]
        assert chosen["hysteresis"] == best["hysteresis"].min()
        found = alarms_at_budgets(said, telemetry, site, score, budgets=[budget], widths=(0.0, 5.0, 20.0)).iloc[0]
        known = alarm_outcome(said, telemetry, site, chosen["threshold"], chosen["hysteresis"]).iloc[-1]
        assert found["caught"] == known["caught"] and found["false"] == known["false"] and found["timely"] == known["timely"]


def test_what_an_alarm_earns_is_the_wanted_lead_and_no_more():
    """Three events: announced 20 and 5 minutes before, and missed; ten minutes are wanted."""
    level = np.full(3000, 200.0)
    for at in (500, 1500, 2500):
        level[at : at + 20] = 300
    telemetry, score = minutes("A", range(3000), hub_jobs=level), np.zeros(3000)
    score[480:500], score[1495:1500] = 1, 1
    site = site_with()
    found = alarm_outcome(pd.Series(score, rule_score(telemetry).index), telemetry, site, 1).iloc[-1]
    assert (found["events"], found["caught"], found["median_lead_min"]) == (3, 2, 12.5)
    assert found["timely"] == pytest.approx((1 + 0.5 + 0) / 3)


def test_a_year_of_minutes_and_200_thresholds():
    n = 365 * 1440
    level = np.convolve(np.random.default_rng(0).normal(0, 1, n + 60), np.ones(60), "valid")[:n] * 6 + 240
    telemetry = minutes("A", range(n), hub_jobs=level)
    curve = alarm_curve(rule_score(telemetry), telemetry, site_with())
    assert len(curve) > 150 and curve["events"].iloc[0] > 100


# Numbers against numpy and scikit-learn ---------------------------------------------------------------------------------


def test_errors_as_scikit_learn_has_them(world):
    _, _, _, targets = world
    forecast = guess(targets, 7)
    found = level_scores(forecast, targets, n_draws=10).set_index(["horizon_min", "target", "metric"])["value"].sort_index()
    for h in (10, 15, 25):
        for t in ("min", "avg", "max"):
            y, p = (f[f"change_{t}_{h}"].to_numpy("float64") for f in (targets, forecast))
            now = targets["now"].to_numpy("float64")
            expected = {"mae": metrics.mean_absolute_error(y, p), "rmse": metrics.root_mean_squared_error(y, p), "bias": (p - y).mean(),
                        "r2_level": metrics.r2_score(now + y, now + p), "r2_change": metrics.r2_score(y, p),
                        "skill": 1 - abs(p - y).mean() / abs(y).mean()}
            assert found[h, t].to_dict() == pytest.approx(expected)


def test_skill_of_persistence_is_exactly_zero(world):
    _, _, _, targets = world
    scores = level_scores(guess(targets, None), targets).query("metric == 'skill'")
    assert (scores[["value", "low", "high"]] == 0).all(axis=None)


def test_quantiles_are_judged_where_given(world):
    _, _, _, targets = world
    forecast = guess(targets, 5)
    forecast["change_max_10_q90"] = forecast["change_max_10"] + 6
    found = level_scores(forecast, targets, n_draws=10).set_index(["horizon_min", "target", "metric"])["value"].sort_index()
    y, q = targets["change_max_10"].to_numpy("float64"), forecast["change_max_10_q90"].to_numpy("float64")
    assert found[10, "max", "pinball_q90"] == pytest.approx(metrics.mean_pinball_loss(y, q, alpha=0.9))
    assert found[10, "max", "coverage_q90"] == pytest.approx((y <= q).mean())
    assert "pinball_q90" not in found[15, "max"]


@pytest.mark.parametrize("missing", [None, 1, 2])
def test_classes_as_scikit_learn_has_them(world, missing):
    "Also where a class never comes true."
    _, _, _, targets = world
    forecast, h = guess(targets, 7), 10
    if missing is not None:
        targets = targets[targets[f"surge_class_{h}"] != missing]
    found = class_scores(forecast, targets, n_draws=10).query("horizon_min == @h").set_index("metric")["value"]
    forecast = forecast.loc[targets.index]
    truth, said = targets[f"surge_class_{h}"].astype(int), surge_class(forecast, h)
    prob = forecast[[f"prob_{c}_{h}" for c in CLASSES]].to_numpy("float64")
    surge = {"labels": [2], "average": "macro", "zero_division": np.nan}
    expected = {"accuracy": metrics.accuracy_score(truth, said), "majority_rate": truth.value_counts(normalize=True).max(),
                "macro_f1": metrics.f1_score(truth, said, average="macro"), "surge_share": (truth == 2).mean(),
                "surge_recall": metrics.recall_score(truth, said, **surge),
                "surge_precision": metrics.precision_score(truth, said, **surge),
                "log_loss": metrics.log_loss(truth, prob / prob.sum(1, keepdims=True), labels=[0, 1, 2])}
    recalls = metrics.recall_score(truth, said, labels=sorted(truth.unique()), average=None)
    expected["balanced_accuracy"] = recalls.mean()
    assert found[list(expected)].to_dict() == pytest.approx(expected, nan_ok=True, rel=1e-5)
    cells = confusion(forecast, targets).query("horizon_min == @h")["n"].to_numpy().reshape(3, 3)
    assert (cells == metrics.confusion_matrix(truth, said, labels=[0, 1, 2])).all()


def test_calibration_error_as_its_definition_has_it(world):
    _, _, _, targets = world
    forecast = guess(targets, 7)
    prob, truth = forecast[[f"prob_{c}_10" for c in CLASSES]].to_numpy("float64"), targets["surge_class_10"].to_numpy(int)
    stated, true, expected = prob.max(1), prob.argmax(1) == truth, 0.0
    for low in np.arange(10) / 10:
        here = (stated >= low) & ((stated < low + 0.1) | ((low == 0.9) & (stated == 1)))
        if here.any():
            expected += abs(stated[here].mean() - true[here].mean()) * here.mean()
    found = class_scores(forecast, targets, n_draws=10).query("horizon_min == 10").set_index("metric")["value"]
    assert found["ece"] == pytest.approx(expected, abs=1e-6)
    table = reliability(forecast, targets).query("horizon_min == 10")
    assert table.groupby("class")["n"].sum().tolist() == [len(targets)] * 3
    surge = table[table["class"] == "surge"]
    assert (abs(surge["stated"] - surge["observed"]) * surge["n"]).sum() / len(targets) == pytest.approx(found["surge_ece"])


# Intervals ---------------------------------------------------------------------------------------------------------------


def wandering(seed, days=10, memory=0.995):
    "Targets whose change wanders with a memory of hours; a forecast of 0 errs by it."
    rng, n = np.random.default_rng(seed), days * 1440
    shocks = np.append(rng.normal(), rng.normal(0, np.sqrt(1 - memory**2), n - 1))
    values = lfilter([1], [1, -memory], shocks)
    index = index_of(minutes("A", range(n)))
    return pd.DataFrame({"now": 0.0, **{f"change_{t}_10": values for t in ("min", "avg", "max")}}, index=index)


def interval_of_bias(seed, days):
    targets = wandering(seed, days)
    forecast = targets * 0.0
    row = level_scores(forecast, targets, n_draws=200).query("metric == 'bias' and target == 'max'").iloc[0]
    return row["low"], row["high"]


def test_intervals_cover_what_they_should():
    "The true bias is 0: a 95 % interval should hold it nearly always; one that took minutes as independent would not."
    spans = [interval_of_bias(seed, 12) for seed in range(24)]
    assert np.mean([low <= 0 <= high for low, high in spans]) >= 0.85
    naive = 2 * 1.96 / np.sqrt(12 * 1440)
    assert np.median([high - low for low, high in spans]) > 5 * naive


def test_intervals_shrink_with_more_days():
    wide, narrow = (np.median([b - a for a, b in (interval_of_bias(s, days) for s in range(8))]) for days in (5, 40))
    assert narrow < 0.6 * wide


def test_blocks_stay_in_their_line_and_follow_the_seed():
    index = index_of(pd.concat([minutes("A", range(3000)), minutes("B", range(600))], ignore_index=True))
    blocks = make_blocks(index, n_draws=50)
    line_of = pd.Series(index.codes[0]).groupby(blocks.unit).first()
    for line, hours in ((0, 50), (1, 10)):
        assert (blocks.weights[:, line_of == line].sum(1) == hours).all()
    assert (make_blocks(index, n_draws=50).weights == blocks.weights).all()
    assert (make_blocks(index, n_draws=50, seed=1).weights != blocks.weights).any()


def test_a_paired_difference_is_sharper_than_two_intervals(world):
    _, _, _, targets = world
    one = guess(targets, 7)
    two = one.copy()
    two["change_max_10"] += np.sign(one["change_max_10"] - targets["change_max_10"]) * 0.5  # worse by half a job, everywhere
    diff = paired_difference(two, one, targets).query("horizon_min == 10 and target == 'max' and metric == 'mae'").iloc[0]
    assert diff["value"] == pytest.approx(0.5, abs=1e-3) and diff["low"] > 0.49 and diff["high"] < 0.51
    alone = level_scores(one, targets).query("horizon_min == 10 and target == 'max' and metric == 'mae'").iloc[0]
    assert diff["high"] - diff["low"] < 0.2 * (alone["high"] - alone["low"])


# Slices ------------------------------------------------------------------------------------------------------------------


def test_slices_by_the_sites_own_clock_and_lines(world):
    site, _, _, targets = world
    parts = slice_table(targets, site)
    local = targets.index.get_level_values("timestamp").tz_convert("Asia/Seoul")
    assert ((parts["shift"] == "day") == ((local.hour >= 6) & (local.hour < 14))).all()
    assert ((parts["week"] == "weekend") == (local.day_of_week >= 5)).all()
    assert (parts["line"] == targets.index.get_level_values("line")).all()
    assert "load" not in parts and "fault" not in parts


def test_slices_by_faults_and_load(world):
    site, _, _, targets = world
    lines, stamp = (targets.index.get_level_values(n) for n in ("line", "timestamp"))
    spans = {"start": stamp[[100, 120, 50]], "end": stamp[[200, 150, 50]]}
    truth = pd.DataFrame({"line": ["A", "A", "B"], "kind": ["jam", "outage", "jam"], **spans})
    parts = slice_table(targets, site, (220, 260), truth)
    present = sum(((lines == r.line) & (stamp >= r.start) & (stamp <= r.end)).astype(int) for r in truth.itertuples()) > 0
    assert ((parts["fault"] == "present") == present).all()
    assert (parts["fault: outage"] == "present").sum() == 31
    assert ((parts["load"] == "high") == (targets["now"] >= 260)).all()


def test_a_slice_is_the_same_as_judging_its_rows_alone(world):
    site, _, _, targets = world
    forecast, parts = guess(targets, 7), slice_table(targets, site)
    table = slice_scores({"m": forecast}, targets, parts[["shift"]], make_blocks(targets.index, 20))
    night = (parts["shift"] == "night").to_numpy()
    alone = pd.concat([scores(forecast[night], targets[night], n_draws=10) for scores in (level_scores, class_scores)])
    both = table.query("part == 'night'").merge(alone, on=["horizon_min", "target", "metric"])
    assert len(both) == len(table) / 3 and both["value_x"].to_list() == pytest.approx(both["value_y"].to_list(), nan_ok=True)
    assert set(both["n_x"]) == {night.sum()}


def test_the_worst_slice_is_named():
    rows = [("shift", "day", 0.4, 5000), ("shift", "night", 0.1, 5000), ("fault", "present", -0.5, 20)]
    table = pd.DataFrame([{"slice": s, "part": p, "model": "m", "horizon_min": 10, "target": "max", "metric": "skill", "value": v, "n": n}
                          for s, p, v, n in rows])
    assert worst_slice(table, "m")["part"] == "night"
    assert worst_slice(table, "m", min_rows=10)["part"] == "present"
    assert worst_slice(table, "another") is None


# Leaks -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def hub():
    site = load_site()
    telemetry = simulate(9, seed=5).telemetry
    return site, telemetry, build_targets(telemetry, site=site)


@pytest.mark.parametrize("feature_set", ["v8", "hub"])
def test_our_features_do_not_leak(hub, feature_set):
    site, telemetry, targets = hub
    build = partial(build_features, feature_set=feature_set, site=site)
    features = build(telemetry)
    rows = features.index.intersection(targets.index)
    found = leak_check(features, targets.loc[rows], time_split(rows), build=build, telemetry=telemetry)
    assert len(found) == 3 and found["passed"].all(), found.to_string()


@pytest.mark.parametrize("plant", ["level 10 minutes ahead", "surge class", "centred mean", "mean of all time"])
def test_a_planted_leak_is_caught(hub, plant):
    site, telemetry, targets = hub

    def build(rows):
        features, jobs = build_features(rows, "v8", site=site), pd.Series(rows["hub_jobs"].to_numpy(), index_of(rows))
        values = {"level 10 minutes ahead": lambda: jobs.shift(-10), "centred mean": lambda: jobs.rolling(31, center=True).mean(),
                  "mean of all time": lambda: jobs * 0 + jobs.mean(),
                  "surge class": lambda: build_targets(rows, site=site)["surge_class_10"]}
        return features.assign(planted=values[plant]().reindex(features.index).astype("float32"))

    features = build(telemetry)
    found = leak_check(features, targets, build=build, telemetry=telemetry).set_index("check")
    assert found.loc["features do not change with the future", "found"] == "planted"
    if plant != "mean of all time":  # which says too little to be seen in the matrix alone
        assert "planted" in found.loc["no feature explains the future alone", "found"]


def test_a_leak_in_the_rows_themselves_is_caught(hub):
    site, telemetry, _ = hub

    def build(rows):
        features = build_features(rows, "v8", site=site)
        return features[features["hub_jobs_last"] > rows["hub_jobs"].mean()]

    assert "(rows)" in future_leaks(build, telemetry.iloc[:1000], telemetry["timestamp"].iloc[700])


def test_future_leaks_wants_rows_to_compare(hub):
    site, telemetry, _ = hub
    with pytest.raises(InputError, match="no feature row up to this minute"):
        future_leaks(partial(build_features, feature_set="v8", site=site), telemetry.iloc[:500], telemetry["timestamp"].iloc[5])


def test_matrix_check_survives_constants_and_gaps(hub):
    _, _, targets = hub
    rng = np.random.default_rng(0)
    gappy = np.where(rng.random(len(targets)) < 0.5, np.nan, targets["now"])
    columns = {"constant": 1.0, "empty": np.nan, "gappy": gappy, "now": targets["now"], "noise": rng.normal(size=len(targets))}
    features = pd.DataFrame(columns, targets.index)
    table = suspicious_features(features, targets)
    assert set(table["feature"]) == set(features) and table["explains"].between(0, 1).all() and not table["suspicious"].any()


@pytest.mark.parametrize(("gap", "said"), [
    (55, []), (54, ["only 54 minutes between train and valid, 55 are needed"]), (-10, ["valid begins before train ends"])])
def test_a_split_needs_order_and_gap(gap, said):
    index = index_of(minutes("A", range(1000)))
    found = split_leaks((np.arange(300), np.arange(299 + gap, 500), np.arange(600, 1000)), index)
    assert len(found) == len(said) and all(a in b for a, b in zip(said, found, strict=True))


# All at once -------------------------------------------------------------------------------------------------------------


def test_everything_on_the_rows_all_share(world):
    site, telemetry, valid, test = world
    forecasts = {"persistence": guess(test, None), "late": guess(test, 5).iloc[500:]}
    before = {"persistence": guess(valid, None), "late": guess(valid, 5)}
    truth = find_events(telemetry, site).assign(kind="surge")
    found = evaluate(forecasts, test, telemetry, site, before, valid, truth=truth, rules=load_rules(site=site), n_draws=50)
    shared = same_rows(forecasts, test)
    assert set(found.levels["n"]) == set(found.classes["n"]) == {len(shared)}
    assert found.model == "late" and set(found.differences["other"]) == {"persistence"}
    methods = ["persistence", "late", "level rule", "rules", "late, rules_first", "late, corrected"]
    assert list(found.alarms["method"].unique()) == methods
    assert set(found.slices["slice"]) >= {"shift", "week", "load", "fault", "line"}
    days = found.curves.groupby("method")["days"].first()
    assert days.to_list() == pytest.approx([len(shared) / 1440] * len(methods))
    head = found.headline()
    assert list(head.index) == methods and head.loc["persistence", "skill_max_10"] == 0
    at = found.alarms.query("method == 'late' and budget == 1 and chosen_on == 'validation'").iloc[0]
    assert head.loc["late", "event_recall"] == at["recall"]


def test_the_same_seed_gives_the_same_numbers_and_they_become_json(world):
    site, telemetry, _, test = world
    one, two = (evaluate({"a": guess(test, 5)}, test, telemetry, site, n_draws=30).as_dict() for _ in range(2))
    assert json.dumps(one) == json.dumps(two)
    assert json.loads(json.dumps(one))["levels"][0]["metric"] == "mae"


def test_what_cannot_be_judged_is_refused(world):
    site, telemetry, valid, test = world
    with pytest.raises(ParameterError, match="no forecast to judge|no forecast of this name"):
        evaluate({}, test, telemetry, site)
    with pytest.raises(ParameterError, match="use one of a"):
        evaluate({"a": guess(test, 5)}, test, telemetry, site, model="b")
    with pytest.raises(InputError, match="share no row"):
        evaluate({"a": guess(test, 5)}, valid, telemetry, site)
    with pytest.raises(InputError, match="validation forecasts are missing"):
        evaluate({"a": guess(test, 5)}, test, telemetry, site, {"c": guess(valid, 5)})


def test_interval_scores_are_those_of_a_slow_reference():
    rng, n = np.random.default_rng(0), 400
    rows = pd.MultiIndex.from_product([["HUB1"], pd.date_range("2026-01-01", periods=n, freq="min", tz="UTC")], names=["line", "timestamp"])
    forecast = pd.DataFrame({"change_max_10": rng.normal(0, 9, n), "spread_max_10": rng.uniform(1, 5, n)}, rows)
    targets = pd.DataFrame({"change_max_10": forecast["change_max_10"] + rng.normal(0, 4, n)}, rows)
    parts = pd.DataFrame({"load": np.where(np.arange(n) % 3, "low", "high")}, rows)
    rungs, size = [[0.2, -1.2, 1.5], [1.3, -1.0, 1.8]], np.log(forecast["spread_max_10"])
    near = ((size - 0.2) / 1.1).clip(0, 1)
    ends = [(a * (1 - near) + b * near) * forecast["spread_max_10"] for a, b in ((-1.2, -1.0), (1.5, 1.8))]
    found = interval_scores(forecast, targets, {"change_max_10": rungs}, parts).set_index(["slice", "part"])
    for at, keep in ((("all", ""), np.full(n, True)), (("load", "low"), parts["load"] == "low"), (("load", "high"), parts["load"] == "high")):
        truth, low, high = (a[keep] for a in (targets["change_max_10"], *(forecast["change_max_10"] + end for end in ends)))
        pinball = (metrics.mean_pinball_loss(truth, low, alpha=0.05) + metrics.mean_pinball_loss(truth, high, alpha=0.95)) / 2
        wanted = [np.mean([a <= t <= b for a, t, b in zip(low, truth, high)]), (high - low).mean(), pinball, keep.sum()]
        assert found.loc[at, ["coverage", "width", "pinball", "n"]].tolist() == pytest.approx(wanted)
