"""Import of real files: every kind of mess is repaired or refused by a named rule, and no row is lost silently."""

import csv
import gzip
import io
import json
import subprocess
import sys
import textwrap
import zipfile
from collections import Counter
from datetime import datetime, timedelta

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from amhs.config import Site, load_site
from amhs.core import InputError, ParameterError
from amhs.telemetry import (
    COLUMNS,
    RULES,
    dataset_hash,
    import_files,
    propose_site,
    read_dataset,
    read_number,
    read_time,
    write_dataset,
)

DROPS = {rule.name for rule in RULES if rule.action == "dropped"}
REPAIRS = {rule.name for rule in RULES if rule.action == "repaired"}


def make_site(**more):
    values = {"name": "t", "time": {"column": "time", "format": "%Y-%m-%d %H:%M"},
              "columns": {"hub_jobs": "jobs", "hub_free_slots": "free", "hub_oht_util": "util"}}
    return Site(**(values | more))


SITE = make_site()


def minute(i, format="%Y-%m-%d %H:%M"):
    return (datetime(2026, 1, 1, 9) + timedelta(minutes=i)).strftime(format)


def rows(n, start=0, format="%Y-%m-%d %H:%M"):
    return [f"{minute(i, format)},{100 + i},{600 - i},{50 + i % 40}" for i in range(start, start + n)]


def text(lines, header="time,jobs,free,util"):
    return "\n".join([header, *lines]) + "\n"


@pytest.fixture
def bring(tmp_path):
    "Write a file, import it; gives the report and the data set."
    def bring(content, site=SITE, name="export.csv", out="set"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        report = import_files(path, site, tmp_path / out)
        adds_up(report)
        return report, read_dataset(tmp_path / out)
    return bring


def adds_up(report):
    for one in (report, *report.files):
        assert one.rows_in == one.kept + one.repaired + sum(one.dropped.values())
        assert set(one.dropped) <= DROPS and set(one.repairs) <= REPAIRS
    change = report.change
    assert change.added + change.replaced + change.unchanged == report.kept + report.repaired
    table = report.table().set_index("what")["rows"]
    assert table["rows in"] == table["kept"] + table["repaired"] + table["dropped"]


def jobs(frame):
    return frame["hub_jobs"].tolist()


# a clean file

def test_clean_file_is_kept_as_it_is(bring):
    report, frame = bring(text(rows(100)))
    assert (report.rows_in, report.kept, report.repaired, report.dropped) == (100, 100, 0, {})
    assert jobs(frame) == [100 + i for i in range(100)]
    assert frame["timestamp"].iloc[0] == pd.Timestamp("2026-01-01 09:00", tz="UTC")
    assert frame["line"].unique().tolist() == ["HUB1"]


def test_report_is_written_as_json_and_table(bring, tmp_path):
    report, _ = bring(text([*rows(3), "nonsense"]))
    written = json.loads(next((tmp_path / "set/_reports").glob("*.json")).read_text())
    assert written == json.loads(json.dumps(report.to_dict()))
    assert written["dropped"] == {"malformed_line": 1} and "hub_jobs_alt" in written["missing"]
    assert "malformed_line" in next((tmp_path / "set/_reports").glob("*.md")).read_text()


# containers

@pytest.mark.parametrize("kind", ["csv", "gz", "zip", "parquet", "xlsx", "csv named xlsx"])
def test_every_container_gives_the_same_data(bring, tmp_path, kind):
    plain = text(rows(50))
    content, name = plain.encode(), "export.csv"
    frame = pd.read_csv(io.StringIO(plain))
    if kind == "gz":
        content = gzip.compress(content)
    elif kind == "zip":
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w") as z:
            half = plain.splitlines()
            z.writestr("one.csv", "\n".join(half[:20]))
            z.writestr("two.csv", "\n".join([half[0], *half[20:]]))
        content = packed.getvalue()
    elif kind == "parquet":
        frame.to_parquet(tmp_path / "x")
        content = (tmp_path / "x").read_bytes()
    elif kind == "xlsx":
        frame.to_excel(tmp_path / "x.xlsx", index=False)
        content = (tmp_path / "x.xlsx").read_bytes()
    elif kind == "csv named xlsx":
        name = "export.xlsx"
    report, got = bring(content, name=name)
    assert report.rows_in == report.kept == 50
    assert jobs(got) == [100 + i for i in range(50)]


def test_parquet_with_real_times_zones_and_text_numbers(bring, tmp_path):
    frame = pd.DataFrame({"time": pd.date_range("2026-01-01 18:00", periods=3, freq="min", tz="Asia/Seoul"),
                          "jobs": ["1,200", "N/A", "7"], "free": [1, None, 3], "util": [True, False, True]})
    frame.to_parquet(tmp_path / "x")
    report, got = bring((tmp_path / "x").read_bytes())
    assert got["timestamp"].iloc[0] == pd.Timestamp("2026-01-01 09:00", tz="UTC")
    np.testing.assert_array_equal(got["hub_jobs"], np.float32([1200, np.nan, 7]))
    assert report.repairs == {"text_number": 1}


def test_parquet_with_times_as_whole_numbers(bring, tmp_path):
    for kind in ("int64", "float64"):
        frame = pd.DataFrame({"time": np.array([202601010900, 202601010901], kind), "jobs": [1, 2], "free": 3, "util": 4})
        frame.to_parquet(tmp_path / "x")
        report, got = bring((tmp_path / "x").read_bytes(), make_site(time={"column": "time", "format": "%Y%m%d%H%M"}), out=kind)
        assert report.kept == 2 and got["timestamp"].dt.minute.tolist() == [0, 1]


def test_workbook_with_times_title_and_empty_rows(bring, tmp_path):
    import openpyxl
    book = openpyxl.Workbook()
    book.active.append(["what is this sheet"])
    sheet = book.create_sheet("data")
    for row in (["Hub report"], [], ["time", "jobs", "free", "util"], [datetime(2026, 1, 1, 9), 10, "1,600", 3.5], [],
                [datetime(2026, 1, 1, 9, 1), 11, "-", None], [datetime(2026, 1, 1, 9, 2, 20), 12, 1, 1]):
        sheet.append(row)
    book.save(tmp_path / "x.xlsx")
    report, got = bring((tmp_path / "x.xlsx").read_bytes())
    assert jobs(got) == [10, 11, 12] and got["hub_free_slots"].iloc[0] == 1600
    assert report.dropped == {"before_header": 1} and report.repairs == {"text_number": 1, "seconds_cut": 1}


# encodings and layout

KOREAN = {"name": "k", "timezone": "Asia/Seoul", "line": {"column": "라인"}, "time": {"column": "측정시각", "format": "%Y%m%d%H%M"},
          "columns": {"hub_jobs": "허브 작업수", "hub_free_slots": "여유"}}


def korean(n=20, line="허브룸1"):
    return "측정시각,라인,허브 작업수,여유\n" + "".join(f"{minute(i, '%Y%m%d%H%M')},{line},{100 + i},{600 - i}\n" for i in range(n))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "cp949", "euc-kr", "utf-16", "utf-16-be-bom"])
def test_encodings_are_found(bring, encoding):
    content = b"\xfe\xff" + korean().encode("utf-16-be") if encoding == "utf-16-be-bom" else korean().encode(encoding)
    report, frame = bring(content, Site(**KOREAN))
    assert report.kept == 20 and frame["line"].unique().tolist() == ["허브룸1"]
    assert frame["timestamp"].iloc[0] == pd.Timestamp("2026-01-01 00:00", tz="UTC")


def test_lines_in_another_encoding_are_read_and_counted(bring):
    lines = korean().encode().splitlines(keepends=True)
    lines[5] = lines[5].decode().encode("cp949")
    report, frame = bring(b"".join(lines), Site(**KOREAN))
    assert report.repairs == {"other_encoding": 1} and frame["line"].nunique() == 1 and len(frame) == 20


def test_lines_in_no_encoding_are_dropped_and_counted(bring):
    lines = korean().encode().splitlines(keepends=True)
    lines[5] = b"202601010904,\xff\xff\xfe,1,2\n"
    report, frame = bring(b"".join(lines), Site(**KOREAN))
    assert report.dropped == {"undecodable_line": 1} and len(frame) == 19


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_delimiters_and_line_ends(bring, delimiter, end):
    report, frame = bring(text(rows(30)).replace(",", delimiter).replace("\n", end))
    assert report.kept == 30 and report.files[0].delimiter == delimiter


def test_title_lines_blank_lines_footer_and_header_again(bring):
    lines = rows(10)
    content = "Hub report\n\nmade by MES, page 1\n" + text([*lines[:5], "", "time,jobs,free,util", *lines[5:], "   ", "Total,1045,,"])
    report, frame = bring(content)
    assert report.dropped == {"before_header": 2, "repeated_header": 1, "unreadable_time": 1}
    assert report.rows_in == 14 and jobs(frame) == [100 + i for i in range(10)]


def test_rows_that_end_with_a_delimiter(bring):
    report, frame = bring(text([line + "," for line in rows(5)]))
    assert report.kept == 5


def test_quoted_fields_everywhere(bring):
    lines = [",".join(f'"{field}"' for field in line.split(",")) for line in rows(5)]
    report, frame = bring(text(lines, '"time","jobs","free","util"'))
    assert report.kept == 5 and jobs(frame) == [100, 101, 102, 103, 104]


@pytest.mark.parametrize("bad", [
    "2026-01-01 09:30,1,2", "2026-01-01 09:30,1,2,3,4", '2026-01-01 09:30,"1,2,3', '2026-01-01 09:30,1"2,"3,4', "\0\0\0\0", "garbage",
    '2026-01-01 09:30,"1"2,2,3',
])
def test_malformed_lines_cost_only_themselves(bring, bad):
    "An open quote must not swallow the lines behind it."
    lines = rows(20)
    report, frame = bring(text([*lines[:10], bad, *lines[10:]]))
    assert report.dropped == {"malformed_line": 1} and len(frame) == 20


@pytest.mark.parametrize("quoted", [False, True])
def test_odd_lines_among_many_are_counted_and_stay_in_their_place(bring, quoted):
    "A long file, read in stretches: of the rows of one minute the last in the file wins, clean or odd."
    lines, n = rows(60_000), 60_000
    if quoted:
        lines = [f'"{line[:16]}"{line[16:]}' for line in lines]
    for i in range(100, n, 1000):
        lines[i] += "\n" + lines[i].replace(f",{100 + i},", f',"{7000 + i:,}",')  # an odd line wins over a clean one before it
        lines[i + 1] = lines[i + 1].replace(f",{101 + i},", f',"{8000 + i:,}",') + "\n" + lines[i + 1]  # and loses against one behind it
        lines[i + 2] += "\nbroken\n\0"
    report, frame = bring(text(lines))
    expected = np.arange(100, n + 100, dtype="float32")
    expected[100::1000] += 6900
    np.testing.assert_array_equal(frame["hub_jobs"], expected)
    assert report.dropped == {"malformed_line": 120, "conflicting_minute": 120} and report.repairs["text_number"] == 60


def test_unknown_and_missing_columns_are_named(bring):
    report, frame = bring(text([f"{minute(i)},{i},x,y" for i in range(3)], "time,jobs,remark,jobs"))
    assert report.unknown == ("remark", "jobs")
    assert "hub_free_slots" in report.missing and "hub_free_slots" not in frame and jobs(frame) == [0, 1, 2]


# values

@pytest.mark.parametrize("cell, value, rule", [
    ("1,234", 1234, "text_number"), (" 12 ", 12, None), ("45 %", 45, "text_number"), ("１２", 12, "text_number"),
    ("12건", 12, "text_number"),
    ("1.5e2", 150, None), ("", np.nan, None), ("N/A", np.nan, None), ("-", np.nan, None), ("null", np.nan, None), ("결측", np.nan, None),
    ("12,5", np.nan, "unreadable_value"), ("fault", np.nan, "unreadable_value"), ("1-2", np.nan, "unreadable_value"),
    ("0x1F", np.nan, "unreadable_value"), ("-5", np.nan, "out_of_range"), ("inf", np.nan, "unreadable_value"),
    ("1e9", np.nan, "out_of_range"),
])
def test_cells(bring, cell, value, rule):
    lines = rows(4)
    lines[2] = f'{minute(2)},102,"{cell}",50'
    report, frame = bring(text(lines))
    np.testing.assert_array_equal(frame["hub_free_slots"].iloc[2], np.float32(value))
    assert report.repairs == ({rule: 1} if rule else {})
    if rule:
        assert report.cells["hub_free_slots"][rule] == 1
    assert report.cells["hub_free_slots"]["missing"] == int(np.isnan(value))


@pytest.mark.parametrize("util, ok", [("100", True), ("100.5", False), ("0", True), ("-0.1", False)])
def test_shares_lie_between_0_and_100(bring, util, ok):
    report, frame = bring(text([f"{minute(0)},1,2,{util}"]))
    assert frame["hub_oht_util"].notna().all() == ok and report.repairs.get("out_of_range", 0) == (not ok)


def test_scale_and_offset_come_before_the_range(bring):
    columns = {"hub_jobs": "jobs", "hub_oht_util": {"source": "util", "scale": 100},
               "hub_free_slots": {"source": "jobs", "scale": -1, "offset": 700}}
    _, frame = bring(text([f"{minute(0)},100,x,0.5"]), make_site(columns=columns))
    assert frame[["hub_jobs", "hub_oht_util", "hub_free_slots"]].iloc[0].tolist() == [100, 50, 600]


def test_row_without_a_number_is_dropped(bring):
    report, _ = bring(text([*rows(3), f"{minute(3)},,-,N/A"]))
    assert report.dropped == {"no_values": 1}


# times

@pytest.mark.parametrize("written, rule", [
    ("2026-01-01 09:05:00", "time_rewritten"), ("2026/01/01 09:05", "time_rewritten"), ("202601010905", "time_rewritten"),
    ("2026-01-01 오전 9:05", "time_rewritten"), ("２０２６/01/01 09:05", "time_rewritten"), ("2026.1.1 9:05", "time_rewritten"),
    ("20260101090500", "time_rewritten"), ("2026년 1월 1일 9시 5분", "time_rewritten"),
])
def test_times_with_one_reading_are_read(bring, written, rule):
    lines = rows(10)
    lines[5] = lines[5].replace(minute(5), written)
    report, frame = bring(text(lines))
    assert report.repairs == {rule: 1} and jobs(frame) == [100 + i for i in range(10)]


@pytest.mark.parametrize("written", [
    "", "yesterday", "2026-01-01", "2026-02-30 10:00", "01/02/2026 10:00", "2026-01-01 25:00", "2026011000"])
def test_times_without_a_reading_are_dropped(bring, written):
    lines = rows(10)
    lines[5] = lines[5].replace(minute(5), written)
    report, frame = bring(text(lines))
    assert report.dropped == {"unreadable_time": 1} and len(frame) == 9


def test_short_digits_do_not_become_another_time(bring):
    site = make_site(time={"column": "time", "format": "%Y%m%d%H%M"})
    report, frame = bring(text([*rows(5, format="%Y%m%d%H%M"), "2026011000,1,2,3"]), site)
    assert report.dropped == {"unreadable_time": 1} and len(frame) == 5


def test_seconds_become_their_minute(bring):
    site = make_site(time={"column": "time", "format": "%Y-%m-%d %H:%M:%S"})
    lines = [f"2026-01-01 09:0{i // 3}:{i % 3 * 20:02d},{i},1,1" for i in range(9)]
    report, frame = bring(text(lines), site)
    assert jobs(frame) == [2, 5, 8] and report.dropped == {"conflicting_minute": 6} and report.repairs == {"seconds_cut": 3}


def test_midnight_written_as_24(bring):
    _, frame = bring(text([*rows(2), "2026-01-01 24:00,7,8,9"]))
    assert frame["timestamp"].iloc[-1] == pd.Timestamp("2026-01-02", tz="UTC")


def test_offsets_in_the_text_win_over_the_zone(bring):
    site = make_site(timezone="Asia/Seoul", time={"column": "time"})
    lines = ["2026-01-01T09:00:00+09:00,1,1,1", "2026-01-01T00:01:00Z,2,1,1", "2026-01-01 09:02,3,1,1"]
    _, frame = bring(text(lines), site)
    assert jobs(frame) == [1, 2, 3] and frame["timestamp"].dt.hour.unique().tolist() == [0]


def test_summer_time(bring):
    "New York, 3 November 2013: 01:00-01:59 comes twice; 10 March: 02:00-02:59 never."
    times = pd.date_range("2013-11-03 04:00", "2013-11-03 08:00", freq="min", tz="UTC")
    lines = [f"{t:%Y-%m-%d %H:%M},{i},1,1" for i, t in enumerate(times.tz_convert("America/New_York"))]
    report, frame = bring(text(["2013-03-10 02:30,1,1,1", *lines]), make_site(timezone="America/New_York"))
    assert report.repairs == {"ambiguous_time": 120} and report.dropped == {"nonexistent_time": 1}
    assert frame["timestamp"].tolist() == list(times) and jobs(frame) == list(range(241))


def test_repeated_unordered_and_missing_minutes(bring):
    lines = rows(20)
    shuffled = [*lines[:3], lines[4], lines[3], lines[3], *lines[5:10], *lines[12:], lines[0].replace(",100,", ",999,")]
    report, frame = bring(text(shuffled))
    assert report.dropped == {"repeated_minute": 1, "conflicting_minute": 1}
    assert report.repairs == {"out_of_order": 2}
    assert jobs(frame)[0] == 999 and report.lines["HUB1"]["missing_minutes"] == 2 and frame["timestamp"].is_monotonic_increasing


def test_a_file_written_backwards(bring):
    report, frame = bring(text(rows(50)[::-1]))
    assert jobs(frame) == [100 + i for i in range(50)] and report.repairs == {"out_of_order": 49}


@pytest.mark.parametrize("by", [-60, -5, 60 * 24 * 400, -60 * 24 * 365 * 26])
def test_clock_that_jumps_and_returns_is_put_right(bring, by):
    lines = rows(200)
    for i in range(100, 120):
        lines[i] = lines[i].replace(minute(i), minute(i + by))
    report, frame = bring(text(lines))
    assert report.repairs == {"clock_moved": 20} and jobs(frame) == [100 + i for i in range(200)]


def test_stray_rows_years_away_are_dropped(bring):
    lines = rows(200)
    report, frame = bring(text([*lines[:50], "2062-05-05 00:00,1,1,1", *lines[50:], "1970-01-01 00:00,1,1,1"]))
    assert report.dropped == {"clock_jump": 2} and len(frame) == 200


def test_late_rows_are_no_clock_jump(bring):
    lines = rows(200)
    late = [*lines[:100], *lines[110:150], *lines[100:110], *lines[150:]]
    report, frame = bring(text(late))
    assert report.dropped == {} and jobs(frame) == [100 + i for i in range(200)] and report.repairs == {"out_of_order": 10}


def test_lines_are_kept_apart(bring):
    site = make_site(line={"column": "hub"})
    lines = [f"{minute(i)},{i},1,1,{hub}" for i in range(10) for hub in ("A", "B", " A " if i == 5 else "C", "")]
    report, frame = bring(text(lines, "time,jobs,free,util,hub"), site)
    assert frame["line"].value_counts().to_dict() == {"A": 10, "B": 10, "C": 9}
    assert report.dropped == {"no_line": 10, "repeated_minute": 1}


# files that cannot be used

@pytest.mark.parametrize("content, said", [
    (b"", "empty"), (b"\n \n", "empty"), (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(200), "binary"),
    (text([]).encode(), "not one usable row"),
    (text(rows(3), "when,jobs,free,util").encode(), "no time column 'time'"),
    (text(rows(3), "time,x,free,util").encode(), "no target column 'jobs'"),
    (text(["noon,1,2,3"]).encode(), "not one time"), (text([f"{minute(0)},fault,2,3"]).encode(), "not one usable number"),
    (gzip.compress(text(rows(500)).encode())[:-30], "cut short"),
    (b"PK\3\4 broken archive", "damaged"), (b"PAR1 broken parquet PAR1", "damaged"),
    (b"\xd0\xcf\x11\xe0" + bytes(100), "old or protected Excel"), (text(["1,2", "3,4"]).encode(), "not one usable row"),
])
def test_unusable_file_is_one_sentence_and_changes_nothing(bring, tmp_path, content, said):
    bring(text(rows(10)))
    before = {p: p.read_bytes() for p in (tmp_path / "set").rglob("*") if p.is_file()}
    (tmp_path / "good.csv").write_text(text(rows(5, start=50)))
    (tmp_path / "bad.csv").write_bytes(content)
    with pytest.raises(InputError, match=said) as e:
        import_files([tmp_path / "good.csv", tmp_path / "bad.csv"], SITE, tmp_path / "set")
    assert "bad.csv" in str(e.value) and "\n" not in str(e.value) and e.value.exit_code == 2
    assert {p: p.read_bytes() for p in (tmp_path / "set").rglob("*") if p.is_file()} == before


def test_refused_import_does_not_even_make_the_folder(tmp_path):
    for paths in ([tmp_path / "nowhere.csv"], []):
        with pytest.raises(InputError):
            import_files(paths, SITE, tmp_path / "set")
    assert not (tmp_path / "set").exists()


def test_profile_must_speak_of_the_schema(tmp_path):
    for columns, said in (({"hub_jobs": "a", "hub_jobz": "b"}, "hub_jobz"), ({"hub_queue": "a"}, "hub_jobs")):
        with pytest.raises(ParameterError, match=said):
            import_files(tmp_path / "x.csv", make_site(columns=columns), tmp_path / "set")


# again, corrected, several

def test_importing_twice_changes_nothing(bring, tmp_path):
    content = text([*rows(50), "broken", rows(1)[0]])
    bring(content)
    before = {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "set").rglob("*") if p.suffix}
    report, _ = bring(content)
    assert report.change == (0, 0, 50) and "nothing changed" in report.summary()
    assert {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in (tmp_path / "set").rglob("*") if p.suffix} == before


def test_corrected_file_wins_where_it_overlaps(bring):
    bring(text(rows(50)))
    fixed = [line.replace(",100,", ",77,") for line in rows(1)] + rows(9, start=1) + rows(5, start=50)
    report, frame = bring(text(fixed), name="fixed.csv")
    assert report.change == (5, 1, 9) and jobs(frame)[:2] == [77, 101] and len(frame) == 55


def test_of_several_files_the_last_wins(tmp_path):
    for name, shift in (("a", 0), ("b", 1000)):
        (tmp_path / name).write_text(text([f"{minute(i)},{i + shift},1,1" for i in range(10)]))
    report = import_files([tmp_path / "a", tmp_path / "b"], SITE, tmp_path / "set")
    adds_up(report)
    assert jobs(read_dataset(tmp_path / "set")) == [1000 + i for i in range(10)]
    assert [file.dropped for file in report.files] == [{"conflicting_minute": 10}, {}]


def test_a_folder_means_the_files_in_it(tmp_path):
    (tmp_path / "in" / "old").mkdir(parents=True)
    for i in range(3):
        (tmp_path / "in" / f"{i}.csv").write_text(text(rows(10, start=10 * i)))
    (tmp_path / "in" / ".hidden").write_text("no table")
    report = import_files(tmp_path / "in", SITE, tmp_path / "set")
    assert report.kept == 30 and len(report.files) == 3
    with pytest.raises(InputError, match="no file"):
        import_files(tmp_path / "in" / "old", SITE, tmp_path / "set")


# all at once

def ugly_korean_export():
    "A CP949 export with everything wrong that an export can have; the truth about it beside."
    rng, site = np.random.default_rng(5), load_site("example_kr")
    sources = {name: column.source for name, column in site.columns.items()}
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\r\n")
    out.write("반송 현황 보고서\r\n출력: 관리자\r\n")
    write.writerow(["측정시각", "라인", *sources.values(), "비고"])
    truth, counts = {}, Counter()
    for i in range(400):
        if i in (50, 51, 200):
            continue
        value = int(rng.integers(900, 1300))
        cells = {source: f"{rng.integers(1, 90)}" for source in sources.values()} | {"층 보관 사용률": f"{rng.random():.3f}"}
        cells["허브 작업수"] = f"{value:,}" if i % 3 == 0 else str(value)
        counts["text_number"] += i % 3 == 0 and value >= 1000
        time = minute(i, "%Y%m%d%H%M") + ("30" if i == 77 else "")
        counts["seconds_cut"] += i == 77
        row = [time, "허브1", *(cells[source] for source in sources.values()), "점검 중" if i % 50 == 0 else ""]
        write.writerow(row)
        truth[i] = value
        if i in (10, 20):
            write.writerow(row)
            counts["repeated_minute"] += 1
        if i == 30:
            out.write("통신 장애\r\n")
            counts["malformed_line"] += 1
    out.write("합계,,,,,,,,,,,,,,,,,,,,,,\r\n")
    counts["unreadable_time"] += 1
    return out.getvalue().encode("cp949"), site, truth, counts


def test_ugly_korean_export(bring):
    content, site, truth, counts = ugly_korean_export()
    report, frame = bring(content, site)
    assert report.files[0].encoding == "cp949"
    counted = {name: counts[name] for name in ("malformed_line", "unreadable_time", "repeated_minute")}
    assert report.dropped == {"before_header": 2, **counted}
    assert report.repairs["text_number"] == counts["text_number"] and report.repairs["seconds_cut"] == 1
    assert jobs(frame) == list(truth.values())
    minutes = (frame["timestamp"] - pd.Timestamp("2026-01-01 00:00", tz="UTC")) / pd.Timedelta("1min")
    assert minutes.tolist() == list(truth)  # 09:00 in Seoul is midnight UTC
    assert frame["floor_storage_util"].between(0, 100).all() and frame["floor_storage_util"].max() > 50
    assert report.unknown == ("비고",)


# properties

@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.one_of(
    st.text(st.characters(exclude_characters="\r\n", exclude_categories=["Cs"]), max_size=30),
    st.builds(lambda *cells: ",".join(cells),
              *[st.sampled_from(["", "1", "N/A", '"2,000"', "-7", "x", '"', "2026-01-01 09:01", "9e9"])] * 4),
    st.builds(lambda i, v: f"{minute(i)},{v},1,1", st.integers(0, 30), st.integers(0, 9)),
), max_size=30))
def test_rows_in_are_kept_repaired_or_dropped_whatever_the_file_says(tmp_path_factory, lines):
    folder = tmp_path_factory.mktemp("any")
    content = text([*rows(5), *lines])
    (folder / "any.csv").write_bytes(content.encode())
    report = import_files(folder / "any.csv", SITE, folder / "set")
    adds_up(report)
    assert report.rows_in == sum(bool(line.strip()) for line in content.encode().split(b"\n")[1:])
    assert len(read_dataset(folder / "set")) == report.kept + report.repaired


def slow_import(lines):
    "What an import must find, in plain Python, for rows in order whose minutes may repeat."
    found, dropped = {}, Counter()
    for line in lines:
        try:
            cells = next(csv.reader([line], strict=True))
        except csv.Error:
            cells = []
        if len(cells) != 4:
            dropped["malformed_line"] += 1
            continue
        try:
            time = datetime.strptime(cells[0], "%Y-%m-%d %H:%M")
        except ValueError:
            dropped["unreadable_time"] += 1
            continue
        values, touched = [], False
        for cell, high in zip(cells[1:], (1e5, 1e5, 100), strict=True):
            if cell in ("", "N/A", "-"):
                values.append(None)
                continue
            try:
                value, touched = float(cell.replace(",", "")), touched or "," in cell
            except ValueError:
                value, touched = None, True
            if value is not None and not 0 <= value <= high:
                value, touched = None, True
            values.append(value)
        if all(value is None for value in values):
            dropped["no_values"] += 1
            continue
        found.setdefault(time, []).append((values, touched))
    for rows_of in found.values():
        dropped.update("repeated_minute" if values == rows_of[-1][0] else "conflicting_minute" for values, _ in rows_of[:-1])
    return {time: rows_of[-1][0] for time, rows_of in found.items()}, dropped, sum(rows_of[-1][1] for rows_of in found.values())


SPOIL = st.sampled_from([None] * 12 + ["short", "long", "quote", "time"])
CELL = st.sampled_from(["", "5", "7.25", "N/A", '"1,234"', "-3", "err", "101"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 2), CELL, CELL, CELL, SPOIL), max_size=40))
def test_counts_and_values_equal_those_of_a_slow_reading(tmp_path_factory, drawn):
    folder, lines, now = tmp_path_factory.mktemp("slow"), rows(1), 0
    for step, one, two, three, spoil in drawn:
        now += step
        line = f"{minute(now)},{one},{two},{three}"
        spoilt = {"short": line + '"x', "long": line + ",9", "quote": f'"{line}', "time": line[:12] + "x" + line[13:]}
        lines.append(spoilt.get(spoil, line))
    (folder / "f.csv").write_text(text(lines))
    report = import_files(folder / "f.csv", SITE, folder / "set")
    expected, dropped, repaired = slow_import(lines)
    assert (report.dropped, report.repaired) == (dict(dropped), repaired)
    frame = read_dataset(folder / "set").reindex(columns=["timestamp", "hub_jobs", "hub_free_slots", "hub_oht_util"])
    got = {time.to_pydatetime().replace(tzinfo=None): [None if np.isnan(v) else v for v in values]
           for time, *values in frame.itertuples(index=False)}
    assert got == expected


@given(st.text(max_size=20))
def test_read_number_and_read_time_take_any_text(said):
    value, rule = read_number(said)
    assert rule in ("missing", "text_number", "unreadable_value") and (rule == "text_number") == bool(np.isfinite(value))
    assert read_time(said) is None or isinstance(read_time(said), datetime)


# killed

KILLED = """
    import os, pathlib, shutil, signal, sys
    import pandas, pyarrow.parquet
    from amhs.config import load_site
    from amhs.telemetry import import_files
    site, file, base, out = sys.argv[1:]

    def dying(function, left):
        def call(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)
        return call

    for moment in range(1, 1000):
        folder = pathlib.Path(out) / str(moment)
        shutil.copytree(base, folder)
        if (child := os.fork()) == 0:
            left = [moment]
            for owner, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "rmdir"), (os, "unlink"),
                                (pyarrow.parquet, "write_table")):
                setattr(owner, name, dying(getattr(owner, name), left))
            import_files(file, site, folder)
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
"""


def test_killed_at_any_moment_the_data_set_is_the_old_or_the_new_one(tmp_path):
    site = tmp_path / "site.yaml"
    site.write_text("{name: t, time: {column: time, format: '%Y-%m-%d %H:%M'}, columns: {hub_jobs: jobs, hub_free_slots: free}}")
    (tmp_path / "old.csv").write_text(text([f"{minute(i)},{i % 90},1,1" for i in range(0, 3000, 3)]))
    (tmp_path / "new.csv").write_text(text([f"{minute(i)},{i % 90 + 1},2,1" for i in range(1000, 4500, 2)]))
    import_files(tmp_path / "old.csv", site, tmp_path / "old")
    for name in ("old.csv", "new.csv"):
        import_files(tmp_path / name, site, tmp_path / "both")
    old, new = dataset_hash(tmp_path / "old"), dataset_hash(tmp_path / "both")
    arguments = site, tmp_path / "new.csv", tmp_path / "old", tmp_path / "out"
    subprocess.run([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], check=True)
    folders = sorted((tmp_path / "out").iterdir(), key=lambda p: int(p.name))
    hashes = [dataset_hash(folder) for folder in folders]
    assert len(folders) > 20 and set(hashes) == {old, new}
    assert hashes == sorted(hashes, key=[old, new].index)  # one moment decides
    for folder in folders:
        report = import_files(tmp_path / "new.csv", site, folder)
        adds_up(report)
        assert dataset_hash(folder) == new
        assert not [p for p in folder.iterdir() if p.name.startswith("_publishing") or (p.is_dir() and p.name.startswith("."))]
        assert len(list((folder / "_reports").glob("*.json"))) == 2


# a draft for an unknown file

def test_drafted_profile_imports_the_file_it_was_drafted_from(tmp_path):
    content, site, truth, _ = ugly_korean_export()
    (tmp_path / "export.csv").write_bytes(content)
    draft = propose_site(tmp_path / "export.csv")
    (tmp_path / "draft.yaml").write_text(draft)
    drafted = load_site(tmp_path / "draft.yaml")
    assert [(name, c.source) for name, c in drafted.columns.items()] == [(name, c.source) for name, c in site.columns.items()]
    assert drafted.time == site.time and drafted.line == site.line and drafted.timezone == "Asia/Seoul"
    assert drafted.columns["floor_storage_util"].scale == 100 and "sure" in draft
    import_files(tmp_path / "export.csv", tmp_path / "draft.yaml", tmp_path / "set")
    assert jobs(read_dataset(tmp_path / "set")) == list(truth.values())


@pytest.mark.parametrize("rename", [str.upper, lambda n: n.replace("_", " ").title(), lambda n: n.title().replace("_", "")])
def test_draft_knows_the_canonical_names_in_other_spellings(tmp_path, rename):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({rename(name): rng.integers(1, 90, 60) for name in COLUMNS})
    frame.insert(0, "TS", pd.date_range("2026-01-01", periods=60, freq="min").strftime("%Y/%m/%d %H:%M"))
    frame.to_csv(tmp_path / "f.csv", index=False)
    (tmp_path / "draft.yaml").write_text(propose_site(tmp_path / "f.csv"))
    drafted = load_site(tmp_path / "draft.yaml")
    right = sum(drafted.columns[name].source == rename(name) for name in COLUMNS if name in drafted.columns)
    assert right >= 29 and drafted.columns["hub_jobs"].source == rename("hub_jobs")
    assert import_files(tmp_path / "f.csv", tmp_path / "draft.yaml", tmp_path / "set").kept == 60


@pytest.mark.parametrize("content, said", [
    (b"", "empty"), (b"a,b\n1,2\n", "looks like a time"), (b"t,a\n2026-01-01 09:00,x\n", "holds numbers")])
def test_nothing_to_draft_from(tmp_path, content, said):
    (tmp_path / "f.csv").write_bytes(content)
    with pytest.raises(InputError, match=said):
        propose_site(tmp_path / "f.csv")


def test_simulated_hub_exported_and_imported_is_the_same(tmp_path):
    from amhs.simulate import simulate
    telemetry = simulate(1, seed=3).telemetry
    telemetry.to_csv(tmp_path / "hub.csv", index=False)
    assert import_files(tmp_path / "hub.csv", "simulated", tmp_path / "set").kept == 1440
    pd.testing.assert_frame_equal(read_dataset(tmp_path / "set"), telemetry)
    assert write_dataset(telemetry, tmp_path / "set") == (0, 0, 1440)
