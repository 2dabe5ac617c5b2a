"""Features: V8 to the last one, the same for history and the newest window, honest about what a site lacks."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from amhs.core import InputError, ParameterError
from amhs.features import FEATURE_SETS, build_features, compile_features
from amhs.telemetry import COLUMNS, columns_of
from v8_reference import v8_row

# Lowest and highest reading of each column, and the step it is read in: wide enough to cross every threshold of V8.
RANGES = {
    "hub_jobs": (230, 340, 1), "hub_jobs_alt": (230, 340, 1), "hub_storage_level": (195, 215, 1),
    "floor_storage_used": (20, 90, 1), "floor_storage_total": (600, 610, 1), "floor_storage_util": (4, 13, 0.1),
    "hub_free_slots": (540, 640, 1), "hub_commands": (80, 130, 1), "upper_to_hub_commands": (90, 130, 1),
    "hub_queue": (1000, 1600, 1), "hub_total_time_1min": (3, 5.5, 0.1), "hub_total_time": (4, 7, 0.1),
    "hub_oht_util": (78, 97, 0.5), "fab_oht_util": (78, 97, 0.5), "fab_load_time_1min": (2, 3.2, 0.1),
    "fab_over_4min": (30, 60, 1), "fab_queue_delay": (0, 5, 1), "hub_queue_completed": (0, 40, 1), "interfab_jobs": (0, 90, 1),
    "fab_queue_created": (0, 900, 1), "fab_queue_completed": (0, 900, 1), "hub_oht_queue": (0, 60, 1), "fab_oht_queue": (0, 60, 1),
    "upper_lifter_capacity": (20, 30, 1), "lower_lifter_capacity": (20, 30, 1),
} | {flow: (0, 25, 1) for flow in columns_of("inflow", "outflow")}  # fmt: skip


def feed(minutes, columns=COLUMNS, line="HUB1", seed=0, start="2026-01-01"):
    "Readings that wander between the limits of their column, in the column's own steps."
    random, table = np.random.default_rng([seed, *map(ord, line)]), {}
    for name in columns:
        low, high, step = RANGES[name]
        walk = (high - low) * (random.random() + np.cumsum(random.normal(scale=0.08, size=minutes)))
        folded = low + np.abs(np.mod(walk, 2 * (high - low)) - (high - low))
        table[name] = (np.round(folded / step) * step).astype("float32")
    times = pd.date_range(start, periods=minutes, freq="min", tz="UTC").as_unit("us")
    return pd.DataFrame({"line": line, "timestamp": times, **table})


def reference(telemetry, end):
    window = telemetry.iloc[end - 29 : end + 1]
    return v8_row({name: window[name].tolist() for name in COLUMNS})


def test_the_feed_crosses_every_threshold():
    flags = build_features(feed(4000)).loc[:, lambda t: t.isin([0, 1]).all()]
    assert len(flags.columns) == 32
    assert (flags.min() == 0).all() and (flags.max() == 1).all()


def test_v8_is_the_reference_to_the_last_feature():
    telemetry = feed(4000, seed=1)
    features = build_features(telemetry)
    ends = range(29, 4000, 7)
    expected = pd.DataFrame([reference(telemetry, end) for end in ends])
    assert len(expected.columns) == 222 and list(features.columns) == list(expected.columns)
    found = features.iloc[[end - 29 for end in ends]].to_numpy("float64")
    scale = expected.abs().to_numpy() + 1e-6
    assert np.abs(found - expected.to_numpy()).max(axis=0).max() < 1e-3
    assert (np.abs(found - expected) / scale).to_numpy().max() < 1e-4
