"""Writing is whole or not at all, also when the process is killed or the disk is full; errors say what to do."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from amhs.core import InputError, atomic_path, nearest, project_root, read_json, seeded, sha256_json, sha256_tree, write_json

WRITER = """
import sys, itertools
from amhs.core import write_json
for i in itertools.count():
    write_json(sys.argv[1], {"round": i, "body": [i] * 20000})
    if i == 3: print("going", flush=True)
"""


def test_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "state.json"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, path], stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "going\n"
    for _ in range(20):
        found = read_json(path)
        assert found["body"] == [found["round"]] * 20000
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    found = read_json(path)
    assert found["body"] == [found["round"]] * 20000


def test_full_disk_keeps_the_old_file(tmp_path):
    path = write_json(tmp_path / "a.json", {"old": True})
    with pytest.raises(OSError), atomic_path(path) as tmp, open("/dev/full", "wb") as full:
        tmp.write_text("new")
        full.write(b"x" * 1_000_000)
    assert read_json(path) == {"old": True}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_atomic_folder_replaces_folder(tmp_path):
    target = tmp_path / "model"
    for text in ("one", "two"):
        with atomic_path(target) as tmp:
            tmp.mkdir()
            (tmp / "weights.json").write_text(text)
    assert (target / "weights.json").read_text() == "two"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_tree_hash_sees_content_and_names(tmp_path):
    (tmp_path / "a.txt").write_text("1")
    first = sha256_tree(tmp_path)
    (tmp_path / ".hidden").write_text("2")
    assert sha256_tree(tmp_path) == first
    (tmp_path / "a.txt").rename(tmp_path / "b.txt")
    assert sha256_tree(tmp_path) != first


@given(st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=5), max_size=6))
def test_json_hash_ignores_the_order_of_keys(value):
    assert sha256_json(value) == sha256_json(dict(reversed(value.items())))


def test_streams_are_independent_and_repeatable():
    assert seeded(3, "a").random() == seeded(3, "a").random()
    assert len({seeded(s, n).random() for s in (1, 2) for n in ("a", "b")}) == 4


def test_broken_json_is_named(tmp_path):
    (tmp_path / "m.json").write_text(json.dumps({"a": 1})[:-1])
    with pytest.raises(InputError, match="m.json"):
        read_json(tmp_path / "m.json")


def test_root_can_be_named(tmp_path, monkeypatch):
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path))
    assert project_root() == tmp_path.resolve()


def test_nearest_falls_back_to_all_names():
    assert nearest("zzz", ["b", "a"]) == ["a", "b"]


def test_threads_may_read_python_at_the_same_time():
    "A callback of the garbage collector, such as hypothesis has, lets threads change over in the middle of a parse."
    code = """
import gc, sys, threading
from pathlib import Path
from amhs.core import parse_python
sys.setswitchinterval(1e-6)
gc.callbacks.append(lambda *_: sum(range(50)))
gc.set_threshold(50)
source, done = Path(threading.__file__).read_text(), []
threads = [threading.Thread(target=lambda: done.append([parse_python(source) for _ in range(2)])) for _ in range(4)]
for t in threads: t.start()
for t in threads: t.join()
print(len(done))
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "4"
