"""Light forms of a forecaster: every one says what the boosters say, on every kind of row; what is loaded is what was saved."""

import json

import numpy as np
import pandas as pd
import pytest
import xgboost as xgb
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from amhs import engines as light
from amhs.core import InputError, ModelError
from amhs.engines import OUTPUTS, Finish, Trees, engines_of, fill_up, finished, load_engine, make_engine, read_trees, seal, unseal
from amhs.model import calibrated, drawn, make_model, ordered
from amhs.smooth import no_smooth, passed_on, widened

HORIZONS = (10, 15, 25)
KINDS = {
    "hub": ("hub", {"trees": 25, "depth": 4, "early_stopping": 5, "min_child_weight": 5.0}),  # absolute error, cut back to its best round
    "deep": ("hub", {"trees": 8, "depth": 9, "early_stopping": 0, "bins": 256, "min_child_weight": 1.0}),
    "v8": ("v8", {"trees": 12, "depth": 6}),  # squared error, neither calibrated nor ordered
    "huber": ("hub", {"trees": 6, "depth": 3, "objective": "huber", "early_stopping": 0, "smooth": False}),
    "stump": ("v8", {"trees": 1, "depth": 1}),
}


def tables(rows=900, seed=0):
    "Features with holes, a constant and a repeated column, and targets that depend on where the holes are."
    random = np.random.default_rng(seed)
    index = pd.MultiIndex.from_product([["A"], pd.date_range("2026-01-01", periods=rows, freq="min", tz="UTC")], names=["line", "timestamp"])
    X = random.normal(size=(rows, 14)).astype("float32").round(1)
    X[random.random(X.shape) < 0.2] = np.nan
    X[:, 3], X[:, 5], X[:, 0] = 1, X[:, 4], 200 + 20 * random.normal(size=rows)
    pull = np.where(np.isnan(X[:, 1]), 25, 10 * np.nan_to_num(X[:, 1])) + 8 * np.nan_to_num(X[:, 2], nan=-2) + random.normal(size=rows)
    targets = {"now": X[:, 0], "event_in": np.where(pull > 15, random.integers(1, 12, rows), 25)}
    for h in HORIZONS:
        targets |= {f"change_min_{h}": pull - h, f"change_avg_{h}": pull, f"change_max_{h}": pull + h, f"surge_class_{h}": np.digitize(pull, [5, 20])}
    return pd.DataFrame(X, index, ["hub_jobs_last", *(f"f{i}" for i in range(1, 14))]), pd.DataFrame(targets, index, dtype="float32")


FEATURES, TARGETS = tables()


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    name, hyper = KINDS[request.param]
    both = FEATURES.iloc[:600], TARGETS.iloc[:600]
    return make_model(name, **hyper).fit(*both, valid=(FEATURES.iloc[655:], TARGETS.iloc[655:]))


@pytest.fixture(scope="module")
def engines(model):
    return {kind: make_engine(kind, model) for kind in engines_of(model)}


def finish(n, **changes):
    "What turns margins of `n` horizons into forecasts and changes nothing."
    plain = Finish(np.ones(n), np.zeros((n, 3)), np.zeros((n, 1, 100)), np.zeros((n, 2)), False, 0.0, 0, -1)
    return plain._replace(**changes)


def odd_rows(model, rows=330):
    "Rows a model may meet: real ones, empty ones, values exactly on thresholds, next to them, and absurd ones."
    random, trees = np.random.default_rng(1), read_trees(model)
    X = np.resize(FEATURES[model.features].to_numpy(), (rows, len(model.features))).copy()
    split = np.flatnonzero((trees.left >= 0) & (trees.feature < len(model.features)))
    for i in range(60, rows):
        for node in random.choice(split, 6):
            value = trees.value[node]
            X[i, trees.feature[node]] = [value, np.nextafter(value, np.float32(-np.inf)), np.nextafter(value, np.float32(np.inf)), np.nan][random.integers(4)]
    X[:10], X[10:20], X[20:30] = np.nan, np.float32(3e38), np.float32(-3e38)
    X[30:40] = np.float32(1e-40)
    return X


def test_forest_and_merged_say_the_same_to_the_bit(model, engines):
    X = odd_rows(model)
    known = engines["boosters"].margins(X)
    assert np.array_equal(engines["forest"].margins(X), known)
    assert np.array_equal(engines["merged"].margins(X), known)
    assert np.abs(known).max() > 1 and len(np.unique(known)) >= 20, "the rows must be told apart, or this proves nothing"


def test_the_alarms_trees_are_among_them(model, engines):
    learnt = model.hyper.alarm_trees > 0 and model.hyper.smooth
    assert ("alarm" in model.boosters) == (model.worth > 0) == learnt
    raised = engines["forest"].forecasts(odd_rows(model)[60:])[:, [-1, 3, 9, 15]]  # the change that counts for alarms, the highest changes
    assert (np.nanmax(np.abs(raised[:, 0] - raised[:, 1:].max(axis=1))) > 1) == learnt


def test_onnx_says_the_same_within_rounding(model, engines):
    X = odd_rows(model)
    assert np.abs(engines["onnx"].margins(X) - engines["boosters"].margins(X)).max() < 1e-4


def test_forecasts_are_the_forecasters_own(model, engines):
    X = pd.DataFrame(odd_rows(model), columns=model.features)
    X["hub_jobs_last"] = np.float32(210)
    known = model.predict(X).to_numpy()
    for kind, engine in engines.items():
        assert np.abs(engine.forecasts(X.to_numpy()) - known).max() < 1e-4, kind


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 9, 63, 64, 65, 200])
def test_one_row_many_rows_and_threads_agree(model, engines, rows):
    X = odd_rows(model)[40 : 40 + rows]
    for engine in engines.values():
        many = engine.forecasts(X)
        assert many.shape == (rows, 2 + 9 * 3)
        assert np.array_equal(engine.forecasts(X, threads=2), many, equal_nan=True)
    single = [engines["forest"].forecast(x) for x in X]
    assert all(np.array_equal(a, b, equal_nan=True) for a, b in zip(single, engines["forest"].forecasts(X), strict=True))


def test_other_memory_layouts_are_read_right(engines, model):
    X = odd_rows(model)[40:60]
    known = engines["forest"].forecasts(X)
    assert np.array_equal(engines["forest"].forecasts(np.asfortranarray(X)), known, equal_nan=True)
    assert np.array_equal(engines["forest"].forecasts(X.astype("float64")), known, equal_nan=True)
    wide = np.repeat(X, 2, axis=1)[:, ::2]
    assert np.array_equal(engines["forest"].forecast(wide[3]), known[3], equal_nan=True)


def test_contributions_are_xgboosts_approximate_ones_and_add_up(model, engines):
    X = odd_rows(model)[40:80]
    for output, head in {2: "change_max_10", 7: "change_avg_15"}.items() | ({18: "alarm"}.items() if model.worth else set()):
        theirs = model.boosters[head].predict(xgb.DMatrix(model._columns(X)), pred_contribs=True, approx_contribs=True)
        wide = np.zeros((len(X), len(model.features) + len(model.smooth.least)))
        wide[:, model._at()] = theirs[:, :-1]
        passed = passed_on(model.smooth, X, wide)
        for i, x in enumerate(X):
            ours = engines["forest"].weigh(x, output)
            assert np.allclose(ours, passed[i], atol=2e-3)
            assert ours.sum() + theirs[i, -1] == pytest.approx(engines["forest"]._margins(widened(model.smooth, X[i : i + 1]))[0, output], abs=5e-3)
    assert engines["onnx"].weigh(X[0], 2) is None


def test_contributions_to_a_class_are_those_to_the_highest_change(model, engines):
    "Scaled to the log-odds that lie between where the trees start and what they say."
    forest = engines["forest"]
    if forest.finish.spread < 0:
        pytest.skip("this model has a classifier of its own")
    for x in odd_rows(model)[40:60]:
        change, odds = forest.weigh(x, 8), {k: forest.weigh(x, 9 + k) for k in range(3)}
        moved = np.abs(change) > 1e-9
        slopes = {k: odds[k][moved] / change[moved] for k in odds}
        assert all(np.allclose(s, s[0]) for s in slopes.values()) and slopes[0][0] <= 0 <= slopes[2][0]


def test_saved_and_loaded_they_say_the_same(model, engines, tmp_path):
    X = odd_rows(model)
    model.save(tmp_path / "model")
    for kind, engine in engines.items():
        again = load_engine(engine.save(tmp_path / kind), tmp_path / "model")
        assert again.kind == kind and again.features == engine.features and again.horizons == engine.horizons
        assert np.array_equal(again.forecasts(X), engine.forecasts(X), equal_nan=True)
        assert not [p for p in (tmp_path / kind).rglob("*") if p.suffix in (".pkl", ".pickle", ".joblib")]


@pytest.mark.parametrize("kind", ["merged", "onnx", "forest"])
def test_a_changed_engine_is_refused(engines, tmp_path, kind):
    folder = engines[kind].save(tmp_path / kind)
    file = next(p for p in folder.iterdir() if p.name != "engine.json")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ModelError, match=file.name):
        load_engine(folder)


def test_an_engine_of_another_format_is_refused(engines, tmp_path):
    folder = engines["forest"].save(tmp_path / "forest")
    seal(folder, "engine.json", unseal(folder, "engine.json") | {"format": 1})
    with pytest.raises(ModelError, match="another format"):
        load_engine(folder)


# --- the forest's own parts ------------------------------------------------------------------------------------------


def naive(trees: Trees, x: np.ndarray) -> np.ndarray:
    "Trees walked as anybody would."
    out = trees.base.copy()
    for tree, node in enumerate(trees.first):
        while trees.left[node] >= 0:
            value = x[trees.feature[node]]
            left = trees.missing_left[node] if np.isnan(value) else value < trees.value[node]
            node = trees.left[node] if left else trees.right[node]
        out[trees.output[tree]] += trees.value[node]
    return out


@st.composite
def random_trees(draw):
    "A few trees of any shape over three features."
    seed, count, depth = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 30)), draw(st.integers(0, 5))
    random, parts = np.random.default_rng(seed), []
    for _ in range(count):
        left, right, level = [-1], [-1], [0]
        for node in range(200):
            if node < len(left) and level[node] < depth and random.random() < 0.7:
                left[node], right[node] = len(left), len(left) + 1
                left += [-1, -1]
                right += [-1, -1]
                level += [level[node] + 1] * 2
        parts.append((np.array(left), np.array(right)))
    first = np.cumsum([0, *(len(left) for left, _ in parts[:-1])])
    total = sum(len(left) for left, _ in parts)
    shift = np.repeat(first, [len(left) for left, _ in parts])
    left, right = (np.where(np.concatenate(side) < 0, -1, np.concatenate(side) + shift) for side in zip(*parts, strict=True))
    return Trees(first, np.sort(random.integers(0, 7, count)), left, right, random.integers(0, 3, total), random.choice(np.float32([-1, 0, 0.5, 2]), total),
                 random.random(total) < 0.5, np.ones(total, "float32"), np.float32(random.normal(size=7)))


@given(random_trees(), hnp.arrays("float32", (9, 3), elements=st.sampled_from([np.nan, -1, 0, 0.25, 0.5, 2, 3, -np.inf, np.inf]).map(np.float32)))
def test_any_trees_are_walked_right(trees, X):
    forest = light.Forest(["a", "b", "c"], [10], finish(1), no_smooth(), fill_up(trees))
    known = np.stack([naive(trees, x) for x in X])
    assert np.array_equal(forest.margins(X).reshape(9, 6), known[:, :6])
    assert np.array_equal(forest.forecast(X[0])[1:4], known[0, :3])


def test_many_features_and_thresholds_take_wider_nodes():
    "More slots and ranks than two bytes hold."
    n, cuts = 300, 130
    count = n * cuts
    first = np.arange(count) * 3
    left, right = np.full(3 * count, -1), np.full(3 * count, -1)
    left[first], right[first] = first + 1, first + 2
    feature, value = np.zeros(3 * count, int), np.tile(np.float32([0, 1, 10]), count)
    feature[first], value[first] = np.repeat(np.arange(n), cuts), np.tile(np.arange(cuts), n)
    trees = Trees(first, np.zeros(count, int), left, right, feature, value, np.arange(3 * count) % 2 == 0,
                  np.ones(3 * count, "float32"), np.zeros(7, "float32"))
    perfect = fill_up(trees)
    assert perfect.nodes.dtype == np.uint32
    forest = light.Forest([f"f{i}" for i in range(n)], [10], finish(1), no_smooth(), perfect)
    x = np.random.default_rng(0).uniform(-5, 140, n).astype("float32")
    x[::7] = np.nan
    assert forest.margins(x[None]).ravel()[0] == naive(trees, x)[0]


def test_trees_too_deep_are_refused_not_cut():
    model = make_model("v8", trees=3, depth=16, min_child_weight=0.0, gamma=0.0).fit(FEATURES, TARGETS)
    with pytest.raises(ModelError, match="too deep"):
        make_engine("forest", model)
    X = FEATURES[model.features].to_numpy()
    assert np.array_equal(make_engine("merged", model).margins(X), make_engine("boosters", model).margins(X))


# --- from margins to forecasts ---------------------------------------------------------------------------------------

numbers = st.floats(-300, 300, width=32)


@given(hnp.arrays("float32", (4, 3, 6), elements=numbers), hnp.arrays("float32", 4, elements=st.floats(0, 500, width=32)), st.floats(0.1, 2),
       hnp.arrays("float64", (3, 3), elements=st.floats(-3, 3)))
def test_the_finish_is_what_the_forecaster_does(margins, now, scale, bias):
    flat, level = np.column_stack([margins.reshape(4, 18), np.ones(4)]), now[:, None]
    said = finished(flat, level, finish(3, scale=np.full(3, scale), bias=bias, ordered=True))[:, 1:19].reshape(4, 3, OUTPUTS)
    assert np.array_equal(said[:, :, :3], ordered(margins[:, :, :3], now))
    for h in range(3):
        assert np.allclose(said[:, h, 3:], calibrated(margins[:, h, 3:], {"scale": scale, "bias": bias[h]}), atol=1e-6)
    whole = finished(flat, level, finish(3, scale=np.full(3, scale), bias=bias, ordered=True, whole=True))
    assert np.array_equal(whole[:, 1:19].reshape(4, 3, OUTPUTS)[:, :, :3], drawn(said[:, :, :3], now.astype("float32")).astype("float32"))
    assert np.array_equal(whole[:, 19:], finished(flat, level, finish(3, bias=bias, ordered=True))[:, 19:]), "alarms count what was foreseen"
    plain = finished(flat, level, finish(3, bias=bias))[:, 1:19].reshape(4, 3, OUTPUTS)
    assert np.array_equal(plain[:, :, :3], margins[:, :, :3])
    for worth in (0.0, 12.5):
        alarm = finished(flat, level, finish(3, bias=bias, worth=worth))[:, -1]
        assert np.array_equal(alarm, (margins[:, :, 2].max(axis=1) + np.float64(worth)).astype("float32"))


def test_without_a_level_of_now_nothing_is_said(model, engines):
    X = odd_rows(model)[60:70]
    X[:, model.features.index("hub_jobs_last")] = np.nan
    known = model.predict(pd.DataFrame(X, columns=model.features)).to_numpy()
    for engine in engines.values():
        assert np.array_equal(np.isnan(engine.forecasts(X)), np.isnan(known))


@pytest.mark.parametrize("name", ["persistence", "linear"])
def test_forecasters_without_trees_keep_their_own_form(name):
    model = make_model(name).fit(FEATURES.fillna(0), TARGETS)
    engine = make_engine("original", model)
    known = model.predict(FEATURES).to_numpy()
    assert np.abs(engine.forecasts(FEATURES[model.features].to_numpy()) - known).max() < 1e-4
    assert engines_of(model) == ("original",)
    with pytest.raises(ModelError, match="use one of original"):
        make_engine("forest", model)


@pytest.fixture(scope="module", params=["hub", "v8", "huber"])
def team(request):
    "An ensemble with a boosted member and one without trees."
    name, hyper = KINDS[request.param]
    team = make_model("ensemble", members={name: hyper, "linear": {}}, weights="equal")
    return team.fit(*(t.iloc[:600].fillna(0) for t in (FEATURES, TARGETS)), valid=(FEATURES.iloc[655:].fillna(0), TARGETS.iloc[655:]))


def test_an_ensemble_of_forests_says_what_the_ensemble_says(team, tmp_path):
    """Real rows, tiny values, values on thresholds; one by one, after saving, too."""
    X, light = odd_rows(next(iter(team.members.values())))[30:], make_engine("members", team)
    known = team.predict(pd.DataFrame(X, columns=team.features)).to_numpy()
    assert np.isfinite(known[10:30]).all()
    team.save(tmp_path / "team")
    for engine in (light, make_engine("original", team), load_engine(light.save(tmp_path / "light"), tmp_path / "team")):
        assert np.allclose(engine.forecasts(X), known, rtol=1e-6, atol=1e-4, equal_nan=True), engine.kind
    assert np.allclose([light.forecast(x) for x in X[10:30]], known[10:30], rtol=1e-6, atol=1e-4)
    with pytest.raises(ModelError, match="use one of members, original"):
        make_engine("forest", team)


def test_an_ensembles_contributions_add_up(team):
    """What all features add differs between two rows as much as what the members say on average."""
    X, light = FEATURES[team.features].fillna(0).to_numpy()[:8], make_engine("members", team)
    changes, probs, _ = team._answer(X)
    told = {2: changes[:, 0, 2], OUTPUTS + 1: changes[:, 1, 1], OUTPUTS * 3: team._raised(X)}
    for output, said in told.items():
        found = np.array([light.weigh(x, output).sum() for x in X])
        assert np.abs((found - found[0]) - (said - said[0])).max() < 1e-3, output
    assert light.weigh(X[0], 5).any() and light.finish.worth == 1


def test_rows_of_another_width_are_refused(model, engines):
    for engine in engines.values():
        with pytest.raises(InputError, match="14 features"):
            engine.forecasts(np.zeros((2, 3), "float32"))
        with pytest.raises(InputError, match="14 features"):
            engine.forecast(np.zeros(3, "float32"))


# --- seals -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def sealed(tmp_path):
    (tmp_path / "part").mkdir()
    (tmp_path / "part/a").write_text("a")
    (tmp_path / "b").write_text("b")
    seal(tmp_path, "card.json", {"format": 1, "limit": 2.5})
    return tmp_path


def test_a_sealed_folder_opens_as_it_was(sealed):
    card = unseal(sealed, "card.json")
    assert (card["limit"], set(card["files"])) == (2.5, {"part/a", "b"})


@pytest.mark.parametrize("spoil", [
    lambda f: (f / "part/a").write_text("A"),
    lambda f: (f / "b").unlink(),
    lambda f: (f / "card.json").write_text((f / "card.json").read_text().replace("2.5", "9.5")),
    lambda f: (f / "card.json").write_text(json.dumps({k: v for k, v in json.loads((f / "card.json").read_text()).items() if k != "seal"})),
    lambda f: (f / "card.json").write_text("[]"),
    lambda f: (f / "card.json").write_text("{"),
    lambda f: (f / "card.json").unlink(),
])
def test_whatever_was_changed_is_refused(sealed, spoil):
    spoil(sealed)
    with pytest.raises(ModelError, match="changed or damaged|nothing to load"):
        unseal(sealed, "card.json")
