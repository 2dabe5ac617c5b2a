"""The dashboard: what it reads of real records, the live page in a real browser, its numbers in a real Prometheus, every query of the Grafana file."""

import importlib.util
import json
import re
import shutil
import socket
import string
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
import yaml

from amhs import dashboard, sections
from amhs.alerts import Alert, FileChannel, send
from amhs.board import Board, decision_table, figures_for_prometheus, monitoring_figures, monitoring_findings
from amhs.retrain import Promotion, Verdict, record_verdict
from amhs.store import open_store

ROOT = Path(__file__).parent.parent
GRAFANA = ROOT / "deploy/grafana/amhs.json"
EVIL = "<img src=x onerror=window.hit=1>"
HANGUL = re.compile("[가-힣]")


def load_bench():
    """bench/dashboard.py fills stores and serves them; its results are not touched."""
    spec = importlib.util.spec_from_file_location("bench_dashboard", ROOT / "bench/dashboard.py")
    sys.path.insert(0, str(ROOT / "bench"))
    try:
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "bench"))
    return module


bench = load_bench()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Two days of two lines up to now, 30 days of checks, a third line whose name is an attack."""
    home = tmp_path_factory.mktemp("dashboard")
    bench.fill(home, lines=2, days=2)
    with open_store(f"sqlite:///{home}/store.sqlite") as store:
        until = datetime.now(UTC).replace(second=0, microsecond=0)
        bench.fill_line(store, EVIL, 0.1, until, seed=5)
        store.write("decisions", bench.checks(["HUB01", "HUB02"], 30, until))
    return home


@pytest.fixture(scope="module")
def served(home):
    with bench.Served(home) as running:
        yield running


@pytest.fixture
def store(tmp_path):
    with open_store(f"sqlite:///{tmp_path}/store.sqlite") as store:
        yield store


# --- what others write is what is read ---

NOON = datetime(2026, 3, 3, 12, tzinfo=UTC)


def test_records_of_monitoring_are_read(store):
    from amhs import monitor

    finding = {"line": "HUB1", "kind": "data_drift", "name": "hub_jobs", "severity": "critical", "value": 0.5, "low": float("nan"), "high": 0.25,
               "since": NOON, "what": "hub_jobs is distributed otherwise than before"}
    empty = pd.DataFrame()
    names = [f for f in monitor.Checked.__dataclass_fields__ if f not in ("findings", "figures", "since", "until", "model")]
    checked = monitor.Checked(**dict.fromkeys(names, empty), findings=pd.DataFrame([finding]), model="3-abc", since=NOON - timedelta(1), until=NOON,
                              figures={"mae_max_10": 9.0, "mae_limit": 12.0, "event_recall": float("nan"), "psi_max": 0.5})
    monitor.record(store, "HUB1", checked, NOON + timedelta(hours=1))
    decisions = store.read("decisions")
    figures, findings = monitoring_figures(decisions), monitoring_findings(decisions)
    assert figures[["line", "model", "mae_max_10", "psi_max"]].to_numpy().tolist() == [["HUB1", "3-abc", 9.0, 0.5]]
    assert figures["at"].iloc[0] == NOON and findings["what"].tolist() == [finding["what"]]
    korean = sections.finding_text(findings.iloc[0].to_dict(), sections.load_words("ko"))
    assert HANGUL.search(korean) and "0.5" in korean and "0.25" in korean


def test_every_kind_of_finding_has_its_sentence_and_its_name():
    from amhs.monitor import KINDS

    for lang in ("en", "ko"):
        words = sections.load_words(lang)
        assert {f"found_{k}" for k in KINDS} <= set(words) and set(KINDS) - {"performance"} <= set(words)


def test_alerts_and_decisions_are_told_in_words(store, tmp_path):
    channel = FileChannel(name="f", kind="file", path=tmp_path / "a.jsonl")
    send([Alert("HUB1/data_drift", "warning", "HUB1: hub_jobs drifts", "PSI 0.4", "HUB1", NOON)], [channel], store, NOON)
    for retrain, said in ((False, ()), (True, ("drift on two days",))):
        verdict = Verdict(retrain, ("drift",) if retrain else (), "change", pd.DataFrame({"drift": [2]}, pd.Index(["2026-03-03"], name="day")), said)
        record_verdict(store, verdict, "HUB1", NOON + timedelta(hours=1 + retrain))
    told = decision_table(store.read("decisions"))
    assert told["subject"].tolist() == ["HUB1"] * 3
    assert told["what"].tolist() == ["Retrain: drift on two days.", "Keep: nothing asks for a retraining.", "HUB1: hub_jobs drifts: open"]


def test_promotions_show_their_verdict(store):
    found = Promotion("refuse", "The current model stays.")
    row = {"id": "p", "at": NOON, "kind": "promotion", "subject": "HUB1", "why": found.sentence, "detail": json.dumps({"verdict": found.verdict})}
    store.write("decisions", [row])
    assert decision_table(store.read("decisions"))["what"].tolist() == ["refuse: The current model stays."]


# --- words ---

def test_both_languages_say_the_same_things():
    english, korean = (sections.load_words(lang) for lang in ("en", "ko"))
    assert list(english) == list(korean)

    def places(text):
        return {name for _, name, _, _ in string.Formatter().parse(text) if name}
    assert [k for k in english if places(english[k]) != places(korean[k])] == []
    assert [k for k in korean if not HANGUL.search(korean[k]) and not re.fullmatch(r"p\d\d_ms|lang|found_(performance|calibration|health|volume)", k)] == []
    assert not [k for k in english if HANGUL.search(english[k])]


# --- the page ---

def test_an_empty_installation_says_what_to_do(store, tmp_path):
    board = Board(store, tmp_path / "deployed")
    for lang in ("en", "ko"):
        words, view = sections.load_words(lang), board.view(lang=lang)
        assert "amhs operate" in sections.head_html(board, view, words)
        parts = [make(board, view, words) for make in sections.SECTIONS.values()]
        assert [len(p) for p in parts] == [1] * 6 and all("empty" in p[0] for p in parts)


def test_the_notebook_is_a_guide_too(home, monkeypatch):
    """Opened by hand, every section is there when its cell has run."""
    monkeypatch.setenv("AMHS_STORE", f"sqlite:///{home}/store.sqlite")
    monkeypatch.setenv("AMHS_DEPLOYED", str(home / "deployed"))
    monkeypatch.setattr(dashboard, "_BOARD", {})
    cells = json.loads((ROOT / dashboard.NOTEBOOK).read_text())["cells"]
    space = {}
    exec("\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code"), space)
    assert set(space["live"].columns) == set(sections.SECTIONS) and all(c.objects for c in space["live"].columns.values())


TEXT = """() => {
  const said = e => e.children.length || ['STYLE', 'SCRIPT'].includes(e.tagName) ? '' : e.textContent;
  const walk = root => [...root.querySelectorAll('*')].map(e => e.shadowRoot ? walk(e.shadowRoot) : said(e)).join(' ');
  return walk(document);
}"""


HEADINGS = """() => {
  const count = root => [...root.querySelectorAll('*')].reduce((n, e) => n + (e.tagName === 'H2') + (e.shadowRoot ? count(e.shadowRoot) : 0), 0);
  return count(document) === 6;
}"""


class Reader:
    """A browser on the page: what it asked of whom, what went wrong."""

    def __init__(self, browser, address, **context):
        self.context = browser.new_context(**context)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.asked, self.wrong = [], []
        self.page.on("request", lambda r: self.asked.append(r.url))
        self.page.on("pageerror", lambda e: self.wrong.append(str(e)))
        self.page.on("console", lambda m: self.wrong.append(m.text) if m.type == "error" else None)
        self.page.goto(address, wait_until="commit")

    def wait(self, tiles, figures):
        self.page.wait_for_function(bench.PAINTED % (tiles, figures), polling=50)
        self.page.wait_for_function(HEADINGS, polling=50)
        return self

    def text(self):
        return self.page.evaluate(TEXT)

    def picture(self, path):
        """A screenshot, and how much of it is neither ground nor empty."""
        from PIL import Image

        self.page.wait_for_timeout(300)
        self.page.screenshot(path=path, full_page=True)
        image = Image.open(path).convert("RGB")
        colours = sorted(image.resize((200, max(image.height * 200 // image.width, 1))).getcolors(1 << 24), reverse=True)
        return image.size, colours[0][1], 1 - colours[0][0] / sum(n for n, _ in colours)


def test_wide_light_english(browser, served, tmp_path):
    reader = Reader(browser, served.address, viewport={"width": 1280, "height": 900}, color_scheme="light").wait(3, 14)
    text, words = reader.text(), sections.load_words("en")
    assert all(words[name] in text for name in sections.SECTIONS)
    assert "hub_jobs_slope +12.3" in text and "12-4f3a9c21" in text and EVIL in text
    assert reader.page.evaluate("window.hit") is None, "text out of the store was taken for HTML"
    host = urllib.parse.urlsplit(served.address).netloc
    assert {urllib.parse.urlsplit(u).netloc for u in reader.asked if not u.startswith(("data:", "blob:"))} == {host}
    assert reader.wrong == []
    (width, height), ground, share = reader.picture(tmp_path / "wide.png")
    assert ground == (255, 255, 255) and share > 0.05 and height > 2000 and width == 1280
    reader.context.close()


def test_phone_dark_korean(browser, served, tmp_path):
    reader = Reader(browser, f"{served.address}/?lang=ko", viewport={"width": 390, "height": 800}, color_scheme="dark", has_touch=True).wait(3, 14)
    text, words = reader.text(), sections.load_words("ko")
    assert all(words[name] in text for name in sections.SECTIONS) and "What drifts" not in text
    assert reader.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "the page is wider than the phone"
    (width, _), ground, share = reader.picture(tmp_path / "phone.png")
    assert max(ground) < 40 and share > 0.05 and width == 390
    assert reader.wrong == []
    reader.context.close()


def test_choices_change_page_and_address_and_an_address_brings_them_back(browser, served):
    reader = Reader(browser, f"{served.address}/?theme=dark", viewport={"width": 1280, "height": 900}, color_scheme="light").wait(3, 14)
    assert reader.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)", "what is asked for wins over the system"
    reader.page.get_by_label("line").select_option("HUB02")
    reader.page.get_by_role("button", name="7 days").click()
    reader.page.wait_for_function("location.search.includes('line=HUB02') && location.search.includes('hours=168')")
    assert "theme=dark" in reader.page.url and reader.wrong == []
    again = Reader(browser, reader.page.url, viewport={"width": 1280, "height": 900}).wait(3, 14)
    assert again.page.get_by_label("line").input_value() == "HUB02"
    shown = re.search(r"(\d+) alarms, the newest", again.text())
    assert shown, "7 days of HUB02 have alarms"
    for r in (reader, again):
        r.context.close()


def test_others_machines_may_not_ask_unless_told(served):
    """A page of another origin cannot open a session: the server knows its own names only."""
    port = served.port
    ask = f"GET /ws HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nOrigin: http://evil.example\r\n"
    ask += "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Protocol: bokeh, token\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as s:
        s.sendall(ask.encode())
        assert s.recv(100).startswith(b"HTTP/1.1 403")


def test_it_listens_on_this_machine_alone(served):
    lines = Path("/proc/net/tcp").read_text().splitlines()[1:]
    mine = [line.split()[1] for line in lines if line.split()[1].endswith(f":{served.port:04X}") and line.split()[3] == "0A"]
    assert mine == [f"0100007F:{served.port:04X}"]


# --- numbers ---

def test_numbers_are_those_of_the_page(served, home):
    from prometheus_client.parser import text_string_to_metric_families

    text = urllib.request.urlopen(f"{served.address}/metrics", timeout=60).read().decode()
    samples = {(s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(text) for s in f.samples}
    with open_store(f"sqlite:///{home}/store.sqlite") as store:
        board = Board(store, home / "deployed")
        last = board.figures(board.view()).drop_duplicates("line", keep="last").set_index("line")
        newest = board.latest().set_index("line")
    for line in ("HUB01", "HUB02"):
        assert samples["amhs_monitor_mae_max_10", ("line", line)] == pytest.approx(last.loc[line, "mae_max_10"])
        assert samples["amhs_monitor_level_jobs", ("line", line)] == newest.loc[line, "now"]
        assert samples["amhs_monitor_forecast_jobs", ("horizon_min", "25"), ("line", line), ("what", "most")] == newest.loc[line, "most_25"]
    assert samples["amhs_monitor_up",] == 1 and ("amhs_monitor_level_jobs", ("line", EVIL)) in samples


def test_a_store_that_cannot_be_read_is_told(tmp_path):
    path = tmp_path / "store.sqlite"
    with open_store(f"sqlite:///{path}") as store:
        board = Board(store, tmp_path / "deployed")
        store.close()
        path.write_bytes(b"no database at all" * 1000)
        for rest in ("-wal", "-shm"):
            Path(f"{path}{rest}").unlink(missing_ok=True)
        assert "amhs_monitor_up 0.0" in figures_for_prometheus(board)


def service_text():
    """What the service tells after a few requests."""
    from prometheus_client import generate_latest

    from amhs.api import Metrics

    metrics = Metrics()
    metrics.of(metrics.seconds, "/predict", "200").observe(0.002)
    metrics.of(metrics.answers, "HUB01", "hybrid", "live").inc()
    metrics.of(metrics.lag, "HUB01").set(0.5)
    metrics.of(metrics.refused, "503").inc()
    metrics.lost.inc()
    return generate_latest()


@pytest.fixture(scope="module")
def prometheus(served, tmp_path_factory):
    """A real Prometheus that scrapes the dashboard and a service."""
    if not shutil.which("prometheus"):
        pytest.skip("no prometheus on this machine: scripts/system-packages.sh installs it")

    class Tells(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Type", "text/plain; version=0.0.4")
            self.end_headers()
            self.wfile.write(service_text())

        def log_message(self, *_):
            pass
    service = ThreadingHTTPServer(("127.0.0.1", 0), Tells)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    folder = tmp_path_factory.mktemp("prometheus")
    targets = {"amhs-monitor": served.port, "amhs": service.server_address[1]}
    jobs = [{"job_name": n, "static_configs": [{"targets": [f"127.0.0.1:{p}"]}]} for n, p in targets.items()]
    told = {"global": {"scrape_interval": "2s", "scrape_timeout": "2s"}, "rule_files": [str(ROOT / "deploy/prometheus/monitor.yml")], "scrape_configs": jobs}
    (folder / "prometheus.yml").write_text(yaml.safe_dump(told))
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address=127.0.0.1:{port}"]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                if len(ask(address, "count_over_time(up[1m]) >= 3 and up == 1")) == 2:
                    break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
            time.sleep(0.5)
        yield address
    finally:
        process.terminate()
        process.wait(20)
        service.shutdown()


def ask(address, query):
    """What Prometheus answers to a query; a refused query fails."""
    with urllib.request.urlopen(f"{address}/api/v1/query?" + urllib.parse.urlencode({"query": query}), timeout=20) as answer:
        found = json.load(answer)
    assert found["status"] == "success", query
    return found["data"]["result"]


def grafana_queries():
    board = json.loads(GRAFANA.read_text())
    return [(p["title"], t["expr"]) for p in board["panels"] for t in p.get("targets", [])]


def filled_in(expr):
    """A query as Grafana sends it."""
    return expr.replace("$line", ".*").replace("$__rate_interval", "1m")


def test_every_query_of_the_grafana_file_is_answered(prometheus):
    queries = grafana_queries()
    assert len(queries) >= 25
    assert [(title, expr) for title, expr in queries if not ask(prometheus, filled_in(expr))] == []


def test_variables_and_annotations_of_the_grafana_file_are_answered(prometheus):
    board = json.loads(GRAFANA.read_text())
    metric, label = re.fullmatch(r"label_values\((\w+), (\w+)\)", board["templating"]["list"][1]["query"]["query"]).groups()
    assert {"HUB01", "HUB02"} <= {r["metric"][label] for r in ask(prometheus, metric)}
    for annotation in board["annotations"]["list"]:
        ask(prometheus, annotation["expr"])


def test_alerts_on_what_checks_found_are_understood(prometheus):
    rules = [r for g in yaml.safe_load((ROOT / "deploy/prometheus/monitor.yml").read_text())["groups"] for r in g["rules"]]
    known = {r["metric"]["__name__"] for r in ask(prometheus, '{__name__=~"amhs_monitor_.*"}')}
    assert {m for r in rules for m in re.findall(r"\bamhs_monitor_\w+", r["expr"])} <= known
    with urllib.request.urlopen(f"{prometheus}/api/v1/rules", timeout=20) as answer:
        loaded = [r for g in json.load(answer)["data"]["groups"] for r in g["rules"]]
    assert len(loaded) == len(rules) and all(r["health"] in ("ok", "unknown") for r in loaded)
    assert all(r["labels"]["severity"] in ("warning", "critical") and r["annotations"]["summary"] for r in rules)


def test_grafana_file_has_the_shape_grafana_wants():
    board = json.loads(GRAFANA.read_text())
    panels = board["panels"]
    assert len({p["id"] for p in panels}) == len(panels) and board["schemaVersion"] >= 36
    taken = set()
    for p in panels:
        g = p["gridPos"]
        cells = {(x, y) for x in range(g["x"], g["x"] + g["w"]) for y in range(g["y"], g["y"] + g["h"])}
        assert g["x"] + g["w"] <= 24 and not cells & taken, p["title"]
        taken |= cells
        assert p["type"] in ("row", "stat", "timeseries", "table") and (p["type"] == "row" or p["description"])
    assert not re.search(r"https?://|\d+\.\d+\.\d+\.\d+", GRAFANA.read_text()), "addresses belong to the place it is imported"
