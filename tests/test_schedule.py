"""A job is done for every due time, and done once: several workers at a time, workers that are killed, days off."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amhs.schedule import OVER, Job, Worker, dues, job_table, keep_running, open_dues, run_due, run_one
from amhs.store import open_store

MIDNIGHT = datetime(2026, 3, 2, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def store(tmp_path):
    with open_store(tmp_path / "store.sqlite") as opened:
        yield opened


class Clock:
    now = 1000.0

    def __call__(self):
        return self.now


def test_many_workers_do_each_due_time_once(store):
    done, turn = Counter(), threading.Lock()

    def work(due):
        time.sleep(0.005)
        with turn:
            done[due] += 1

    job = Job("hourly", work, every_min=60)
    run_due(Worker(store, "first"), [job], MIDNIGHT)
    workers = [threading.Thread(target=run_due, args=(Worker(store, f"w{i}"), [job], MIDNIGHT + DAY)) for i in range(6)]
    [w.start() for w in workers]
    [w.join() for w in workers]
    assert len(done) == 25 and set(done.values()) == {1}


VICTIM = """
import sys, time
from datetime import datetime, timedelta, UTC
from pathlib import Path
from amhs.schedule import Job, Worker, run_due
from amhs.store import open_store

home = Path(sys.argv[1])

def work(due):
    with open(home / "begun", "a") as f: f.write(f"{due:%d}\\n")
    time.sleep(float(sys.argv[2]))
    with open(home / "ended", "a") as f: f.write(f"{due:%d}\\n")

jobs = [Job("daily", work)]
end = datetime(2026, 3, 6, tzinfo=UTC)
worker = Worker(open_store(home / "store.sqlite"), lease_s=1.0)
run_due(worker, jobs, end - timedelta(days=4))
for _ in range(100):
    run_due(worker, jobs, end)
    if (home / "ended").exists() and (home / "ended").read_text().endswith("06\\n"): break
    time.sleep(0.1)
"""


def test_kill_in_the_middle_of_a_job_loses_none(tmp_path):
    "Three processes are killed while they work; the fourth ends what they began, in order."
    command = [sys.executable, "-c", VICTIM, str(tmp_path)]
    for begun in (1, 2, 3):
        victim = subprocess.Popen([*command, "60"])
        for _ in range(600):
            if (tmp_path / "begun").exists() and len((tmp_path / "begun").read_text().split()) >= begun:
                break
            time.sleep(0.05)
        victim.send_signal(signal.SIGKILL)
        victim.wait()
    subprocess.run([*command, "0"], check=True, timeout=60)
    assert (tmp_path / "ended").read_text().split() == ["02", "03", "04", "05", "06"]
    with open_store(tmp_path / "store.sqlite") as store:
        table = job_table(store).sort_values("due")
    assert set(table["state"]) == {"done"} and table["tries"].tolist() == [4, 1, 1, 1, 1]


def test_a_claim_is_extended_while_its_job_runs(store):
    began, go_on = threading.Event(), threading.Event()
    slow = Job("slow", lambda due: began.set() or go_on.wait(20))
    thread = threading.Thread(target=run_one, args=(Worker(store, "kim", lease_s=0.3), slow, MIDNIGHT))
    thread.start()
    began.wait(10)
    time.sleep(1.0)
    assert run_one(Worker(store, "lee", lease_s=0.3), slow, MIDNIGHT) is None, "three leases later it is still Kim's"
    go_on.set()
    thread.join()
    assert job_table(store)[["state", "who"]].values.tolist() == [["done", "kim"]]


def test_who_lost_a_claim_is_not_believed(store):
    clock, other = Clock(), Job("job", lambda due: "lee's")

    def overtaken(due):
        clock.now += 1000
        assert run_one(Worker(store, "lee", 60, clock), other, due) == "done"

    assert run_one(Worker(store, "kim", 60, clock), Job("job", overtaken), MIDNIGHT) is None
    assert job_table(store)[["state", "who", "tries"]].values.tolist() == [["done", "lee", 2]]


def test_days_off_are_made_up_for(store):
    seen = []
    jobs = [Job(n, lambda due, n=n: seen.append(f"{n} {due:%d}"), after=a, catch_up=c)
            for n, a, c in (("check", ("join",), "all"), ("join", (), "latest"), ("tell", ("check",), "latest"))]
    run_due(Worker(store), jobs, MIDNIGHT)
    seen.clear()
    run_due(Worker(store), jobs, MIDNIGHT + 3 * DAY)
    assert seen == ["join 05", "check 03", "check 04", "check 05", "tell 05"]
    assert run_due(Worker(store), jobs, MIDNIGHT + 3 * DAY).empty


def test_after_a_long_time_off_nobody_waits_for_what_will_never_be_made_up(store):
    seen = []
    jobs = [Job("first", lambda due: None, keep_days=3), Job("waits", lambda due: seen.append(f"{due:%d}"), after=("first",), keep_days=5)]
    run_due(Worker(store), jobs, MIDNIGHT)
    run_due(Worker(store), jobs, MIDNIGHT + 40 * DAY)
    assert seen == ["02", "07", "08", "09", "10", "11"]


def test_no_further_back_than_it_keeps(store):
    seen = []
    job = Job("daily", seen.append, keep_days=3)
    run_due(Worker(store), [job], MIDNIGHT)
    run_due(Worker(store), [job], MIDNIGHT + 40 * DAY)
    assert len(seen) == 4


def test_a_failing_job_holds_up_only_those_that_wait_for_it(store):
    clock, seen, fails = Clock(), [], [True]

    def fragile(due):
        if fails[0]:
            raise ValueError("no telemetry")
        seen.append("fragile")

    jobs = [Job("fragile", fragile, tries=3), Job("waits", lambda due: seen.append("waits"), after=("fragile",)),
            Job("other", lambda due: seen.append("other"))]
    worker = Worker(store, "kim", 60, clock)
    run_due(worker, jobs, MIDNIGHT)
    assert seen == ["other"]
    run_due(worker, jobs, MIDNIGHT + timedelta(seconds=20))
    assert seen == ["other"], "not tried again yet"
    clock.now, fails[0] = clock.now + 31, False
    run_due(worker, jobs, MIDNIGHT + timedelta(minutes=1))
    assert seen == ["other", "fragile", "waits"]
    table = job_table(store).set_index("job")
    assert table.loc["fragile", "tries"] == 2 and table.loc["fragile", "error"] == ""


def test_those_that_wait_are_not_lost_when_the_first_day_fails(store):
    clock, seen = Clock(), []
    jobs = [Job("first", lambda due: 1 / 0 if clock.now < 2000 else None, tries=9), Job("waits", lambda due: seen.append(f"{due:%d}"), after=("first",))]
    worker = Worker(store, "kim", 60, clock)
    run_due(worker, jobs, MIDNIGHT)
    clock.now = 9000
    run_due(worker, jobs, MIDNIGHT + DAY)
    assert seen == ["02", "03"]


def test_given_up_in_the_end_and_others_go_on(store):
    clock, seen = Clock(), []
    jobs = [Job("broken", lambda due: 1 / 0, tries=2), Job("waits", lambda due: seen.append(due), after=("broken",))]
    worker = Worker(store, "kim", 60, clock)
    for _ in range(3):
        run_due(worker, jobs, MIDNIGHT)
        clock.now += 4000
    table = job_table(store).set_index("job")
    assert (table.loc["broken", "state"], len(seen)) == ("given up", 1) and "division" in table.loc["broken", "error"]


def test_an_interrupted_job_is_taken_again_at_once(store):
    tries = []

    def work(due):
        tries.append(due)
        if len(tries) == 1:
            raise KeyboardInterrupt

    job = Job("job", work, tries=1)
    with pytest.raises(KeyboardInterrupt):
        run_one(Worker(store, "kim"), job, MIDNIGHT)
    assert run_one(Worker(store, "lee"), job, MIDNIGHT) == "done"


def test_always_on_wakes_every_job_and_a_long_one_holds_up_no_other(store):
    go_on, quick = threading.Event(), threading.Event()
    jobs = [Job("long", lambda due: go_on.wait(20)), Job("quick", lambda due: quick.set())]
    scheduler = keep_running(Worker(store), jobs, 0.05, lambda: MIDNIGHT)
    try:
        assert quick.wait(10) and not go_on.is_set()
    finally:
        go_on.set()
        scheduler.shutdown()
    assert set(job_table(store)["state"]) <= set(OVER)


@settings(max_examples=60, deadline=None)
@given(every=st.integers(1, 3000), at=st.integers(0, 1439), since=st.integers(0, 10_000), spans=st.lists(st.integers(0, 3000), min_size=1, max_size=5))
def test_due_times_neither_double_nor_vanish_however_time_is_cut(every, at, since, spans):
    job, first = Job("any", print, every_min=every, at_min=at), MIDNIGHT + timedelta(minutes=since)
    ends = [first + timedelta(minutes=sum(spans[: i + 1])) for i in range(len(spans))]
    parts = [d for a, b in zip([first, *ends], ends) for d in dues(job, a, b)]
    assert parts == dues(job, first, ends[-1])
    assert all((d - datetime(1970, 1, 1, tzinfo=UTC) - timedelta(minutes=at)) % timedelta(minutes=every) == timedelta(0) for d in parts)


def test_open_dues_forgets_nothing_between_two_processes(tmp_path):
    job = Job("daily", lambda due: os.getpid())
    for day in range(3):
        with open_store(tmp_path / "store.sqlite") as opened:
            run_due(Worker(opened), [job], MIDNIGHT + day * DAY)
    with open_store(tmp_path / "store.sqlite") as opened:
        assert open_dues(opened, job, MIDNIGHT + 2 * DAY) == [] and len(open_dues(opened, job, MIDNIGHT + 5 * DAY)) == 3
