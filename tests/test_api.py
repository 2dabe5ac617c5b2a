"""The service's interface in process: every endpoint, every refusal with its status and a sentence, keys, limits, shedding."""

import asyncio
import contextlib
import json
import threading
import time
from datetime import UTC, datetime
from types import SimpleNamespace

import httpx
import msgspec
import numpy as np
import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st
from served import Clock, labelled, make_desk, small_package, window_at
from starlette.testclient import TestClient

from amhs.access import add_key, revoke_key
from amhs.api import create_app, openapi
from amhs.client import Client, ServiceError
from amhs.deployment import assign
from amhs.door import Direct
from amhs.messages import Answer, Failure
from amhs.serve import Serving
from amhs.telemetry import COLUMNS


@pytest.fixture(scope="module")
def data():
    return labelled(days=3)


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    return small_package(tmp_path_factory)


@contextlib.contextmanager
def serving(home, package, clock, **told):
    "The application at work, a key, and a client."
    desk = make_desk(home, [package], serving=Serving(**told), clock=clock)
    key = add_key("a test", home / "keys.json")
    with TestClient(create_app(lambda: desk, home / "keys.json"), raise_server_exceptions=False) as http:
        http.headers["authorization"] = f"Bearer {key}"
        http.key, http.desk, http.front = key, desk, http.app.state.front
        yield http


@pytest.fixture(scope="module")
def http(data, package, tmp_path_factory):
    clock = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime())
    with serving(tmp_path_factory.mktemp("site"), package, clock, shed_after_ms=10_000) as http:
        http.clock = clock
        yield http


def body(data, end=2000, **changes):
    return msgspec.json.encode(window_at(data.telemetry, end, **changes))


def row(data, i, **changes):
    r = data.telemetry.iloc[i]
    return {"line": "HUB1", "timestamp": r["timestamp"].isoformat(), "values": {c: float(r[c]) for c in COLUMNS}} | changes


def refused(response, status, said):
    assert response.status_code == status, response.text
    assert said in msgspec.json.decode(response.content, type=Failure).error.what


def soon(found, within_s=5):
    "Wait for what is committed behind an answer."
    until = time.monotonic() + within_s
    while not (value := found()) and time.monotonic() < until:
        time.sleep(0.02)
    return value


# --- endpoints ---


def test_predict_and_what_is_kept_of_it(http, data):
    answer = msgspec.json.decode(http.post("/predict", content=body(data, replay=False)).content, type=Answer)
    assert answer.source == "hybrid" and answer.role == "live" and answer.made == datetime.fromtimestamp(http.clock.now, UTC)
    kept = soon(lambda: http.get("/predictions", params={"id": answer.id, "inputs": "true"}).json()["predictions"])[0]
    assert msgspec.convert(kept["answer"], Answer, strict=False) == answer and len(kept["inputs"]["rows"]) == 30
    again = http.post("/predict", json={"line": "HUB1", "end": answer.at.isoformat(), **kept["inputs"]}).json()
    assert again["horizons"] == kept["answer"]["horizons"]


def test_a_batch_answers_each_window_in_its_place(http, data):
    windows = [msgspec.to_builtins(window_at(data.telemetry, e)) for e in (100, 900)]
    windows.insert(1, windows[0] | {"line": "HUB7"})
    answers = http.post("/predict/batch", json={"windows": windows}).json()["answers"]
    assert "no such line" in answers[1]["error"]["what"]
    alone = [http.post("/predict", json=windows[i]).json() for i in (0, 2)]
    assert [a["horizons"] for a in (answers[0], answers[2])] == [a["horizons"] for a in alone]


def test_explain_adds_up_and_is_kept(http, data):
    answer = http.post("/predict", content=body(data)).json()
    soon(lambda: http.get("/predictions", params={"id": answer["id"]}).json()["predictions"])
    for asked in ({"prediction": answer["id"]}, {"window": msgspec.to_builtins(window_at(data.telemetry, 2000))}):
        found = http.post("/explain", json={**asked, "top": 1000, "target": "max", "horizon_min": 10}).json()
        assert found["base"] + sum(c["adds"] for c in found["contributions"]) == pytest.approx(found["total"], abs=0.1)
        level = next(h for h in answer["horizons"] if h["horizon_min"] == 10)["max"]["level"]
        assert answer["now"] + found["total"] == pytest.approx(level, abs=5)  # the answer is put in order afterwards
    kept = http.get("/predictions", params={"id": answer["id"]}).json()["predictions"][0]
    assert kept["explanation"]["contributions"] == http.post("/explain", json={"prediction": answer["id"], "top": 1000}).json()["contributions"]
    peak = max(answer["horizons"], key=lambda h: h["max"]["level"])["horizon_min"]
    alarm = http.post("/explain", json={"prediction": answer["id"], "target": "alarm", "horizon_min": peak}).json()
    assert answer["now"] + alarm["total"] == pytest.approx(answer["alarm"]["score"], abs=5)
    refused(http.post("/explain", json={"prediction": answer["id"], "horizon_min": 11}), 422, "no such forecast")
    refused(http.post("/explain", json={}), 422, "nothing to explain")
    refused(http.post("/explain", json={"prediction": "nothing"}), 404, "no such prediction")


def test_rows_observed_become_forecasts_that_can_be_explained(http, data):
    for i in range(1900, 1940):
        http.clock.at(data.telemetry["timestamp"].iloc[i])
        receipt = http.post("/observe", json=row(data, i)).json()
        assert receipt["status"] == "new"
    assert receipt["answer"]["source"] == "hybrid" and receipt["answer"]["notes"] == []
    assert http.get("/forecast/HUB1").json()["horizons"] == receipt["answer"]["horizons"]
    assert http.post("/observe", json=row(data, 1939)).json()["status"] == "duplicate"
    assert http.get("/lines").json()["lines"][0]["lag_min"] == 0
    soon(lambda: http.get("/predictions", params={"id": receipt["answer"]["id"]}).json()["predictions"])
    told = http.post("/explain", json={"prediction": receipt["answer"]["id"], "top": 3}).json()
    assert len(told["contributions"]) == 3 and told["at"] == receipt["answer"]["at"]
    http.clock.now += 3600
    stale = http.get("/forecast/HUB1").json()
    assert stale["source"] == "rules" and "60 min old" in stale["notes"][0]
    http.clock.at(data.telemetry["timestamp"].iloc[2000])


def test_feedback_is_kept_with_its_prediction(http, data):
    answer = http.post("/predict", content=body(data)).json()
    soon(lambda: http.get("/predictions", params={"id": answer["id"]}).json()["predictions"])
    noted = http.post("/feedback", json={"prediction": answer["id"], "verdict": "false_alarm", "comment": "승강기 점검", "operator": "kim"}).json()
    kept = http.desk.store.read("feedback", id=noted["id"]).iloc[0]
    assert (kept["line"], kept["verdict"], kept["comment"]) == ("HUB1", "false_alarm", "승강기 점검")
    refused(http.post("/feedback", json={"prediction": "nothing", "verdict": "missed"}), 404, "no such prediction")
    refused(http.post("/feedback", json={"prediction": answer["id"], "verdict": "perhaps"}), 400, "not what this endpoint takes")


def test_models_health_and_lines(http, package):
    model = http.get("/model").json()["models"][0]
    assert model["engine"] == "forest" and "Confirmed model 1" in model["card"] and model["lines"] == ["HUB1"]
    del http.headers["authorization"]
    assert http.get("/health").json()["status"] == "ok"
    http.headers["authorization"] = f"Bearer {http.key}"
    refused(http.get("/forecast/HUB7"), 404, "no such line")
    for query, said in [({"limit": "0"}, "whole number"), ({"limit": "ten"}, "whole number"), ({"since": "yesterday"}, "ISO 8601"),
                        ({"since": "2026-01-01T00:00:00"}, "ISO 8601"), ({"lines": "HUB1"}, "no such filter")]:
        refused(http.get("/predictions", params=query), 400, said)


# --- what is refused ---


@pytest.mark.parametrize(("content", "status"), [
    (b"", 400), (b"[]", 400), (b"{", 400), (b"null", 400), (b"\xff\xfe", 400), (b'{"line": "HUB1"}', 400),
    (b'{"line": "HUB1", "end": "2026-01-01T00:00:00Z", "columns": ["hub_jobs"], "rows": [[NaN]]}', 400),
    (b'{"line": "HUB1", "end": "2026-01-01T00:00:00Z", "columns": ["hub_jobs"], "rows": [[1e999]]}', 400),
    (b'{"line": "HUB1", "end": "2026-01-01T00:00:00Z", "columns": ["hub_jobs"], "rows": [["1"]]}', 400),
    (b'{"line": "HUB1", "end": "2026-01-01T00:00:00", "columns": ["hub_jobs"], "rows": [[1]]}', 400),
    (b'{"line": "HUB1", "end": "9999-12-31T23:59:59Z", "columns": ["hub_jobs"], "rows": [[1]], "extra": 1}', 400),
    (b'{"line": "HUB1", "end": "2026-01-01T00:00:00Z", "columns": ["hub_jobs"], "rows": [[1e30]]}', 422),
    (b'{"line": "HUB1", "end": "2026-01-01T00:00:00Z", "columns": ["hub_jobs", "x"], "rows": [[1, 2]]}', 422),
    (b'{"line": "HUB1", "end": "2026-01-01T00:00:00Z", "columns": ["hub_jobs"], "rows": [[1], [1, 2]]}', 422),
    (b'{"line": "HUB1", "end": "2026-01-01T00:00:00Z", "columns": [], "rows": [[]]}', 400)])
def test_broken_bodies_get_a_sentence(http, content, status):
    response = http.post("/predict", content=content)
    assert response.status_code == status
    assert len(msgspec.json.decode(response.content, type=Failure).error.what) > 10


names = st.sampled_from(["line", "end", "columns", "rows", "values", "x"])
json_values = st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
                           lambda inner: st.lists(inner, max_size=4) | st.dictionaries(names, inner, max_size=4), max_leaves=12)


@given(path=st.sampled_from(["/predict", "/predict/batch", "/observe", "/explain", "/feedback"]), value=json_values)
def test_whatever_is_sent_is_never_the_services_fault(http, path, value):
    assert 400 <= http.post(path, content=json.dumps(value)).status_code < 500


@given(end=st.datetimes(timezones=st.just(UTC)), number=st.floats(width=64), column=st.sampled_from([*COLUMNS, "hub_job", ""]), rows=st.integers(1, 40))
def test_any_number_at_any_time_is_answered_or_refused(http, end, number, column, rows):
    said = http.post("/predict", content=json.dumps({"line": "HUB1", "end": end.isoformat(), "columns": [column], "rows": [[number]] * rows}))
    assert said.status_code in (200, 400, 422)


def test_large_bodies_are_cut_off(data, package, tmp_path):
    clock = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime())
    with serving(tmp_path, package, clock, body_limit_kb=64, shed_after_ms=10_000) as http:
        refused(http.post("/predict", content=b" " * 70_000), 413, "larger than 64 kB")
        refused(http.post("/predict", content=(b" " * 1000 for _ in range(70))), 413, "larger than 64 kB")  # no length told
        assert http.post("/predict", content=body(data)).status_code == 200


# --- who may call, and how often ---


def test_keys_are_needed_and_can_be_revoked(data, package, tmp_path):
    clock = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime())
    with serving(tmp_path, package, clock, shed_after_ms=10_000) as http:
        good = http.headers.pop("authorization")
        wrong = [{"authorization": text} for text in ("Bearer amhs_0_0", good + "x", "Basic abc")]
        for header in ({}, {"x-api-key": "\u00e9".encode("latin-1")}, *wrong):
            refused(http.post("/predict", content=body(data), headers=header), 401, "key")
        assert http.post("/predict", content=body(data), headers={"x-api-key": http.key}).status_code == 200
        second = add_key("another", tmp_path / "keys.json")
        assert http.get("/lines", headers={"x-api-key": second}).status_code == 200
        revoke_key(http.key.split("_")[1], tmp_path / "keys.json")
        assert soon(lambda: http.get("/lines", headers={"authorization": good}).status_code == 401)
        assert http.get("/lines", headers={"x-api-key": second}).status_code == 200
        assert second.split("_")[2] not in (tmp_path / "keys.json").read_text() and (tmp_path / "keys.json").stat().st_mode & 0o777 == 0o600


def test_without_keys_only_this_machine_is_answered(data, package, tmp_path):
    clock = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime())
    desk = make_desk(tmp_path, [package], serving=Serving(auth=False, shed_after_ms=10_000), clock=clock)
    with TestClient(create_app(lambda: desk, tmp_path / "none.json")) as here:
        assert here.get("/lines").status_code == 200
        elsewhere = TestClient(here.app, client=("10.0.0.7", 50000))
        refused(elsewhere.get("/lines"), 401, "only callers on this machine")


def test_a_key_may_only_ask_so_often(data, package, tmp_path):
    clock = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime())
    with serving(tmp_path, package, clock, rate_per_s=5, shed_after_ms=10_000) as http:
        said = [http.get("/model") for _ in range(12)]
        assert [r.status_code for r in said[:5]] == [200] * 5 and said[-1].status_code == 429 and said[-1].headers["retry-after"] == "1"
        other = add_key("another", tmp_path / "keys.json")
        assert http.get("/model", headers={"authorization": f"Bearer {other}"}).status_code == 200


def shed_so_far():
    return prometheus_client.REGISTRY.get_sample_value("amhs_refused_total", {"status": "503"}) or 0


@pytest.mark.parametrize("direct", [True, False])
def test_a_late_loop_sheds_and_recovers(data, package, tmp_path, direct):
    "On both ways to an endpoint: straight, as the service has it, and through the routes."
    clock = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime())
    with serving(tmp_path, package, clock, shed_after_ms=50) as http:
        front, before = http.front, shed_so_far()

        async def block_and_ask():
            transport = httpx.ASGITransport(Direct(http.app, SimpleNamespace(app=http.app), "") if direct else http.app)
            async with httpx.AsyncClient(transport=transport, base_url="http://x", headers=dict(http.headers)) as client:
                await asyncio.sleep(0.03)
                time.sleep(0.3)  # many requests in one round of the event loop
                busy = await client.get("/model")
                await asyncio.sleep(0.1)
                return busy, await client.get("/model")

        busy, later = http.portal.call(block_and_ask)
        refused(busy, 503, "too busy")
        assert busy.headers["retry-after"] == "1" and later.status_code == 200 and front.ready
        assert shed_so_far() == before + 1


# --- time budgets, engines that are not compiled, a store that fails ---


def test_a_slow_model_leaves_the_answer_to_the_rules(data, package, tmp_path):
    clock, go = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime()), threading.Event()
    with serving(tmp_path, package, clock, time_budget_ms=30, trips=2, rest_s=1000, shed_after_ms=10_000) as http:
        live = http.desk.line("HUB1").packages["live"]

        class Slow:
            def __getattr__(self, name):
                return getattr(live, name)

            engine = type("Engine", (), {"kind": "onnx", "features": live.engine.features})

            def forecast(self, x):
                go.wait(5)
                return live.forecast(x)

        http.desk.line("HUB1").packages = {"live": Slow()}
        began = time.monotonic()
        notes = [http.post("/predict", content=body(data)).json()["notes"][0] for _ in range(3)]
        assert time.monotonic() - began < 3 and "longer than 30 ms" in notes[0] and "rests" in notes[2]
        go.set()
        clock.now += 2000
        assert soon(lambda: http.post("/predict", content=body(data)).json()["source"] == "hybrid")


def test_an_engine_that_is_not_compiled_answers_the_same(data, package, tmp_path, tmp_path_factory):
    clock = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime())
    slow = small_package(tmp_path_factory, engine="boosters")
    (tmp_path / "fast").mkdir()
    patient = {"time_budget_ms": 5000, "shed_after_ms": 10_000}
    with serving(tmp_path, slow, clock, **patient) as http, serving(tmp_path / "fast", package, clock, **patient) as fast:
        one, other = (h.post("/predict", content=body(data)).json() for h in (http, fast))
        assert one["source"] == "hybrid" and one["horizons"] == other["horizons"]


def test_an_unwritable_store_loses_no_answer_and_acknowledges_no_row(data, package, tmp_path, monkeypatch):
    from amhs.store import StoreError

    clock = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime())
    with serving(tmp_path, package, clock, shed_after_ms=10_000) as http:
        def full(*_):
            raise StoreError("the store failed: its disk is full", fix="make room")

        monkeypatch.setattr(http.desk.store, "_commit", full)
        assert http.post("/predict", content=body(data)).status_code == 200
        response = http.post("/observe", json=row(data, 2000))
        refused(response, 503, "disk is full")
        assert response.headers["retry-after"] == "1" and http.desk.store.read("observations").empty
        monkeypatch.undo()
        assert http.post("/observe", json=row(data, 2000)).json()["status"] == "new"
        assert len(http.desk.store.read("observations")) == 1


# --- deployments while it runs ---


def test_a_change_of_the_pointer_is_followed_within_a_second(data, package, tmp_path):
    clock = Clock(data.telemetry["timestamp"].iloc[2000].to_pydatetime())
    with serving(tmp_path, package, clock, shed_after_ms=10_000) as http:
        began = time.monotonic()
        assign("HUB1", tmp_path / "deployed", hybrid="rules", why="a test")
        assert soon(lambda: http.post("/predict", content=body(data)).json()["source"] == "rules", 2)
        assert time.monotonic() - began < 1.5
        (tmp_path / "deployed/lines.json").write_text("{ broken")
        time.sleep(0.5)
        assert http.post("/predict", content=body(data)).status_code == 200 and http.get("/health").json()["ready"]


# --- the document, and the client ---


def test_the_document_names_every_way_and_its_examples_work(http):
    document = http.get("/openapi.json").json()
    assert set(document["paths"]) == {f"/v1{p}" for p in ("/predict", "/predict/batch", "/observe", "/forecast/{line}", "/lines", "/explain", "/model",
                                                         "/feedback", "/predictions", "/health")}
    example = document["paths"]["/v1/predict"]["post"]["requestBody"]["content"]["application/json"]["example"]
    answer = http.post("/predict", json=example).json()
    assert answer["source"] == "hybrid" and answer["notes"] == []
    assert openapi()["paths"].keys() == document["paths"].keys()


def test_the_client_speaks_to_the_service(http, data):
    client = Client("http://testserver", http.key, transport=Bridge(http))
    window = window_at(data.telemetry, 2000)
    answer = client.predict(window)
    assert isinstance(answer, Answer) and answer.source == "hybrid"
    both = client.predict_batch([window, window_at(data.telemetry, 2000, line="HUB7")])
    assert both[0].horizons == answer.horizons and isinstance(both[1], Failure)
    soon(lambda: client.predictions(id=answer.id))
    assert client.predictions(id=answer.id) == [answer] and client.explain(prediction=answer.id, top=2).contributions[0].feature
    assert client.feedback(answer.id, "true_alarm").status == "noted" and client.lines()[0].line == "HUB1" and client.models()["models"]
    r = data.telemetry.iloc[1999]
    assert client.observe("HUB1", r["timestamp"].to_pydatetime(), {c: float(r[c]) for c in COLUMNS}).status in ("new", "duplicate", "late")
    assert client.forecast("HUB1").line == "HUB1"
    with pytest.raises(ServiceError, match="no such line") as e:
        client.forecast("HUB7")
    assert e.value.status == 404


class Bridge(httpx.BaseTransport):
    "The client's requests, carried to the application in process."

    def __init__(self, http):
        self.http = http

    def handle_request(self, request):
        path = request.url.raw_path.decode().removeprefix("/v1")
        said = self.http.request(request.method, path, content=request.read(), headers={k: v for k, v in request.headers.items() if k != "host"})
        return httpx.Response(said.status_code, headers=said.headers, content=said.content)


def test_metrics_speak_the_words_of_the_domain(http, data):
    http.post("/predict", content=body(data))
    text = prometheus_client.generate_latest().decode()
    assert 'amhs_answers_total{line="HUB1",role="live",source="hybrid"}' in text and 'amhs_request_seconds_count{path="/predict",status="200"}' in text
    assert np.isfinite(float(text.split('amhs_data_lag_minutes{line="HUB1"} ')[1].split("\n")[0]))
