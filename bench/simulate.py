"""How fast the simulator is: 180 days of one hub on one core, and the forks the oracle needs."""

import time

import numpy as np
from common import figure, record

from amhs.simulate import Simulator, simulate

DAYS = 180


def timed(call) -> tuple[float, float, object]:
    "Wall seconds, CPU seconds and the result of a call."
    wall, cpu = time.perf_counter(), time.process_time()
    found = call()
    return time.perf_counter() - wall, time.process_time() - cpu, found


first, _, _ = timed(lambda: simulate(days=0.01))
wall, cpu, result = timed(lambda: simulate(DAYS, seed=1))
rows = len(result.telemetry)

sim = Simulator(seed=1)
sim.run(600)
forking, _, _ = timed(lambda: [sim.fork(seed) for seed in range(100)])
futures, _, jobs = timed(lambda: sim.futures(200, 25))
assert jobs.shape == (200, 25) and np.isfinite(jobs).all()

record("simulate", [
    figure(f"{DAYS} days ({rows:,} rows), wall", round(wall, 2), "s", "at most 20", wall <= 20),
    figure(f"{DAYS} days, CPU of one core", round(cpu, 2), "s", "at most 20", cpu <= 20),
    figure("simulated minutes per CPU second", round(rows / cpu), "min/s"),
    figure("first call in this process (loads or compiles the kernel)", round(first, 2), "s"),
    figure("one fork", round(forking / 100 * 1e3, 3), "ms"),
    figure("200 futures of 25 minutes", round(futures, 3), "s"),
])
