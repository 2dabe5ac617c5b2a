"""JupyterLab in a real browser: a stage runs from top to bottom, plots are seen, saving leaves no noise, a failed stage opens as it ran."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from by_hand import copy_project, handed_over, plain_environment, run_in_batch

from amhs.core import read_json, write_json

AMHS = Path(sys.executable).with_name("amhs")
TOKEN = "for-this-test-only"


def git(cwd, *args):
    who = ("-c", "user.name=a test", "-c", "user.email=test@example.org")
    return subprocess.run(["git", *who, *args], cwd=cwd, check=True, capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the project under git, with a good run of stages 01 and 02, and an older one whose stage 02 fails."""
    root = run_in_batch(copy_project(tmp_path_factory.mktemp("lab") / "project"), "business", "poc", days="8")  # few, to be quick
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "as it is")
    sets = ("--set", "business.source=gone.csv", "--set", "poc.trees=23")
    assert amhs(root, "run", "develop", "--to", "poc", "--run-id", "broken", *sets).returncode == 1
    record = root / "runs/broken/run.json"
    write_json(record, read_json(record) | {"started": "2026-01-01T00:00:00+09:00"})
    return root


def environment(root):
    """Like a person's shell in the project's folder, with JupyterLab's own files kept out of the home of whoever runs the tests."""
    own = {f"JUPYTER_{kind}_DIR": str(root.parent / kind) for kind in ("CONFIG", "DATA", "RUNTIME")} | {"IPYTHONDIR": str(root.parent / "ipython")}
    return plain_environment(**own)


def amhs(root, *args):
    return subprocess.run([AMHS, *args], cwd=root, env=environment(root), capture_output=True, text=True, timeout=300)


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Lab:
    """A JupyterLab started by a command of ours."""

    def __init__(self, root, *command):
        self.address, log = f"http://127.0.0.1:{(port := free_port())}", root.parent / "lab.log"
        options = ("--allow-root", "--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0", f"--IdentityProvider.token={TOKEN}")
        with open(log, "w") as out:
            whole = [AMHS, *command, "--no-browser", "--", *options]
            self.process = subprocess.Popen(whole, cwd=root, env=environment(root), stdout=out, stderr=out, start_new_session=True)
        self.log = log

    def wait(self):
        """Until it answers."""
        for _ in range(240):
            assert self.process.poll() is None, self.log.read_text()
            try:
                return urllib.request.urlopen(f"{self.address}/api/status?token={TOKEN}", timeout=5)
            except OSError:
                time.sleep(0.25)
        raise AssertionError(f"JupyterLab did not answer: {self.log.read_text()}")

    def end(self):
        """Stop it; its kernels end with it."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(10)


@pytest.fixture(scope="module")
def lab(clone):
    running = Lab(clone, "lab")
    try:
        running.wait()
        yield running
    finally:
        running.end()


def open_page(browser, lab, path):
    """A page with a notebook whose kernel is ready."""
    page = browser.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(60_000)
    page.goto(f"{lab.address}/lab/tree/{path}?token={TOKEN}&reset")  # no tabs of an earlier test
    page.get_by_text(re.compile(r"^Python.* \| Idle$")).first.wait_for(timeout=90_000)  # in the status bar; "No Kernel" at first
    return page


WRONG = '.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.stderr"]'  # errors and warnings
ALL_RAN = """() => {
  const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')].map(p => p.textContent.trim());
  return prompts.length > 2 && prompts.every(p => /^\\[\\d+\\]:$/.test(p));
}"""


def run_all(page):
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.locator('[data-command="runmenu:run-all"]').click()


def save(page, path):
    """Save, and wait until the file was written."""
    before = path.stat().st_mtime_ns
    page.keyboard.press("Control+s")
    for _ in range(120):
        if path.stat().st_mtime_ns != before:
            return
        page.wait_for_timeout(250)
    raise AssertionError("the notebook was not saved within 30 seconds")


def test_a_stage_runs_shows_its_plot_saves_without_noise_and_gives_what_the_run_gave(browser, lab, clone):
    path = "nbs/stages/02_poc.ipynb"
    page = open_page(browser, lab, path)
    run_all(page)
    plot = page.locator(".jp-OutputArea-output img").first
    plot.wait_for(timeout=180_000)
    plot.scroll_into_view_if_needed()
    assert plot.evaluate("i => i.complete ? i.naturalWidth * i.naturalHeight : 0") > 10_000
    page.wait_for_function(ALL_RAN, timeout=180_000)
    assert page.locator(WRONG).count() == 0
    save(page, clone / path)
    page.close()
    assert git(clone, "diff", "--stat") == ""
    assert git(clone, "status", "--porcelain") == ""
    assert handed_over(clone / "runs/scratch/02_poc/results.json") == handed_over(clone / "runs/batch/02_poc/manifest.json")


def test_a_change_is_all_that_a_diff_shows(browser, lab, clone):
    """One line typed into a stage, run and saved: one line of difference, and the parameters tag is still there."""
    path = clone / "nbs/stages/01_business.ipynb"
    page = open_page(browser, lab, "nbs/stages/01_business.ipynb")
    editor = page.locator(".jp-CodeCell .cm-content").first
    editor.click()
    page.keyboard.press("Control+End")
    page.keyboard.type("  # for good")
    run_all(page)
    page.wait_for_function(ALL_RAN, timeout=120_000)
    save(page, path)
    page.close()
    changed = [line for line in git(clone, "diff", "-U0").splitlines() if line[:1] in "+-" and line[:3] not in ("+++", "---")]
    git(clone, "checkout", "-q", ".")
    assert [line[0] for line in changed] == ["-", "+"] and "# for good" in changed[1], changed


def test_a_library_notebook_keeps_the_outputs_that_teach(browser, lab, clone):
    path = clone / "nbs/lib/12_pages.ipynb"
    before = json.loads(path.read_text())
    page = open_page(browser, lab, "nbs/lib/12_pages.ipynb")
    run_all(page)
    page.wait_for_function(ALL_RAN, timeout=120_000)
    save(page, path)
    page.close()
    after = json.loads(path.read_text())
    git(clone, "checkout", "-q", ".")
    assert any(c.get("outputs") for c in after["cells"])
    outputs = [o for c in after["cells"] for o in c.get("outputs", [])]
    assert not [o for o in outputs if o.get("execution_count") or o.get("metadata")]
    for book in (before, after):
        for cell in book["cells"]:
            cell.pop("outputs", None)
    assert after == before


def test_a_failed_stage_opens_as_it_ran(browser, clone):
    """`amhs open` shows the notebook with the run's parameters; Run All fails where the run failed."""
    running = Lab(clone, "open", "broken", "poc")
    try:
        running.wait()
        page = open_page(browser, running, "runs/scratch/broken-poc/02_poc.ipynb")
        assert "in which this stage ended: error in code cell 4" in page.locator(".jp-MarkdownCell").nth(1).inner_text()
        injected = page.locator(".jp-CodeCell .cm-content").nth(1).inner_text()
        assert injected.startswith("# Parameters") and "trees = 23" in injected
        run_all(page)
        page.locator(WRONG).first.wait_for(timeout=120_000)
        assert "got 'gone.csv'" in page.locator(WRONG).first.inner_text()
        page.close()
    finally:
        running.end()
    assert git(clone, "status", "--porcelain") == ""
