"""The command as a person meets it: answers, exit codes, messages."""

import contextlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from toy_project import make_project, write_stage
from typer.testing import CliRunner

from amhs import cli
from amhs.core import ParameterError
from amhs.telemetry import read_dataset

AMHS = Path(sys.executable).with_name("amhs")


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A toy project in which `amhs` is called, with one run of stage 01."""
    with pytest.MonkeyPatch.context() as patch:
        for key in ("AMHS_RUNS", "AMHS_DATA", "AMHS_PARAMS", "AMHS_SITES"):
            patch.delenv(key, raising=False)
        root = tmp_path_factory.mktemp("cli")
        patch.setenv("AMHS_ROOT", str(root))
        make_project(root)
        yield root, amhs(root, "run", "develop", "--to", "business", "--run-id", "first", "--set", "business.days=9")


def amhs(cwd, *args, **env):
    return subprocess.run([AMHS, *args], cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, timeout=300)


def test_help_names_every_command(tmp_path):
    done = amhs(tmp_path, "--help")
    assert done.returncode == 0
    for command in ("run", "simulate", "import", "stages", "report", "doctor"):
        assert f"  {command} " in done.stdout


def loaded(code):
    """Names of the modules loaded after running some code in a fresh process."""
    done = subprocess.run([sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"],
                          capture_output=True, text=True, check=True, timeout=60)
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_nothing_heavy_is_imported_before_it_is_needed(toy):
    heavy = {"papermill", "nbformat", "nbconvert", "pandas", "numpy", "matplotlib", "xgboost", "numba"}
    assert not loaded("import amhs.cli") & (heavy | {"pydantic", "rich", "amhs.runs"})
    assert not loaded("from amhs import plan; plan.plan_run(profile='full')") & heavy


def test_a_good_run_says_where_its_report_is(toy):
    root, done = toy
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["All 1 stages finished, every gate passed.", "Report: runs/first/index.html"]
    assert (root / "runs/first/index.html").is_file()
    assert "01 business: cell 1 of 7" in done.stderr and "01 business: finished" in done.stderr
    assert "\x1b" not in done.stdout + done.stderr, "no colours when nobody looks"


def on_a_terminal(cwd, *args, **env):
    """Exit code and all that the command writes when a person sits before it."""
    pid, fd = pty.fork()
    if not pid:
        os.chdir(cwd)
        os.execve(AMHS, [str(AMHS), *args], {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm-256color"} | env)
    said = b""
    with os.fdopen(fd, "rb", buffering=0) as end, contextlib.suppress(OSError):  # how Linux says that the other side is gone
        while some := end.read(1 << 16):
            said += some
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), said.decode()


def seen(said):
    """What stays on the screen: of each line, what was written last."""
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said)
    return [line.rsplit("\r", 1)[-1].rstrip() for line in text.replace("\r\n", "\n").split("\n")]


@pytest.mark.parametrize("env", [{}, {"NO_COLOR": "1"}], ids=["colour", "no colour"])
def test_on_a_terminal_a_bar_moves_and_one_line_stays(toy, env):
    code, said = on_a_terminal(toy[0], "run", "develop", "--to", "business", "--set", "business.days=11", "--force", **env)
    assert code == 0 and re.search(r"━.*6/7.*cells", said), "the bar, at the last cell"
    assert re.fullmatch(r"✓ 01 business    finished, [\d.]+ s, 1 of 1 gates passed", seen(said)[0])
    assert seen(said)[1] == "All 1 stages finished, every gate passed." and "cell 6 of 7" not in said
    assert bool(re.search(r"\x1b\[[\d;]*m", said)) == (not env)


def test_elsewhere_progress_is_plain_lines(toy):
    _, done = toy
    assert "01 business: cell 6 of 7" in done.stderr.splitlines() and "\x1b" not in done.stdout + done.stderr and "━" not in done.stderr


def test_report_finds_a_run_by_its_beginning(toy):
    done = amhs(toy[0], "report", "fir")
    assert done.stdout.splitlines() == ["first: finished. All 1 stages finished, every gate passed.", "Report: runs/first/index.html"]
    assert amhs(toy[0], "report", "frist").stderr == "amhs: no such run (got 'frist'). use one of first.\n"


def test_the_shell_completes_commands_and_run_ids(toy):
    def completed(words):
        env = os.environ | {"_AMHS_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
        return subprocess.run([AMHS], cwd=toy[0], env=env, capture_output=True, text=True, timeout=60).stdout.split()
    assert {"run", "runs"} <= set(completed("amhs ru")) and completed("amhs runs show fir") == ["first"]


def test_a_failing_cell_exits_1_with_a_short_report(toy):
    write_stage(toy[0], "poc", "raise ValueError('no rows\\nat all')")
    done = amhs(toy[0], "run", "develop", "--from", "poc", "--to", "poc", "--run-id", "second")
    assert done.returncode == 1
    report = done.stderr[done.stderr.index("Stage poc"):]
    assert report.startswith("Stage poc, code cell 5: ValueError: no rows\n    raise ValueError('no rows\\nat all')\n")
    assert "Notebook: runs/second/02_poc/notebook.html" in report and "Traceback" not in done.stderr


def test_a_cell_that_took_too_long_is_all_that_is_said(toy):
    write_stage(toy[0], "poc", "import time; time.sleep(99)")
    done = amhs(toy[0], "run", "develop", "--from", "poc", "--to", "poc", "--cell-timeout", "1")
    assert done.returncode == 1 and "timed out" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Report: "), "nothing of what was given up complains afterwards"


def test_a_failed_gate_exits_3(toy):
    write_stage(toy[0], "poc", "run.gate('signal', 0, 1)")
    done = amhs(toy[0], "run", "develop", "--from", "poc", "--to", "poc")
    assert done.returncode == 3 and "stage poc failed gate signal (0, asked >= 1)" in done.stdout


@pytest.mark.parametrize(("args", "said"), [
    (["--set", "poc.treees=3"], "did you mean trees"),
    (["--set", "poc.trees"], "--set takes stage.name=value"),
    (["--set", "pcc.trees=3"], "use one of poc"),
    (["--set", "poc.trees=few"], "poc: `trees`"),
    (["--profile", "dmeo"], "no such profile"),
    (["--from", "traim"], "use one of train"),
    (["--resume", "nothing"], "no such run"),
    (["--json"], "add --plan"),
    (["--resume", "first", "--run-id", "second"], "leave one of them out"),
    (["--resume", "first", "--grid", "poc.trees=3,4"], "leave one of them out"),
    (["--resume", "first", "--profile", "smoke"], "leave one of them out"),
    (["--grid", "poc.trees=3", "--grid", "poc.trees=4"], "each parameter once"),
])
def test_bad_words_exit_2_with_one_message_and_no_traceback(toy, args, said):
    before = sorted(toy[0].glob("runs/*"))
    done = amhs(toy[0], "run", "develop", *args)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("amhs: ") and said in done.stderr and done.stderr.count("\n") == 1
    assert sorted(toy[0].glob("runs/*")) == before


def test_unknown_pipeline_and_option(toy):
    assert "use one of develop" in amhs(toy[0], "run", "devlop").stderr
    assert amhs(toy[0], "run", "--porfile", "demo").returncode == 2


def test_asked_again_it_answers_without_importing_anything(toy):
    root, _ = toy
    words = ["run", "develop", "--to", "business", "--set", "business.days=9"]
    _, first, second = (amhs(root, *words) for _ in range(3))
    assert (first.returncode, second.returncode) == (0, 0)
    assert first.stdout.startswith("Nothing to do, run ") and second.stdout == first.stdout
    code = f"import sys, os; os.chdir({str(root)!r}); sys.argv = ['amhs', *{words}]\nfrom amhs import cli\ntry: cli.main()\nexcept SystemExit: pass"
    assert not loaded(code) & {"yaml", "rich", "pandas", "papermill", "amhs.config", "amhs.plan", "amhs.runs"}


def test_overrides_come_from_option_file_and_papermills_habit(toy):
    root, _ = toy
    (root / "night.yaml").write_text("business: {days: 20, line: A}\npoc.min_skill: 1e-3\n")
    done = amhs(root, "run", "develop", "--to", "poc", "-f", "night.yaml", "-p", "business.line", "B", "--plan", "--json")
    told = {s["stage"]: s for s in json.loads(done.stdout)["stages"]}
    assert {n: o["value"] for n, o in told["business"]["overridden"].items()} == {"days": 20, "line": "B"}
    assert told["poc"]["parameters"]["min_skill"] == 0.001 and told["poc"]["action"] == "run" and told["poc"]["why"]


def test_a_grid_by_command(toy):
    root, _ = toy
    done = amhs(root, "run", "develop", "--to", "business", "--grid", "line=A,B", "--isolated")
    assert done.returncode == 0 and done.stdout.startswith("2 of 2 runs: 2 finished. 2 stages executed."), done.stdout + done.stderr


    names = {line.split(":")[0][-2:] for line in done.stderr.splitlines() if ": cell" in line}
    assert names == {"-1", "-2"}, "each line of progress names its run"


def test_the_plan_of_a_grid_is_one_for_each_run(toy):
    asked = ("run", "develop", "--to", "poc", "--grid", "line=A,C", "--grid", "poc.trees=31,32", "--plan")
    told = json.loads(amhs(toy[0], *asked, "--json").stdout)
    assert [t["grid"] for t in told] == [{"business.line": x, "poc.trees": n} for x in "AC" for n in (31, 32)]
    assert [t["stages"][0]["parameters"]["line"] for t in told] == ["A", "A", "C", "C"]
    said = amhs(toy[0], *asked).stdout
    assert "run 4 of 4: business.line=C, poc.trees=32" in said and not re.search(" $", said, re.M)


def test_a_table_keeps_ids_whole_where_the_terminal_is_narrow(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    cli.show_table([{"run": "20260701-120000-smoke", "verdict": "All nine stages finished, every gate passed, nothing is owed to anyone."}])
    out = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "20260701-120000-smoke" in out and "…" not in out and max(map(len, out.splitlines())) <= 60


@pytest.mark.parametrize("ask", [("runs", "ls"), ("runs", "show", "gone"), ("report", "gone")])
def test_a_run_whose_runner_is_dead_does_not_say_it_runs(toy, ask):
    run = toy[0] / "runs/gone"
    run.mkdir(exist_ok=True)
    (run / "run.json").write_text(json.dumps(json.loads((toy[0] / "runs/first/run.json").read_text()) | {"run_id": "gone", "status": "running"}))
    try:
        said = amhs(toy[0], *ask).stdout
        assert "killed" in next(line for line in said.splitlines() if "gone" in line), said
    finally:
        shutil.rmtree(run)


def test_plan_runs_nothing(toy):
    before = sorted(toy[0].rglob("runs/*"))
    done = amhs(toy[0], "run", "develop", "--profile", "smoke", "--set", "train.trees=77", "--plan")
    assert done.returncode == 0 and "train.trees" in done.stdout and "77" in done.stdout and "--set" in done.stdout
    assert [n for n in ("business", "poc", "evaluate") if n not in done.stdout] == []
    assert sorted(toy[0].rglob("runs/*")) == before


def test_an_unforeseen_error_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr("amhs.stages.stage_rows", lambda: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["amhs", "stages"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


def test_simulate_then_import_what_it_wrote(tmp_path):
    done = amhs(tmp_path, "simulate", "--days", "1", "--seed", "3", "--out", "hub", "--line", "L2")
    assert done.returncode == 0, done.stderr
    written = read_dataset(tmp_path / "hub")
    written.to_csv(tmp_path / "export.csv", index=False)
    done = amhs(tmp_path, "import", "export.csv", "--site", "simulated", "--out", "copy")
    assert done.returncode == 0, done.stderr
    assert "1,440 rows read into copy" in done.stdout
    copy = read_dataset(tmp_path / "copy")
    pd.testing.assert_frame_equal(copy, written[list(copy)])


def test_import_of_nothing_usable_exits_2(tmp_path):
    (tmp_path / "empty.csv").write_text("")
    done = amhs(tmp_path, "import", "empty.csv", "--site", "simulated", "--out", "out")
    assert done.returncode == 2 and done.stderr.startswith("amhs: ") and not (tmp_path / "out").exists()
    assert "--site and --out" in amhs(tmp_path, "import", "empty.csv").stderr


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("warn", 0), ("fail", 1)])
def test_doctor_fails_if_a_check_does(monkeypatch, status, code):
    monkeypatch.setattr(cli, "CHECKS", (lambda: cli.Check("ok", "Python", "3"), lambda: cli.Check(status, "disk", "full", "make room")))
    done = CliRunner().invoke(cli.app, ["doctor"])
    assert done.exit_code == code and f"{status:<4}  disk       full" in done.output and "-> make room" in done.output


def test_doctor_sees_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path))
    make_project(tmp_path)
    lock = ["no-such-package==1.0 \\", "    --hash=sha256:00", "typer==0.0.1", "win==1 ; sys_platform == 'win32'"]
    (tmp_path / "requirements.lock").write_text("\n".join(lock))
    assert cli.check_packages()[:3] == ("fail", "packages", "missing: no-such-package")
    write_stage(tmp_path, "train", tags=())
    assert "06_train.ipynb has 0 cells tagged `parameters`" in cli.check_stages().found
    monkeypatch.setenv("AMHS_RUNS", "/proc/amhs")
    assert cli.check_folders().status == "fail" or os.access("/proc", os.W_OK)


def test_stages_lists_the_table():
    output = CliRunner().invoke(cli.app, ["stages"]).output
    assert "라벨링 데이터셋" in output and "back to develop" in output


def test_assignments():
    assert cli.parse_assignments(["a.b=1=2", " c.d = x "]) == {"a.b": "1=2", "c.d": "x"}
    with pytest.raises(ParameterError):
        cli.parse_assignments(["=3"])
