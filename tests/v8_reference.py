"""The 222 features of V8 for one window of 30 minutes, in plain Python.

Written from the description of V8 alone and slowly on purpose: it shares no code, no thresholds and no lists of columns
with the library, so that both can only agree by both being right.
"""

import math

WINDOW_COLUMNS = [
    "hub_commands", "upper_to_hub_commands",  # command
    "hub_storage_level",  # storage
    "floor_storage_used", "floor_storage_total", "floor_storage_util",  # floor_storage
    "hub_free_slots",  # hub
    "hub_queue", "hub_total_time_1min",  # queue
    "hub_jobs_alt",  # target_alt
    "hub_queue_completed", "interfab_jobs", "hub_total_time", "hub_oht_queue", "hub_oht_util",  # hub_queue
    "fab_queue_completed", "fab_queue_created", "fab_oht_queue", "fab_oht_util",  # fab_queue
    "fab_load_time_1min", "fab_over_4min", "fab_queue_delay",
]  # fmt: skip
INFLOW = ["upper_to_hub_jobs", "lower_to_hub_jobs", "neighbor_to_hub_jobs"]
OUTFLOW = ["hub_to_upper_jobs", "hub_to_lower_jobs", "hub_to_neighbor_jobs"]
COMMAND = ["hub_commands", "upper_to_hub_commands"]
CAPACITY = ["upper_lifter_capacity", "lower_lifter_capacity"]


def mean(values):
    return math.fsum(values) / len(values)


def std(values):
    m = mean(values)
    return math.sqrt(math.fsum((v - m) ** 2 for v in values) / len(values))


def slope(values):
    middle, m = (len(values) - 1) / 2, mean(values)
    above = math.fsum((i - middle) * (v - m) for i, v in enumerate(values))
    return above / sum((i - middle) ** 2 for i in range(len(values)))


def reading(value):
    "A sensor's value as it was reported: single precision holds 2.8 as 2.79999995."
    return round(value, 5)


def v8_row(window):
    "{column: its 30 values, newest last} -> {feature: value}, in V8's order."
    w = {name: [float(v) for v in values] for name, values in window.items()}
    assert all(len(values) == 30 for values in w.values())
    now = {name: reading(values[29]) for name, values in w.items()}
    out = {}

    jobs = w["hub_jobs"]
    rise = jobs[29] - jobs[25]
    acceleration = (mean(jobs[25:30]) - mean(jobs[20:25])) / 5
    out["hub_jobs_mean"] = mean(jobs)
    out["hub_jobs_std"] = std(jobs)
    out["hub_jobs_max"] = max(jobs)
    out["hub_jobs_min"] = min(jobs)
    out["hub_jobs_last"] = jobs[29]
    out["hub_jobs_last5_mean"] = mean(jobs[25:])
    out["hub_jobs_last10_mean"] = mean(jobs[20:])
    out["hub_jobs_slope"] = slope(jobs)
    out["hub_jobs_acceleration"] = acceleration
    out["hub_jobs_is_rising"] = rise > 0
    out["hub_jobs_rapid_rise"] = rise > 10

    for name in WINDOW_COLUMNS:
        out[f"{name}_mean"] = mean(w[name])
        out[f"{name}_std"] = std(w[name])
        out[f"{name}_max"] = max(w[name])
        out[f"{name}_min"] = min(w[name])
        out[f"{name}_last"] = w[name][29]
        out[f"{name}_last5_mean"] = mean(w[name][25:])
        out[f"{name}_slope"] = slope(w[name])

    for name in INFLOW + OUTFLOW:
        out[f"{name}_mean"] = mean(w[name])
        out[f"{name}_last"] = w[name][29]
        out[f"{name}_slope"] = slope(w[name])

    for name in CAPACITY:
        out[f"{name}_last"] = w[name][29]

    used, total, util = w["floor_storage_used"], w["floor_storage_total"], now["floor_storage_util"]
    out["floor_use_rate"] = (used[29] - used[0]) / 30
    out["floor_remaining"] = total[29] - used[29]
    out["floor_util_last"] = w["floor_storage_util"][29]
    out["floor_util_high"] = util_high = util >= 7
    out["storage_high"] = util >= 10  # V8's own slip: overwritten below by the flag of the same name

    free = w["hub_free_slots"]
    room_high = now["hub_free_slots"] < 610
    out["room_critical"] = now["hub_free_slots"] < 590
    out["room_high"] = room_high
    out["room_warning"] = now["hub_free_slots"] < 620
    out["room_decrease_rate"] = (free[0] - free[29]) / 30
    out["room_storage_risk"] = room_high and util >= 7

    commands = sum(w[name][29] for name in COMMAND)
    storage_high = now["hub_storage_level"] >= 205
    out["net_flow"] = sum(w[name][29] for name in INFLOW) - sum(w[name][29] for name in OUTFLOW)
    out["total_commands"] = commands
    out["commands_low"] = low = commands < 220
    out["commands_very_low"] = commands < 200
    out["room_and_commands_low"] = room_high and low
    out["storage_high"] = storage_high
    out["storage_critical"] = now["hub_storage_level"] >= 207
    out["surge_risk_score"] = 3 * room_high + 2 * storage_high + 1 * low + 1 * util_high
    out["surge_imminent"] = now["hub_jobs"] > 280 and acceleration > 0.5 and room_high

    out["hub_queue_high"] = now["hub_queue"] >= 1200
    out["hub_queue_critical"] = now["hub_queue"] >= 1400
    out["hub_total_time_1min_high"] = now["hub_total_time_1min"] >= 4.0
    out["hub_total_time_1min_critical"] = now["hub_total_time_1min"] >= 4.5
    out["hub_queue_and_time_high"] = now["hub_queue"] >= 1200 and now["hub_total_time_1min"] >= 4.0

    out["hub_oht_util_high"] = now["hub_oht_util"] >= 85
    out["hub_oht_util_critical"] = now["hub_oht_util"] >= 90
    out["hub_total_time_high"] = now["hub_total_time"] >= 5.0
    out["hub_total_time_critical"] = now["hub_total_time"] >= 6.0
    out["hub_oht_and_time_high"] = now["hub_oht_util"] >= 85 and now["hub_total_time"] >= 5.0

    out["fab_oht_util_high"] = now["fab_oht_util"] >= 85
    out["fab_oht_util_critical"] = now["fab_oht_util"] >= 90
    out["fab_load_time_high"] = now["fab_load_time_1min"] >= 2.5
    out["fab_load_time_critical"] = now["fab_load_time_1min"] >= 2.8
    out["fab_over_4min_high"] = now["fab_over_4min"] >= 40
    out["fab_over_4min_critical"] = now["fab_over_4min"] >= 50
    out["fab_queue_delay_high"] = now["fab_queue_delay"] >= 1
    out["fab_queue_delay_critical"] = now["fab_queue_delay"] >= 3
    out["fab_oht_and_over_4min_high"] = now["fab_oht_util"] >= 85 and now["fab_over_4min"] >= 40

    return {name: float(value) for name, value in out.items()}
