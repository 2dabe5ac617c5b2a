"""An open-loop load generator: requests leave at fixed random times, and a latency counts from the moment its request should have left.

`python bench/load.py URL --body FILE --key KEY --rate 1000 --seconds 10` prints one JSON line. Run it in a process of its own.
"""

import argparse
import asyncio
import json
from collections import Counter, deque
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import uvloop


class Connection(asyncio.Protocol):
    "One keep-alive connection, one request at a time."

    def __init__(self, load):
        self.load, self.buffer, self.due = load, b"", None

    def connection_made(self, transport):
        self.transport = transport
        self.load.idle.append(self)

    def send(self, due):
        self.due = due
        self.transport.write(self.load.request)

    def data_received(self, data):
        self.buffer += data
        head = self.buffer.find(b"\r\n\r\n")
        if head < 0:
            return
        at = self.buffer.lower().find(b"content-length:", 0, head)
        length = int(self.buffer[at + 15 : self.buffer.index(b"\r", at)]) if at >= 0 else 0
        if len(self.buffer) >= head + 4 + length:
            status, self.buffer = self.buffer[9:12].decode(), b""
            self.load.done(self, status)

    def connection_lost(self, error):
        self.load.lost(self)


class Load:
    "Requests at their times, over as many connections as are free."

    def __init__(self, request: bytes, times: np.ndarray, host: str, port: int):
        self.request, self.times, self.host, self.port = request, times, host, port
        self.idle, self.waiting, self.finished = deque(), deque(), asyncio.Event()
        self.latency, self.statuses, self.sent, self.open = {}, Counter(), 0, 0

    def done(self, connection, status):
        self.statuses[status] += 1
        self.latency.setdefault(status, []).append(self.loop.time() - connection.due)
        connection.due = None
        if self.waiting:
            connection.send(self.waiting.popleft())
        else:
            self.idle.append(connection)
        self.check()

    def lost(self, connection):
        if connection in self.idle:
            self.idle.remove(connection)
        if connection.due is not None:
            self.statuses["lost"] += 1
            connection.due = None
        if not self.ending:
            self.loop.create_task(self.connect())
        self.check()

    def check(self):
        if self.sent == len(self.times) and sum(self.statuses.values()) == self.sent:
            self.finished.set()

    async def connect(self):
        try:
            await self.loop.create_connection(lambda: Connection(self), self.host, self.port)
        except OSError:
            self.statuses["refused"] += 0

    async def run(self, connections: int, patience_s: float) -> dict:
        self.loop, self.ending = asyncio.get_running_loop(), False
        await asyncio.gather(*(self.connect() for _ in range(connections)))
        began = self.loop.time() + 0.05
        while self.sent < len(self.times):
            now = self.loop.time() - began
            while self.sent < len(self.times) and self.times[self.sent] <= now:
                due = began + self.times[self.sent]
                self.sent += 1
                if self.idle:
                    self.idle.popleft().send(due)
                else:
                    self.waiting.append(due)
            await asyncio.sleep(0.0005)
        try:
            await asyncio.wait_for(self.finished.wait(), patience_s)
        except TimeoutError:
            self.statuses["unanswered"] += self.sent - sum(self.statuses.values())
        took = self.loop.time() - began
        self.ending = True
        return self.report(took)

    def report(self, took_s: float) -> dict:
        good = 1000 * np.array(self.latency.get("200", [np.nan]))
        p50, p95, p99 = np.percentile(good, [50, 95, 99])
        return {"offered_per_s": len(self.times) / self.times[-1], "answered_per_s": self.statuses["200"] / took_s, "statuses": dict(self.statuses),
                "p50_ms": p50, "p95_ms": p95, "p99_ms": p99, "max_ms": good.max(), "seconds": took_s}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("url")
    parser.add_argument("--body", type=Path, required=True)
    parser.add_argument("--key", default="")
    parser.add_argument("--rate", type=float, default=100)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--patience", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--content-type", default="application/json")
    args = parser.parse_args()
    url, body = urlsplit(args.url), args.body.read_bytes()
    key = f"Authorization: Bearer {args.key}\r\n" if args.key else ""
    head = f"POST {url.path} HTTP/1.1\r\nHost: {url.netloc}\r\n{key}Content-Type: {args.content_type}\r\nContent-Length: {len(body)}\r\n\r\n"
    times = np.cumsum(np.random.default_rng(args.seed).exponential(1 / args.rate, int(args.rate * args.seconds)))
    load = Load(head.encode() + body, times, url.hostname, url.port)
    print(json.dumps(uvloop.run(load.run(args.connections, args.patience))))


if __name__ == "__main__":
    main()
