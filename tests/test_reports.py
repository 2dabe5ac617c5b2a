"""What a reviewer reads: the list of runs, the page of a run with its picture, the page of a stage."""

import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from xml.etree import ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reviewed import Links, check_pages

from amhs import reports
from amhs.core import read_json, write_json
from amhs.stages import PIPELINES, STAGES, find_stage, stage_manifest


def manifests(run):
    return {s.name: m for s in STAGES if (m := stage_manifest(run, s))}


def picture(run):
    "The pipeline's picture on a run's page, as XML."
    text = (run / "index.html").read_text()
    return ElementTree.fromstring(re.search(r"<svg.*?</svg>", text, re.DOTALL)[0])


def of_class(picture, name):
    return [e for e in picture.iter() if name in (e.get("class") or "").split()]


def test_every_page_works_offline_and_every_link_leads_somewhere(week):
    executed = sum(m["cells"] > 0 for run in week.glob("[!.]*day") for m in manifests(run).values())
    documents = sum(len(d["pages"]) for run in week.glob("[!.]*day") for m in manifests(run).values() for d in m["documents"].values())
    assert check_pages(week) == 1 + 4 + executed + documents


# --- the picture -----------------------------------------------------------------------------------------------------


def test_the_picture_has_every_stage_with_its_state_and_where_it_leads(week):
    boxes = {a.find("text").text: a for a in of_class(picture(week / "tuesday"), "is-none") if a.tag == "a"}
    assert list(boxes) == ["01 business", "02 poc", "03 prototype", "04 data", "05 develop", "08 inference", "09 integration"]
    assert boxes["04 data"].get("href") == "../monday/index.html#data" and "taken from run monday" in boxes["04 data"].find("title").text
    titles = [t.text for t in picture(week / "tuesday").iter("title")]
    assert any("train.trees changed 7 → 9" in t for t in titles), "why a stage ran is in its tooltip"
    boxes = {a.find("text").text: a for a in of_class(picture(week / "thursday"), "is-none") if a.tag == "a"}
    assert len(boxes) == len(PIPELINES["develop"]) - 1
    assert boxes["04 data"].get("href") == "#" and "not run" in boxes["04 data"].find("title").text
    tones = {a.find("text").text: a.get("class") for a in picture(week / "monday").iter("a")}
    other = {"poc": "is-idle", "integration": "is-none"}  # skipped; not run
    assert tones == {f"{s.number} {s.name}": other.get(s.name, "is-good") for s in map(find_stage, PIPELINES["develop"])}
    assert of_class(picture(week / "wednesday"), "is-bad")[0].get("href") == "#evaluate"
    assert [t.text for t in of_class(picture(week / "monday"), "faint") if t.text == find_stage("data").title_ko]


def test_arrows_follow_the_inputs(week):
    "Each arrow ends at the left edge of a stage's box and begins below one of its inputs; none is left without."
    drawn = picture(week / "monday")
    boxes = {a.find("text").text.split()[1]: tuple(float(a.find("rect").get(k)) for k in "xy") for a in drawn.iter("a")}
    arrows = set()
    for wire in of_class(drawn, "wire"):
        x, y, _, to_x = map(float, re.fullmatch(r"M([\d.]+) ([\d.]+)V([\d.]+)q0 6 6 6H([\d.]+)", wire.get("d")).groups())
        end = float(re.search(r"V([\d.]+)", wire.get("d"))[1]) + 6
        arrows.add((next(n for n, b in boxes.items() if (b[0] + 12, b[1] + 38) == (x, y)),
                    next(n for n, b in boxes.items() if (b[0], b[1] + 19) == (to_x + 6, end))))
    inputs = {(i, n) for n in boxes for i in find_stage(n).inputs if i in boxes}
    assert arrows <= inputs

    def reach(name):
        return {name} | {n for a, b in arrows if b == name for n in reach(a)}

    assert all(i in reach(n) for i, n in inputs), "what no arrow shows, a chain of arrows does"


def test_bars_stand_on_one_time_axis(week):
    found = manifests(week / "monday")
    bars = [(float(r.get("x")), float(r.get("width"))) for r in of_class(picture(week / "monday"), "bar")]
    seconds = [found[n]["duration_s"] for n in PIPELINES["develop"] if n in found]
    assert len(bars) == len(seconds)
    scale = max(w for _, w in bars) / max(seconds)
    assert all(w == pytest.approx(s * scale, rel=0.02) for (_, w), s in zip(bars, seconds, strict=True) if s * scale > 4)
    assert [x for x, _ in bars] == sorted(x for x, _ in bars)


def test_gates_are_marked_and_explained(week):
    marks = [(e.get("class"), g.find("title").text) for g in picture(week / "tuesday").iter("g") for e in g.findall("circle")]
    gates = [g for m in manifests(week / "tuesday").values() for g in m["gates"]]
    assert [c == "pass" for c, _ in marks] == [g["passed"] for g in gates] and not all(g["passed"] for g in gates)
    assert ("fail", "skill: FAIL, 0.1 (asked >= 0.2). must beat waiting") in marks


def test_hours_in_which_nothing_ran_are_cut_out(week, tmp_path):
    "A stage that was run again a day later does not squeeze the others."
    shutil.copytree(week / "monday", tmp_path / "monday")
    manifest = read_json(tmp_path / "monday/07_evaluate/manifest.json")
    write_json(tmp_path / "monday/07_evaluate/manifest.json", manifest | {"started": "2031-01-01T00:00:00+00:00"})
    (tmp_path / "monday/index.html").write_text(reports.run_page(tmp_path / "monday"))
    widths = [[float(r.get("width")) for r in of_class(picture(run), "bar")] for run in (week / "monday", tmp_path / "monday")]
    assert widths[0] == pytest.approx(widths[1], rel=0.35)


# --- the page of a stage ---------------------------------------------------------------------------------------------


def test_a_stage_page_says_where_it_comes_from(week):
    found = manifests(week / "tuesday")["train"]
    text = (week / "tuesday/06_train/notebook.html").read_text()
    head = text[:text.index('id="cell-id=title"')]
    for said in ('class="badge good">finished', "run tuesday", "../index.html", "manifest.json", "trees = 9", "monday",
                 found["code"]["notebook_sha256"][:12], found["outputs"]["model"]["sha256"][:12], "Python 3", "documents/validation.html"):
        assert said in head, said
    for table in ("gates", "metrics", "parameters", "inputs", "outputs", "provenance"):
        assert re.search(rf"<details><summary>{table}", head), f"{table} is there, folded"
    assert head.count(found["inputs"]["data"]["artefacts"]["labelled"]["sha256"][:12]) == 1


def test_a_failed_gate_stands_open_and_an_error_leads_to_its_cell(week):
    refused = (week / "tuesday/07_evaluate/notebook.html").read_text()
    assert re.search(r'<details open="">\s*<summary>gates \(\d+, 1 failed\)', refused)
    broken = (week / "wednesday/07_evaluate/notebook.html").read_text()
    assert 'href="#cell-id=extra"' in broken and 'class="badge bad">error' in broken and "InputError" in broken


def test_a_run_page_puts_the_verdict_first_and_failed_gates_above_the_others(week):
    text = (week / "tuesday/index.html").read_text()
    assert text.index("Refused by stage evaluate") < text.index("<svg") < text.index("<h2>Gates</h2>")
    gates = text[text.index("<h2>Gates</h2>"):]
    assert gates.index("FAIL") < gates.index(">pass<")
    assert "Skipped: 기준 모델이 이미 있습니다" in (week / "monday/index.html").read_text()


# --- the list of runs ------------------------------------------------------------------------------------------------


def rows(page):
    return [re.sub(r"<[^>]+>", " ", r) for r in re.findall(r"<tr data-.*?</tr>", page, re.DOTALL)]


def test_the_list_has_all_runs_newest_first_with_what_matters(week):
    found = rows((week / "index.html").read_text())
    assert [next(n for n in ("monday", "tuesday", "wednesday", "thursday") if n in r) for r in found] == ["thursday", "wednesday", "tuesday", "monday"]
    assert "refused" in found[2] and "Refused by stage evaluate" in found[2] and "simulated HUB1" in found[2]
    assert re.search(r"mae\s+3\s+jobs", found[2]) and re.search(r"mae\s+4\s+jobs", found[3]) and "smoke" in found[0]


def test_the_record_holds_what_the_list_shows_and_nothing_else_is_read(week, tmp_path):
    for run in week.glob("[!.]*day"):
        (tmp_path / run.name).mkdir()
        shutil.copy(run / "run.json", tmp_path / run.name)
    assert rows(reports.index_page(tmp_path)) == rows((week / "index.html").read_text())
    record = read_json(week / "tuesday/run.json")
    assert {"name": "mae", "value": 3.0, "unit": "jobs", "stage": "train"} in record["headline"]
    assert record["gates"][1] - record["gates"][0] == 1 and (record["site"], record["line"]) == ("simulated", "HUB1")


def test_the_list_leads_to_grids_and_comparisons(week, tmp_path):
    shutil.copytree(week, tmp_path / "runs")
    write_json(tmp_path / "runs/20260701-120000-grid/grid.json", {"verdict": "2 of 2 runs: 2 finished.", "runs": []})
    (tmp_path / "runs/20260701-120000-grid/index.html").write_text("a grid")
    (tmp_path / "runs/compare-monday-tuesday.html").write_text("a comparison")
    reports.write_index(tmp_path / "runs")
    assert check_pages(tmp_path / "runs") == check_pages(week) + 2
    assert {"compare-monday-tuesday.html", "20260701-120000-grid/index.html"} <= set(Links(tmp_path / "runs/index.html").links)


def test_the_page_of_a_running_run_lists_it(tmp_path):
    record = {"pipeline": "develop", "profile": "demo", "status": "running", "verdict": "2 of 7 stages done.", "started": "2026-07-01T12:00:00+00:00",
              "duration_s": 3.0, "sources": {}}
    write_json(tmp_path / "now/run.json", record)
    assert "running" in rows(reports.index_page(tmp_path))[0]


@given(st.text(max_size=30), st.text(max_size=30), st.floats(allow_nan=False))
def test_whatever_a_record_says_is_text(verdict, name, value):
    with tempfile.TemporaryDirectory() as folder:
        record = {"pipeline": "develop", "profile": "demo", "status": "error", "verdict": verdict, "started": "2026-07-01T12:00:00+00:00",
                  "duration_s": 3.0, "site": name, "headline": [{"name": name, "value": value, "unit": verdict, "stage": "data"}]}
        write_json(Path(folder) / "now/run.json", record)
        page = reports.index_page(folder)
    cell = re.search(r'<td class="verdict">(.*?)</td>', page, re.DOTALL)[1]
    assert unescape(cell) == verdict and page.count("<script>") == 1


def test_runs_that_end_together_are_all_listed(tmp_path):
    def end(i):
        write_json(tmp_path / f"run-{i}/run.json", {"pipeline": "develop", "profile": "demo", "status": "finished", "verdict": "", "duration_s": 1.0,
                                                    "started": f"2026-07-01T12:00:{i:02}+00:00"})
        reports.write_index(tmp_path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(end, range(24)))
    assert len(rows((tmp_path / "index.html").read_text())) == 24


def test_the_list_filters_and_sorts_in_a_browser(week, browser):
    page = browser.new_page()
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto((week / "index.html").as_uri())

    def seen():
        return [r.text_content().strip() for r in page.locator("tbody tr td.run").all() if r.is_visible()]

    assert seen() == ["thursday", "wednesday", "tuesday", "monday"]
    page.select_option("select[data-by=status]", "finished")
    assert seen() == ["thursday", "monday"] and "2 of 4 runs" in page.text_content("form")
    page.select_option("select[data-by=status]", "")
    page.fill("input[name=words]", "skill refused")
    assert seen() == ["tuesday"]
    page.fill("input[name=words]", "")
    page.click("th >> text=run")
    assert seen() == ["monday", "thursday", "tuesday", "wednesday"]
    page.click("th >> text=run")
    assert seen() == ["wednesday", "tuesday", "thursday", "monday"]
    page.select_option("select[name=metric]", "mae")
    assert seen()[0] == "monday" and seen()[-1] == "thursday", "largest first; runs without that number last"
    assert all(url.startswith(("file:", "data:")) for url in asked)
    page.close()


def test_pages_fit_a_phone(week, browser):
    "Nothing makes a page itself wider than the screen: pictures and tables scroll in their boxes."
    page = browser.new_page(viewport={"width": 390, "height": 800})
    for path in ("index.html", "tuesday/index.html", "tuesday/06_train/notebook.html", "wednesday/07_evaluate/notebook.html"):
        page.goto((week / path).as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, path
    page.close()


# --- words, and what the runner does with the pages -----------------------------------------------------------------


def test_durations_and_sizes_read_well():
    assert [reports.spent(s) for s in (0, 3.26, 59, 119, 121, 7300)] == ["0 s", "3.3 s", "59 s", "119 s", "2 min", "2 h 2 min"]
    assert [reports.sized(n) for n in (0, 999, 1500, 2_345_678, 7e9)] == ["0 bytes", "999 bytes", "1.5 kB", "2.35 MB", "7 GB"]


def test_a_record_changes_with_its_page_and_the_list(week):
    "The three are written together: what one says, the others say."
    for run in week.glob("[!.]*day"):
        record = read_json(run / "run.json")
        assert unescape(record["verdict"]) in unescape((run / "index.html").read_text())
        assert f'data-status="{record["status"]}"' in (week / "index.html").read_text()
        assert (run / "index.html").read_text() == reports.run_page(run)
    assert (week / "index.html").read_text() == reports.index_page(week)
