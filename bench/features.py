"""Rows per second of the full V8 feature set on 180 days of one line: ours, a loop over rows, pandas and polars rolling.

All four compute the same 222 columns from the same telemetry; what they find is compared before it is timed. The fast ones
run on all rows, best of some repeats; the loop runs on a sample of rows, its speed does not depend on how many.

    python bench/features.py [--days 180] [--repeats 5]
"""

import argparse
import time

import numpy as np
import pandas as pd
import polars as pl
from common import figure, record

from amhs.features import _by_column, build_features, compile_features
from amhs.telemetry import COLUMNS, columns_of

WINDOW = columns_of("command", "storage", "floor_storage", "hub", "queue", "target_alt", "hub_queue", "fab_queue")
FLOWS = (*columns_of("inflow"), *columns_of("outflow"))
# name of the flag, column, limit
HIGH = [("floor_util_high", "floor_storage_util", 7), ("storage_high", "hub_storage_level", 205), ("storage_critical", "hub_storage_level", 207),
        ("hub_queue_high", "hub_queue", 1200), ("hub_queue_critical", "hub_queue", 1400), ("hub_total_time_1min_high", "hub_total_time_1min", 4.0),
        ("hub_total_time_1min_critical", "hub_total_time_1min", 4.5), ("hub_oht_util_high", "hub_oht_util", 85), ("hub_oht_util_critical", "hub_oht_util", 90),
        ("hub_total_time_high", "hub_total_time", 5.0), ("hub_total_time_critical", "hub_total_time", 6.0), ("fab_oht_util_high", "fab_oht_util", 85),
        ("fab_oht_util_critical", "fab_oht_util", 90), ("fab_load_time_high", "fab_load_time_1min", 2.5), ("fab_load_time_critical", "fab_load_time_1min", 2.8),
        ("fab_over_4min_high", "fab_over_4min", 40), ("fab_over_4min_critical", "fab_over_4min", 50), ("fab_queue_delay_high", "fab_queue_delay", 1),
        ("fab_queue_delay_critical", "fab_queue_delay", 3)]  # fmt: skip


def telemetry(days: int, seed: int = 0) -> pd.DataFrame:
    "One line of wandering readings; the speed of none of the four depends on the values."
    random, minutes = np.random.default_rng(seed), days * 1440
    walk = {c: (300 + np.cumsum(random.normal(size=minutes)) / 10).astype("float32") for c in COLUMNS}
    times = pd.date_range("2026-01-01", periods=minutes, freq="min", tz="UTC").as_unit("us")
    return pd.DataFrame({"line": "HUB1", "timestamp": times, **walk})


def flags(out, last, lag):
    "The 48 V8 features that need no more than single minutes; works on numbers, Series and polars expressions alike."
    free, jobs, used = last("hub_free_slots"), last("hub_jobs"), last("floor_storage_used")
    total, room_high = sum(last(c) for c in columns_of("command")), free < 610
    out |= {"hub_jobs_is_rising": jobs - lag("hub_jobs", 4) > 0, "hub_jobs_rapid_rise": jobs - lag("hub_jobs", 4) > 10}
    out |= {name: last(column) >= limit for name, column, limit in HIGH}
    out |= {f"{c}_last": last(c) for c in (*WINDOW, *FLOWS, *columns_of("capacity"))}
    out |= {"hub_jobs_last": jobs, "floor_util_last": last("floor_storage_util"), "floor_remaining": last("floor_storage_total") - used,
            "floor_use_rate": (used - lag("floor_storage_used", 29)) / 30, "room_decrease_rate": (lag("hub_free_slots", 29) - free) / 30,
            "room_critical": free < 590, "room_high": room_high, "room_warning": free < 620, "room_storage_risk": room_high & out["floor_util_high"],
            "net_flow": sum(last(c) for c in columns_of("inflow")) - sum(last(c) for c in columns_of("outflow")), "total_commands": total,
            "commands_low": total < 220, "commands_very_low": total < 200, "room_and_commands_low": room_high & (total < 220),
            "surge_risk_score": 3 * room_high + 2 * out["storage_high"] + 1 * (total < 220) + 1 * out["floor_util_high"],
            "hub_queue_and_time_high": out["hub_queue_high"] & out["hub_total_time_1min_high"],
            "hub_oht_and_time_high": out["hub_oht_util_high"] & out["hub_total_time_high"],
            "fab_oht_and_over_4min_high": out["fab_oht_util_high"] & out["fab_over_4min_high"]}  # fmt: skip
    out["hub_jobs_acceleration"] = (out["hub_jobs_last5_mean"] - out.pop("before5")) / 5
    out["surge_imminent"] = (jobs > 280) & (out["hub_jobs_acceleration"] > 0.5) & room_high
    return out


def loop(frame: pd.DataFrame, ends) -> pd.DataFrame:
    "As V8 does it: one row after the other, numpy on its 30 minutes."
    values = {c: frame[c].to_numpy("float64") for c in COLUMNS}
    rows, minutes = [], np.arange(30)
    for end in ends:
        w, out = {c: v[end - 29 : end + 1] for c, v in values.items()}, {}
        for c in ("hub_jobs", *WINDOW):
            x = w[c]
            out |= {f"{c}_mean": np.mean(x), f"{c}_std": np.std(x), f"{c}_max": np.max(x), f"{c}_min": np.min(x),
                    f"{c}_last5_mean": np.mean(x[-5:]), f"{c}_slope": np.polyfit(minutes, x, 1)[0]}  # fmt: skip
        for c in FLOWS:
            out |= {f"{c}_mean": np.mean(w[c]), f"{c}_slope": np.polyfit(minutes, w[c], 1)[0]}
        out |= {"hub_jobs_last10_mean": np.mean(w["hub_jobs"][-10:]), "before5": np.mean(w["hub_jobs"][-10:-5])}
        rows.append(flags(out, lambda c: w[c][29], lambda c, n: w[c][29 - n]))
    return pd.DataFrame(rows)


def pandas_rolling(frame: pd.DataFrame) -> pd.DataFrame:
    "The set by pandas' rolling windows; the slope from a rolling sum of values weighted by their running number."
    x, out = frame[list(COLUMNS)].astype("float64"), {}
    number = pd.Series(np.arange(len(x), dtype="float64"))
    def slope(c):
        return ((x[c] * number).rolling(30).sum() - (number - 14.5) * x[c].rolling(30).sum()) / 2247.5
    for c in ("hub_jobs", *WINDOW):
        r = x[c].rolling(30)
        out |= {f"{c}_mean": r.mean(), f"{c}_std": r.std(ddof=0), f"{c}_max": r.max(), f"{c}_min": r.min(),
                f"{c}_last5_mean": x[c].rolling(5).mean(), f"{c}_slope": slope(c)}  # fmt: skip
    for c in FLOWS:
        out |= {f"{c}_mean": x[c].rolling(30).mean(), f"{c}_slope": slope(c)}
    out |= {"hub_jobs_last10_mean": x["hub_jobs"].rolling(10).mean(), "before5": out["hub_jobs_last5_mean"].shift(5)}
    return pd.DataFrame(flags(out, lambda c: x[c], lambda c, n: x[c].shift(n))).iloc[29:].astype("float32")


def polars_rolling(frame: pl.DataFrame) -> pl.DataFrame:
    "The set by polars' rolling expressions, all in one query; it runs on all processors."
    x, number, out = lambda c: pl.col(c).cast(pl.Float64), pl.int_range(pl.len()).cast(pl.Float64), {}
    def slope(c):
        return ((x(c) * number).rolling_sum(30) - (number - 14.5) * x(c).rolling_sum(30)) / 2247.5
    for c in ("hub_jobs", *WINDOW):
        out |= {f"{c}_mean": x(c).rolling_mean(30), f"{c}_std": x(c).rolling_std(30, ddof=0), f"{c}_max": x(c).rolling_max(30),
                f"{c}_min": x(c).rolling_min(30), f"{c}_last5_mean": x(c).rolling_mean(5), f"{c}_slope": slope(c)}  # fmt: skip
    for c in FLOWS:
        out |= {f"{c}_mean": x(c).rolling_mean(30), f"{c}_slope": slope(c)}
    out |= {"hub_jobs_last10_mean": x("hub_jobs").rolling_mean(10), "before5": out["hub_jobs_last5_mean"].shift(5)}
    out = flags(out, x, lambda c, n: x(c).shift(n))
    return frame.lazy().select(e.cast(pl.Float32).alias(n) for n, e in out.items()).slice(29).collect()


def seconds(work, repeats: int, clock=time.perf_counter) -> float:
    "The best of some repeats in a row: the first also pays for fresh memory and is seldom the best."
    def once() -> float:
        start = clock()
        work()
        return clock() - start
    return min(once() for _ in range(repeats))


def compare(frame: pd.DataFrame, polars_frame: pl.DataFrame) -> float:
    "The largest difference of the other three from ours, relative to the size of each feature."
    ours = build_features(frame).reset_index(drop=True).astype("float64")
    others = {"pandas": pandas_rolling(frame).reset_index(drop=True), "polars": polars_rolling(polars_frame).to_pandas()}
    ends = np.arange(29, len(frame), len(frame) // 50)
    others["loop"], worst = loop(frame, ends).set_index(ends - 29), 0.0
    for found in others.values():
        assert set(found) == set(ours)
        apart = (found[ours.columns].astype("float64") - ours.loc[found.index]).abs()
        worst = max(worst, (apart / (ours.abs().mean() + 1e-3)).to_numpy().max())
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--days", type=int, default=180)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    frame = telemetry(args.days)
    polars_frame = pl.DataFrame({c: frame[c].to_numpy() for c in COLUMNS})
    rows, ends = len(frame) - 29, np.arange(29, len(frame))
    apart = compare(frame.head(20_000), polars_frame.head(20_000))
    kernel, values = compile_features("v8"), _by_column(frame, COLUMNS, np.arange(len(frame)))
    hub = compile_features("hub")
    window, long_window = values[:, :30].copy(), values[:, : hub.memory_min].copy()

    sample = ends[:: len(ends) // 400]
    works = {
        "loop over rows, numpy (V8's way)": (len(sample), lambda: loop(frame, sample)),
        "pandas rolling": (rows, lambda: pandas_rolling(frame)),
        "polars rolling": (rows, lambda: polars_rolling(polars_frame)),
        "amhs build_features, table to table": (rows, lambda: build_features(frame)),
        "amhs kernel, 1 thread": (rows, lambda: kernel.matrix(values, ends, threads=1)),
        "amhs kernel, 2 threads": (rows, lambda: kernel.matrix(values, ends, threads=2)),
        "amhs build_features, set hub": (rows, lambda: build_features(frame, "hub")),
    }
    speed = {name: n / seconds(work, args.repeats) for name, (n, work) in works.items()}
    ours, slow, rolling = (speed[n] for n in ("amhs build_features, table to table", "loop over rows, numpy (V8's way)", "pandas rolling"))
    cpu = {name: seconds(works[name][1], 3, time.process_time) for name in ("amhs build_features, table to table", "pandas rolling")}
    hub_share = speed["amhs build_features, set hub"] / ours
    newest = {"newest row, v8": lambda: kernel.row(window), "newest row, hub": lambda: hub.row(long_window, 0)}
    record("features", [
        figure("telemetry", len(frame), "rows"),
        figure("largest relative difference between the four", float(apart), "", "<= 0.001", bool(apart <= 1e-3)),
        *(figure(name, float(value), "rows/s") for name, value in speed.items()),
        figure("build_features against the loop", ours / slow, "times", ">= 1000", bool(ours / slow >= 1000)),
        figure("build_features against pandas rolling", ours / rolling, "times", ">= 10", bool(ours / rolling >= 10)),
        figure("the same in processor time, for busy machines", cpu["pandas rolling"] / cpu["amhs build_features, table to table"], "times"),
        figure("build_features against polars rolling", ours / speed["polars rolling"], "times"),
        figure("set hub against set v8", hub_share, "times", ">= 0.5", bool(hub_share >= 0.5)),
        *(figure(name, 1e6 * seconds(work, 500), "us") for name, work in newest.items()),
    ])


if __name__ == "__main__":
    main()
