"""Stages that misbehave: each ends in a true status, harms nothing beside it, and leaves a project that can run."""

import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from toy_project import make_project, write_stage

from amhs import runs, stages, warm
from amhs.core import StageError, read_json
from amhs.execute import Limits, run_stage
from amhs.plan import plan_run

QUIET = runs.Manner(fast=False, show=runs.Reporter(lambda line: None))


@pytest.fixture
def toy(tmp_path, monkeypatch):
    for key in ("AMHS_RUNS", "AMHS_DATA", "AMHS_PARAMS", "AMHS_SITES", "AMHS_LANG"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path))
    return make_project(tmp_path)


def one(toy, extra, limits=None, **kw):
    """Run one stage whose extra cell holds this code; its manifest and folder."""
    write_stage(toy, "business", extra)
    result = runs.run_pipeline(last="business", manner=replace(QUIET, limits=limits or Limits()), **kw)
    return result.manifests[0], result.folder / "01_business"


def test_a_stage_that_eats_memory_is_ended_and_says_so(toy):
    hog = "import time\nhog = bytearray(600_000_000)\nfor i in range(0, len(hog), 4096): hog[i] = 1\ntime.sleep(60)"
    manifest, folder = one(toy, hog, Limits(memory_mb=400))
    assert manifest["status"] == "out of memory" and "more than its limit of 400 MB" in manifest["error"]["message"]
    assert manifest["error"]["cell_id"] == "extra" and (folder / "notebook.html").is_file()


def test_memory_that_cannot_be_had_is_out_of_memory(toy):
    manifest, _ = one(toy, "raise MemoryError('no more')")
    assert (manifest["status"], manifest["error"]["cell_id"]) == ("out of memory", "extra")


def test_a_flood_of_output_is_cut(toy):
    manifest, folder = one(toy, "print('x' * 100_000_000)\nfor i in range(3): print('y' * 500_000)")
    assert manifest["status"] == "finished"
    assert (folder / "notebook.ipynb").stat().st_size < 3_000_000
    assert "output cut here: this cell showed more than 1,000,000 bytes" in (folder / "notebook.html").read_text()


def test_children_do_not_outlive_the_stage(toy):
    manifest, _ = one(toy, "import subprocess\nchild = subprocess.Popen(['sleep', '600'])\nrun.metric('child', child.pid)")
    pid = manifest["metrics"]["child"]["value"]
    assert manifest["status"] == "finished"
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("end", ["", "import os; os._exit(3)"])
def test_temporary_files_do_not_outlive_the_stage(toy, tmp_path, monkeypatch, fast, end):
    """Kernels are ended at once and do not tidy up; batches would fill the disk night after night."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    keeps = "import tempfile\nkept = tempfile.TemporaryDirectory()\nfor file in (kept.name + '/rows', 'where'): open(file, 'w').write(kept.name)\n"
    write_stage(toy, "business", keeps + end)
    result = runs.run_pipeline(last="business", manner=replace(QUIET, fast=fast))
    assert result.manifests[0]["status"] == ("dead kernel" if end else "finished")
    assert Path("where").read_text().startswith(f"{tmp_path / 'tmp'}/amhs-") and not list((tmp_path / "tmp").iterdir())


SECRET = "hunter2-and-more"


def holders(folder: Path) -> list[Path]:
    return [p for p in folder.rglob("*") if p.is_file() and SECRET.encode() in p.read_bytes()]


def test_a_secret_reaches_the_stage_and_no_file_of_the_run(toy, monkeypatch):
    monkeypatch.setenv("TOKEN", SECRET)
    show = "import sys\ntoken = run.secret(run.params.scenario)\nassert len(token) == 16\nprint(token); print(token, file=sys.stderr)\ntoken"
    manifest, folder = one(toy, show, sets={"business.scenario": "env:TOKEN"})
    assert manifest["status"] == "finished" and holders(folder.parent.parent) == []
    assert "[secret env:TOKEN]" in (folder / "notebook.html").read_text()
    manifest, folder = one(toy, show + "\nraise ValueError(token)", sets={"business.scenario": "env:TOKEN"})
    assert manifest["status"] == "error" and holders(folder.parent.parent) == []
    assert "[secret env:TOKEN]" in manifest["error"]["message"]


def test_a_secret_in_an_artefact_fails_the_stage(toy, monkeypatch):
    (toy / "token.txt").write_text(SECRET + "\n")
    leak = "token = run.secret(run.params.scenario)\n(run.folder / 'artefacts').mkdir(exist_ok=True)\n(run.folder / 'artefacts' / 'x').write_text(token)"
    manifest, folder = one(toy, leak, sets={"business.scenario": f"file:{toy / 'token.txt'}"})
    assert (manifest["status"], manifest["error"]["name"]) == ("error", "secret written")
    assert holders(folder.parent.parent) == [] and manifest["outputs"] == {}


def test_a_secret_that_is_not_there_is_named(toy):
    manifest, _ = one(toy, "run.secret(run.params.scenario)", sets={"business.scenario": "env:AMHS_NO_SUCH"})
    assert "AMHS_NO_SUCH" in manifest["error"]["message"]


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="mounting a small file system needs root")
def test_a_full_disk_leaves_the_truth_and_the_next_run_works(toy):
    (toy / "runs").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", toy / "runs"]).returncode:
        pytest.skip("this system lets nobody mount a file system")
    try:
        write_stage(toy, "business", "(run.folder / 'big').write_bytes(b'0' * 3_000_000)")
        with pytest.raises(StageError, match="No space left.*amhs run --resume full"):
            runs.run_pipeline(last="business", run_id="full", manner=QUIET)
        assert read_json(toy / "runs/full/run.json")["status"] == "error"
        write_stage(toy, "business")
        assert runs.run_pipeline(last="business", run_id="after", manner=QUIET).status == "finished"
    finally:
        subprocess.run(["umount", toy / "runs"], check=True)


# --- the warm worker ----------------------------------------------------------------------------------------------------


def told(folder: Path) -> list:
    """What an executed notebook says, without the times."""
    keys = ("output_type", "name", "text", "data", "ename", "evalue")
    return [(c["id"], "".join(c["source"]), c.get("execution_count"), [{k: o[k] for k in keys if k in o} for o in c.get("outputs", [])])
            for c in read_json(folder / "notebook.ipynb")["cells"]]


@pytest.mark.skipif(not warm.can_fork(), reason="this system does not fork")
def test_a_forked_kernel_leaves_the_same_notebook(toy):
    shows = "import pandas as pd, sys\nprint('out'); print('err', file=sys.stderr)\ndisplay(pd.DataFrame({'a': [1, 2]}))\n3 * 4"
    apart, folder = one(toy, shows, run_id="apart")
    fast = runs.run_pipeline(last="business", run_id="fast", forced=True, manner=replace(QUIET, fast=True))
    assert (apart["status"], fast.status) == ("finished", "finished")
    assert told(folder) == told(fast.folder / "01_business")
    assert apart["outputs"] == fast.manifests[0]["outputs"] and (fast.folder / "01_business" / "notebook.html").is_file()


SHOWS = [
    "import asyncio, os, subprocess, sys, threading, warnings\nimport multiprocessing as mp\nimport pandas as pd",
    "async def later(x):\n    await asyncio.sleep(0.01)\n    return x\ntask = asyncio.create_task(later(1))\nawait later(2)",
    "await task, asyncio.get_running_loop().is_running()",
    "os.system('echo from a shell'); subprocess.run(['sh', '-c', 'echo bad >&2']); os.write(1, '한글\\n'.encode())",
    "!echo by magic\n%who_ls",
    "print('a', end=''); print('b', file=sys.stderr); print('c')",
    "from IPython.display import HTML, clear_output, display, update_display\n"
    "display(HTML('<b>1</b>'), display_id='x')\nupdate_display(HTML('<b>2</b>'), display_id='x')",
    "print('gone'); clear_output(); print('kept')",
    "p = mp.get_context('fork').Process(target=print, args=('a forked child',)); p.start(); p.join()",
    "t = threading.Thread(target=print, args=('a thread',)); t.start(); t.join()",
    "import matplotlib.pyplot as plt\nplt.figure(figsize=(1, 1)); plt.plot([1, 2]); plt.show()",
    "try: input()\nexcept Exception as e: print(type(e).__name__)",
    "pd.DataFrame({'a': [1.5, None]})",
    "Out[5], In[3][:5], sys.stdout.isatty(), os.environ['MPLBACKEND'], type(get_ipython()).__name__",
    "def f(x):\n    raise ValueError('no ' + x)\nf('way')",
]


def by_stream(outputs: list[dict]) -> list:
    """Outputs, and what went to each stream: two pipes have no order between them."""
    streams = {name: "".join(line for o in outputs if o.get("name") == name for line in o["text"]) for name in ("stdout", "stderr")}
    return [o for o in outputs if "text" not in o] + [streams]


@pytest.mark.skipif(not warm.can_fork(), reason="this system does not fork")
def test_both_kinds_of_kernel_show_the_same(worker, toy, monkeypatch):
    monkeypatch.delenv("PYTEST_CURRENT_TEST")
    stages.toy_stage(toy, "business", *SHOWS)
    plan, found = plan_run(last="business"), {}
    for kind, by in (("isolated", None), ("forked", worker)):
        (toy / "runs" / kind).mkdir(parents=True)
        manifest = run_stage(plan.steps[0], toy / "runs" / kind, plan, {}, warm=by)
        assert (manifest["kernel"]["kind"], manifest["status"], manifest["error"]["name"]) == (kind, "error", "ValueError")
        cells = [c for c in told(toy / "runs" / kind / "01_business") if c[0].startswith("cell")]
        found[kind] = [(*rest, by_stream(outputs)) for *rest, outputs in cells]
    assert found["forked"] == found["isolated"]
    everything = json.dumps(found["forked"], ensure_ascii=False)
    assert all(text in everything for text in ("from a shell", "bad", "한글", "by magic", "a forked child", "image/png", "StdinNotImplementedError"))


@pytest.mark.skipif(not warm.can_fork(), reason="this system does not fork")
def test_a_flood_out_of_a_forked_kernel_is_cut(worker, toy):
    write_stage(toy, "business", "print('x' * 100_000_000)")
    (toy / "runs" / "r").mkdir(parents=True)
    plan = plan_run(last="business")
    manifest = run_stage(plan.steps[0], toy / "runs" / "r", plan, {}, warm=worker)
    assert manifest["status"] == "finished" and (toy / "runs/r/01_business/notebook.ipynb").stat().st_size < 3_000_000


@pytest.mark.skipif(not warm.can_fork(), reason="this system does not fork")
@pytest.mark.parametrize(("code", "status", "said"), [
    ("1 / 0", "error", "ZeroDivisionError"),
    ("import os; os._exit(3)", "dead kernel", "exit code 3"),
    ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "dead kernel", "SIGKILL"),
    ("import time; time.sleep(60)", "timed out", "longer than the time-out"),
    ("import asyncio\nawait asyncio.sleep(60)", "timed out", "longer than the time-out"),
    ("import time; hog = bytearray(b'1') * 900_000_000; time.sleep(60)", "out of memory", "more than its limit of 800 MB"),
])
def test_a_forked_kernel_ends_in_the_same_ways(worker, toy, code, status, said):
    write_stage(toy, "business", code)
    (toy / "runs" / "r").mkdir(parents=True)
    plan = plan_run(last="business")
    manifest = run_stage(plan.steps[0], toy / "runs" / "r", plan, {}, limits=Limits(cell_timeout_s=4, memory_mb=800), warm=worker)
    assert manifest["status"] == status and said in f"{manifest['error']['name']}: {manifest['error']['message']}"


@pytest.fixture(scope="module")
def worker():
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("PYTEST_CURRENT_TEST")  # with it, kernels do not look at what child processes write
        with runs.warm_worker(runs.Manner()) as found:
            yield found


@pytest.mark.skipif(not warm.can_fork(), reason="this system does not fork")
def test_without_its_worker_a_kernel_starts_by_itself(toy, caplog):
    write_stage(toy, "business")
    (toy / "runs" / "r").mkdir(parents=True)
    plan = plan_run(last="business")
    with tempfile.TemporaryDirectory() as folder:
        dead = warm.start_warm(folder)
        dead.process.kill()
        dead.process.wait()
        manifest = run_stage(plan.steps[0], toy / "runs" / "r", plan, {}, warm=dead)
    assert manifest["status"] == "finished" and (toy / "runs/r/01_business/notebook.html").is_file()
    assert manifest["kernel"]["kind"] == "isolated" and "did not fork a kernel and ended (-9)" in manifest["kernel"]["why"]
    assert [r.getMessage() for r in caplog.records if r.name == "amhs"] == [f"a kernel starts by itself, which takes longer: {manifest['kernel']['why']}"]


@pytest.mark.skipif(not warm.can_fork(), reason="this system does not fork")
def test_what_the_worker_could_not_import_is_on_record(toy, monkeypatch):
    (toy / "broken").mkdir()
    (toy / "broken" / "sqlite3.py").write_text("raise ImportError('broken on purpose')")
    monkeypatch.setenv("PYTHONPATH", str(toy / "broken"))
    write_stage(toy, "business")
    result = runs.run_pipeline(last="business", manner=replace(QUIET, fast=True))
    assert result.status == "finished" and result.manifests[0]["kernel"]["kind"] == "forked"
    assert "sqlite3 (ImportError: broken on purpose)" in result.manifests[0]["kernel"]["why"]


@pytest.mark.skipif(not warm.can_fork(), reason="this system does not fork")
def test_kernels_and_worker_go_with_a_killed_runner(toy):
    write_stage(toy, "business", "import os, time\n(stages.project_root() / 'reached').write_text(f'{os.getpid()} {os.getppid()}')\ntime.sleep(120)")
    runner = subprocess.Popen([shutil.which("amhs") or str(Path(os.sys.executable).with_name("amhs")), "run", "--to", "business"], cwd=toy,
                              stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end = time.time() + 60
    while not (toy / "reached").exists() or not (toy / "reached").read_text():
        assert time.time() < end and runner.poll() is None
        time.sleep(0.1)
    pids = [int(p) for p in (toy / "reached").read_text().split()]
    runner.send_signal(signal.SIGKILL)
    runner.wait()
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
        assert time.time() < end, "a kernel or the worker outlived the runner"
        time.sleep(0.1)
    write_stage(toy, "business")
    assert runs.run_pipeline(last="business", manner=QUIET).status == "finished"
    killed = [r for r in stages.list_runs() if read_json(r / "run.json")["status"] == "killed"]
    assert len(killed) == 1 and json.loads((killed[0] / "01_business/manifest.json").read_text())["status"] == "killed"
