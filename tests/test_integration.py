"""The Bento, started in processes of its own and tried over the network; and the tools that try it, which must see what is wrong."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from threading import Thread

import pandas as pd
import psutil
import pytest
from served import labelled, small_package

from amhs import bento, integration
from amhs.client import window_of
from amhs.config import load_params, read_yaml, settings
from amhs.core import InputError, ParameterError, StageError
from amhs.deployment import deploy, read_deployment
from amhs.inference import load_package
from amhs.load import Offered, poisson_times
from amhs.processes import Child, free_port

PARAMS = load_params("integration", "smoke").model_copy(update={"rehearsal_s": 3.0})
TOLD = "a key is needed, says the Bento"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    "A package and its Bento; the unpacked one says a sentence that no other copy of the code says."
    home = tmp_path_factory.mktemp("bento")
    data = labelled(days=3)
    packed = small_package(tmp_path_factory)
    tag = bento.build_bento(packed, home / "amhs.bento")
    unpacked = bento.unpack_bento(home / "amhs.bento", home / "unpacked")
    clean = shutil.copytree(unpacked, home / "clean")
    api = unpacked / "src/amhs/api.py"
    api.write_text(api.read_text().replace('"a key is needed"', f'"{TOLD}"'))
    return {"home": home, "data": data, "packed": packed, "package": load_package(packed), "tag": tag, "bento": unpacked, "clean": clean}


@pytest.fixture(scope="module")
def tried(made):
    "One started service, shared; staleness is off in it, as for a replay."
    package = made["package"]
    before, day = integration.split_history(made["data"].telemetry, package, 40, datetime.now(UTC))
    calm = integration.calm_rows(package, integration.newest_day(made["data"].telemetry, package))
    with integration.running(made["bento"], made["home"] / "service", 2, before, **integration.STALENESS_OFF) as service:
        yield {**made, "service": service, "before": before, "day": day, "calm": calm, "window": window_of(calm, replay=True)}


def test_a_bento_holds_what_it_needs_and_nothing_else(made):
    folder, version = made["clean"], made["package"].version
    assert re.fullmatch(rf"amhs:{version}-[0-9a-f]{{8}}", made["tag"])
    assert bento.bento_problems(folder) == []
    told = read_deployment(folder / "src/data/deployed")
    assert {line: d.live for line, d in told.lines.items()} == {"HUB1": version}
    assert load_package(folder / "src/data/deployed/packages" / version).version == version
    parts = set(bento.bento_contents(folder).index)
    assert {"src/service.py", "src/amhs", "src/params", "src/data/deployed", "src/requirements.lock", "bento.yaml"} <= parts
    assert not {"src/nbs", "src/tests", "src/runs", "src/bench"} & parts


def test_every_pin_of_a_bento_has_its_hash(made):
    blocks = re.split(r"\n(?=\S)", (made["clean"] / "src/requirements.lock").read_text().strip())
    assert len(blocks) > 30 and all("==" in b and "--hash=sha256:" in b for b in blocks)
    names = {re.match(r"[\w.-]+", b)[0] for b in blocks}
    assert {"bentoml", "numba", "starlette", "psycopg"} <= names and not {"mlflow", "jupyterlab", "pytest", "papermill"} & names


@pytest.mark.full
def test_the_pins_are_all_the_service_loads(made, tmp_path):
    "Whatever distribution a serving process has loaded, after an answer and its explanation, is pinned in the Bento."
    code = """
import json, sys
from importlib.metadata import packages_distributions
import bentoml, bentoml_cli.cli, bentoml_cli.serve, service, psycopg, uvloop, httptools, amhs.cli, amhs.serving, onnxruntime
from amhs.inference import load_package
import numpy as np
package = load_package(sys.argv[1])
package.explain(np.zeros(len(package.engine.features), "float32"), package.horizons[0])
known = packages_distributions()
print(json.dumps(sorted({d for name in {m.split(".")[0] for m in sys.modules} for d in known.get(name, ())})))
"""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("AMHS_")} | {"BENTOML_DO_NOT_TRACK": "True"}
    command = [sys.executable, "-c", code, made["packed"]]
    folder = shutil.copytree(made["clean"], tmp_path / "bento")  # running leaves compiled code behind
    done = subprocess.run(command, cwd=folder / "src", env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    loaded = {re.sub(r"[-_.]+", "-", name).lower() for name in json.loads(done.stdout.splitlines()[-1])} - {"amhs", "pip", "setuptools"}
    pinned = {re.match(r"[\w.-]+", b)[0] for b in re.split(r"\n(?=\S)", (made["clean"] / "src/requirements.lock").read_text().strip())}
    if_there = {"cffi", "pycparser", "charset-normalizer"}  # used where they happen to be; nobody asks for them
    assert len(loaded) > 20 and loaded - pinned - if_there == set()


@pytest.mark.parametrize(("file", "text"), [
    ("src/api_keys.json", "{}"), ("src/data/store.sqlite", ""), ("src/model.pkl", ""), ("src/data/deployed/history.jsonl", ""),
    ("env/python/requirements.txt", "--index-…\nnumpy==2"), ("src/note.md", f"amhs_{'0' * 8}_{'f' * 64}"),
    ("src/settings.ini", "store = postgresql://amhs:secret@db/amhs"), ("src/note.md", f"built in {Path(__file__).parent.parent}"),
])
def test_what_must_not_leave_the_house_is_seen(made, tmp_path, file, text):
    folder = tmp_path / "bento"
    (folder / file).parent.mkdir(parents=True)
    (folder / file).write_text(text)
    assert [p.split(":")[0] for p in bento.bento_problems(folder)] == [file]


@pytest.mark.full
def test_a_bento_built_again_is_the_same_but_for_its_time(made, tmp_path):
    assert bento.build_bento(made["packed"], tmp_path / "again.bento") == made["tag"]
    assert bento.bento_hash(bento.unpack_bento(tmp_path / "again.bento", tmp_path / "again")) == bento.bento_hash(made["clean"])
    (tmp_path / "again/src/params/serving.yaml").write_text("keep_days: 9\n")
    assert bento.bento_hash(tmp_path / "again") != bento.bento_hash(made["clean"])


def test_a_broken_file_is_no_bento(made, tmp_path):
    (tmp_path / "half.bento").write_bytes((made["home"] / "amhs.bento").read_bytes()[:5000])
    with pytest.raises(InputError, match="no Bento"):
        bento.unpack_bento(tmp_path / "half.bento", tmp_path / "half")
    assert not (tmp_path / "half").exists()


def test_the_day_replayed_is_what_offline_inference_says(tried):
    "Minute by minute over new connections, by two workers; and a history that was another one is seen."
    service, package, before, day = tried["service"], tried["package"], tried["before"], tried["day"]
    first, rest = day.iloc[:30].reset_index(drop=True), day.iloc[30:].reset_index(drop=True)
    said = integration.replay(service, package, before, first)
    assert said["same"].all() and set(said["status"]) == {"new"} and set(said["source"]) == {"hybrid"}
    other = pd.concat([before, first], ignore_index=True)
    other["hub_jobs"] += 60
    wrong = integration.replay(service, package, other, rest)
    assert not wrong["same"].any()


def test_the_bento_answers_with_its_own_code(tried):
    status, body = integration.ask_raw(tried["service"], "GET", "/lines", headers={"authorization": ""})
    assert status == 401 and TOLD in body.decode()


def test_wrong_requests_are_refused_with_a_sentence(tried):
    refused = integration.refusals(tried["service"])
    assert len(refused) > 30 and refused["passed"].all(), refused[~refused["passed"]]
    assert refused.loc["huge body", "status"] == 413 and refused.loc["no key", "status"] == 401


def test_the_contract_is_kept(tried):
    found = integration.contract(tried["service"], PARAMS)
    assert len(found) == 10 and found["requests"].min() > 0
    assert found["wrong"].sum() == 0, found["first_wrong"].tolist()
    assert " × 200" in found.loc["POST /v1/predict", "statuses"] and " × 4" in found.loc["POST /v1/predict", "statuses"]


def test_an_answer_the_document_does_not_announce_is_seen(tried, monkeypatch):
    "The document, robbed of the fields an answer has and of a status."
    real = integration.ask_raw

    def forged(service, method, path, *more):
        status, body = real(service, method, path, *more)
        if path != "/openapi.json":
            return status, body
        document = json.loads(body)
        document["paths"] = {p: document["paths"][p] for p in ("/v1/lines", "/v1/health")}
        document["paths"]["/v1/lines"]["get"]["responses"] = {"204": {"description": "nothing"}, "401": {"description": "no key"}}
        document["paths"]["/v1/health"]["get"]["responses"]["200"]["content"]["application/json"]["schema"] = {"type": "array"}
        return status, json.dumps(document).encode()

    monkeypatch.setattr(integration, "ask_raw", forged)
    found = integration.contract(tried["service"], PARAMS)
    assert (found["wrong"] > 0).all() and all(found["first_wrong"].str.contains("/v1/"))


def test_what_users_expect(tried):
    checks = {n: c for n, c in integration.load_checks().items() if n != "stale"}
    stale = integration.Check(says="two months old", age_min=61 * 1440, expect={"source": ("rules",), "note": "old"})
    alarmed = integration.Check(says="wrong on purpose", expect={"alarm": True})
    heat = integration.Check(says="of a column that is not there", below={"hub_temperature": 3}, expect={"alarm": True})
    found = integration.acceptance(tried["service"], tried["package"], tried["calm"], checks | {"stale": stale, "alarmed": alarmed, "heat": heat})
    assert found["verdict"].drop(["alarmed", "heat"]).eq("pass").all(), found
    assert found.loc["alarmed", ["result", "verdict"]].tolist() == ["`alarm: False`", "FAIL"]
    assert found.loc["heat", "verdict"] == "not applicable"
    assert integration.acceptance_table(found, "ko").index.str.contains("[가-힣]").sum() == len(checks)


def test_a_mistyped_check_is_refused(tmp_path):
    (tmp_path / "acceptance.yaml").write_text("calm: {says: hello, expects: {}}\n")
    with pytest.raises(ParameterError, match="expect"):
        integration.load_checks(tmp_path / "acceptance.yaml")


def said(p99_ms, refused=0):
    return {"p99_ms": p99_ms, "statuses": {"200": 1000 - refused, "503": refused}}


@pytest.mark.parametrize(("reports", "offered"), [
    ([said(9)], 1),
    ([said(200), said(9)], 2),
    ([said(9, refused=5), said(9, refused=1)], 2),
    ([said(200), said(9, refused=5), said(200)], 3),
])
def test_a_disturbed_load_is_offered_again_and_every_attempt_is_told(monkeypatch, reports, offered):
    left = list(reports)
    monkeypatch.setattr(integration, "_load", lambda *_: left.pop(0))
    params = load_params("integration", "full")
    assert params.load_attempts == 3 and params.max_refused_share == 0.001
    found = integration.loads(None, None, params, p99_ms=100)
    assert [*found.values()] == reports[:offered] and [*found][0] == "constant load"
    assert set(found) <= set(read_yaml(settings().params / "templates/ko/terms.yaml")["words"]), "they have Korean names"


def test_a_model_is_switched_and_switched_back_without_a_dropped_request(tried, tmp_path):
    service, package = tried["service"], tried["package"]
    previous = integration.previous_package(tried["packed"], tmp_path / "twin", tmp_path / "none")
    found = integration.rehearse(service, tried["packed"], previous, tried["window"], PARAMS)
    table = integration.load_table(rehearsal=found)
    assert table.loc["rehearsal", "dropped"] == 0 and table.loc["rehearsal", "requests"] > 50
    assert found["to"] == package.version != found["from"] and 0 < found["switch_s"] < 30
    assert read_deployment(service.deployed).lines["HUB1"].live == found["from"], "rolled back at the end"
    assert read_deployment(tried["clean"] / "src/data/deployed").lines["HUB1"].live == package.version, "the Bento itself is as it was"


def test_whoever_is_live_at_the_site_is_switched_from(made, tmp_path):
    other = integration.twin(made["packed"], tmp_path / "other")
    deploy(other, ["HUB1"], folder=tmp_path / "site")
    found = integration.previous_package(made["packed"], tmp_path / "twin", tmp_path / "site")
    assert load_package(found).version == load_package(other).version and not (tmp_path / "twin").exists()


@pytest.mark.parametrize(("wanted", "live", "passed", "role"), [
    ("auto", None, True, "live"), ("auto", "other", True, "shadow"), ("auto", "same", True, "none"), ("auto", None, False, "none"),
    ("live", "other", True, "live"), ("canary", "other", True, "canary"), ("none", None, True, "none"), ("live", "other", False, "none"),
])
def test_who_answers_from_now_on(made, tmp_path, wanted, live, passed, role):
    site, version = tmp_path / "site", made["package"].version
    other = load_package(integration.twin(made["packed"], tmp_path / "other"))
    if live:
        deploy(other.folder if live == "other" else made["packed"], ["HUB1"], folder=site)
    before = read_deployment(site)
    assert integration.decide_role(wanted, passed, made["package"], site)[0] == role
    record = integration.put_in_place(role, "a test", made["packed"], "run-1", 0.2, site)
    after = read_deployment(site)
    if role == "none":
        assert after == before
    else:
        now = after.lines["HUB1"]
        assert getattr(now, role) == version and (now.previous == other.version) == (role == "live" and live == "other")
        assert now.canary_share == (0.2 if role == "canary" else 0)
    assert record["role"] == role and len(integration.line_table(record)) == 2


def alive(mark: str) -> list[int]:
    "Processes that have a word in their environment or command."
    found = []
    for process in psutil.process_iter():
        try:
            if mark in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


def test_a_child_ends_with_whoever_started_it(tmp_path):
    "Also if that one is killed on the spot, and with all the child had started."
    mark = f"{tmp_path}/mark"
    sleeps = "import time; time.sleep(300)"
    child = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', '{sleeps}', '{mark}'], start_new_session=True); {sleeps}"
    code = f"import os, sys; from amhs.processes import Child; Child([sys.executable, '-c', {child!r}, {mark!r}], os.environ, '{tmp_path}/log'); {sleeps}"
    parent = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 30
    while len(alive(mark)) < 4 and time.monotonic() < until:  # parent, guard, child, grandchild
        time.sleep(0.1)
    assert len(alive(mark)) == 4
    parent.kill()
    parent.wait()
    while alive(mark) and time.monotonic() < until:
        time.sleep(0.1)
    assert alive(mark) == []


def test_an_error_in_the_middle_leaves_no_service_behind(made, monkeypatch):
    "The service is ended before the error goes on; here, the start itself fails."
    broken = made["home"] / "broken"
    shutil.copytree(made["clean"], broken)
    (broken / "src/service.py").write_text("raise RuntimeError('not today')\n")
    with pytest.raises(StageError, match="not today"), integration.running(broken, made["home"] / "never", within_s=60):
        pass
    assert alive(str(broken)) == []


class Slow:
    "A server that sleeps before its first answer, or hangs up; in a thread."

    def __init__(self, behave):
        self.behave, self.port, self.loop = behave, free_port(), asyncio.new_event_loop()
        Thread(target=self.work, daemon=True).start()

    def work(self):
        asyncio.set_event_loop(self.loop)
        self.loop.create_task(asyncio.start_server(self.serve, "127.0.0.1", self.port))
        self.loop.run_forever()

    async def serve(self, reader, writer):
        try:
            while await reader.readuntil(b"\r\n\r\n"):
                if not await self.behave():
                    writer.close()
                    return
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
        except (asyncio.IncompleteReadError, ConnectionError):
            return


def offered(behave, **options) -> dict:
    with Offered(f"http://127.0.0.1:{Slow(behave).port}/", **{"rate": 100, "seconds": 1, "connections": 4, "patience": 3} | options) as load:
        return load.result()


def test_latency_counts_from_the_scheduled_time():
    "A server that stands still for half a second at its first request makes all that came meanwhile late, not just one."
    stood = []

    async def stand_still_once():
        if not stood:
            stood.append(True)
            time.sleep(0.5)
        return True

    said = offered(stand_still_once)
    assert said["statuses"] == {"200": 100}
    assert said["max_ms"] > 450 and said["p95_ms"] > 300, "closed loops would have called this a p95 of nothing"


def test_a_connection_that_is_hung_up_is_a_dropped_request():
    count = []

    async def every_tenth():
        count.append(1)
        return len(count) % 10 != 0

    said = offered(every_tenth)
    assert said["statuses"]["lost"] == 10 and said["statuses"]["200"] == 90
    assert integration.load_table(x=said).loc["x", "dropped"] == 10


def test_times_are_those_of_callers_who_do_not_know_of_one_another():
    times = poisson_times(200, 50, seed=3)
    gaps = times[1:] - times[:-1]
    assert abs(gaps.mean() - 1 / 200) < 4e-4 and abs(gaps.std() / gaps.mean() - 1) < 0.05
    assert (poisson_times(200, 50, seed=3) == times).all()


def test_a_child_that_never_gets_ready_is_given_up(tmp_path):
    with Child(["sleep", "60"], os.environ, tmp_path / "log") as child, pytest.raises(StageError, match="did not become ready"):
        child.wait_ready("http://127.0.0.1:9/", within_s=0.5)
    assert child.process.poll() is not None
