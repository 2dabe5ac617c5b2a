"""The store keeps what it acknowledged, whatever happens to its process, its disk or its neighbours; on SQLite and on PostgreSQL."""

import contextlib
import os
import pwd
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import wait
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from amhs import store as store_module
from amhs.core import InputError, ParameterError
from amhs.simulate import simulate
from amhs.store import GroupCommit, StoreBusy, StoreError, minute_of, observation_rows, open_store, telemetry_of
from amhs.telemetry import COLUMNS

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
NUMBERS = count()


def observation(minute=0, line="HUB1", value=0.0, **other):
    return {"line": line, "minute": minute, "received": NOON, "values": np.full(31, value, np.float32)} | other


def prediction(ident, minute=0, made=NOON, **other):
    return {"id": str(ident), "line": "HUB1", "minute": minute, "made": made, "source": "model", "model": "3-0123abcd", "role": "live",
            "alarm": True, "answer": b'{"now": 1}'} | other


OUTCOME = {"line": "HUB1", "minute": 7, "horizon_min": 10, "level_min": 1.5, "level_avg": 2.0, "level_max": 3.0, "surge_class": 2, "joined": NOON}
FEEDBACK = {"id": "f1", "prediction": "p1", "line": "HUB1", "minute": 7, "verdict": "real", "comment": "정체", "operator": "kim", "at": NOON}
DECISION = {"id": "d1", "at": NOON, "kind": "promote", "subject": "HUB1", "who": "lee", "why": "better", "detail": "{}"}


# --- the two databases


def program(name):
    "A program of PostgreSQL, also where Debian hides it."
    hidden = sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"), reverse=True)
    return shutil.which(name) or (str(hidden[0]) if hidden else None)


class Server:
    "A PostgreSQL server of our own, on a socket in a folder of its own."

    def __init__(self):
        self.folder = Path(tempfile.mkdtemp(prefix="amhs-pg-"))
        self.user = "nobody" if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        if os.geteuid() == 0:  # PostgreSQL refuses root
            shutil.chown(self.folder, self.user)
        self.call("initdb", "-D", self.folder / "data", "-U", "amhs", "-A", "trust", "-E", "UTF8", "--no-sync", "--locale=C.UTF-8")
        self.start()

    def call(self, name, *arguments):
        as_user = {"user": self.user, "group": pwd.getpwnam(self.user).pw_gid, "extra_groups": ()} if os.geteuid() == 0 else {}
        done = subprocess.run([program(name), *map(str, arguments)], cwd=self.folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, timeout=60, **as_user)
        assert done.returncode == 0, done.stderr.decode()

    def start(self):
        options = f"-c listen_addresses= -c unix_socket_directories={self.folder} -c max_connections=50"
        self.call("pg_ctl", "-D", self.folder / "data", "-w", "-s", "-l", self.folder / "log", "-o", options, "start")

    def stop(self):
        self.call("pg_ctl", "-D", self.folder / "data", "-w", "-s", "-m", "immediate", "stop")

    def fresh(self):
        "The URL of a new, empty database."
        import psycopg

        name = f"amhs{next(NUMBERS)}"
        with psycopg.connect(f"host={self.folder} user=amhs dbname=postgres", autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return f"postgresql+psycopg://amhs@/{name}?host={self.folder}"


@pytest.fixture(scope="session")
def server():
    pytest.importorskip("psycopg", reason="psycopg is not installed; pip install 'amhs[postgres]'")
    if not program("initdb") or not program("pg_ctl"):
        pytest.skip("no PostgreSQL server is installed (initdb, pg_ctl); scripts/system-packages.sh installs Debian's")
    server = Server()
    yield server
    with contextlib.suppress(AssertionError):
        server.stop()
    shutil.rmtree(server.folder)


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return request.getfixturevalue("server").fresh() if request.param == "postgresql" else f"sqlite:///{tmp_path}/store.sqlite"


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def shared(request, tmp_path_factory):
    "A store for many examples of a property; each takes a line of its own."
    folder = tmp_path_factory.mktemp("shared")
    url = request.getfixturevalue("server").fresh() if request.param == "postgresql" else folder / "store.sqlite"
    with open_store(url) as found:
        yield found


@pytest.fixture
def file(tmp_path):
    return tmp_path / "store.sqlite"


def minutes_of(store, line="HUB1"):
    return store.read("observations", line)["minute"].tolist()


# --- what is written is read


def test_every_table_is_read_as_it_was_written(url):
    with open_store(url) as store:
        store.write("predictions", [prediction("p1", 7, inputs=b"\x00\xff", explanation=None)])
        store.write("outcomes", [OUTCOME, OUTCOME | {"horizon_min": 15, "level_min": np.nan, "level_avg": None, "surge_class": None}])
        store.write("feedback", [FEEDBACK])
        store.write("decisions", [DECISION, {"id": "d2", "at": NOON + timedelta(microseconds=1), "kind": "note", "subject": "x"}])
    with open_store(url) as store:
        found = store.read("predictions").iloc[0]
        assert found[["id", "line", "minute", "made", "alarm", "answer"]].tolist() == ["p1", "HUB1", 7, NOON, True, b'{"now": 1}']
        assert (found["inputs"], found["explanation"]) == (b"\x00\xff", None)
        outcomes = store.read("outcomes", horizon_min=15).iloc[0]
        assert outcomes[["level_min", "level_avg", "surge_class"]].isna().all() and outcomes["level_max"] == 3.0
        assert store.read("feedback", "HUB1").iloc[0].to_dict() == FEEDBACK
        decisions = store.read("decisions", since=NOON + timedelta(microseconds=1))
        assert decisions["id"].tolist() == ["d2"] and decisions["why"].isna().all()
        assert str(decisions["at"].dtype) == "datetime64[us, UTC]"


def test_an_empty_answer_has_the_columns_and_types_of_a_full_one(url):
    with open_store(url) as store:
        empty = {n: store.read(n) for n in store_module.STORE_TABLES}
        store.write("observations", [observation()])
        store.write("predictions", [prediction(1)])
        store.write("outcomes", [OUTCOME])
        store.write("feedback", [FEEDBACK])
        store.write("decisions", [DECISION])
        for name, table in empty.items():
            assert len(table) == 0
            assert table.dtypes.to_dict() == store.read(name).dtypes.to_dict(), name
        minutes, values = store.newest("no such line")
        assert (minutes.shape, values.shape) == ((0,), (0, 31))


def test_telemetry_goes_in_and_comes_out(shared):
    telemetry = simulate(days=1, seed=3, line="round trip").telemetry.head(90)
    telemetry.loc[3:5, "hub_jobs_alt"] = np.nan
    shared.write("observations", observation_rows(telemetry.sample(frac=1, random_state=1), NOON))
    pd.testing.assert_frame_equal(telemetry_of(shared.read("observations", "round trip")), telemetry[["line", "timestamp", *COLUMNS]])
    minutes, values = shared.newest("round trip", 30)
    assert minutes.tolist() == [minute_of(t) for t in telemetry["timestamp"].tail(30)]
    assert np.array_equal(values, telemetry[list(COLUMNS)].tail(30).to_numpy(np.float32), equal_nan=True)


@given(values=arrays(np.float32, 31, elements=st.floats(width=32, allow_nan=True, allow_infinity=True)))
def test_every_float_is_kept_to_the_bit(shared, values):
    line = f"bits {next(NUMBERS)}"
    shared.write("observations", [observation(line=line, values=values)])
    assert shared.newest(line)[1].tobytes() == values.tobytes()


@given(st.lists(st.tuples(st.integers(-3, 12), st.integers(0, 9)), min_size=1, max_size=30), st.data())
def test_the_last_row_of_a_key_counts_and_writing_again_changes_nothing(shared, rows, data):
    line, expected = f"upsert {next(NUMBERS)}", dict(rows)
    rows = [observation(m, line, v) for m, v in rows]
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=4)))
    for begin, end in zip([0, *cuts], [*cuts, len(rows)]):
        shared.write("observations", rows[begin:end])
    for _ in range(2):
        found = shared.read("observations", line)
        assert dict(zip(found["minute"], found["hub_jobs"].astype(int))) == expected
        assert found["minute"].is_monotonic_increasing
        shared.write("observations", [observation(m, line, v) for m, v in data.draw(st.permutations(list(expected.items())))])


@given(minutes=st.sets(st.integers(-50, 50), max_size=20), since=st.none() | st.integers(-60, 60), until=st.none() | st.integers(-60, 60),
       limit=st.none() | st.integers(0, 25), newest_first=st.booleans())
def test_read_takes_the_rows_asked_for(shared, minutes, since, until, limit, newest_first):
    line = f"read {next(NUMBERS)}"
    shared.write("observations", [observation(m, line) for m in minutes])
    within = [m for m in sorted(minutes, reverse=newest_first) if (since is None or m >= since) and (until is None or m < until)]
    found = shared.read("observations", line, since, until, limit, newest_first)
    assert found["minute"].tolist() == within[:limit]
    assert shared.newest(line, 5)[0].tolist() == sorted(minutes)[-5:]


def test_times_bound_minutes_and_decisions(shared):
    shared.write("observations", [observation(minute_of(NOON) + i, "times") for i in range(3)])
    assert len(shared.read("observations", "times", since=NOON + timedelta(minutes=1), until=NOON + timedelta(minutes=2))) == 1
    with pytest.raises(ParameterError, match="use one of minute"):
        shared.read("observations", minut=3)


@settings(max_examples=40)
@given(ages=st.lists(st.integers(0, 10 * 1440), max_size=12), keep=st.floats(0.5, 8))
def test_what_is_too_old_goes_and_nothing_else(shared, ages, keep):
    line = f"ttl {next(NUMBERS)}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "_SLICE", 3)
        shared.expire(NOON + timedelta(days=99), 1)
        shared.write("observations", [observation(minute_of(NOON) - a, line) for a in ages])
        shared.write("outcomes", [OUTCOME | {"line": line, "minute": minute_of(NOON) - a} for a in ages])
        shared.write("predictions", [prediction(i, made=NOON - timedelta(minutes=a), line=line) for i, a in enumerate(ages)])
        shared.write("decisions", [DECISION])
        removed = shared.expire(NOON, keep)
        kept = [a for a in ages if a <= keep * 1440]
        kept_minutes = {a for a in set(ages) if -a >= minute_of(NOON - timedelta(days=keep)) - minute_of(NOON)}
    assert sorted(NOON - t.to_pydatetime() for t in shared.read("predictions", line)["made"]) == sorted(timedelta(minutes=a) for a in kept)
    assert {minute_of(NOON) - m for m in shared.read("outcomes", line)["minute"]} == kept_minutes
    assert {minute_of(NOON) - m for m in shared.read("observations", line)["minute"]} == kept_minutes
    assert removed["predictions"] == len(ages) - len(kept)
    assert len(shared.read("decisions")) == 1
    assert shared.expire(NOON, keep) == {"observations": 0, "outcomes": 0, "predictions": 0}
    assert shared.expire(NOON, {}) == {}


# --- what cannot be kept


@pytest.mark.parametrize(("table", "row", "said"), [
    ("observations", observation(line="x" * 65), "at most 64 characters"),
    ("observations", observation(line="a\0b"), "at most 64 characters"),
    ("observations", observation(line="\ud800"), "surrogates"),
    ("observations", observation(minute=2**63), "64 bits"),
    ("observations", observation(minute=1.5), "`minute`"),
    ("observations", observation(minute=None), "it is missing"),
    ("observations", observation(values=np.zeros(30)), "31 float32"),
    ("observations", observation(values="abc"), "`values`"),
    ("observations", observation(received="2026-01-01"), "`received`"),
    ("observations", observation(received=datetime(2026, 1, 1)), "time zone"),
    ("observations", observation(colour="red"), "no such column"),
    ("predictions", prediction(1, answer="text"), "wanted are bytes"),
    ("feedback", FEEDBACK | {"comment": "x" * 10_001}, "10000 characters"),
    ("outcomes", {k: v for k, v in OUTCOME.items() if k != "joined"}, "`joined`"),
])
def test_a_wrong_value_is_named_and_its_batch_left_alone(shared, table, row, said):
    good = {"observations": observation(77, "beside"), "predictions": prediction("beside"), "feedback": FEEDBACK | {"id": "beside"},
            "outcomes": OUTCOME | {"line": "beside"}}[table]
    with pytest.raises(InputError, match=said):
        shared.write(table, [good, row])
    key = {"id": "beside"} if "id" in good else {"line": "beside"}
    assert len(shared.read(table, **key)) == 0


def test_names_are_told_apart_by_case_and_accent(shared):
    for i, line in enumerate(["hub", "HUB", "Hüb", "허브", "hub "]):
        shared.write("observations", [observation(i, line)])
        assert shared.newest(line)[0].tolist() == [i]


def test_no_such_table(shared):
    with pytest.raises(ParameterError, match="use one of observations"):
        shared.write("observation", [observation()])
    with pytest.raises(ParameterError, match="no such table"):
        shared.write("about", [{"name": "schema", "value": "9"}])


# --- group commit


def test_rows_of_many_threads_share_transactions(url):
    with open_store(url) as store, GroupCommit(store, wait_ms=5) as commits:
        def hand_in(worker):
            futures = [commits.put("observations", observation(i, f"L{worker}")) for i in range(200)]
            commits.post("predictions", prediction(worker))
            assert wait(futures, timeout=30).not_done == set()
            assert minutes_of(store, f"L{worker}") == list(range(200))
        workers = [threading.Thread(target=hand_in, args=(w,)) for w in range(4)]
        [w.start() for w in workers]
        [w.join() for w in workers]
        commits.close()
        assert len(store.read("predictions")) == 4
        assert (commits.rows, commits.failed, commits.waiting) == (804, 0, 0)
        assert commits.commits < 200


def test_the_order_of_handing_in_is_kept(url):
    with open_store(url) as store, GroupCommit(store, wait_ms=0) as commits:
        futures = [commits.put("observations", observation(0, value=v)) for v in range(300)]
        assert wait(futures, timeout=30).not_done == set()
        assert store.newest("HUB1")[1][0, 0] == 299


def test_closing_does_not_wait_for_further_rows(file):
    with open_store(file) as store:
        begun = time.monotonic()
        with GroupCommit(store, wait_ms=60_000) as commits:
            future = commits.put("observations", observation(1))
        assert future.result(timeout=0) is None and minutes_of(store) == [1]
        assert time.monotonic() - begun < 30


def test_a_post_alone_is_written_soon(url):
    with open_store(url) as store, GroupCommit(store, post_ms=20) as commits:
        commits.post("predictions", prediction(1))
        deadline = time.monotonic() + 10
        while not commits.rows and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(store.read("predictions")) == 1


def test_who_gives_up_waiting_harms_nobody(file):
    with open_store(file) as store, GroupCommit(store, wait_ms=50) as commits:
        first, second = (commits.put("observations", observation(i)) for i in range(2))
        assert first.cancel()
        assert second.result(timeout=10) is None
        assert commits.put("observations", observation(2)).result(timeout=10) is None


def test_more_than_may_wait_is_refused(file):
    with open_store(file) as store, GroupCommit(store, limit=10, post_ms=60_000) as commits:
        for i in range(10):
            commits.post("observations", observation(i))
        with pytest.raises(StoreBusy, match="10 rows wait"):
            commits.put("observations", observation(99))
        commits.close()
        assert minutes_of(store) == list(range(10))
        with pytest.raises(StoreError, match="closed"):
            commits.put("observations", observation())


# --- faults


@contextlib.contextmanager
def locked(url):
    "Somebody else holds the database."
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            yield
    else:
        import psycopg

        with psycopg.connect(url.replace("+psycopg", "")) as other:
            other.execute("LOCK TABLE observations IN ACCESS EXCLUSIVE MODE")
            yield


def test_a_locked_database_costs_the_batch_and_no_more(url):
    with open_store(url, wait_s=0.2) as store, GroupCommit(store) as commits:
        with locked(url):
            with pytest.raises(StoreError, match="stays locked by another process"):
                store.write("observations", [observation(1)])
            with pytest.raises(StoreError, match="nothing of this batch was written"):
                commits.put("observations", observation(2)).result(timeout=10)
        assert commits.put("observations", observation(3)).result(timeout=10) is None
        assert (minutes_of(store), commits.failed) == ([3], 1)


def test_readers_are_not_kept_waiting_by_a_writer(file):
    with open_store(file, wait_s=0.2) as store:
        store.write("observations", [observation(1)])
        with locked(f"sqlite:///{file}"):
            assert store.newest("HUB1")[0].tolist() == minutes_of(store) == [1]


WRITER = """
import sys, time
import numpy as np
from datetime import datetime, UTC
from amhs.store import GroupCommit, open_store
store = open_store(sys.argv[1])
now, values = datetime.now(UTC), np.zeros(31, np.float32)
with GroupCommit(store, wait_ms=0) as commits:
    for batch in range(10**9):
        rows = [{"line": "HUB1", "minute": 50 * batch + i, "received": now, "values": values} for i in range(50)]
        if batch % 2: store.write("observations", rows)
        else: [f.result() for f in [commits.put("observations", r) for r in rows]]
        print(batch, flush=True)
"""


def test_a_killed_writer_loses_nothing_it_acknowledged(url):
    writer = subprocess.Popen([sys.executable, "-c", WRITER, url], stdout=subprocess.PIPE, text=True)
    seen = [int(writer.stdout.readline()) for _ in range(40)]
    os.kill(writer.pid, signal.SIGKILL)
    rest = writer.communicate(timeout=30)[0].split()
    seen += [int(b) for b in rest if b.isdigit()]
    with open_store(url) as store:
        per_batch = pd.Series(minutes_of(store)).floordiv(50).value_counts()
        assert (per_batch[seen[:-1]] == 50).all()
        assert (per_batch[[b for b in per_batch.index if b % 2]] == 50).all(), "half a transaction"
        store.write("observations", [observation(-1)])
        assert minutes_of(store)[0] == -1
    if url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as connection:
            assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def test_a_server_that_comes_back_is_used_again(server):
    store = open_store(server.fresh(), wait_s=2)
    with store, GroupCommit(store) as commits:
        assert commits.put("observations", observation(1)).result(timeout=10) is None
        server.stop()
        try:
            with pytest.raises(StoreError, match="server cannot be reached"):
                commits.put("observations", observation(2)).result(timeout=20)
            with pytest.raises(StoreError, match="server cannot be reached"):
                store.newest("HUB1")
        finally:
            server.start()
        assert commits.put("observations", observation(3)).result(timeout=20) is None
        assert store.newest("HUB1")[0].tolist() == [1, 3]


def test_a_server_restarted_between_two_rows_is_not_noticed(server):
    with open_store(server.fresh(), wait_s=5) as store:
        store.write("observations", [observation(1)])
        server.stop()
        server.start()
        assert store.newest("HUB1")[0].tolist() == [1]
        store.write("observations", [observation(2)])


FULL = """
import sys, resource, signal
import numpy as np
from datetime import datetime, UTC
from amhs.store import GroupCommit, StoreError, open_store
if len(sys.argv) > 2:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
now, done = datetime.now(UTC), []
store = open_store(sys.argv[1])
with GroupCommit(store) as commits:
    for batch in range(200):
        rows = [{"line": "HUB1", "minute": 500 * batch + i, "received": now, "values": np.zeros(31)} for i in range(500)]
        futures = [commits.put("observations", r) for r in rows]
        errors = [f.exception(timeout=30) for f in futures]
        done += [r["minute"] for r, e in zip(rows, errors) if e is None]
        if any(errors): break
    kind = next(e for e in errors if e)
    assert isinstance(kind, StoreError), kind
    found = store.read("observations")["minute"].tolist()
    assert found == done, (len(found), len(done))
    print(kind)
    if len(sys.argv) > 2:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    else:
        import os; os.unlink(sys.argv[1] + ".ballast")
    assert commits.put("observations", rows[-1]).result(timeout=30) is None
    assert store.newest("HUB1")[0][-1] == rows[-1]["minute"]
"""


def full_disk(path, *limit):
    done = subprocess.run([sys.executable, "-c", FULL, path, *limit], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_full_disk_costs_the_batch_and_no_more(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", tmp_path], capture_output=True).returncode == 0
    try:
        if mounted:
            (tmp_path / "store.sqlite.ballast").write_bytes(bytes(2 * 2**20))
            assert "its disk is full" in full_disk(tmp_path / "store.sqlite")
        else:
            assert "disk" in full_disk(tmp_path / "store.sqlite", str(2 * 2**20))
    finally:
        if mounted:
            subprocess.run(["umount", tmp_path], check=True)


def test_a_limited_file_size_costs_the_batch_and_no_more(tmp_path):
    assert "disk" in full_disk(tmp_path / "store.sqlite", str(2 * 2**20))


def as_nobody(action):
    "What an action raises in a process that may write next to nothing."
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setuid(pwd.getpwnam("nobody").pw_uid)
        try:
            action()
            said = "nothing"
        except BaseException as e:  # noqa: BLE001 (whatever it is, the test wants to see it)
            said = f"{type(e).__name__}: {e}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    with open(read) as f:
        return f.read()


def test_a_file_that_may_only_be_read_says_so():
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "store.sqlite"
        with open_store(file) as store:
            store.write("observations", [observation(1)])
        file.chmod(0o444)
        Path(folder).chmod(0o555)
        try:
            said = as_nobody(lambda: open_store(file).write("observations", [observation(2)]))
        finally:
            Path(folder).chmod(0o755)
    assert said.startswith("StoreError") and ("may only be read" in said or "cannot be opened" in said), said
    assert str(file) in said


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(StoreError, match="its folder is there"):
        open_store(tmp_path / "unmounted/store.sqlite")
    assert not (tmp_path / "unmounted").exists()


def test_the_default_store_lies_in_the_project(tmp_path, monkeypatch):
    shutil.copy(Path(__file__).parent.parent / "settings.ini", tmp_path)
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path))
    monkeypatch.delenv("AMHS_STORE", raising=False)
    with open_store() as store:
        store.write("observations", [observation(1)])
    assert (tmp_path / "data/store.sqlite").is_file()
    monkeypatch.setenv("AMHS_STORE", "env:STORE_URL")
    monkeypatch.setenv("STORE_URL", "sqlite:///data/other.sqlite")
    with open_store() as store:
        assert len(store.read("observations")) == 0
    assert (tmp_path / "data/other.sqlite").is_file()


def test_a_newer_schema_is_left_alone(url):
    import sqlalchemy as sa

    with open_store(url) as store, store.engine.connect() as connection:
        connection.execute(sa.text("UPDATE about SET value = '2'"))
        connection.commit()
    with pytest.raises(StoreError, match="newer amhs: its schema is 2, this one knows 1"):
        open_store(url)


def test_a_file_that_is_no_database_says_so(file):
    file.write_bytes(b"not a database" * 1000)
    with pytest.raises(StoreError, match="damaged or is no database"):
        open_store(file)
    assert file.read_bytes().startswith(b"not a database")


@pytest.mark.parametrize(("name", "said"), [("sqlite://", "needs a file"), ("oracle+nonsense://x", "no driver"), ("sqlite:///:memory:", "needs a file")])
def test_a_store_that_cannot_be(name, said):
    with pytest.raises((ParameterError, StoreError), match=said):
        open_store(name)


def test_a_server_that_is_not_there_says_so_and_hides_the_password(tmp_path):
    pytest.importorskip("psycopg")
    with pytest.raises(StoreError, match="cannot be reached") as e:
        open_store(f"postgresql+psycopg://amhs:s3cret@/amhs?host={tmp_path}", wait_s=1)
    assert "s3cret" not in str(e.value)


def test_a_file_removed_or_replaced_meanwhile_is_not_written_to(file, caplog):
    with open_store(file) as store, GroupCommit(store) as commits:
        assert commits.put("observations", observation(1)).result(timeout=10) is None
        for ending in ("", "-wal", "-shm"):
            file.with_name(file.name + ending).unlink()
        assert commits.put("observations", observation(2)).result(timeout=10) is None
        assert store.newest("HUB1")[0].tolist() == [2]
        assert "removed or replaced" in caplog.text
    with open_store(file) as again:
        assert minutes_of(again) == [2]


OPENER = "import sys; from amhs.store import open_store\nsys.stdin.readline(); open_store(sys.argv[1]); print('good')"


def test_an_empty_database_may_be_opened_by_many_at_once(url):
    openers = [subprocess.Popen([sys.executable, "-c", OPENER, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
               for _ in range(4)]
    time.sleep(2)
    for opener in openers:
        opener.stdin.write("go\n")
        opener.stdin.flush()
    assert [(o.communicate(timeout=30), o.returncode)[1] for o in openers] == [0, 0, 0, 0]


def test_two_processes_write_at_once(file):
    writers = [subprocess.Popen([sys.executable, "-c", WRITER, str(file)], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    seen = [[w.stdout.readline() for _ in range(30)] for w in writers]
    [w.kill() for w in writers]
    [w.communicate() for w in writers]
    with open_store(file) as store:
        assert len(minutes_of(store)) >= 50 * 30
    assert all(line.strip().isdigit() for lines in seen for line in lines)


def test_a_process_without_free_file_handles_is_told_so(file):
    with open_store(file) as store:
        store.write("observations", [observation(1)])
        store.close()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(StoreError, match="cannot be opened"):
                store.newest("HUB1")
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert store.newest("HUB1")[0].tolist() == [1]
