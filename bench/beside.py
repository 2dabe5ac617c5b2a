"""A model is trained while the service answers: what that costs those who ask, at a hundred windows a second.

The training is what `amhs operate` starts for a retraining: a pipeline of its own, standing back by `nice` and on as many processors as
params/operate.yaml allows. The load is measured before, during and after it; before and after are put together.

    python bench/beside.py [--seconds 30] [--rate 100]
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import serving
from common import figure, record

from amhs.operate import load_operate, stand_back


def training(home: Path) -> subprocess.Popen:
    "Stages 01 to 06 of the demo, as a retraining runs."
    own = {"AMHS_RUNS": home / "runs", "AMHS_DATA": home / "data", "AMHS_REGISTRY": "off"}
    words = [*stand_back(load_operate()), Path(sys.executable).with_name("amhs"), "run", "develop", "--profile", "demo", "--to", "train"]
    with open(home / "log", "w") as log:
        return subprocess.Popen(words, cwd=serving.HOUSE, env={**os.environ, **{k: str(v) for k, v in own.items()}}, stdout=log, stderr=log,
                                start_new_session=True)


def measured(home: Path, args: argparse.Namespace) -> list[dict]:
    "The service alone, beside a training, alone again."
    from served import labelled, make_package

    package = args.package or make_package(home, labelled(14), trees=300)
    window, _ = serving.bodies(home, package)
    server, url, key = serving.with_amhs(home, package, 2, {})
    with server:
        serving.offer(url, window, args.rate, 5, key)
        before = serving.offer(url, window, args.rate, args.seconds, key)
        process = training(home)
        try:
            while "06 train: cell" not in (home / "log").read_text() and process.poll() is None:
                time.sleep(0.5)
            beside = serving.offer(url, window, args.rate, args.seconds, key)
            running = process.poll() is None
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait()
        time.sleep(2)
        after = serving.offer(url, window, args.rate, args.seconds, key)
    alone = (before["p99_ms"] + after["p99_ms"]) / 2
    lost = sum(n for status, n in beside["statuses"].items() if status != "200")
    return [figure("p99 alone, before", before["p99_ms"], "ms"), figure("p99 alone, after", after["p99_ms"], "ms"),
            figure("p99 beside a training", beside["p99_ms"], "ms"), figure("p50 alone", (before["p50_ms"] + after["p50_ms"]) / 2, "ms"),
            figure("p50 beside a training", beside["p50_ms"], "ms"), figure("training was still running", float(running), ""),
            figure("not answered beside a training", lost, "requests", "0", lost == 0),
            figure("p99 beside a training / alone", beside["p99_ms"] / alone, "x", "<= 2", beside["p99_ms"] / alone <= 2)]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=30)
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--package", type=Path, help="a package to serve; none: one is made")
    with tempfile.TemporaryDirectory(prefix="beside-") as folder:
        record("beside", measured(Path(folder), parser.parse_args()))
