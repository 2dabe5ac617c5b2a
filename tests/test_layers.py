"""Imports point left only, siblings never meet, and some libraries have a single home (architecture: the layer rule)."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LAYERS = [
    {"core"}, {"answers", "messages", "processes", "load", "door"},
    {"config", "client"}, {"pages"}, {"documents"}, {"telemetry", "events"}, {"simulate", "quality", "features", "targets", "rules", "smooth", "spread"},
    {"model"}, {"evaluate", "plots", "engines", "challengers"}, {"inference", "baseline", "store", "oracle", "causes"},
    {"develop", "deployment", "access"}, {"registry", "distil", "tuning"}, {"package", "serve", "schedule"},
    {"api", "bento", "offline", "board", "contest"}, {"sections"}, {"dashboard"}, {"integration"},
    {"monitor", "alerts"}, {"retrain"}, {"operate"}, {"rehearsal"},
    {"stages"}, {"provenance"}, {"plan"}, {"reports"}, {"compare"}, {"wire"}, {"kernel"}, {"warm"}, {"execute"}, {"runs"},
    {"archive"}, {"grids"}, {"reproduce"}, {"workbench"}, {"maturity"}, {"serving"}, {"operating"}, {"cli"},
]
HOMES = {"mlflow": {"registry"}, "papermill": {"execute"}, "matplotlib": {"plots"}, "bentoml": {"package"},
         "sqlalchemy": {"store"}, "optuna": {"tuning"}, "lightgbm": {"challengers"}, "torch": {"challengers"}, "jinja2": {"documents"},
         "starlette": {"api", "door"}, "httpx": {"client", "alerts"},
         "msgspec": {"messages", "serve", "api", "client", "offline", "integration", "monitor", "board"},
         "panel": {"dashboard"}, "bokeh": {"sections"}, "schemathesis": {"integration"}, "hypothesis": {"integration"}}
LEVEL = {module: i for i, layer in enumerate(LAYERS) for module in layer}


def imported(source: str) -> set[str]:
    "Every dotted name that source imports, also inside functions."
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            # nbdev writes `from amhs.core import x` as `from .core import x`
            module = ".".join(filter(None, ["amhs" if node.level else "", node.module]))
            found |= {f"amhs.{a.name}" for a in node.names} if module == "amhs" else {module}
    return found


def violations(module: str, source: str) -> list[str]:
    names = imported(source)
    inner = {n.split(".")[1] for n in names if n.startswith("amhs.")} - {module}
    upward = [f"{module} imports {m}" for m in inner if LEVEL[m] >= LEVEL[module]]
    strays = [f"{module} imports {n}" for n in names if module not in HOMES.get(n.split(".")[0], {module})]
    return upward + strays


MODULES = sorted(p for p in (ROOT / "amhs").glob("*.py") if not p.stem.startswith("_"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.stem)
def test_imports_point_left(path):
    assert path.stem in LEVEL, f"say in which layer {path.stem} belongs"
    assert violations(path.stem, path.read_text()) == []


@pytest.mark.parametrize(("module", "line"), [
    ("features", "from amhs.targets import build_targets"),
    ("telemetry", "def f():\n    import amhs.model"),
    ("core", "from amhs import cli"),
    ("evaluate", "import matplotlib.pyplot as plt"),
])
def test_a_planted_violation_is_seen(module, line):
    assert violations(module, line)
