"""Two runs side by side: what differs is found, all of it and nothing else; what is alike is counted."""

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from reviewed import Links, check_pages

from amhs import compare
from amhs.core import read_json, write_json


@pytest.fixture(scope="module")
def found(week):
    return compare.compare_runs(week / "monday", week / "tuesday")


@pytest.fixture
def twins(week, tmp_path):
    "Monday's run and a copy of it that a test may change."
    for name in ("monday", "copy"):
        shutil.copytree(week / "monday", tmp_path / name)
    return tmp_path / "monday", tmp_path / "copy"


def different(found):
    return {kind: [f for f in facts if f.a != f.b] for kind, facts in found.facts.items()}


def change_cells(run, change):
    "Change the list of cells of the stage data of a run."
    path = run / "04_data/notebook.ipynb"
    book = read_json(path)
    book["cells"] = change(book["cells"])
    write_json(path, book)


def test_what_differs_is_found_and_nothing_else(found):
    other = different(found)
    assert [(f.stages, f.name, f.a, f.b) for f in other["parameters"]] == [("train", "trees", 7, 9)]
    assert [(f.stages, f.a, f.b) for f in other["metrics"] if f.name == "mae"] == [("train", 4.0, 3.0)]
    assert [(f.stages, f.name, f.a, f.b) for f in other["gates"]] == [("evaluate", "skill", None, "FAIL: 0.1, asked >= 0.2")]
    assert ("evaluate", "finished", "gate failed") in [(f.stages, f.a, f.b) for f in other["stages"]]
    assert {f.name for f in other["provenance"]} == {"notebook 06", "notebook 07"}, "same library, data, lock and packages"
    cells = {n: compare.differing_cells(c) for n, c in found.cells.items()}
    assert {n: c for n, c in cells.items() if c} == {"train": ["extra"], "evaluate": ["extra", "finish"]}
    assert {"business", "data", "develop"} < set(cells)


def test_a_stage_that_only_one_run_has_is_one_difference(week):
    found = compare.compare_runs(week / "monday", week / "thursday")
    assert list(found.cells) == ["business"] and {f.stages for f in found.facts["gates"]} == {"business"}
    assert ("train", "finished", None) in [(f.stages, f.a, f.b) for f in different(found)["stages"]]
    assert ("run", "profile", "demo", "smoke") in different(found)["parameters"]


def test_the_trail_is_followed_to_the_run_that_holds_a_stage(found):
    assert {n: home.name for n, home in found.b.homes.items()}.items() >= {
        "business": "monday", "data": "monday", "develop": "monday", "train": "tuesday", "evaluate": "tuesday"}.items()
    assert "from run monday" in compare.comparison_page(found)


def test_a_run_and_itself_differ_in_nothing(week):
    same = compare.compare_runs(week / "monday", week / "monday")
    assert not any(different(same).values()) and not any(compare.differing_cells(c) for c in same.cells.values())
    page = compare.comparison_page(same)
    assert "Nothing differs." in page and 'class="cell"' not in page and "<mark>" not in page


def test_differences_come_first_and_the_rest_is_folded_with_its_count(found):
    page = compare.comparison_page(found)
    order = re.findall(r'<section id="(\w+)">', page)
    assert order[:7] == ["stages", "parameters", "gates", "metrics", "provenance", "train", "evaluate"]
    assert set(order[7:]) == {"documents"} | set(found.cells) - {"train", "evaluate"}, "the toy's documents say the same"
    alike = sum(f.a == f.b for f in found.facts["parameters"])
    assert f"<summary>{alike} the same</summary>" in page and f"Parameters: 1 of {alike + 1} differ" in page
    assert "<summary>6 cells the same</summary>" in page


def test_a_cell_that_differs_shows_code_text_and_figures_of_both(found):
    page = compare.comparison_page(found)
    cell = page[page.index('id="train"'):]
    cell = cell[:cell.index("</section>")]
    assert cell.count('src="data:image/png;base64,') == 2 and len(set(re.findall(r'base64,([^"]+)', cell))) == 2
    assert "trees <mark>7</mark>" in cell and "trees <mark>9</mark>" in cell, "what was printed"
    assert "<mark>4</mark>" in cell and "<mark>3</mark>" in cell, "what was written"
    assert "-1 (-25.0%)" in page, "how far a number moved"


def test_documents_are_compared_line_by_line_and_by_their_figures(twins):
    same = compare.compare_runs(*twins)
    assert {n[-4:] for n in same.documents} == {"(en)"} and len(same.documents) > 6 and not compare.differing_cells(same.documents)
    text, picture = (next((twins[1] / "04_data/documents").glob(f"*.{end}")) for end in ("md", "png"))
    text.write_text(text.read_text() + "\nOne sentence more.\n")
    picture.write_bytes(picture.read_bytes() + b"0")
    found = compare.compare_runs(*twins)
    assert compare.differing_cells(found.documents) == ["Data card of the labelled data set (en)"]
    page = compare.comparison_page(found)
    part = page[page.index('id="documents"'):]
    part = part[:part.index("</section>")]
    assert "One sentence more." in part and part.count('src="data:image/png') == 2 and f"<summary>{len(found.documents) - 1} the same</summary>" in part
    assert page.index('id="documents"') < page.index('id="parameters"'), "differences first"
    assert re.search(r"documents +1 of \d+ differ: Data card", compare.comparison_text(found))


def test_documents_are_compared_in_the_languages_of_the_runs(twins):
    write_json(twins[1] / "run.json", read_json(twins[1] / "run.json") | {"lang": "both"})
    found = compare.compare_runs(*twins)
    assert {n[-4:] for n in found.documents} == {"(en)", "(ko)"} and not compare.differing_cells(found.documents)
    path = twins[0] / "04_data/manifest.json"
    manifest = read_json(path)
    del manifest["documents"]["data_card"]["pages"]["ko"]
    write_json(path, manifest)
    found = compare.compare_runs(*twins)
    assert compare.differing_cells(found.documents) == ["Data card of the labelled data set (ko)"]
    assert "only in B" in compare.comparison_page(found)


def test_a_run_s_own_name_and_day_are_no_difference_between_documents(week):
    found = compare.compare_runs(week / "monday", week / "thursday")
    assert found.documents and not compare.differing_cells(found.documents)


def test_the_page_is_offline_and_every_link_leads_somewhere(week, tmp_path):
    shutil.copytree(week, tmp_path / "runs")
    made = compare.write_comparison(compare.compare_runs(tmp_path / "runs/monday", tmp_path / "runs/wednesday"))
    assert made == tmp_path / "runs/compare-monday-wednesday.html" and check_pages(tmp_path / "runs") > 1
    assert made.name in Links(tmp_path / "runs/index.html").links, "the list of runs mentions it"


def test_cells_meet_by_id_wherever_they_stand(twins):
    new = {"cell_type": "markdown", "id": "new", "metadata": {}, "source": "Something else entirely."}
    change_cells(twins[1], lambda cells: [c for c in [*cells[:3], new, *cells[3:]] if c["id"] != "reads"])
    found = compare.compare_runs(*twins)
    assert sorted(compare.differing_cells(found.cells["data"])) == ["new", "reads"]
    assert found.cells["data"]["new"][0] is None and found.cells["data"]["reads"][1] is None
    page = compare.comparison_page(found)
    assert "only in A" in page and "only in B" in page and "Something else entirely." in page


def test_a_cell_with_a_new_id_is_recognised(twins):
    change_cells(twins[1], lambda cells: [{**c, "id": f"again-{i}"} for i, c in enumerate(cells)])
    found = compare.compare_runs(*twins)
    changed = compare.differing_cells(found.cells["data"])
    assert all(None not in found.cells["data"][n] for n in found.cells["data"] if n not in changed)
    assert len(changed) <= 1, "but for the table of parameters the runner put in, which is known by its id"


@pytest.mark.parametrize(("a", "b", "same"), [
    ("<object at 0x7f00deadbeef>", "<object at 0x7f00cafecafe>", True),
    ("\x1b[31mred\x1b[0m", "red", True),
    ("0x12", "0x13", False),
    ("1.0", "1.00", False),
])
def test_noise_is_not_a_difference(twins, a, b, same):
    for run, text in zip(twins, (a, b), strict=True):
        out = {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": {"text/plain": [text]}}
        change_cells(run, lambda cells, out=out: [{**c, "outputs": [out]} if c["id"] == "extra" else c for c in cells])
    assert (compare.differing_cells(compare.compare_runs(*twins).cells["data"]) == []) == same


def test_a_table_that_only_html_can_say_is_compared_by_its_words(twins):
    for run, number in zip(twins, (3, 4), strict=True):
        data = {"text/plain": "<Styler at 0x7f00deadbeef>", "text/html": f"<style>b {{}}</style><b>{number} jobs</b>"}
        out = {"output_type": "display_data", "metadata": {}, "data": data}
        change_cells(run, lambda cells, out=out: [{**c, "outputs": [out]} if c["id"] == "extra" else c for c in cells])
    page = compare.comparison_page(compare.compare_runs(*twins))
    assert "<mark>3</mark> jobs" in page and "<b>4 jobs" not in page


def test_a_column_that_text_leaves_out_is_compared(twins):
    "pandas writes `...` for the middle of a wide table; in its HTML it is there."
    for run, number in zip(twins, ("7.25", "8.50"), strict=True):
        table = f"<table><tr><th>model</th><th>mae</th><th>skill</th></tr><tr><th>hub</th><td>{number}</td><td>0.4</td></tr></table>"
        data = {"text/plain": "model  ... skill\nhub    ...   0.4", "text/html": f"<style>td {{}}</style>{table}"}
        out = {"output_type": "execute_result", "execution_count": 1, "metadata": {}, "data": data}
        change_cells(run, lambda cells, out=out: [{**c, "outputs": [out]} if c["id"] == "extra" else c for c in cells])
    found = compare.compare_runs(*twins)
    assert compare.differing_cells(found.cells["data"]) == ["extra"]
    page = compare.comparison_page(found)
    assert "  hub  <mark>7</mark>.<mark>25</mark>    0.4" in page and "<h4>pass <a" in page, "told by the line it begins with"


def test_the_language_a_run_speaks_first_is_no_difference_between_documents(twins):
    "It only changes what files are called."
    home, path = twins[1] / "04_data/documents", twins[1] / "04_data/manifest.json"
    for file in sorted(home.glob("data_card[.-]*")):
        if not file.name.startswith("data_card.ko"):
            if file.suffix == ".md":
                file.write_text(file.read_text().replace("](data_card-", "](data_card.en-"))
            file.rename(home / file.name.replace("data_card", "data_card.en", 1))
    manifest = read_json(path)
    manifest["documents"]["data_card"]["pages"]["en"] = "data_card.en.html"
    write_json(path, manifest)
    assert not compare.differing_cells(compare.compare_runs(*twins).documents)


def sides(table):
    "The two texts a side-by-side table shows, where it shows them whole."
    cells = [re.sub(r"</?mark>", "", c) for c in re.findall(r"<td[^>]*>(.*?)</td>", table, re.DOTALL)]
    return [unescape("\n".join(cells[i::2])) for i in (0, 1)]


line = st.text(st.characters(exclude_categories=("Cs", "Cc", "Zl", "Zp")), max_size=12)


@given(st.lists(line, max_size=5), st.lists(line, max_size=5))
def test_texts_side_by_side_are_what_they_were(a, b):
    table = compare.diff_table("\n".join(a), "\n".join(b))
    if "\n".join(a).splitlines() == "\n".join(b).splitlines():
        assert "<tr>" not in table
    elif "⋯" not in table and all(a) and all(b):
        left, right = (s.split("\n") for s in sides(table))
        assert is_part([x for x in left if x], a) and is_part([x for x in right if x], b)
        assert {*a} - {*b} <= {*left} and {*b} - {*a} <= {*right}, "whatever only one of them has is shown"


def is_part(some, whole):
    "Whether `some` stands in `whole` in this order."
    left = iter(whole)
    return all(x in left for x in some)


def test_what_a_notebook_says_is_never_run(twins):
    change_cells(twins[1], lambda cells: [{**c, "source": "<script>alert(1)</script>"} if c["id"] == "extra" else c for c in cells])
    page = compare.comparison_page(compare.compare_runs(*twins))
    assert "alert" in page and "<script" not in page


def amhs(root, *args):
    return subprocess.run([Path(sys.executable).with_name("amhs"), *args], cwd=root, capture_output=True, text=True, timeout=120)


def test_the_command_says_it_in_short_and_where_the_page_is(week, tmp_path):
    root = shutil.copytree(week.parent, tmp_path / "project")
    done = amhs(root, "runs", "compare", "mon", "tue")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and lines[:2] == ["A monday: finished", "B tuesday: refused"]
    assert any(re.fullmatch(r"parameters +1 of \d+ differ: train trees 7 → 9", x) for x in lines)
    assert lines[-1] == "Page: runs/compare-monday-tuesday.html" and check_pages(root / "runs")
    done = amhs(root, "runs", "compare", "monday", "teusday")
    assert done.returncode == 2 and "use one of tuesday" in done.stderr and "Traceback" not in done.stderr
