"""Parameters are refused before anything runs, with the name that was meant; profiles need only three keys."""

import pytest

from amhs.config import PARAMS, Site, checked, load_params, load_profile, load_site, parse_sets, parse_yaml, settings
from amhs.core import ParameterError

LEAST = {"name": "m14", "time": {"column": "CURRTIME", "format": "%Y%m%d%H%M"}, "columns": {"hub_jobs": "TOTALCNT"}}


NUMBERS = [("1e-3", 0.001), ("2E5", 2e5), ("-1.5e+2", -150.0), ("007x", "007x"), ("1e", "1e"), ("e3", "e3")]


@pytest.mark.parametrize(("text", "value"), NUMBERS)
def test_numbers_as_people_write_them(text, value):
    assert parse_yaml(text) == value


def test_a_profile_needs_three_keys():
    site = checked(Site, LEAST, "m14.yaml")
    assert site.line.constant == "HUB1" and site.encodings == ("utf-8", "cp949", "euc-kr")
    assert set(site.classes) == {10, 15, 25} and site.columns["hub_jobs"].scale == 1.0


@pytest.mark.parametrize(("change", "says"), [
    ({"tims": 1}, "did you mean time"),
    ({"thresholds": {"surge_lvl": 3}}, "did you mean surge_level"),
    ({"timezone": "Asia/Soul"}, "Asia/Seoul"),
    ({"classes": {10: [30, 10]}}, "first edge"),
    ({"columns": {"hub_jobs": {"sauce": "A"}}}, "did you mean source"),
    ({"line": {}}, "constant"),
    ({"gaps": {"fill_up_to_min": -1}}, "greater than or equal to 0"),
])
def test_a_wrong_profile_is_refused_with_advice(change, says):
    with pytest.raises(ParameterError, match=says):
        checked(Site, LEAST | change, "m14.yaml")


def test_everything_wrong_is_said_at_once():
    with pytest.raises(ParameterError, match=r"(?s)time.*columns.*zone"):
        checked(Site, {"name": "x", "zone": 1}, "x.yaml")


def test_some_edges_keep_the_other_defaults():
    assert checked(Site, LEAST | {"classes": {10: [5, 20]}}, "x").classes == {10: (5, 20), 15: (10, 35), 25: (10, 40)}


def test_site_by_path(tmp_path):
    path = tmp_path / "m14.yaml"
    path.write_text("name: m14\ntime: {column: T}\ncolumns: {hub_jobs: A}\n")
    assert load_site(path).name == "m14"
    path.write_text("name: m15\ntime: {column: T}\ncolumns: {hub_jobs: A, hub_queue: B}\n")
    assert load_site(path).name == "m15"


@pytest.mark.parametrize(("sets", "says"), [
    ({"train.tress": "5"}, "did you mean trees"),
    ({"trian.trees": "5"}, "use one of train"),
    ({"train.trees": "many"}, "train.*trees"),
    ({"train.model": "xgb"}, "hub"),
    ({"nothing": "1"}, "no stage has this parameter"),
])
def test_wrong_sets_are_refused(sets, says):
    with pytest.raises(ParameterError, match=says):
        for stage in PARAMS:
            load_params(stage, "smoke", sets)


def test_a_bare_name_reaches_every_stage_that_has_it():
    sets = parse_sets({"seed": "7"})
    assert all(values == {"seed": 7} for values in sets.values())


def test_profiles_size_the_run():
    assert load_params("business", "smoke").days < load_params("business", "demo").days < load_params("business", "full").days


def test_unknown_profile():
    with pytest.raises(ParameterError, match="smoke"):
        load_profile("demi")


def test_environment_moves_folders(monkeypatch, tmp_path):
    monkeypatch.setenv("AMHS_RUNS", str(tmp_path))
    assert settings().runs == tmp_path


def test_skipping_needs_a_reason():
    with pytest.raises(ParameterError, match="skip_reason"):
        load_params("poc", "smoke", {"poc.skip": "true"})
    assert load_params("poc", "smoke", {"poc.skip": "true", "poc.skip_reason": "V8 is in use"}).skip


def test_nothing_after_the_equals_sign_is_empty_text():
    assert parse_sets({"business.line": ""})["business"] == {"line": ""}
