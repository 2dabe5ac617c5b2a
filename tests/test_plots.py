"""Figures: they show the tables they were given, keep no state, and survive thin data."""

import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from matplotlib import font_manager

from amhs import plots
from amhs.config import CLASSES, load_site
from amhs.core import InputError
from amhs.evaluate import evaluate
from amhs.targets import build_targets

SITE = load_site("simulated")
LEVEL = SITE.thresholds.surge_level


def hub(days=3, line="A", seed=0):
    rng, n = np.random.default_rng(seed), days * 1440
    level = LEVEL - 60 + 90 * np.sin(np.arange(n) / 60) + rng.normal(0, 4, n)
    time = pd.date_range("2026-03-02", periods=n, freq="min", tz="UTC").as_unit("us")
    return pd.DataFrame({"line": line, "timestamp": time, "hub_jobs": level.astype("float32"), "hub_free_slots": np.float32(600)})


def guess(targets, noise, seed=0):
    rng, found = np.random.default_rng(seed), targets[["now"]].copy()
    for h in (10, 15, 25):
        for t in ("min", "avg", "max"):
            found[f"change_{t}_{h}"] = targets[f"change_{t}_{h}"] * bool(noise) + rng.normal(0, noise, len(found))
        found[[f"prob_{c}_{h}" for c in CLASSES]] = rng.dirichlet([1, 1, 1], len(found))
    return found.astype("float32")


@pytest.fixture(scope="module")
def world():
    telemetry = pd.concat([hub(), hub(line="B", seed=1)], ignore_index=True)
    targets = build_targets(telemetry, site=SITE)
    start = telemetry["timestamp"].iloc[100]
    truth = pd.DataFrame({"line": "A", "kind": ["jam", "outage"], "start": [start, start], "end": [start + pd.Timedelta("60min")] * 2})
    forecasts = {"persistence": guess(targets, 0), "v8": guess(targets, 9), "hub": guess(targets, 4)}
    evaluation = evaluate(forecasts, targets, telemetry, SITE, forecasts, targets, truth=truth, n_draws=30)
    return SimpleNamespace(telemetry=telemetry, targets=targets, truth=truth, forecasts=forecasts, evaluation=evaluation)


def png(figure):
    "The picture's width and height in pixels; warnings (a glyph no font has, a layout that does not fit) are errors."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data = figure._repr_png_()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def texts(figure):
    parts = ((ax._left_title, ax.xaxis.label, ax.yaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels()) for ax in figure.axes)
    return [text.get_text() for part in parts for text in part]


def every_figure(w):
    parts = pd.DataFrame(np.random.default_rng(0).normal(size=(50, 4)), columns=["one", "two", "three", "base"])
    trials = pd.DataFrame({"trial": range(5), "score": [3.0, 2, 4, 1, 5], "depth": [3, 4, 5, 6, 7], "origin": "search",
                           "state": ["complete"] * 4 + ["pruned"]})
    return {
        "telemetry": plots.telemetry(w.telemetry, SITE, w.truth, days=1), "missing": plots.missing(w.telemetry),
        "targets": plots.targets(w.targets, SITE), "bars": plots.bars(pd.Series({"a": 0.5, "b": -0.7})),
        "forecast": plots.forecast(w.forecasts["hub"], w.targets, SITE), "skill": plots.skill(w.evaluation),
        "errors": plots.errors(w.evaluation), "confusion": plots.confusion(w.evaluation), "reliability": plots.reliability(w.evaluation),
        "tradeoff": plots.alarm_tradeoff(w.evaluation), "slices": plots.slices(w.evaluation),
        "contributions": plots.contributions(parts, parts.drop(columns="base") * 2), "waterfall": plots.waterfall(parts.iloc[0], parts.iloc[0] * 2),
        "search": plots.search_history(trials), "learning": plots.learning(pd.DataFrame({"train": [3, 2, 1], "valid": [3, 2, 2]}), stopped=1),
    }


def test_every_figure_draws_itself_at_the_width_of_a_report(world):
    for name, figure in every_figure(world).items():
        width, height = png(figure)
        assert width == round(9.6 * 110) and 140 < height < 1400, name


def test_figures_change_nothing_they_are_given(world):
    before = [world.telemetry.copy(), world.targets.copy(), world.truth.copy(), world.evaluation.as_dict()]
    every_figure(world)
    pd.testing.assert_frame_equal(before[0], world.telemetry)
    pd.testing.assert_frame_equal(before[1], world.targets)
    pd.testing.assert_frame_equal(before[2], world.truth)
    assert before[3] == world.evaluation.as_dict()


def test_no_pyplot_and_no_display():
    "Drawing leaves no global state: pyplot is not even loaded."
    code = ("import sys, pandas as pd; from amhs import plots; plots.bars(pd.Series({'a': 1.0}))._repr_png_(); "
            "sys.exit('matplotlib.pyplot' in sys.modules or 'shap' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_busiest_days_are_shown_unless_others_are_asked_for():
    telemetry = hub(days=9).assign(hub_jobs=np.float32(LEVEL - 50))
    telemetry.loc[5 * 1440 : 5 * 1440 + 60, "hub_jobs"] = LEVEL + 50
    shown = plots.telemetry(telemetry, SITE, days=1).axes[0].get_lines()[0].get_xydata()
    assert shown[:, 1].max() == LEVEL + 50
    asked = plots.telemetry(telemetry, SITE, start="2026-03-03 09:00", days=1).axes[0].get_lines()[0]
    assert pd.Timestamp(asked.get_xdata()[0]) == pd.Timestamp("2026-03-03 09:00")  # on the site's clock
    assert asked.get_ydata().max() == LEVEL - 50


def test_missing_minutes_are_gaps_not_straight_lines():
    telemetry = hub(days=1).drop(index=range(300, 400)).reset_index(drop=True)
    drawn = plots.telemetry(telemetry, SITE, days=1).axes[0].get_lines()[0].get_ydata()
    assert np.isnan(drawn).sum() == 100


def test_only_the_line_and_faults_asked_for(world):
    figure = plots.telemetry(world.telemetry, SITE, world.truth, line="A", start=world.telemetry["timestamp"].iloc[0], days=1)
    assert {"jam", "outage"} <= set(texts(figure))
    assert "jam" not in texts(plots.telemetry(world.telemetry, SITE, world.truth, line="B", days=1))


def test_missing_says_how_much_and_of_what():
    telemetry = hub(days=4)
    telemetry.loc[1000:2439, "hub_free_slots"] = np.nan
    figure = plots.missing(telemetry)
    strips = figure.axes[0].collections[0].get_array().reshape(2, -1)
    assert strips[0].max() == 0 and strips[1].max() == 100
    assert any("12.50% of all values are missing" in t and "29 of the schema's 31 columns" in t for t in texts(figure))
    whole = plots.missing(telemetry.drop(index=range(1000, 2440)))
    assert whole.axes[0].collections[0].get_array().reshape(1, -1).max() == 100  # one strip: whole rows


def test_the_forecast_is_drawn_where_it_was_said(world):
    figure = plots.forecast(world.forecasts["hub"], world.targets, SITE, 15, line="B", days=1)
    now, came, said = (line.get_ydata() for line in figure.axes[0].get_lines()[:3])
    rows = world.targets.loc["B"]
    at = figure.axes[0].get_lines()[0].get_xdata()
    own = rows.loc[pd.DatetimeIndex(at).tz_localize(SITE.timezone).tz_convert("UTC")]
    assert np.allclose(now, own["now"]) and np.allclose(came, own["now"] + own["change_max_15"])
    assert abs(said - came).mean() < 6


def test_bars_and_whiskers_are_the_tables_numbers(world):
    figure = plots.skill(world.evaluation)
    drawn = [bar.get_height() for bar in figure.axes[2].patches]
    levels = world.evaluation.levels.query("metric == 'skill' and target == 'max'")
    assert drawn == pytest.approx([*levels[levels["model"] == "v8"]["value"], *levels[levels["model"] == "hub"]["value"]])


def test_the_frontier_never_beats_the_curve(world):
    line = next(x for x in plots.alarm_tradeoff(world.evaluation).axes[0].get_lines() if x.get_label() == "hub")
    curve = world.evaluation.curves.query("method == 'hub'")
    for cost, recall in line.get_xydata():
        assert recall == curve[curve["false_per_day"] <= cost]["recall"].max()


def test_the_weakest_slice_is_named(world):
    figure = plots.slices(world.evaluation)
    at = world.evaluation.slices.query("model == 'hub' and metric == 'skill' and target == 'max' and horizon_min == 10 and n >= 240")
    worst = at.loc[at["value"].idxmin()]
    assert any(f"weakest: {worst['slice']} {worst['part']}" in t for t in texts(figure))


def test_a_waterfall_ends_at_the_forecast():
    row = pd.Series({"a": 3.0, "b": -1.0, "c": 0.25, "d": 0.25, "base": 10.0})
    figure = plots.waterfall(row, n=2)
    bars = figure.axes[0].patches
    assert bars[-1].get_x() + bars[-1].get_width() == pytest.approx(12.5)
    assert [t for t in texts(figure) if t][-3:] == ["2 others", "b", "a"]


def test_strongest_features_first():
    parts = pd.DataFrame({"weak": [0.1, -0.1, 0.1], "strong": [5.0, -5, 5], "base": [1.0, 1, 1]})
    named = [t for t in texts(plots.contributions(parts, parts)) if "strong" in t or "weak" in t]
    assert [t.split()[0] for t in named] == ["strong", "weak"]


@pytest.mark.skipif(not set(font_manager.get_font_names()) & set(plots._KOREAN), reason="no Korean font on this machine")
def test_korean_names_are_drawn():
    png(plots.bars(pd.Series({"허브 작업수": 0.4, "상층→허브 유입": -0.3}), "상관"))


def test_without_a_korean_font_a_figure_is_still_drawn_and_nothing_is_said(monkeypatch):
    monkeypatch.setattr(plots, "_KOREAN", ())
    plots._style.cache_clear()
    png(plots.bars(pd.Series({"허브 작업수": 0.4}), "상관"))
    monkeypatch.undo()
    plots._style.cache_clear()


@pytest.mark.parametrize("thin", ["constant", "one row per class", "no fault", "all missing"])
def test_thin_data_still_makes_a_picture(world, thin):
    telemetry, targets = hub(days=1), world.targets
    if thin == "constant":
        png(plots.telemetry(telemetry.assign(hub_jobs=np.float32(5)), SITE))
        png(plots.targets(targets.assign(**{c: 0.0 for c in targets if c != "now"}), SITE))
    elif thin == "one row per class":
        png(plots.contributions(pd.DataFrame({"a": [1.0], "base": [0.0]}), pd.DataFrame({"a": [2.0]})))
    elif thin == "no fault":
        png(plots.telemetry(telemetry, SITE, world.truth.iloc[:0]))
    else:
        png(plots.missing(telemetry.assign(hub_jobs=np.nan, hub_free_slots=np.nan)))


def test_what_cannot_be_drawn_is_said(world):
    with pytest.raises(InputError, match="nothing to draw in this time"):
        plots.telemetry(world.telemetry, SITE, start="2031-01-01")
    with pytest.raises(InputError, match="lower `least`"):
        plots.slices(world.evaluation, least=10**9)
