"Stage 05's choices: a search that survives its process, and says the same as if nothing had happened."

import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from amhs import tuning
from amhs.config import load_params
from amhs.core import InputError
from amhs.features import build_features
from amhs.simulate import simulate
from amhs.targets import build_targets
from amhs.tuning import SEARCHED, choose, fold_score, sampled, search

SETS = {"develop.trees": 6, "develop.folds": 3, "develop.trials": 4}
PARAMS = load_params("develop", "smoke", SETS)


@pytest.fixture(scope="module")
def tables():
    telemetry = simulate(2, seed=3).telemetry
    features = build_features(telemetry, "v8")
    return sampled(features.iloc[:, :6], build_targets(telemetry), share=0.5)


@pytest.fixture(scope="module")
def whole(tables):
    return search(*tables, PARAMS)


MORTAL = """
import os, signal, sys
import pandas as pd
from amhs import tuning
from amhs.config import load_params
folder, at, *words = sys.argv[1:]
tables = [pd.read_parquet(f"{folder}/{name}.parquet") for name in ("features", "targets")]
real, seen = tuning._fold_ratio, []

def mortal(*args):
    seen.append(0)
    if len(seen) == int(at):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)

tuning._fold_ratio = mortal
tuning.search(*tables, load_params("develop", "smoke", dict(w.split("=") for w in words)), folder=f"{folder}/studies")
"""


def killed(tables, folder, at: int) -> int:
    "How a process ended that searches and is killed at its n-th fold."
    for name, table in zip(("features", "targets"), tables):
        table.to_parquet(folder / f"{name}.parquet")
    words = [f"{name}={value}" for name, value in SETS.items()]
    return subprocess.run([sys.executable, "-c", MORTAL, str(folder), str(at), *words], timeout=300).returncode


@pytest.mark.parametrize("at", [2, 9])
def test_a_killed_search_goes_on_and_tries_what_it_would_have_tried(tables, whole, tmp_path, at):
    assert killed(tables, tmp_path, at) == -signal.SIGKILL
    pd.testing.assert_frame_equal(search(*tables, PARAMS, folder=tmp_path / "studies"), whole)


def test_what_is_known_is_not_tried_again(tables, whole, tmp_path, monkeypatch):
    search(*tables, PARAMS, folder=tmp_path)
    monkeypatch.setattr(tuning, "_fold_ratio", lambda *args: pytest.fail("tried again"))
    pd.testing.assert_frame_equal(search(*tables, PARAMS, folder=tmp_path), whole)


@pytest.mark.parametrize("other", [{"seed": 1}, {"trees": 7}, "data"])
def test_what_scores_depend_on_makes_another_study(tables, tmp_path, other):
    first = PARAMS.model_copy(update={"trials": 1})
    search(*tables, first, folder=tmp_path)
    if other == "data":
        features = tables[0].copy()
        features.iloc[0, 0] = np.nextafter(features.iloc[0, 0], np.float32(1e9))
        search(features, tables[1], first, folder=tmp_path)
    else:
        search(*tables, first.model_copy(update=other), folder=tmp_path)
    assert len(list(tmp_path.glob("*.sqlite"))) == 2


def test_a_score_is_the_mean_of_its_folds(tables, whole):
    best = whole.iloc[0]
    scores = fold_score(*tables, PARAMS.folds, PARAMS.seed, (10,), trees=PARAMS.trees, **{n: best[n].item() for n in SEARCHED})
    assert best["score"] == pytest.approx(np.mean(scores), abs=1e-12) and best["folds"] == PARAMS.folds


def test_what_is_behind_is_given_up_and_never_chosen(tables):
    trials = search(*tables, PARAMS.model_copy(update={"trials": 12}))
    given_up, tried = trials[trials["state"] == "pruned"], trials[trials["state"] == "complete"]
    assert len(given_up) and len(tried) and (given_up["folds"] < PARAMS.folds).all() and (tried["folds"] == PARAMS.folds).all()
    first = trials.loc[trials["origin"] == "default"].iloc[0]
    assert first["trial"] == 0 and first["state"] == "complete"
    assert choose("v8", trials)["score"] == tried["score"].min() <= first["score"]


def test_minutes_are_those_of_the_study_whoever_spent_them(tables, tmp_path):
    assert len(search(*tables, PARAMS, folder=tmp_path)) == 4
    assert len(search(*tables, PARAMS.model_copy(update={"trials": 50, "minutes": 1e-4}), folder=tmp_path)) == 4


def test_a_broken_study_is_told(tables, tmp_path):
    search(*tables, PARAMS.model_copy(update={"trials": 1}), folder=tmp_path)
    study = next(tmp_path.glob("*.sqlite"))
    study.write_bytes(b"not a database, and long enough to be taken for one" * 100)
    with pytest.raises(InputError, match="delete the file"):
        search(*tables, PARAMS, folder=tmp_path)
