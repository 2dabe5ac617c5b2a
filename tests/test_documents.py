"""Deliverable documents: templates in two languages, what they may ask for, what a reader gets."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text
from toy_project import make_project, write_stage

from amhs import plots, runs, stages
from amhs.config import load_params, settings
from amhs.core import ParameterError, StageError, read_json, write_json
from amhs.documents import Terms, load_labels, load_terms, placeholders, render, translated
from amhs.plan import plan_run

AMHS = Path(sys.executable).with_name("amhs")
OWED = [(s, d) for s in stages.STAGES for d in s.deliverables]
HANGUL = re.compile("[가-힣]")
GATES = pd.DataFrame({"name": ["skill"], "value": [0.4], "op": [">="], "limit": [0.05], "verdict": ["FAIL"], "why": ["too low"]}).set_index("name")


SETTINGS = ("AMHS_RUNS", "AMHS_DATA", "AMHS_PARAMS", "AMHS_SITES", "AMHS_LANG")


def amhs(root, *args):
    """The command, in a project."""
    return subprocess.run([AMHS, *args], cwd=root, env={**os.environ, "AMHS_ROOT": str(root)}, capture_output=True, text=True, timeout=120)


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A toy project with the real templates, which a test may spoil."""
    for key in SETTINGS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path))
    return make_project(tmp_path)


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A toy project with a run in both languages that broke in stage 02."""
    with pytest.MonkeyPatch.context() as patch:
        for key in SETTINGS:
            patch.delenv(key, raising=False)
        root = tmp_path_factory.mktemp("spoken")
        patch.setenv("AMHS_ROOT", str(root))
        write_stage(make_project(root), "poc", "1 / 0")
        done = amhs(root, "run", "develop", "--to", "poc", "--lang", "both", "--run-id", "both")
        assert done.returncode == 1 and "ZeroDivisionError" in done.stderr, done.stderr
        return root


@pytest.fixture
def again(spoken, tmp_path, monkeypatch):
    """A copy of that project which a test may spoil."""
    for key in SETTINGS:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("AMHS_ROOT", str(tmp_path / "again"))
    return Path(shutil.copytree(spoken, tmp_path / "again"))


def note(**blocks):
    """The feasibility note of a stage run by hand, with these blocks; the folder it lies in."""
    stage = stages.StageRun(stages.find_stage("poc"), load_params("poc"), settings().runs / "scratch", {}, "by-hand", "2026-07-01T12:00:00+09:00",
                            settings().lang)
    stage.folder.mkdir(parents=True, exist_ok=True)
    figure = Figure((2, 1))
    figure.subplots().plot([1, 2])
    given = {"curve": figure, "scores": pd.DataFrame({"model": ["linear"], "skill_change_max_10": [0.25]}), "failed": GATES, "gates": GATES}
    stage.document("feasibility", **given | blocks)
    return stage, stage.folder / "documents"


@pytest.mark.parametrize(("stage", "owed"), OWED, ids=lambda x: x.name)
def test_every_deliverable_has_both_templates_with_the_same_placeholders(stage, owed):
    english, korean = placeholders(owed.name, "en"), placeholders(owed.name, "ko")
    assert english == korean and english


@pytest.mark.parametrize(("stage", "owed"), OWED, ids=lambda x: x.name)
def test_korean_prose_is_korean(stage, owed):
    "Each paragraph and each head of a Korean template holds Hangul, and no sentence was left in English."
    text = (settings().params / "templates/ko" / f"{owed.name}.md").read_text(encoding="utf-8")
    prose = re.sub(r"\{%.*?%\}|\{\{.*?\}\}|```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    assert all(HANGUL.search(p) for p in prose.split("\n\n") if p.strip())
    assert not re.search(r"\b[a-z]+ [a-z]+ [a-z]+\b", prose)
    assert not HANGUL.search((settings().params / "templates/en" / f"{owed.name}.md").read_text(encoding="utf-8"))


def test_no_template_is_left_over():
    for lang in ("en", "ko"):
        there = {p.stem for p in (settings().params / "templates" / lang).glob("[!_]*.md")}
        assert there == {d.name for _, d in OWED}


def test_a_korean_document(toy, monkeypatch):
    monkeypatch.setenv("AMHS_LANG", "ko")
    stage, folder = note()
    text, html = (folder / "feasibility.md").read_text(), (folder / "feasibility.html").read_text()
    assert text.startswith("# 타당성 검토서\n\n*02단계 PoC 모델 개발 · 실행 by-hand · 2026-07-01 12:00*")
    assert "| 모델 | 스킬(최대 변화량, 10분) |" in text and "| 선형 | 0.25 |" in text and "| 스킬 | 0.4 | >= | 0.05 | 미달 | too low |" in text
    assert "**진행 보류.**" in text and not re.search("verdict|Stage|figure|Go", text)
    assert '<html lang="ko">' in html and "<title>타당성 검토서</title>" in html
    names = ("-curve.png", ".en-curve.png", ".en.html", ".en.md", ".html", ".md")
    assert sorted(p.name for p in folder.iterdir()) == [f"feasibility{n}" for n in names], "English is there for who asks for it later"
    assert stage.documents["feasibility"]["pages"] == {"ko": "feasibility.html", "en": "feasibility.en.html"}
    assert {p.rsplit("/", 2)[-2] for p in stage.files} == {"ko"}, "the templates of the language that was asked for"


def test_both_languages_stand_side_by_side(toy, monkeypatch):
    monkeypatch.setenv("AMHS_LANG", "both")
    stage, folder = note(failed=GATES[:0])
    english, korean = (folder / "feasibility.md").read_text(), (folder / "feasibility.ko.md").read_text()
    assert english.startswith("# Feasibility note (타당성 검토서)\n\n*Stage 02 Proof of concept") and "**Go.**" in english
    assert korean.startswith("# 타당성 검토서") and "**진행.**" in korean
    assert english.count("(feasibility-curve.png)") == korean.count("(feasibility.ko-curve.png)") == 1
    assert stage.documents["feasibility"]["pages"] == {"en": "feasibility.html", "ko": "feasibility.ko.html"}
    assert {p.rsplit("/", 2)[-2] for p in stage.files} == {"en", "ko"}, "the templates are what the stage read"


def test_a_function_of_the_language_is_asked_for_each(toy, monkeypatch):
    monkeypatch.setenv("AMHS_LANG", "both")
    _, folder = note(scores=lambda lang: f"in {lang}")
    assert "in en" in (folder / "feasibility.md").read_text() and "in ko" in (folder / "feasibility.ko.md").read_text()


@pytest.mark.parametrize(("prose", "said"), [
    ("{{ scores }} {{ scroes }}", "asks for scroes.*it may use .*scores"),
    ("{{ curve.secret }}{{ scores }}{{ failed }}{{ gates }}", "cannot be filled.*it may use curve"),
    ("{{ scores }}", "has no place for curve, failed, gates.*it has scores"),
    ("{% if failed %}", "line 1"),
    ("{{ curve.__class__.__mro__ }}{{ scores }}{{ failed }}{{ gates }}", "unsafe|cannot be filled"),
])
def test_a_template_that_cannot_be_filled_is_refused(toy, prose, said):
    (toy / "params/templates/en/feasibility.md").write_text(prose)
    with pytest.raises(StageError, match=said):
        note()


def test_a_stage_that_gives_other_names_is_refused(toy):
    with pytest.raises(StageError, match="has no place for scroes.*it has curve, failed, gates, scores"):
        note(scroes=1)


def test_what_a_stage_says_is_not_a_template(toy):
    _, folder = note(scores="{{ gates }} {% raw %} <script>")
    assert "{{ gates }} {% raw %} <script>" in (folder / "feasibility.md").read_text()
    assert "<script>" not in (folder / "feasibility.html").read_text()


def test_a_broken_or_missing_template_is_found_before_anything_runs(toy, monkeypatch):
    (toy / "params/templates/ko/validation.md").write_text("{{ scores")
    assert plan_run().steps, "a language nobody asked for is not looked at"
    monkeypatch.setenv("AMHS_LANG", "both")
    with pytest.raises(StageError, match="ko/validation.md, line 1"):
        runs.run_pipeline()
    (toy / "params/templates/ko/validation.md").unlink()
    with pytest.raises(StageError, match="validation has no template in 'ko'.*analysis_plan"):
        runs.run_pipeline()
    assert not list(toy.glob("runs/*/"))


class Links(HTMLParser):
    """Where a page links to."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found += [v for k, v in attrs if k == "href"]


def test_the_language_of_a_run_reaches_kernel_manifest_and_page(spoken):
    run = spoken / "runs/both"
    assert read_json(run / "run.json")["lang"] == read_json(run / "01_business/manifest.json")["lang"] == "both"
    links = Links((run / "index.html").read_text()).found
    for name in ("requirements", "requirements.ko", "analysis_plan", "analysis_plan.ko"):
        assert f"01_business/documents/{name}.html" in links and (run / f"01_business/documents/{name}.html").is_file()


def why_again(wanted, monkeypatch):
    monkeypatch.setenv("AMHS_LANG", wanted)
    step = plan_run(last="business").steps[0]
    return step.why if step.action == "run" else ()


def test_another_language_runs_nothing_again(again, monkeypatch):
    manifest = again / "runs/both/01_business/manifest.json"
    for made in ("both", "ko", "en"):
        write_json(manifest, read_json(manifest) | {"lang": made})
        assert [why_again(wanted, monkeypatch) for wanted in ("en", "ko", "both")] == [(), (), ()]


def test_but_for_what_is_not_there_in_it(again, monkeypatch):
    manifest = again / "runs/both/01_business/manifest.json"
    record = read_json(manifest) | {"lang": "en"}
    write_json(manifest, record)
    with open(again / "params/templates/ko/analysis_plan.md", "a", encoding="utf-8") as f:
        f.write("\n서명: 담당자\n")
    for path in [p for p in record["files"] if "/ko/" in p]:
        del record["files"][path]
    del record["documents"]["requirements"]["pages"]["ko"]
    write_json(manifest, record)
    assert why_again("en", monkeypatch) == ()
    assert why_again("both", monkeypatch) == ("document requirements was not written in ko", "template ko/analysis_plan.md changed")


def test_asked_for_another_language_the_command_finds_the_documents(again):
    write_stage(again, "poc")
    assert amhs(again, "run", "--to", "poc", "--lang", "en", "--run-id", "english").returncode == 0
    done = amhs(again, "run", "--to", "poc", "--lang", "ko")
    assert done.returncode == 0 and "runs/english/index.html" in done.stdout + done.stderr, done.stdout + done.stderr
    links = Links((again / "runs/english/index.html").read_text()).found
    assert "02_poc/documents/feasibility.ko.html" in links and not list((again / "runs").glob("2*"))


def test_a_language_nobody_asked_for_may_be_broken(toy):
    (toy / "params/templates/ko/feasibility.md").write_text("{{ scores")
    stage, folder = note()
    assert stage.documents["feasibility"]["pages"] == {"en": "feasibility.html"} and not list(folder.glob("*.ko.*"))


def test_figures_speak_the_reader_s_language(toy, monkeypatch):
    monkeypatch.setattr(plots, "_style", lambda: {"font.family": ["DejaVu Sans", "DejaVu Sans Mono"]})
    curve = plots.learning(pd.DataFrame({"train": [2.0, 1.0]}), stopped=1)
    with curve.in_words(load_labels("ko")):
        assert {t.get_text() for t in curve.findobj(Text)} >= {"손실", "반복", "학습", "1에서 멈춤"}
    assert {t.get_text() for t in curve.findobj(Text)} >= {"loss", "round", "train", "stopped at 1"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, folder = note(curve=curve)
    assert (folder / "feasibility-curve.png").read_bytes() != (folder / "feasibility.ko-curve.png").read_bytes()


def test_without_a_font_figures_stay_english(monkeypatch):
    monkeypatch.setattr(plots, "_style", lambda: {"font.family": ["DejaVu Sans"]})
    curve = plots.bars(pd.Series({"a": 1.0}), "How early")
    with curve.in_words(load_labels("ko")):
        assert "How early" in {t.get_text() for t in curve.findobj(Text)}


def test_names_of_ticks_are_said_too_and_come_back():
    curve = plots.waterfall(pd.Series({"base": 1.0} | {f"f{i}": float(i) for i in range(20)}))
    said = [t.get_text() for t in curve.axes[0].get_yticklabels()]
    if len(plots._style()["font.family"]) == 1:
        pytest.skip("no Korean font here")
    with curve.in_words(load_labels("ko")):
        assert [t.get_text() for t in curve.axes[0].get_yticklabels()][0] == "그 외 10개" and said[0] == "10 others"
    assert [t.get_text() for t in curve.axes[0].get_yticklabels()] == said


def test_a_changed_template_makes_its_stage_old(again, monkeypatch):
    monkeypatch.setenv("AMHS_LANG", "both")
    assert plan_run(last="business").steps[0].action == "skip"
    with open(again / "params/templates/ko/requirements.md", "a", encoding="utf-8") as f:
        f.write("\n서명: 담당자\n")
    assert plan_run(last="business").steps[0].why == ("params/templates/ko/requirements.md changed",)


def test_a_run_that_is_gone_on_with_keeps_its_language(again):
    write_stage(again, "poc")
    done = amhs(again, "run", "--resume", "both")
    assert done.returncode == 0, done.stderr
    assert (again / "runs/both/02_poc/documents/feasibility.ko.md").read_text().startswith("# 타당성 검토서")


def test_the_command_refuses_an_unknown_language(again):
    done = amhs(again, "run", "develop", "--lang", "kr")
    assert done.returncode == 2 and "'en', 'ko' or 'both'" in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_language_is_refused(toy, monkeypatch):
    monkeypatch.setenv("AMHS_LANG", "kr")
    with pytest.raises(ParameterError, match="'en', 'ko' or 'both'"):
        settings()


def test_terms_translate_heads_words_and_what_varies():
    heads, words = load_terms("ko")
    frame = pd.DataFrame({"passed": [True, False], "why": ["at a false-alarm budget of 1 a day", "hub_jobs"], "rows": [12, 13]},
                         index=pd.Index(["leaks", "M14"], name="name"))
    said = translated(frame, heads, words)
    assert list(said) == ["통과", "근거", "행 수"] and list(said.index) == ["데이터 누설", "M14"] and said.index.name == "항목"
    assert said.to_numpy().tolist() == [["예", "하루 오경보 한도 1건 기준", 12], ["아니오", "hub_jobs", 13]]
    assert list(frame) == ["passed", "why", "rows"], "the table itself stays as it is"


def test_a_numbered_table_stays_numbered():
    frame = pd.DataFrame({"a": [1, 2]})
    assert isinstance(translated(frame, Terms({}), Terms({})).index, pd.RangeIndex)


def test_terms_have_the_parts_they_may_have(toy):
    (toy / "params/templates/ko/terms.yaml").write_text("haeds: {a: b}")
    with pytest.raises(StageError, match="haeds.*heads and words.*labels"):
        load_terms("ko")


def test_empty_lists_tables_and_numbers_in_a_sentence(tmp_path):
    (tmp_path / "en").mkdir()
    (tmp_path / "en/_head.md").write_text("# {{ title }}")
    (tmp_path / "en/x.md").write_text("{{ n }} {{ share }} {{ names }} {{ no }}{% if empty %}never{% endif %}")
    blocks = {"n": 259200, "share": 0.123456, "names": ["a", "b"], "no": None, "empty": pd.DataFrame({"a": []})}
    assert render("x", "en", blocks, {"title": "T"}, tmp_path) == "# T\n\n259,200 0.1235 a, b –\n"
