"""The simulated hub once more, as SimPy processes: the slow and independent oracle of the compiled one.

The same network: lots, pooled vehicles in two areas, lifters with a lane for each direction, ports, finite slots, and above
all the vehicle that is held while its lifter's buffer is full or its destination has no free slot. Left out, and switched
off on the other side: faults, bursts, drift, side track and stocker.
"""

import math
import random
from collections import deque
from dataclasses import replace

import simpy

from amhs.simulate import Hub

UPPER, LOWER, NEIGHBOR = range(3)
QUIET = {
    "burst_step": 0.0, "drift_step": 0.0, "fault_per_day": (0.0,) * 11, "fault_low": (0.0,) * 11, "queue_limit": 10**6, "floor_carriers": 10**6,
    "side_share": 0.0, "side_overflow": 0, "stocker_share": 0.0, "crane_queue": 0,
}


def plain(**numbers) -> Hub:
    "A hub without what this model leaves out."
    return replace(Hub(), **QUIET, **numbers)


def rhythm(minute_of_week: float) -> float:
    "Demand factor: shifts from 06:00 of 8 hours, the day, the week."
    since = (minute_of_week - 360) % 480
    shift = 0.80 if since < 20 else 1.16 if since < 60 else 1.0
    return shift * (1 + 0.06 * math.sin(2 * math.pi * (minute_of_week / 1440 - 0.35))) * (1.012 if minute_of_week < 7200 else 0.97)


class Vehicles:
    "A pool: the job that has waited longest among those that may go."

    def __init__(self, env, number, may_go):
        self.env, self.number, self.may_go = env, number, may_go
        self.waiting, self.busy, self.area, self.last = {}, 0, 0.0, 0.0

    def count(self, change):
        self.area += self.busy * (self.env.now - self.last)
        self.last = self.env.now
        self.busy += change

    def ask(self, kind):
        granted = self.env.event()
        self.waiting.setdefault(kind, deque()).append((self.env.now, granted))
        self.look()
        return granted

    def release(self):
        self.count(-1)
        self.look()

    def look(self):
        "Send vehicles out as long as there are some and somebody may go."
        while self.busy < self.number:
            able = [(queue[0][0], kind) for kind, queue in self.waiting.items() if queue and self.may_go(kind)]
            if not able:
                return
            kind = min(able)[1]
            self.count(1)
            self.waiting[kind].popleft()[1].succeed()
            self.granted(kind)

    def queue(self):
        return sum(map(len, self.waiting.values()))


class SimpyHub:
    def __init__(self, hub: Hub, seed: int, week_minute: int):
        self.p, self.rng, self.env, self.week_minute = hub, random.Random(seed), simpy.Environment(), week_minute
        self.bound, self.inbound, self.exiting = [0, 0], 0, [0, 0, 0]
        self.jobs, self.transports = 0, []
        self.fab = Vehicles(self.env, hub.fab_vehicles, lambda kind: kind[0] != "bound" or self.bound[kind[1]] < hub.fab_bound)
        self.hub = Vehicles(self.env, hub.hub_vehicles, self.hub_may_go)
        self.fab.granted, self.hub.granted = self.fab_granted, self.hub_granted
        self.buffer = [simpy.Resource(self.env, hub.lifter_buffer if k < NEIGHBOR else 10**6) for k in range(3)]
        self.port = [simpy.Resource(self.env, hub.port_carriers) for _ in range(3)]
        self.zone = [simpy.Resource(self.env, hub.zone_slots[k]) for k in range(3)]
        self.lanes = [[simpy.Resource(self.env, 1) for _ in range(3)] for _ in range(2)]
        for origin in range(4):
            self.env.process(self.source(origin))

    def hub_may_go(self, kind):
        return self.inbound < self.p.hub_inbound if kind[0] == "in" else self.exiting[kind[1]] < self.p.exit_carriers

    def fab_granted(self, kind):
        if kind[0] == "bound":
            self.bound[kind[1]] += 1

    def hub_granted(self, kind):
        if kind[0] == "in":
            self.inbound += 1
        else:
            self.exiting[kind[1]] += 1

    def lasts(self, mean):
        return mean * (0.4 + 0.3 * self.rng.gammavariate(2, 1))

    def slower(self, pool):
        return 1 + self.p.crowding * ((pool.busy - 1) / pool.number) ** 4

    def source(self, origin):
        p, size = self.p, sum(self.p.lot_carriers) / len(self.p.lot_carriers)
        while True:
            dest = self.rng.choices(range(3), p.route[3 * origin:3 * origin + 3])[0] if origin < 3 else None
            release = self.lasts(p.release_s[origin])
            for i in range(self.rng.choice(p.lot_carriers)):
                self.env.process(self.carrier(origin, dest, release + i * p.carrier_gap_s))
            rate = p.jobs_per_min[origin] * p.demand_factor * rhythm((self.week_minute + self.env.now // 60) % 10_080) / 60
            yield self.env.timeout(size / rate * self.rng.gammavariate(4, 0.25))

    def fab_trip(self, kind):
        asked = self.env.now
        yield self.fab.ask(kind)
        slower = self.slower(self.fab)
        yield self.env.timeout(self.lasts(self.p.fab_empty_s * slower) + self.lasts(self.p.fab_loaded_s * slower))
        return asked

    def fab_done(self, asked, counts=True):
        if counts:
            self.transports.append(self.env.now - asked)
        self.fab.release()

    def lane_time(self, k):
        return 60 / self.p.lifter_per_min[k] * (0.8 + 0.2 * self.rng.expovariate(1))

    def carrier(self, origin, dest, release):
        yield self.env.timeout(release)
        if origin == 3:
            self.fab_done((yield from self.fab_trip(("local", 0))), counts=False)
            return
        yield from self.to_hub(origin)
        yield from self.through_hub(origin, dest)
        if dest != NEIGHBOR:
            self.fab_done((yield from self.fab_trip(("deliver", dest))))

    def to_hub(self, k):
        "Up to the port; the vehicle is held while the lifter's buffer is full, the lifter while the port is full."
        if k == NEIGHBOR:
            yield self.env.timeout(self.lasts(self.p.neighbor_s))
        else:
            asked = yield from self.fab_trip(("bound", k))
        place = self.buffer[k].request()
        yield place
        if k != NEIGHBOR:
            self.bound[k] -= 1
            self.fab_done(asked)
        with self.lanes[0][k].request() as lane:
            yield lane
            self.buffer[k].release(place)
            yield self.env.timeout(self.lane_time(k))
            place = self.port[k].request()
            yield place
        self.jobs += 1
        asked = self.hub.ask(("in", k))
        asked.callbacks.append(lambda _: self.port[k].release(place))
        yield asked

    def through_hub(self, origin, dest):
        "From the port to the slot, the vehicle held while there is none; later to the exit and out."
        yield self.env.timeout(self.lasts(self.p.hub_store_s * self.slower(self.hub)))
        slot = self.zone[dest].request()
        yield slot
        self.inbound -= 1
        self.hub.release()
        yield self.env.timeout(self.lasts(self.p.dwell_s))
        yield self.hub.ask(("out", dest))
        yield self.env.timeout(self.lasts(self.p.hub_leave_s * self.slower(self.hub)))
        self.zone[dest].release(slot)
        self.hub.release()
        with self.lanes[1][dest].request() as lane:
            yield lane
            self.exiting[dest] -= 1
            self.hub.look()
            yield self.env.timeout(self.lane_time(dest))
        self.jobs -= 1

    def run(self, warm_up_min: int, minutes: int) -> dict[str, float]:
        "Means over the minutes after the warm-up, by the names of the telemetry."
        self.env.run(60 * warm_up_min)
        sums = {"hub_jobs": 0.0, "hub_oht_queue": 0.0, "fab_oht_queue": 0.0}
        for pool in (self.fab, self.hub):
            pool.count(0)
            pool.area = 0.0
        self.transports.clear()
        for minute in range(minutes):
            self.env.run(60 * (warm_up_min + minute + 1))
            sums["hub_jobs"] += self.jobs
            sums["hub_oht_queue"] += self.hub.queue()
            sums["fab_oht_queue"] += self.fab.queue()
        for pool in (self.fab, self.hub):
            pool.count(0)
        return {name: total / minutes for name, total in sums.items()} | {
            "fab_oht_util": self.fab.area / (60 * minutes * self.fab.number) * 100,
            "hub_oht_util": self.hub.area / (60 * minutes * self.hub.number) * 100,
            "hub_total_time_1min": sum(self.transports) / len(self.transports) / 60,
        }
