"""The service under load, side by side with `mlflow models serve` and a bare Starlette service around the same compiled model.

Open loop: requests leave at random times of a fixed rate, and a latency counts from the moment its request should have left. The load
generator runs on the same machine, in a process of its own. Every service gets two workers and a window of 30 minutes, from which it makes
the features; only the service has keys and a store. Saturation: what is answered of an offer far beyond it.
`--seconds` shortens the fixed loads, `--days` the history the model learns from.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import common
import psutil

HOUSE = common.BENCH.parent
sys.path.insert(0, str(HOUSE / "tests"))

BARE = '''
"""Bare Starlette: a window in, a forecast out; no keys, no store, no rules."""
import os
import msgspec, numpy as np
from starlette.applications import Starlette
from starlette.responses import Response
from starlette.routing import Route
from amhs.inference import load_package
from amhs.messages import Window
from amhs.serve import minute_of

package, take, give = load_package(os.environ["PACKAGE"]), msgspec.json.Decoder(Window).decode, msgspec.json.Encoder().encode

async def predict(request):
    window = take(await request.body())
    values = np.ascontiguousarray(np.array(window.rows, "float32").T)
    return Response(give(package.forecast(package.features(values, minute_of(window.end))).tolist()), media_type="application/json")

app = Starlette(routes=[Route("/predict", predict, methods=["POST"])])
'''
MLFLOW = '''
"""A pyfunc: features in, a forecast out."""
import mlflow, numpy as np, pandas as pd
from amhs.inference import load_package

class Forecast(mlflow.pyfunc.PythonModel):
    def load_context(self, context):
        package = load_package(context.artifacts["package"])
        self.names = list(package.engine.features)
        self.answer = {answer}

    def predict(self, context, model_input, params=None):
        return self.answer(model_input[self.names].astype("float32"))

mlflow.models.set_model(Forecast())
'''
ANSWERS = {"boosters": "lambda X, f=package.forecaster: f.predict(X).to_numpy()", "forest": "lambda X, p=package: p.forecasts(X.to_numpy())"}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Server:
    "A service in its own processes."

    def __init__(self, command: list, ready: str, port: int, environment: dict, log: Path):
        began = time.monotonic()
        with open(log, "w") as out:
            self.process = subprocess.Popen([str(c) for c in command], cwd=HOUSE, env={**os.environ, **environment}, stdout=out, stderr=out,
                                            start_new_session=True)
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}{ready}", timeout=1)
                break
            except urllib.error.HTTPError as e:
                if e.code == 404:  # there is no such page, but somebody to say so
                    break
            except OSError:
                if self.process.poll() is not None or time.monotonic() > began + 120:
                    raise SystemExit(log.read_text()[-3000:]) from None
                time.sleep(0.05)
        self.ready_s = time.monotonic() - began

    def memory_mb(self) -> float:
        "What all its processes hold, shared pages counted once."
        family = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        return sum(p.memory_full_info().pss for p in family) / 2**20

    def __enter__(self):
        return self

    def __exit__(self, *_):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)


def offer(url: str, body: Path, rate: float, seconds: float, key: str = "", patience: float = 5, connections: int = 64) -> dict:
    from amhs.load import Offered

    with Offered(url, body, key=key, rate=rate, seconds=seconds, patience=patience, connections=connections) as load:
        found = load.result()
    said = ", ".join(f"{k} {v}" for k, v in found["statuses"].items())
    print(f"  offered {found['offered_per_s']:,.0f}/s: answered {found['answered_per_s']:,.0f}/s, p99 {found['p99_ms']:.1f} ms ({said})", flush=True)
    return found


def saturation(url: str, body: Path, rate: float, key: str = "") -> float:
    offer(url, body, rate / 4, 3, key, patience=1)  # warm
    return max(offer(url, body, rate, 8, key, patience=0.3)["answered_per_s"] for _ in range(2))


def with_amhs(home: Path, package: Path, workers: int, serving: dict) -> tuple[Server, str, str]:
    "The service, with keys and a store."
    from amhs.access import add_key
    from amhs.deployment import deploy
    from amhs.serving import service_environment

    deploy(package, ["HUB1"], folder=home / "deployed")
    params = home / "params"
    if not params.exists():
        subprocess.run(["cp", "-r", HOUSE / "params", params], check=True)
    text = (HOUSE / "params/serving.yaml").read_text()
    lines = [next((f"{k}: {v}" for k, v in serving.items() if line.startswith(f"{k}:")), line) for line in text.splitlines()]
    (params / "serving.yaml").write_text("\n".join(lines))
    port = free_port()
    site = {"AMHS_DEPLOYED": home / "deployed", "AMHS_KEYS": home / "keys.json", "AMHS_STORE": f"sqlite:///{home}/store.sqlite", "AMHS_PARAMS": params,
            "AMHS_SITES": params / "sites", "BENTOML_HOME": home / "bentoml", "AMHS_WORKERS": workers}
    environment = service_environment({}) | {k: str(v) for k, v in site.items()}
    command = [Path(sys.executable).parent / "bentoml", "serve", "service:Amhs", "--host", "127.0.0.1", "--port", port]
    return Server(command, "/readyz", port, environment, home / "amhs.log"), f"http://127.0.0.1:{port}/v1/predict", add_key("bench", home / "keys.json")


def with_bare(home: Path, package: Path, workers: int) -> tuple[Server, str]:
    (home / "bare_app.py").write_text(BARE)
    port = free_port()
    command = [sys.executable, "-m", "uvicorn", "bare_app:app", "--app-dir", home, "--port", port, "--workers", workers, "--no-access-log"]
    return Server(command, "/", port, {"PACKAGE": str(package), "OMP_NUM_THREADS": "1"}, home / "bare.log"), f"http://127.0.0.1:{port}/predict"


def with_mlflow(home: Path, package: Path, workers: int, kind: str) -> tuple[Server, str]:
    import mlflow

    code, port, model = home / f"mlflow_{kind}.py", free_port(), home / f"model_{kind}"
    code.write_text(MLFLOW.replace("{answer}", ANSWERS[kind]))
    mlflow.pyfunc.save_model(model, python_model=str(code), artifacts={"package": str(package)}, pip_requirements=["mlflow"])
    command = [Path(sys.executable).parent / "mlflow", "models", "serve", "-m", model, "-p", port, "--env-manager", "local", "-w", workers]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # mlflow calls uvicorn by its name
    environment = {"OMP_NUM_THREADS": "1", "MLFLOW_DISABLE_TELEMETRY": "true", "PATH": path}
    return Server(command, "/ping", port, environment, home / f"{kind}.log"), f"http://127.0.0.1:{port}/invocations"


def bodies(home: Path, package_folder: Path) -> tuple[Path, Path]:
    "The window, and the features made of it as MLflow wants them."
    import numpy as np

    from amhs.core import read_json
    from amhs.inference import load_package
    from amhs.serve import moment_of

    package, kept = load_package(package_folder), read_json(package_folder / "example.json")
    columns = list(package.kernel.columns)
    rows = [list(r) for r in zip(*(kept["values"][c][-30:] for c in columns))]
    window, features = home / "window.json", home / "features.json"
    window.write_text(json.dumps({"line": "HUB1", "end": moment_of(kept["minute"]).isoformat(), "replay": True, "columns": columns, "rows": rows}))
    values = np.array([[np.nan if v is None else v for v in kept["values"][c]] for c in columns], "float32")
    row = [None if v != v else float(v) for v in package.features(values, kept["minute"])]
    features.write_text(json.dumps({"dataframe_split": {"columns": list(package.engine.features), "data": [row]}}))
    return window, features


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="of the load at 1,000/s; the others last half as long")
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--trees", type=int, default=300)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--package", type=Path, help="a package to serve; none: one is made")
    args = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="serving-"))
    from served import labelled, make_package

    package = args.package or make_package(home, labelled(args.days), trees=args.trees)
    facts = json.loads((package / "package.json").read_text())
    print(f"package {facts['version']}, engine {facts['engine']}, {facts['feature_set']}")
    window, features = bodies(home, package)
    found, w = [], args.workers

    print("the service, nothing shed")
    server, url, key = with_amhs(home, package, w, {"shed_after_ms": 100000})
    with server:
        own = saturation(url, window, 6000, key)
    print("the service, as it is")
    server, url, key = with_amhs(home, package, w, {})
    with server:
        offer(url, window, 1000, 5, key)
        loads = {rate: offer(url, window, rate, args.seconds / (1 if rate == 1000 else 2), key) for rate in (1000, 2000)}
        flood = offer(url, window, 6000, args.seconds / 3, key, connections=1000)  # few would hold callers back before the service could
        memory, ready_s = server.memory_mb(), server.ready_s
    print("bare Starlette")
    server, bare_url = with_bare(home, package, w)
    with server:
        bare = saturation(bare_url, window, 8000)
    mlflow = {}
    for kind, rate in (("boosters", 400), ("forest", 2500)):
        print(f"mlflow models serve, {kind}")
        server, its_url = with_mlflow(home, package, w, kind)
        with server:
            mlflow[kind] = saturation(its_url, features, rate)

    f = common.figure
    for rate, load, limit in ((1000, loads[1000], 10), (2000, loads[2000], 30)):
        lost = sum(n for status, n in load["statuses"].items() if status != "200")
        found += [f(f"p99 at {rate:,}/s, {load['seconds']:.0f} s", load["p99_ms"], "ms", f"<= {limit}", load["p99_ms"] <= limit),
                  f(f"not answered at {rate:,}/s", lost, "requests", "0", lost == 0)]
    found += [f("p95 at 1,000/s", loads[1000]["p95_ms"], "ms"), f("saturation", own, "requests/s", ">= 3000", own >= 3000),
              f("answered of 6,000/s offered", flood["answered_per_s"], "requests/s", ">= 2500", flood["answered_per_s"] >= 2500),
              f("p99 of what is answered of 6,000/s", flood["p99_ms"], "ms", "<= 100", flood["p99_ms"] <= 100),
              f("start to ready", ready_s, "s", "<= 6", ready_s <= 6), f("memory of all processes", memory, "MB", "<= 700", memory <= 700),
              f("saturation of bare Starlette, same model", bare, "requests/s"), f("own / bare Starlette", own / bare, "x", ">= 0.6", own / bare >= 0.6),
              f("saturation of mlflow, twelve boosters", mlflow["boosters"], "requests/s"),
              f("own / mlflow, twelve boosters", own / mlflow["boosters"], "x", ">= 20", own / mlflow["boosters"] >= 20),
              f("saturation of mlflow, same model", mlflow["forest"], "requests/s"),
              f("own / mlflow, same model", own / mlflow["forest"], "x", ">= 3", own / mlflow["forest"] >= 3)]
    common.record("serving", found)


if __name__ == "__main__":
    main()
