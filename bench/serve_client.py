"""The load of `serve.py`: raw sockets and one epoll, in a process of its own.

Reads one job a line from stdin and answers each with one line of JSON. Every token of every stream is held
against the text that the timed engine makes (" 0 1 2 ..."): the last number in what has come must be the
count of what has come, at every read, and one stream in sixteen is decoded in full at its end.
"""

from __future__ import annotations

import json
import os
import random
import select
import sys
import time
from array import array
from collections.abc import Callable
from typing import Any

import msgspec
from serve_connection import Connection, Wrong

DECODED_EVERY = 16
PARTS = 5
SILENCE_S = 30.0
SLACK_S = 0.5
LONGEST_STREAM = 30_000


class Job(msgspec.Struct):
    """What to do. `processes`: group name to process ids whose CPU is read."""

    kind: str
    port: int
    connections: int
    seconds: float
    probe_seconds: float = 0.0
    step_ms: float = 0.0
    ranks: int = 2
    processes: dict[str, list[int]] = {}


def process_cpu_ns(process: int) -> int:
    """User and system CPU of a whole process to the nanosecond (/proc/PID/stat counts in 10 ms)."""
    return time.clock_gettime_ns((~process << 3) | 2)  # The kernel's CPUCLOCK_SCHED clock of another process.


class Clock:
    """Readings of the time and of every group's CPU."""

    def __init__(self, processes: dict[str, list[int]]) -> None:
        self._processes = {**processes, "client": [os.getpid()]}
        self.times: list[float] = []
        self.counts: list[int] = []
        self._cpu: list[dict[str, int]] = []

    def read(self, count: int) -> None:
        """`count`: what has been received so far."""
        self.times.append(time.perf_counter())
        self.counts.append(count)
        self._cpu.append({name: sum(map(process_cpu_ns, ids)) for name, ids in self._processes.items()})

    @property
    def seconds(self) -> float:
        """Between the first and the last reading."""
        return self.times[-1] - self.times[0]

    @property
    def count(self) -> int:
        """What was received between them."""
        return self.counts[-1] - self.counts[0]

    def figures(self) -> dict[str, Any]:
        """Rates and costs between the first and the last reading; `part_us`: the cost of each part."""
        seconds, count = self.seconds, self.count
        if seconds <= 0 or count <= 0:
            raise Wrong("nothing was received while it was measured")
        spent = [reading["front-ends"] for reading in self._cpu]
        return {
            "seconds": seconds,
            "count": count,
            "rate": count / seconds,
            "us": (spent[-1] - spent[0]) / count / 1e3,
            "part_us": [
                (spent[i + 1] - spent[i]) / (self.counts[i + 1] - self.counts[i]) / 1e3
                for i in range(len(spent) - 1)
                if self.counts[i + 1] > self.counts[i]
            ],
            "cores": {name: (self._cpu[-1][name] - self._cpu[0][name]) / 1e9 / seconds for name in self._processes},
        }


class QueueGroup:
    """Connections on one epoll."""

    def __init__(self, port: int, count: int) -> None:
        self.epoll = select.epoll()
        self.received = 0
        self.by_descriptor: dict[int, Connection] = {}
        self.connections = [self.add(port) for _ in range(count)]

    def add(self, port: int) -> Connection:
        """One more connection."""
        connection = Connection(port)
        self.by_descriptor[connection.descriptor] = connection
        self.epoll.register(connection.descriptor, select.EPOLLIN)
        return connection

    def turn(self, timeout_s: float = SILENCE_S) -> list[Connection]:
        """Wait and take in; returns the connections that had something."""
        heard = [self.by_descriptor[descriptor] for descriptor, _ in self.epoll.poll(timeout_s)]
        if not heard and timeout_s == SILENCE_S:
            raise Wrong(f"nothing came for {SILENCE_S:g} s")
        for connection in heard:
            self.received += connection.on_readable()
        return heard

    def start(self, tokens: int, rank: int | None) -> None:
        """A stream of `tokens` on every connection."""
        for number, connection in enumerate(self.connections):
            connection.send(tokens, stream=True, decoded=number % DECODED_EVERY == 0, rank=rank)

    def finish(self) -> None:
        """Until all streams have ended, and right."""
        while not all(connection.ended for connection in self.connections):
            self.turn()
        for connection in self.connections:
            connection.check()

    def close(self) -> None:
        """Close all."""
        for connection in self.by_descriptor.values():
            connection.socket.close()
        self.epoll.close()


def run_streams(job: Job) -> dict[str, Any]:
    """`connections` streams at once."""
    pool = QueueGroup(job.port, job.connections)
    # A lone stream and the probes must meet at one rank.
    rank = 0 if job.connections == 1 else None
    clock = Clock(job.processes)
    per_second = calibrate(pool, job, rank)
    if job.step_ms:
        # At the set pace; a deployment that cannot hold it takes longer.
        pool.start(int((job.seconds + job.probe_seconds + SLACK_S) * 1e3 / job.step_ms) + 10, rank)
        while not all(connection.tokens for connection in pool.connections):
            pool.turn()
        figures = watch(pool, clock, job.seconds)
        figures["first_ms"] = probe(pool, job)
        pool.finish()
    else:
        figures = run_whole(pool, clock, min(LONGEST_STREAM, int(per_second * job.seconds / PARTS) + 10), rank)
    pool.close()
    return clock.figures() | figures


def run_whole(pool: QueueGroup, clock: Clock, tokens: int, rank: int | None) -> dict[str, Any]:
    """Streams from their beginning to their end, several times: for steps of zero cost, where early streams can
    end before late ones begin."""
    gaps, reads = array("d"), 0
    for connection in pool.connections:
        connection.gaps = gaps
    clock.read(pool.received)
    for _ in range(PARTS):
        pool.start(tokens, rank)
        pool.finish()
        clock.read(pool.received)
        reads += sum(connection.reads for connection in pool.connections)
    return {"merged": clock.count / reads, "gap_ms": quantiles(gaps or [0.0], 1e3)}


def watch(pool: QueueGroup, clock: Clock, seconds: float) -> dict[str, Any]:
    """Receive for `seconds`, or until a stream ends: costs while all run and none begins or ends."""
    gaps = array("d")
    for connection in pool.connections:
        connection.gaps = gaps
    reads = -sum(connection.reads for connection in pool.connections)
    over = False
    clock.read(pool.received)
    while len(clock.times) <= PARTS and not over:
        part_ends = clock.times[0] + seconds * len(clock.times) / PARTS
        while time.perf_counter() < part_ends and not over:
            over = any(connection.ended for connection in pool.turn())
        clock.read(pool.received)
    reads += sum(connection.reads for connection in pool.connections)
    for connection in pool.connections:
        connection.gaps = None
    return {"merged": clock.count / max(1, reads), "gap_ms": quantiles(gaps, 1e3)}


def calibrate(pool: QueueGroup, job: Job, rank: int | None) -> float:
    """Short streams, which warm everything up; returns a stream's tokens a second."""
    tokens = 30 if job.step_ms else max(100, 4000 // job.connections)
    pool.start(tokens, rank)
    pool.finish()
    begin = min(connection.first_at if job.step_ms else connection.sent_at for connection in pool.connections)
    return (tokens - 1) / (max(connection.last_at for connection in pool.connections) - begin)


def probe(pool: QueueGroup, job: Job) -> dict[str, float]:
    """Lone requests at moments that have nothing to do with the steps: the time to the first token."""
    rng = random.Random(0)
    step_s = job.step_ms / 1e3
    count = 2 if job.step_ms < 20 else 6
    probes = [pool.add(job.port) for _ in range(count)]
    due = {connection: time.perf_counter() + rng.uniform(0, step_s) for connection in probes}
    ends = time.perf_counter() + job.probe_seconds
    waits: list[float] = []
    while time.perf_counter() < ends or len(due) < count:
        now = time.perf_counter()
        for number, connection in enumerate(probes):
            if connection.ended and due.get(connection, now + 1) <= now < ends:
                del due[connection]
                connection.send(1, stream=True, rank=0 if job.connections == 1 else number % job.ranks)
        for connection in pool.turn(0.0005):
            if connection in probes and connection.ended:
                waits.append(connection.first_at - connection.sent_at)
                due[connection] = time.perf_counter() + rng.uniform(0, step_s)
            elif connection.ended:
                ends = 0.0
    return quantiles(waits, 1e3)


def run_requests(job: Job) -> dict[str, Any]:
    """Closed loop: each connection asks for one token, again and again."""
    pool = QueueGroup(job.port, job.connections)
    stream = job.kind == "streamed requests"
    answered = 0
    waits: list[float] = []
    clock = Clock(job.processes)

    def turn(until: float) -> None:
        nonlocal answered
        while time.perf_counter() < until:
            for descriptor, _ in pool.epoll.poll(SILENCE_S) or no_answer():
                connection = pool.by_descriptor[descriptor]
                took = read_stream(connection) if stream else connection.answer_took()
                if took:
                    waits.append(took)
                    answered += 1
                    connection.send(1, stream=stream)

    for connection in pool.connections:
        connection.send(1, stream=stream)
    turn(time.perf_counter() + max(0.3, job.seconds / 6))
    waits.clear()
    begin = time.perf_counter()
    clock.read(answered)
    for part in range(PARTS):
        turn(begin + job.seconds * (part + 1) / PARTS)
        clock.read(answered)
    pool.close()
    return clock.figures() | {"first_ms": quantiles(waits, 1e3)}


def no_answer() -> list[tuple[int, int]]:
    raise Wrong(f"no request was answered for {SILENCE_S:g} s")


def read_stream(connection: Connection) -> float:
    """Seconds to the first token once the stream has ended, 0 before."""
    connection.on_readable()
    return connection.first_at - connection.sent_at if connection.ended else 0.0


def quantiles(values: list[float] | array[float], scale: float) -> dict[str, float]:
    """Count, p50 and p99, times `scale`."""
    if not values:
        raise Wrong("nothing was measured: too few seconds for this load")
    ordered = sorted(values)
    at = {name: ordered[min(len(ordered) - 1, int(share * len(ordered)))] for name, share in QUANTILES.items()}
    return {"count": len(ordered)} | {name: value * scale for name, value in at.items()}


QUANTILES = {"p50": 0.5, "p99": 0.99}
KINDS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "streams": run_streams,
    "requests": run_requests,
    "streamed requests": run_requests,
}


def main() -> None:
    for line in sys.stdin:
        job = msgspec.json.decode(line, type=Job)
        try:
            answer = KINDS[job.kind](job)
        except (Wrong, OSError) as error:
            answer = {"error": f"{job.kind}, {job.connections} connections: {error}"}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
