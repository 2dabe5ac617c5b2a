"""Runs to read, compare and pack: two that ended well, one that was refused, one that failed."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from toy_project import make_project, write_stage

from amhs import runs

QUIET = runs.Manner(show=runs.Reporter(lambda line: None))
DRAW = "from matplotlib.figure import Figure\nfig = Figure((2, 1)); fig.subplots().plot([1, {0}]); print('trees', {0}); fig"


def make_runs(root: Path) -> Path:
    """Monday whole, Tuesday from train on and refused, Wednesday from evaluate on and broken, Thursday stage 01 alone; the folder of runs."""
    make_project(root)
    write_stage(root, "poc", "run.skip('기준 모델이 이미 있습니다')")
    write_stage(root, "train", DRAW.format(7) + "\nrun.metric('mae', 4.0, 'jobs', headline=True)\nfig")
    assert go("monday", "business", "inference", sets={"train.trees": 7, "business.line": "HUB1"}) == "finished"
    write_stage(root, "train", DRAW.format(9) + "\nrun.metric('mae', 3.0, 'jobs', headline=True)\nfig")
    write_stage(root, "evaluate", "run.gate('skill', 0.1, 0.2, why='must beat waiting')")
    assert go("tuesday", "train", "evaluate", sets={"train.trees": 9, "business.line": "HUB1"}) == "refused"
    write_stage(root, "evaluate", "print(run.folder.resolve())\nstages.read_json(run.folder / 'no such file')")
    assert go("wednesday", "evaluate", "evaluate") == "error"
    assert go("thursday", "business", "business", profile="smoke") == "finished"
    return root / "runs"


def go(run_id: str, first: str, last: str, **kw) -> str:
    return runs.run_pipeline(first=first, last=last, run_id=run_id, manner=QUIET, **kw).status


def own_settings(patch: pytest.MonkeyPatch, root: Path) -> None:
    """Work in this project and no other."""
    for key in ("AMHS_RUNS", "AMHS_DATA", "AMHS_PARAMS", "AMHS_SITES"):
        patch.delenv(key, raising=False)
    patch.setenv("AMHS_ROOT", str(root))


class Links(HTMLParser):
    """What a page would fetch, where it leads, which anchors it has."""

    def __init__(self, path: Path):
        super().__init__()
        self.path, self.loads, self.links, self.ids = path, [], [], set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.ids.add(attrs.get("id"))
        self.loads += [attrs[k] for k in ("src", "srcset", "data", "poster", "xlink:href") if attrs.get(k)]
        if tag in ("link", "use", "image"):
            self.loads.append(attrs.get("href"))
        elif attrs.get("href"):
            self.links.append(attrs["href"])


def check_pages(folder: Path) -> int:
    """Every page below a folder works offline, and every link in it leads somewhere; how many there are."""
    found = {p: Links(p) for p in folder.rglob("*.html") if "artefacts" not in p.parts}
    for path, page in found.items():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"@import|url\(\s*['\"]?(?!data:)|https?://", text), path
        beside = [s for s in page.loads if not s.startswith("data:image/")]
        assert all((path.parent / s).is_file() for s in beside), (path, beside)
        for link in page.links:
            place, _, anchor = link.partition("#")
            target = (path.parent / place).resolve() if place else path.resolve()
            assert target.exists() and target.is_relative_to(folder.resolve()), (path, link)
            assert not anchor or anchor in Links(target).ids, (path, link)
    return len(found)
