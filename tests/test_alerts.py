"""People are told once, by every channel that works: a real receiver of webhooks and a real mail server stand by, and fail."""

import email
import json
import socketserver
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email import policy
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pandas as pd
import pytest

from amhs.alerts import Alert, alert_table, alerts_of, load_channels, send, silence
from amhs.core import ParameterError
from amhs.store import open_store

NOON = datetime(2026, 3, 2, 12, tzinfo=UTC)


def at(hours):
    return NOON + timedelta(hours=hours)


def alert(key="HUB1/data_drift", severity="warning", hours=0, title="HUB1: data drift", text="hub_jobs is higher than ever."):
    return Alert(key, severity, title, text, key.partition("/")[0], at(hours))


class Webhook(BaseHTTPRequestHandler):
    "Receives alerts; answers with the statuses it was told to, then with 200."

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.server.got.append((status, dict(self.headers), body))
        self.send_response(status)
        self.end_headers()

    def log_message(self, *_):
        pass


class Mailbox(socketserver.StreamRequestHandler):
    "As much of SMTP as a client needs to hand in a mail."

    def handle(self):
        self.say("220 here")
        while line := self.rfile.readline().decode().strip():
            word = line.split()[0].upper()
            if word == "DATA":
                self.say("354 go on")
                self.server.got.append(self.body())
            self.say({"QUIT": "221 bye"}.get(word, "250 ok"))
            if word == "QUIT":
                return

    def say(self, text):
        self.wfile.write(f"{text}\r\n".encode())

    def body(self):
        lines = []
        while (line := self.rfile.readline()) != b".\r\n":
            lines.append(line)
        return email.message_from_bytes(b"".join(lines), policy=policy.default)


@pytest.fixture
def served():
    "Starts servers on loopback and stops them again."
    running = []

    def start(kind, handler):
        server = kind(("127.0.0.1", 0), handler)
        server.got, server.statuses = [], []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        running.append(server)
        return server

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


@pytest.fixture
def webhook(served):
    return served(ThreadingHTTPServer, Webhook)


@pytest.fixture
def mailbox(served):
    return served(socketserver.ThreadingTCPServer, Mailbox)


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "store.sqlite") as opened:
        yield opened


def channels_of(tmp_path, text):
    (tmp_path / "alerts.yaml").write_text(text)
    return load_channels(tmp_path / "alerts.yaml")[0]


def hook(tmp_path, server, **more):
    "A webhook and a file."
    extra = "".join(f", {k}: {v}" for k, v in more.items())
    return channels_of(tmp_path, f"""
channels:
  desk: {{kind: webhook, url: "http://127.0.0.1:{server.server_port}/hook?token=hidden", wait_s: 0.01{extra}}}
  file: {{kind: file, path: {tmp_path}/alerts.jsonl, least: info}}
""")


def outcomes(table):
    return {(r.channel, r.what): r.outcome for r in table.itertuples()}


def test_a_process_that_dies_while_it_tells_is_not_heard_twice(tmp_path):
    "Two channels, and a death after each of them; half a line of a message is no message."
    first, last = channels_of(tmp_path, "".join(["channels:", *(f"\n  {n}: {{kind: file, path: {tmp_path}/{n}.jsonl}}" for n in ("desk", "shift"))]))

    class Dies(type(first)):
        def deliver(self, messages):
            super().deliver(messages)
            raise KeyboardInterrupt

    (tmp_path / "desk.jsonl").write_text('{"key": "HUB1/dat')
    for channels in ((Dies(**first.model_dump()), last), (first, Dies(**last.model_dump())), (first, last)):
        with open_store(tmp_path / "store.sqlite") as store, suppress(KeyboardInterrupt):
            send([alert()], channels, store, NOON)
    assert [[json.loads(line)["what"] for line in (tmp_path / f"{n}.jsonl").read_text().splitlines()] for n in ("desk", "shift")] == [["open"], ["open"]]


def test_a_webhook_receives_alerts_with_its_secret_header(tmp_path, store, webhook, monkeypatch):
    monkeypatch.setenv("DESK_TOKEN", "Bearer s3cret")
    channels = hook(tmp_path, webhook, headers="{Authorization: env:DESK_TOKEN}")
    told = send([alert(), alert("HUB2/missing", "critical", title="HUB2: missing")], channels, store, NOON)
    assert set(told["outcome"]) == {"sent"} and len(told) == 4
    (status, headers, body), = webhook.got  # both in one request
    assert headers["Authorization"] == "Bearer s3cret"
    assert [(a["key"], a["severity"], a["what"]) for a in body["alerts"]] == [("HUB1/data_drift", "warning", "open"), ("HUB2/missing", "critical", "open")]
    assert "HUB2: missing" in body["text"]
    assert "s3cret" not in store.read("decisions").to_string()


def test_an_alert_is_told_once_then_again_after_a_day_and_once_when_it_is_over(tmp_path, store, webhook):
    channels = hook(tmp_path, webhook)
    for hours in (0, 1, 5, 23, 24, 30):
        send([alert(hours=hours)], channels, store, at(hours), 24, covers=["HUB1/"])
    for hours in (31, 32):
        send([], channels, store, at(hours), 24, covers=["HUB1/"])
    assert [b["alerts"][0]["what"] for _, _, b in webhook.got] == ["open", "again", "over"]
    assert alert_table(store)["state"].tolist() == ["closed"]


def test_only_what_is_covered_is_over(tmp_path, store, webhook):
    channels = hook(tmp_path, webhook)
    send([alert(), alert("HUB10/missing")], channels, store, NOON)
    send([], channels, store, at(1), covers=["HUB1/"])
    assert dict(zip(alert_table(store)["key"], alert_table(store)["state"])) == {"HUB1/data_drift": "closed", "HUB10/missing": "open"}


def test_what_gets_worse_is_told_at_once(tmp_path, store, webhook):
    channels = hook(tmp_path, webhook, least="critical")
    first = send([alert()], channels, store, NOON)
    worse = send([alert(severity="critical", hours=1)], channels, store, at(1))
    assert outcomes(first) == {("file", "open"): "sent"}
    assert outcomes(worse) == {("desk", "open"): "sent", ("file", "worse"): "sent"}


def test_a_failing_channel_stops_no_other_and_is_tried_again(tmp_path, store, webhook):
    channels = hook(tmp_path, webhook)
    webhook.statuses = [503, 503, 503]
    first = send([alert()], channels, store, NOON)
    assert outcomes(first) == {("desk", "open"): "failed", ("file", "open"): "sent"}
    assert len(webhook.got) == 3, "an overloaded receiver is asked again"
    webhook.statuses = [401]
    second = send([alert(hours=1)], channels, store, at(1))
    assert outcomes(second) == {("desk", "open"): "failed"} and len(webhook.got) == 4, "a refusal is not asked again at once"
    assert "hidden" not in first["error"].str.cat() + second["error"].str.cat(), "an address may hold a secret"
    assert outcomes(send([alert(hours=2)], channels, store, at(2))) == {("desk", "open"): "sent"}


def test_a_dead_receiver_and_an_unset_secret_are_failures_in_words(tmp_path, store, webhook):
    webhook.shutdown()
    webhook.server_close()
    channels = hook(tmp_path, webhook, tries=2)
    channels += channels_of(tmp_path, "channels: {other: {kind: webhook, url: env:NO_SUCH_NAME}}")
    told = send([alert()], channels, store, NOON).set_index("channel")
    assert "ConnectError" in told.loc["desk", "error"] and "NO_SUCH_NAME" in told.loc["other", "error"]
    assert told.loc["file", "outcome"] == "sent"


def test_an_alert_nobody_heard_of_is_not_told_as_over(tmp_path, store, webhook):
    channels = hook(tmp_path, webhook)
    webhook.statuses = [400]
    send([alert()], channels, store, NOON)
    over = send([], channels, store, at(1), covers=["HUB1/"])
    assert outcomes(over) == {("file", "over"): "sent"}
    assert alert_table(store)["state"].tolist() == ["closed"]


def test_silence_ends_by_itself_and_what_goes_on_is_told_then(tmp_path, store, webhook):
    channels = hook(tmp_path, webhook)
    silence(store, "*/data_drift", 4, "known since the new route", "kim", NOON)
    hushed = send([alert(hours=1), alert("HUB1/missing", hours=1)], channels, store, at(1))
    assert hushed.set_index(["key", "channel"])["outcome"].to_dict() == {
        ("HUB1/data_drift", "desk"): "silenced", ("HUB1/missing", "desk"): "sent",
        ("HUB1/data_drift", "file"): "silenced", ("HUB1/missing", "file"): "sent"}
    assert set(send([alert(hours=5)], channels, store, at(5))["outcome"]) == {"sent"}
    silence(store, "*", 8, "", "kim", at(6))
    silence(store, "*", 0, "back already", "kim", at(7))
    assert set(send([alert("HUB1/volume", hours=8)], channels, store, at(8))["outcome"]) == {"sent"}


def test_a_mail_server_receives_one_mail_for_several_alerts(tmp_path, store, mailbox):
    channels = channels_of(tmp_path, f"""
channels:
  mail: {{kind: email, host: 127.0.0.1, port: {mailbox.server_address[1]}, security: none, sender: amhs@fab.example, to: [shift@fab.example, kim@fab.example]}}
""")
    korean = alert("HUB2/missing", "critical", title="HUB2: 결측\r\nBcc: all@fab.example", text="하루 동안 값이 없다.")
    told = send([alert(), korean], channels, store, NOON)
    assert set(told["outcome"]) == {"sent"}
    mail, = mailbox.got
    assert mail["Subject"] == "[critical] HUB2: 결측 Bcc: all@fab.example (and 1 more)" and "Bcc" not in mail
    assert mail["To"] == "shift@fab.example, kim@fab.example"
    assert "하루 동안 값이 없다." in mail.get_content() and "hub_jobs is higher than ever." in mail.get_content()


def test_state_survives_the_process(tmp_path, webhook):
    channels = hook(tmp_path, webhook)
    for hours in (0, 1):
        with open_store(tmp_path / "store.sqlite") as opened:
            send([alert(hours=hours)], channels, opened, at(hours))
    assert len(webhook.got) == 1


def test_findings_become_one_alert_per_line_and_kind():
    rows = [(line, "feature_drift", f"feature_{i}", "warning" if i else "critical", f"Sentence {i}.") for line in ("HUB1", "HUB2") for i in range(30)]
    rows += [("HUB1", "volume", "rows", "info", "A few rows less.")]
    found = alerts_of(pd.DataFrame(rows, columns=["line", "kind", "name", "severity", "what"]), NOON)
    assert [(a.key, a.severity) for a in found] == [("HUB1/feature_drift", "critical"), ("HUB2/feature_drift", "critical")]
    assert found[0].text.splitlines()[-1] == "… and 20 more." and len(found[0].text.splitlines()) == 11
    assert alerts_of(pd.DataFrame(columns=["line", "kind", "name", "severity", "what"]), NOON) == []


@pytest.mark.parametrize(("text", "says"), [
    ("channels: {x: {kind: webhook}}", "url"),
    ("channels: {x: {kind: email, host: h, sender: s, to: []}}", "to"),
    ("channels: {x: {kind: log, leest: info}}", "leest"),
    ("repeat_after_h: 0", "repeat_after_h"),
])
def test_a_wrong_file_is_refused_by_name(tmp_path, text, says):
    with pytest.raises(ParameterError, match=says):
        channels_of(tmp_path, text)
