"""The service as it runs: BentoML, two workers, real sockets, a real store; killed, flooded, filled, looked at in a browser."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import msgspec
import pandas as pd
import psutil
import pytest
from served import labelled, small_package, window_at

from amhs.access import add_key
from amhs.client import Client
from amhs.deployment import deploy, rollback
from amhs.serving import service_environment
from amhs.store import open_store
from amhs.telemetry import COLUMNS

HOUSE = Path(__file__).parent.parent


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Service:
    "The service in its own processes, on a site of its own."

    def __init__(self, home: Path, package: Path, workers: int = 2, store: Path | None = None):
        self.home, self.port = home, free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        deploy(package, ["HUB1"], folder=home / "deployed")
        self.key = add_key("a test", home / "keys.json")
        site = {"AMHS_DEPLOYED": home / "deployed", "AMHS_KEYS": home / "keys.json", "AMHS_STORE": f"sqlite:///{store or home / 'store.sqlite'}",
                "BENTOML_HOME": home / "bentoml", "AMHS_WORKERS": workers}
        environment = service_environment(dict(os.environ)) | {k: str(v) for k, v in site.items()}
        command = [Path(sys.executable).parent / "bentoml", "serve", "service:Amhs", "--host", "127.0.0.1", "--port", str(self.port)]
        self.began = time.monotonic()
        with open(home / "log.txt", "w") as log:
            self.process = subprocess.Popen(command, cwd=HOUSE, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        self.ready_s = self.wait()
        self.http = httpx.Client(base_url=f"{self.url}/v1", headers={"authorization": f"Bearer {self.key}"}, timeout=20)

    def wait(self) -> float:
        while self.process.poll() is None and time.monotonic() < self.began + 90:
            try:
                if httpx.get(f"{self.url}/readyz").status_code == 200:
                    return time.monotonic() - self.began
            except httpx.TransportError:
                pass
            time.sleep(0.1)
        raise AssertionError((self.home / "log.txt").read_text()[-3000:])

    def workers(self) -> list[psutil.Process]:
        found = psutil.Process(self.process.pid).children(recursive=True)
        return [p for p in found if p.status() != psutil.STATUS_ZOMBIE and "_bentoml_impl.worker.service" in " ".join(p.cmdline())]

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(20)
        finally:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def data():
    found = labelled(days=3)
    shift = pd.Timestamp(datetime.now(UTC)).floor("min") - found.telemetry["timestamp"].iloc[2000]  # so that row 2000 is now
    return found, found.telemetry.assign(timestamp=found.telemetry["timestamp"] + shift)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    return [small_package(tmp_path_factory), small_package(tmp_path_factory, number=2, trees=5)]


@pytest.fixture(scope="module")
def service(packages, tmp_path_factory):
    started = Service(tmp_path_factory.mktemp("site"), packages[0])
    yield started
    started.stop()


def row(telemetry, i):
    r = telemetry.iloc[i]
    return {"line": "HUB1", "timestamp": r["timestamp"].isoformat(), "values": {c: float(r[c]) for c in COLUMNS}}


def test_curl_gets_a_forecast(service, data, tmp_path):
    (tmp_path / "window.json").write_bytes(msgspec.json.encode(window_at(data[1], 2000)))
    said = subprocess.run(["curl", "-sS", f"{service.url}/v1/predict", "-H", f"Authorization: Bearer {service.key}", "-d", f"@{tmp_path}/window.json"],
                          capture_output=True, text=True, check=True)
    assert json.loads(said.stdout)["source"] == "hybrid"


def test_bentoml_still_answers_health_and_metrics(service, data):
    service.http.post("/predict", content=msgspec.json.encode(window_at(data[1], 2000)))
    for path in ("/livez", "/readyz", "/healthz"):
        assert httpx.get(f"{service.url}{path}").status_code == 200
    text = httpx.get(f"{service.url}/metrics").text
    assert "amhs_answers_total" in text and "amhs_request_seconds_bucket" in text


def test_what_was_acknowledged_survives_a_killed_worker(service, data):
    telemetry, acknowledged, stop = data[1], [], threading.Event()

    def observe():
        with Client(service.url, service.key, tries=60, timeout_s=5, wait_s=0.05) as client:
            for i in range(1500, 2000):
                if stop.is_set():
                    return
                r = telemetry.iloc[i]
                client.observe("HUB1", r["timestamp"].to_pydatetime(), {c: float(r[c]) for c in COLUMNS})
                acknowledged.append(r["timestamp"])

    thread = threading.Thread(target=observe)
    thread.start()
    time.sleep(1.5)
    before = service.workers()
    assert len(before) == 2
    for victim in before:
        victim.kill()
    began = time.monotonic()
    while time.monotonic() - began < 30:
        if len(service.workers()) == 2 and not {w.pid for w in before} & {w.pid for w in service.workers()} and len(acknowledged) > 300:
            break
        time.sleep(0.2)
    stop.set()
    thread.join(30)
    assert not thread.is_alive() and len(acknowledged) > 100
    with open_store(f"sqlite:///{service.home}/store.sqlite") as store:
        kept = store.read("observations", line="HUB1")
    minutes = set(pd.to_datetime(kept["minute"] * 60, unit="s", utc=True))
    assert {pd.Timestamp(t) for t in acknowledged} <= minutes
    service.wait()
    answer = service.http.get("/forecast/HUB1").json()
    assert pd.Timestamp(answer["at"]) >= max(acknowledged)  # a restarted worker reads the line's minutes from the store


def test_switching_under_load_drops_no_request(service, data, packages):
    body, said, stop = msgspec.json.encode(window_at(data[1], 2000)), [], threading.Event()

    def ask():
        with httpx.Client(base_url=f"{service.url}/v1", headers=dict(service.http.headers), timeout=10) as http:
            while not stop.is_set():
                response = http.post("/predict", content=body)
                said.append((time.monotonic(), response.status_code, response.json().get("model")))

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(1)
    switches = []
    for step in range(4):
        switches.append(time.monotonic())
        if step % 2:
            rollback("HUB1", service.home / "deployed")
        else:
            deploy(packages[1], ["HUB1"], folder=service.home / "deployed")
        time.sleep(1.5)
    stop.set()
    for thread in threads:
        thread.join(20)
    statuses = {status for _, status, _ in said}
    assert statuses <= {200, 503}, statuses  # 503: this machine was too busy for both
    models = [model for _, status, model in said if status == 200]
    assert len(set(models)) == 2
    last = [m for t, s, m in said if s == 200 and switches[-1] + 1 < t]
    assert last and set(last) == {models[0]}


def test_thousands_of_malformed_requests_are_the_callers_fault_and_cost_no_memory(service):
    bodies = [b"", b"{", b"[]", b'{"line": 1}', b"\xff" * 100, b'{"line": "HUB1", "end": "x", "columns": [], "rows": [[NaN]]}', b'{"columns": ["c%d"]}',
              b'{"line": "HUB1", "end": "2026-01-01T00:00:00Z", "columns": ["hub_jobs"], "rows": [["a"]]}', b'{"a":' * 2000]

    def flood(n):
        return {service.http.post("/predict", content=bodies[i % len(bodies)]).status_code for i in range(n)}

    flood(500)
    before = sum(p.memory_info().rss for p in service.workers())
    statuses = flood(9500)
    after = sum(p.memory_info().rss for p in service.workers())
    assert all(400 <= s < 500 or s == 503 for s in statuses), statuses
    assert 400 in statuses and after < before + 20e6


def test_slow_clients_hold_up_nobody(service, data):
    slow = []
    for _ in range(50):
        s = socket.create_connection(("127.0.0.1", service.port))
        s.sendall(f"POST /v1/predict HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {service.key}\r\nContent-Length: 9000\r\n\r\n{{".encode())
        slow.append(s)
    began = time.monotonic()
    body = msgspec.json.encode(window_at(data[1], 2000))
    said = [service.http.post("/predict", content=body).status_code for _ in range(20)]
    assert set(said) <= {200, 503} and 200 in said and time.monotonic() - began < 9
    slow[0].settimeout(30)
    assert b"408" in slow[0].recv(4000).split(b"\r\n")[0]
    for s in slow:
        s.close()


def test_the_interface_can_be_read_and_tried_in_a_browser(service, tmp_path, browser):
    page = browser.new_page(viewport={"width": 1200, "height": 1600})
    strangers = []
    page.on("request", lambda r: strangers.append(r.url) if not r.url.startswith((service.url, "data:")) else None)
    page.goto(f"{service.url}/v1/docs")
    page.wait_for_selector("text=Forecast from a window of the newest minutes")
    page.screenshot(path=os.environ.get("AMHS_SHOTS", str(tmp_path)) + "/interface.png")
    page.click("text=Forecast from a window of the newest minutes")
    page.click("button:has-text('Try it out')")
    page.click("button.execute")
    page.wait_for_selector("text=a key is needed")
    assert strangers == []
    page.close()


def test_a_full_disk_acknowledges_no_row_and_answers_all_the_same(packages, data, tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1500k", "tmpfs", small], capture_output=True).returncode:
        pytest.skip("mounting a small disk needs root")
    started = None
    try:
        started = Service(tmp_path, packages[0], workers=1, store=small / "store.sqlite")
        (small / "ballast").write_bytes(b"x" * 600_000)
        body = msgspec.json.encode(window_at(data[1], 2000))
        said = [started.http.post("/predict", content=body).status_code for _ in range(400)]
        assert set(said) <= {200, 503} and said.count(200) > 300  # their keeping fails silently, their answers do not
        refused = next(r for i in range(1000, 2000) if (r := started.http.post("/observe", json=row(data[1], i))).status_code != 200)
        assert refused.status_code == 503 and "full" in refused.text
        (small / "ballast").unlink()
        time.sleep(1)
        assert started.http.post("/observe", json=row(data[1], 2000)).status_code == 200
    finally:
        if started:
            started.stop()
        subprocess.run(["umount", "-l", small])


def test_it_ends_when_told_to_and_comes_back_where_it_was(packages, data, tmp_path):
    telemetry = data[1]
    first = Service(tmp_path, packages[0], workers=1)
    for i in range(1960, 2000):
        assert first.http.post("/observe", json=row(telemetry, i)).status_code == 200
    before = first.http.get("/forecast/HUB1").json()
    assert first.stop() in (0, -signal.SIGTERM)
    second = Service(tmp_path, packages[0], workers=1)
    try:
        after = second.http.get("/forecast/HUB1").json()
        assert after["horizons"] == before["horizons"] and after["at"] == before["at"]
        ends = datetime.now(UTC) - timedelta(days=2)
        kept = second.http.get("/predictions", params={"line": "HUB1", "since": ends.isoformat(), "limit": "1000"}).json()["predictions"]
        assert len(kept) == 40
    finally:
        second.stop()
