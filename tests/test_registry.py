"""The registry tells which models there are, which is in use and which was; it is never in the way of a run."""

import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from fake_runs import fake_package, fake_run
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_project import HOUSE

from amhs import registry
from amhs.core import ParameterError, read_json, sha256_tree, write_json
from amhs.registry import (
    RefusedError,
    RegistryError,
    alias_history,
    attach_package,
    diff_versions,
    fetch_version,
    find_version,
    list_versions,
    model_card,
    open_registry,
    promote,
    register_quietly,
    rollback,
    sync_runs,
)

pytestmark = pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")  # MLflow's, with SQLAlchemy 2.1


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory):
    "MLflow's database without a row; making one takes seconds."
    file = tmp_path_factory.mktemp("mlflow") / "mlflow.sqlite"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AMHS_ROOT", str(HOUSE))
        patch.setenv("AMHS_REGISTRY", f"sqlite:///{file}")
        with open_registry() as reached:
            reached.client.search_experiments()
    return file


def project(root, empty_database, patch):
    "A folder with settings, no runs, and an empty registry."
    root.mkdir(exist_ok=True)
    shutil.copy(HOUSE / "settings.ini", root)
    (root / "data").mkdir()
    shutil.copy(empty_database, root / "data/mlflow.sqlite")
    for key in ("AMHS_RUNS", "AMHS_DATA", "AMHS_REGISTRY_ARTIFACTS"):
        patch.delenv(key, raising=False)
    patch.setenv("AMHS_ROOT", str(root))
    patch.setenv("AMHS_REGISTRY", "sqlite:///data/mlflow.sqlite")
    return root / "runs"


@pytest.fixture
def runs(tmp_path, empty_database, monkeypatch):
    return project(tmp_path, empty_database, monkeypatch)


def at(day, hour=12, tz=UTC):
    return lambda: datetime(2026, 11, day, hour, tzinfo=tz)


def mlflow_client():
    with open_registry() as reached:
        return reached.client


def mlflow_runs():
    client = mlflow_client()
    return client.search_runs([e.experiment_id for e in client.search_experiments()])


# --- what is registered


def test_a_run_is_found_in_mlflow_with_all_a_person_looks_for(runs):
    home = fake_run(runs, "monday", skill=0.31)
    assert sync_runs()[["kind", "name", "what"]].values.tolist() == [["run", "monday", "new"], ["model", "fab1/1", "new"]]
    found, client = mlflow_runs()[0], mlflow_client()
    assert (found.info.run_name, found.info.status) == ("monday", "FINISHED")
    assert found.info.end_time - found.info.start_time == 3_660_000
    assert found.data.params == {"train.seed": "0", "train.trees": "60", "evaluate.seed": "0", "evaluate.bootstrap": "50"}
    assert found.data.metrics["evaluate.skill_change_max_10"] == found.data.metrics["evaluate.gate.skill_change_max_10"] == 0.31
    assert found.data.metrics["evaluate.levels.mae_max_10"] == 8.25
    tags = found.data.tags
    assert (tags["site"], tags["data"], tags["gates"], tags["mlflow.source.git.commit"]) == ("fab1", "d" * 64, "passed", "1234abcd" * 5)
    assert "| 07 evaluate | finished | 1 of 1 | verdict confirmed, skill_change_max_10 0.31 |" in tags["mlflow.note.content"]
    assert [d.dataset.digest for d in found.inputs.dataset_inputs] == ["d" * 12]
    kept = {f.path for folder in ("07_evaluate", "model") for f in client.list_artifacts(found.info.run_id, folder)}
    assert {"07_evaluate/experiment_report.html", "07_evaluate/manifest.json", "07_evaluate/evaluation.json", "model/card.md", "model/MLmodel"} <= kept
    version = client.get_model_version("fab1", "1")
    assert version.description == (home / "07_evaluate/artefacts/confirmed_model/card.md").read_text()
    assert version.run_id == found.info.run_id and version.source.endswith("/model")


def test_what_goes_in_and_out_is_read_by_mlflow_itself(runs):
    fake_run(runs, "monday")
    sync_runs()
    from mlflow.models import Model

    folder = mlflow_client().download_artifacts(mlflow_runs()[0].info.run_id, "model")
    signature = Model.load(folder).signature
    assert signature.inputs.input_names() == ["hub_jobs", "hub_queue"]
    assert signature.outputs.input_names() == ["now", "change_max_10"]


def test_registering_again_changes_nothing(runs):
    fake_run(runs, "monday")
    fake_run(runs, "tuesday", 17, confirmed=False, status="error")
    assert len(sync_runs()) == 3
    before = (runs.parent / "data/mlflow.sqlite").read_bytes()
    assert sync_runs().empty
    assert (runs.parent / "data/mlflow.sqlite").read_bytes() == before
    assert {r.info.run_name: r.info.status for r in mlflow_runs()} == {"monday": "FINISHED", "tuesday": "FAILED"}


def test_a_run_at_work_is_left_alone_until_it_ended(runs):
    fake_run(runs, "monday", status="running")
    assert sync_runs().empty
    fake_run(runs, "monday")
    assert len(sync_runs()) == 2


def test_a_run_somebody_went_on_in_is_the_same_run(runs):
    fake_run(runs, "monday", status="error", confirmed=False, skill=0.1)
    sync_runs()
    fake_run(runs, "monday", skill=0.4)
    assert sync_runs()["what"].tolist() == ["updated", "new"]
    assert [(r.info.status, r.data.metrics["evaluate.skill_change_max_10"]) for r in mlflow_runs()] == [("FINISHED", 0.4)]


def test_other_parameters_supersede_what_was_registered(runs):
    fake_run(runs, "monday", trees=60)
    sync_runs()
    fake_run(runs, "monday", trees=90, model="another")
    assert sync_runs()["what"].tolist() == ["new", "new"]
    assert sync_runs().empty
    found = {r.data.params["train.trees"]: r for r in mlflow_runs()}
    assert found["60"].data.tags["superseded_by"] == found["90"].info.run_id
    assert [find_version(n).run for n in "12"] == [found["60"].info.run_id, found["90"].info.run_id]


def test_a_model_confirmed_again_is_the_same_version(runs):
    fake_run(runs, "monday", model="same")
    fake_run(runs, "tuesday", 17, model="same")
    assert sync_runs().query("kind == 'model'")["name"].tolist() == ["fab1/1"]


def test_stages_taken_from_another_run_belong_to_it(runs):
    fake_run(runs, "monday", trees=33)
    tuesday = fake_run(runs, "tuesday", 17)
    shutil.rmtree(tuesday / "06_train")
    write_json(tuesday / "run.json", read_json(tuesday / "run.json") | {"sources": {"train": "monday"}})
    sync_runs()
    assert {r.info.run_name: r.data.params["train.trees"] for r in mlflow_runs()} == {"monday": "33", "tuesday": "33"}


def test_one_unreadable_run_does_not_keep_the_others_out(runs):
    fake_run(runs, "monday")
    (fake_run(runs, "tuesday", 17) / "07_evaluate/manifest.json").write_text("{")
    (fake_run(runs, "wednesday", 18) / "run.json").write_text("[]")
    fake_run(runs, "thursday", 19, model="other")
    done = sync_runs().set_index("name")["what"]
    assert done.to_dict() == {"monday": "new", "fab1/1": "new", "tuesday": "left out", "wednesday": "left out", "thursday": "new", "fab1/2": "new"}


def test_a_model_changed_after_its_run_is_not_registered(runs):
    (fake_run(runs, "monday") / "07_evaluate/artefacts/confirmed_model/model/change_max_10.ubj").write_bytes(b"other trees")
    done = sync_runs()
    assert done["what"].tolist() == ["new", "left out"] and "is not what its run wrote" in done["status"].iloc[1]
    with pytest.raises(RegistryError, match="no model is registered"):
        find_version("1")


def test_long_values_are_cut_and_never_fail(runs):
    fake_run(runs, "monday", trees="x" * 7000, card="# Card\n" + "정체 " * 4000)
    sync_runs()
    assert len(mlflow_runs()[0].data.params["train.trees"]) == 6000
    assert find_version("1").card.startswith("# Card")
    assert sync_runs().empty


@pytest.mark.parametrize("breaks", ["log_artifacts", "log_batch", "set_terminated", "create_model_version"])
def test_what_was_registered_halfway_is_finished_later(runs, monkeypatch, breaks):
    fake_run(runs, "monday")
    client = mlflow_client()
    with monkeypatch.context() as patch:
        patch.setattr(type(client), breaks, lambda *a, **k: (_ for _ in ()).throw(ConnectionError("cut")))
        with pytest.raises(RegistryError, match="ConnectionError: cut.*registers them later"):
            sync_runs()
    assert "fab1/1" in sync_runs()["name"].tolist()
    assert sync_runs().empty
    assert len(mlflow_runs()) == len(list_versions()) == 1
    assert fetch_version("1", runs.parent / "got").is_dir()


SYNC = "import sys, mlflow; from amhs.registry import sync_runs; print('ready', flush=True); sys.stdin.read(); print(len(sync_runs()))"


def test_two_who_register_at_once_do_not_do_it_twice(runs):
    for day in range(10, 14):
        fake_run(runs, f"run{day}", day)
    beside = subprocess.Popen([sys.executable, "-c", SYNC], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert beside.stdout.readline() == "ready\n"
    beside.stdin.close()
    with ThreadPoolExecutor(3) as pool:
        here = sum(pool.map(lambda _: len(sync_runs()), range(3)))
    assert int(beside.stdout.read()) + here == 8
    beside.wait(timeout=60)
    assert len(mlflow_runs()) == len(list_versions()) == 4


def test_a_package_made_later_is_kept_with_its_version(runs):
    fake_run(runs, "monday")
    fake_run(runs, "tuesday", 17, skill=0.4)
    sync_runs()
    made = fake_package(runs, "wednesday", of="tuesday")
    assert sync_runs().values.tolist()[1][:3] == ["package", "fab1/2", "new"]
    assert sync_runs().empty
    assert sha256_tree(fetch_version("2", runs.parent / "light", "package")) == sha256_tree(made)
    with pytest.raises(ParameterError, match="use one of model"):
        fetch_version("1", runs.parent / "light", "package")
    write_json(made / "more.json", {})
    assert attach_package("1", made).tags["package_sha256"] == sha256_tree(made)


# --- taking into use


def make_three(runs):
    for day, skill, gate in ((16, 0.30, True), (17, 0.38, True), (18, 0.45, False)):
        fake_run(runs, f"run{day}", day, skill, gate=gate)
    sync_runs()


@pytest.fixture(scope="module")
def three_registered(empty_database, tmp_path_factory):
    "MLflow's database with three versions: the second is the best, the third failed a gate."
    with pytest.MonkeyPatch.context() as patch:
        make_three(runs := project(tmp_path_factory.mktemp("registered") / "project", empty_database, patch))
    return runs.parent / "data/mlflow.sqlite"


@pytest.fixture
def three(tmp_path, three_registered, monkeypatch):
    "The same, to work with."
    return project(tmp_path, three_registered, monkeypatch)


def test_promotion_keeps_the_old_champion_and_rollback_takes_it_back(three):
    assert promote("1", clock=at(20)).aliases == ("champion",)
    promote("2", alias="challenger", clock=at(21))
    assert promote("2", clock=at(22)).aliases == ("champion",), "a champion is no challenger any more"
    assert find_version("previous").number == 1
    assert rollback(clock=at(23)).aliases == ("champion",)
    assert (find_version("champion").number, find_version("previous").number) == (1, 2)
    assert rollback(clock=at(24)).number == 2
    assert list_versions()[["version", "aliases", "best"]].values.tolist() == [[3, "", False], [2, "champion", True], [1, "previous", False]]


def test_gates_refuse_and_force_leaves_a_reason_on_record(three):
    with pytest.raises(RefusedError, match="failed: evaluate.skill_change_max_10") as refused:
        promote("3")
    assert refused.value.exit_code == 3
    for why in (None, "  "):
        with pytest.raises(ParameterError, match="says why"):
            promote("3", force=True, why=why)
    assert alias_history().empty
    forced = promote("3", force=True, why="the gate is too strict", who="kim", clock=at(20))
    assert "version 3 since 2026-11-20 12:00 UTC, by kim: the gate is too strict" in mlflow_client().get_registered_model("fab1").description
    assert forced.aliases == ("champion",) and "the gate is too strict" in forced.tags["forced"]
    assert alias_history().iloc[0][["who", "why", "forced"]].tolist() == ["kim", "the gate is too strict", True]
    assert "forced: 2026-11-20" in model_card("champion")


def test_promoting_again_is_nothing_new(three):
    promote("1", clock=at(20))
    promote("1", clock=at(21))
    assert len(alias_history()) == 1
    with pytest.raises(RegistryError, match="no previous champion"):
        rollback()
    for alias in ("previous", "Champion", "best"):
        with pytest.raises(ParameterError, match="no such alias"):
            promote("1", alias=alias)


def test_who_was_champion_is_known_for_any_day_and_zone(three):
    promote("1", clock=at(20, 23))
    promote("2", clock=at(22, 1))
    on = {d: find_version(f"2026-11-{d}", at(30)).number for d in (20, 21, 22, 25)}
    assert on == {20: 1, 21: 1, 22: 2, 25: 2}
    seoul = ZoneInfo("Asia/Seoul")  # where 23 h UTC is the morning of the next day
    with pytest.raises(ParameterError, match="the first was named on 2026-11-20"):
        find_version("2026-11-20", at(30, tz=seoul))
    assert find_version("2026-11-21", at(30, tz=seoul)).number == 1
    assert [find_version(w, at(22)).number for w in ("yesterday", "today")] == [1, 2]


def test_a_clock_that_goes_back_leaves_the_order_of_decisions(three):
    promote("1", clock=at(20))
    promote("2", clock=at(10))
    rollback(clock=at(5))
    assert alias_history().query("alias == 'champion'")["version"].tolist() == [1, 2, 1]
    assert find_version("2026-11-20", at(30)).number == find_version("champion").number == 1


@pytest.mark.parametrize(("ref", "number"), [("3", 3), ("fab1/3", 3), ("fab1@3", 3), ("best", 2), ("fab1@best", 2), ("champion", 1), ("fab1", 1),
                                           ("fab1/champion", 1)])
def test_a_version_has_many_names(three, ref, number):
    promote("1")
    assert find_version(ref).number == number


@pytest.mark.parametrize(("ref", "said"), [
    ("4", "there are 1, 2, 3"),
    ("0", "there are 1, 2, 3"), ("fab2/1", "use one of fab1"), ("champion", "no version has that name now"), ("bets", "best"),
    ("2026-13-01", "write it like"), ("yesterday", "none was ever named"), ("", "write 3, fab1/3"), ("fab1/", "write 3"), ("'; --", "write 3"),
    ("-1", "write 3"),
])
def test_a_name_that_means_nothing_says_what_would(three, ref, said):
    with pytest.raises(ParameterError, match=said):
        find_version(ref)


def test_several_sites_have_models_of_their_own(runs):
    fake_run(runs, "monday")
    fake_run(runs, "tuesday", 17, site="fab2/west")
    fake_run(runs, "wednesday", 18, site="fab1")
    sync_runs()
    assert sorted(map(str, [find_version(r) for r in ("fab1/2", "fab2-west/1")])) == ["fab1/2", "fab2-west/1"]
    with pytest.raises(ParameterError, match="say which: fab1/1"):
        promote("1")
    promote("fab2-west/1")
    promote("fab1@best")
    assert list_versions(best=True)[["model", "aliases"]].values.tolist() == [["fab1", "champion"], ["fab2-west", "champion"]]
    assert list_versions("fab1")["version"].tolist() == [2, 1]


def test_best_is_by_the_headline_number_the_newest_shares(runs):
    fake_run(runs, "old", 1, 900.0, metric="points")
    fake_run(runs, "a", 2, 4.0, metric="mae", op="<=")
    fake_run(runs, "b", 3, 3.0, metric="mae", op="<=")
    fake_run(runs, "c", 4, 5.0, metric="mae", op="<=")
    fake_run(runs, "d", 5, 1.0, metric="mae", op="<=", gate=False)
    sync_runs()
    assert find_version("best").tags["amhs.run_id"] == "b"


def test_no_version_is_best_when_none_passed(runs):
    fake_run(runs, "a", gate=False)
    sync_runs()
    with pytest.raises(ParameterError, match="no version has that name now"):
        find_version("best")


SEQUENCES = count()


@settings(max_examples=7)
@given(st.lists(st.sampled_from(["1", "2", "3", "back", "2 challenger", "3 shadow", "1 challenger"]), max_size=8))
def test_any_sequence_of_decisions_ends_as_a_simple_model_says(three_registered, decisions):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        project(Path(folder) / f"s{next(SEQUENCES)}", three_registered, patch)
        held, champions = {}, []
        for i, decision in enumerate(decisions):
            clock, (what, _, alias) = (lambda i=i: datetime(2026, 11, 20, tzinfo=UTC) + timedelta(days=i)), decision.partition(" ")
            if what == "back" and not {"champion", "previous"} <= held.keys():
                with pytest.raises(RegistryError, match="no previous champion"):
                    rollback("fab1", clock=clock)
            elif what == "back":
                rollback("fab1", clock=clock)
                held |= {"champion": held["previous"], "previous": held["champion"]}
            else:
                promote(what, alias=alias or "champion", force=True, why="told to", clock=clock)
                new = int(what)
                if not alias and held.get("champion", new) != new:
                    held["previous"] = held["champion"]
                if not alias and held.get("champion") != new:
                    held = {a: v for a, v in held.items() if a == "previous" or v != new}
                held[alias or "champion"] = new
            champions.append(held.get("champion"))
            table = list_versions()
            assert {a: n for n, held_by in zip(table["version"], table["aliases"]) for a in held_by.split(", ") if a} == held
        for i, champion in enumerate(champions):
            if champion:
                assert find_version(f"{datetime(2026, 11, 20) + timedelta(days=i):%Y-%m-%d}", at(30)).number == champion


# --- reading


def test_a_difference_names_what_differs_and_nothing_else(runs):
    fake_run(runs, "a", 16, 0.3, trees=60)
    fake_run(runs, "b", 17, 0.4, trees=90, data="e" * 64)
    sync_runs()
    found = diff_versions("1", "2").set_index("name")
    assert found.loc["train.trees"].tolist() == ["parameter", "60", "90"]
    assert found.loc["data", "fab1/2"] == "e" * 64
    assert found.loc["evaluate.skill_change_max_10"].tolist() == ["figure", "0.3", "0.4"]
    assert "evaluate.bootstrap" not in found.index and "commit" not in found.index
    assert diff_versions("1", "1").empty


def test_the_card_says_where_a_model_comes_from_and_what_it_is_used_as(three):
    promote("2")
    card = model_card("2")
    for said in ("Skill 0.38", "version: fab1/2", "used as: champion", "run: run17", "d" * 64, "1234abcd", "gates: passed"):
        assert said in card


def test_fetched_files_are_those_that_were_confirmed(runs):
    make_three(runs)
    folder = runs.parent / "out"
    write_json(folder / "old.json", {})
    confirmed = runs / "run17/07_evaluate/artefacts/confirmed_model"
    assert sha256_tree(fetch_version("best", folder)) == sha256_tree(confirmed)
    assert not (folder / "old.json").exists()
    place = Path(find_version("2").source.removeprefix("file://")) / "model/change_max_10.ubj"
    place.write_bytes(b"other trees")
    with pytest.raises(RegistryError, match="are not what was confirmed"):
        fetch_version("2", folder)
    assert sha256_tree(folder) == sha256_tree(confirmed), "what was there is still there"
    shutil.rmtree(place.parent)
    with pytest.raises(RegistryError, match="not what was confirmed|failed"):
        fetch_version("2", folder)


# --- the registry is away


def garbage(root):
    (root / "data/mlflow.sqlite").write_bytes(b"no database " * 1000)


def folder_in_the_way(root):
    (root / "data/mlflow.sqlite").unlink()
    (root / "data/mlflow.sqlite").mkdir()


@pytest.mark.parametrize(("uri", "harm", "said"), [
    ("http://127.0.0.1:9", None, "does not answer"), ("postgresql://amhs@127.0.0.1:9/x", None, "does not answer"),
    ("sqlite:///data/mlflow.sqlite", garbage, "not a database"), ("sqlite:///data/mlflow.sqlite", folder_in_the_way, "unable to open"),
    ("sqlite:////no/such/folder/mlflow.sqlite", None, "unable to open"),
])
def test_a_registry_that_is_away_says_so_at_once_and_costs_nothing(runs, empty_database, monkeypatch, uri, harm, said):
    fake_run(runs, "monday")
    if harm:
        harm(runs.parent)
    monkeypatch.setenv("AMHS_REGISTRY", uri)
    begun = time.monotonic()
    for ask in (sync_runs, list_versions, lambda: promote("1"), rollback):
        with pytest.raises(RegistryError, match=f"{said}.*registers them later"):
            ask()
    assert register_quietly().startswith("Not registered: the registry")
    assert time.monotonic() - begun < 10
    shutil.copy(empty_database, runs.parent / "data/new.sqlite")
    monkeypatch.setenv("AMHS_REGISTRY", "sqlite:///data/new.sqlite")
    assert register_quietly() == "Registered: run monday, model fab1/1"
    assert register_quietly() == ""


def test_a_registry_that_is_off_costs_nothing(runs, monkeypatch):
    fake_run(runs, "monday")
    monkeypatch.setenv("AMHS_REGISTRY", "off")
    assert register_quietly() == ""
    with pytest.raises(RegistryError, match="the registry is off"):
        sync_runs()
    code = "import sys; from amhs import registry; registry.register_quietly(); print([m for m in ('mlflow', 'pandas', 'sqlalchemy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_registry_that_may_only_be_read_says_so():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        shutil.copy(HOUSE / "settings.ini", root)
        (root / "data").mkdir()
        (root / "data/mlflow.sqlite").touch()
        for path, mode in ((root / "data/mlflow.sqlite", 0o444), (root / "data", 0o555), (root, 0o555)):
            path.chmod(mode)
        read, write = os.pipe()
        if (child := os.fork()) == 0:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setuid(pwd.getpwnam("nobody").pw_uid)
            os.environ |= {"AMHS_ROOT": str(root), "AMHS_REGISTRY": "sqlite:///data/mlflow.sqlite"}
            os.write(write, registry.register_quietly().encode())
            os._exit(0)
        os.close(write)
        os.waitpid(child, 0)
        with open(read) as f:
            assert "Not registered: the registry's file may only be read" in f.read()
        root.chmod(0o755)


def test_another_process_at_work_is_waited_for(runs, monkeypatch):
    fake_run(runs, "monday")
    monkeypatch.setattr(registry._alone.__wrapped__, "__defaults__", (0.2,))
    with registry._alone(runs), pytest.raises(RegistryError, match="another process is at work"):
        sync_runs()
    assert len(sync_runs()) == 2


# --- a real server


@pytest.fixture
def server(tmp_path):
    "`mlflow server` on a free port of this machine."
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    quiet = os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true"}
    words = ["server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1", "--backend-store-uri", f"sqlite:///{tmp_path}/server.sqlite",
             "--artifacts-destination", str(tmp_path / "kept")]
    with open(tmp_path / "server.log", "w") as log:
        at_work = subprocess.Popen([Path(sys.executable).with_name("mlflow"), *words], env=quiet, stdout=log, stderr=log, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and at_work.poll() is None:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(at_work.pid, 15)
        at_work.wait(timeout=30)


@pytest.mark.full
def test_a_server_serves_as_well_as_a_file(runs, server, monkeypatch):
    import httpx

    monkeypatch.setenv("AMHS_REGISTRY", server)
    for day, skill in ((16, 0.3), (17, 0.4)):
        fake_run(runs, f"run{day}", day, skill)
    assert len(sync_runs()) == 4
    assert sync_runs().empty
    promote("1", clock=at(20))
    promote("best", clock=at(21), why="more skill")
    rollback(clock=at(22))
    assert alias_history()["version"].tolist()[:2] == [2, 1]
    assert find_version("2026-11-21", at(30)).number == 2
    confirmed = runs / "run17/07_evaluate/artefacts/confirmed_model"
    assert sha256_tree(fetch_version("2", runs.parent / "got")) == sha256_tree(confirmed)
    shown = httpx.get(f"{server}/model-versions/get-artifact", params={"name": "fab1", "version": "2", "path": "MLmodel"}, timeout=30)
    assert "hub_jobs" in shown.json()["signature"]["inputs"]
    assert "MLflow" in httpx.get(server, timeout=30).text
