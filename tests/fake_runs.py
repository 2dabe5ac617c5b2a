"""Runs as their files tell them, made without running anything: what the registry reads."""

from pathlib import Path

from amhs.core import sha256_file, sha256_json, sha256_tree, write_json


def fake_run(runs: Path, run_id: str, day: int = 16, skill: float = 0.3, site: str = "fab1", **other) -> Path:
    """A run of stages 06 and 07 that confirmed a model; `other` changes details: status, gate, op, metric, trees, model, data, confirmed."""
    given = {"status": "finished", "gate": True, "op": ">=", "metric": "skill_change_max_10", "trees": 60, "model": run_id, "data": "d" * 64,
             "confirmed": True, "card": f"# Confirmed model: hub for site {site}\n\nSkill {skill}.\n"} | other
    home, began = runs / run_id, f"2026-11-{day:02}T05:00:00+00:00"
    if given["confirmed"]:
        _confirmed_model(home / "07_evaluate/artefacts/confirmed_model", site, given["card"])
    write_json(home / "06_train/manifest.json", _manifest(run_id, "06", "train", began, {"seed": 0, "trees": given["trees"]}))
    write_json(home / "07_evaluate/artefacts/evaluation.json", {"model": "hub", "levels": [
        {"model": m, "horizon_min": 10, "target": "max", "metric": "mae", "value": v} for m, v in (("persistence", 13.4), ("hub", 8.25))]})
    (home / "07_evaluate/documents").mkdir(parents=True, exist_ok=True)
    (home / "07_evaluate/documents/experiment_report.html").write_text("<html>report</html>")
    write_json(home / "07_evaluate/manifest.json", _evaluated(run_id, began, home, skill, given))
    write_json(home / "run.json", {
        "run_id": run_id, "pipeline": "develop", "profile": "demo", "started": began, "status": given["status"], "verdict": "Every gate passed.",
        "duration_s": 3660.0, "sources": {}, "sets": {}, "site": site, "line": "HUB1"})
    return home


def _confirmed_model(folder: Path, site: str, card: str) -> None:
    write_json(folder / "interface.json", {"reads": {"columns": ["hub_jobs", "hub_queue"]}, "gives": ["now", "change_max_10"], "feature_set": "hub"})
    write_json(folder / "site.json", {"name": site})
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model/change_max_10.ubj").write_bytes(card.encode() * 3)
    (folder / "card.md").write_text(card, encoding="utf-8")
    (folder / "contents.json").unlink(missing_ok=True)
    write_json(folder / "contents.json", {p.relative_to(folder).as_posix(): sha256_file(p) for p in sorted(folder.rglob("*")) if p.is_file()})


def _manifest(run_id: str, number: str, stage: str, began: str, parameters: dict, **other) -> dict:
    return {"run_id": run_id, "stage": stage, "number": number, "title": stage, "status": "finished", "started": began, "duration_s": 60.0,
            "peak_memory_mb": 200.0, "parameters": parameters, "metrics": {}, "gates": [], "inputs": {}, "outputs": {},
            "code": {"commit": "1234abcd" * 5, "dirty": False}} | other


def _evaluated(run_id: str, began: str, home: Path, skill: float, given: dict) -> dict:
    metrics = {"verdict": {"value": "confirmed", "headline": True}, given["metric"]: {"value": skill, "headline": True}}
    gates = [{"name": given["metric"], "value": skill, "op": given["op"], "limit": 0.2, "passed": given["gate"]}]
    inputs = {"data": {"artefacts": {"labelled": {"sha256": given["data"]}}}, "train": {"artefacts": {"model": {"sha256": sha256_json(given["model"])}}}}
    confirmed = home / "07_evaluate/artefacts/confirmed_model"
    outputs = {"confirmed_model": {"sha256": sha256_tree(confirmed), "bytes": 500}} if given["confirmed"] else {}
    return _manifest(run_id, "07", "evaluate", began, {"seed": 0, "bootstrap": 50}, metrics=metrics, gates=gates, inputs=inputs, outputs=outputs)


def fake_package(runs: Path, run_id: str, of: str) -> Path:
    """A run of a later stage that made a package from what another run confirmed."""
    made = fake_run(runs, run_id, 25, confirmed=False) / "08_inference/artefacts/package"
    write_json(made / "package.json", {"engine": "forest"})
    sha = sha256_tree(runs / of / "07_evaluate/artefacts/confirmed_model")
    inputs = {"evaluate": {"run_id": of, "artefacts": {"confirmed_model": {"sha256": sha}}}}
    outputs = {"package": {"sha256": sha256_tree(made), "bytes": 30}}
    manifest = _manifest(run_id, "08", "inference", "2026-11-25T05:00:00+00:00", {"seed": 0}, inputs=inputs, outputs=outputs)
    write_json(made.parent.parent / "manifest.json", manifest)
    return made
