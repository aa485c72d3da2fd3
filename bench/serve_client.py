"""The load of `serve.py`: raw sockets and one epoll, in a process of its own.

Reads a job from stdin and answers with JSON. Every token of every stream is held against the text that the timed engine
makes (" 0 1 2 ..."): the last number in what has come must be the count of what has come, at every read.
"""

from __future__ import annotations

import json
import os
import random
import select
import socket
import sys
import time
from array import array
from itertools import pairwise
from typing import Any

import msgspec

PARTS = 5
SILENCE_S = 30.0
SLACK_S = 0.5
LONGEST_STREAM = 30_000
CONNECT_S = 10.0
TEXT_MARK = b'"text":"'
EVENT_END = b"\n\n"
LAST_CHUNK = b"0\r\n\r\n"
PROMPT = "Say something short about the weather of the week."
# One buffer for all reads: a fresh object a read would cost more than all else the client does.
BUFFER = bytearray(1 << 20)


class Wrong(Exception):
    """The deployment did not do what it must."""


class Connection:
    """One keep-alive connection with at most one request under way."""

    def __init__(self, port: int) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), CONNECT_S)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setblocking(False)
        self.descriptor = self.socket.fileno()
        self.gaps: array[float] | None = None
        self.sent_at = self.first_at = self.last_at = 0.0
        self.ended = True

    def send(self, tokens: int, *, stream: bool, rank: int | None = None) -> None:
        self.tokens, self.expected, self.ended, self._tail = 0, tokens, False, b""
        request = request_bytes(tokens, stream, rank)
        self.first_at = 0.0
        self.sent_at = time.perf_counter()
        if self.socket.send(request) != len(request):
            raise Wrong("a request did not fit into its socket")

    def on_readable(self) -> int:
        """Take in what is there; returns how many tokens came."""
        size = self.socket.recv_into(BUFFER)
        now = time.perf_counter()
        if not size:
            raise Wrong(f"a connection was closed after {self.tokens} of {self.expected} tokens")
        data, end = BUFFER, size
        if self._tail:
            data = bytearray(self._tail) + memoryview(BUFFER)[:size]
            end, self._tail = len(data), b""
        whole = data.rfind(EVENT_END, 0, end) + len(EVENT_END)
        if whole < len(EVENT_END):
            whole = 0
        if end - whole != 2:
            self._tail = bytes(memoryview(data)[whole:end])
            self.ended = self._tail.endswith(LAST_CHUNK)
        came = data.count(TEXT_MARK, 0, whole)
        if came:
            self._count(came, data, whole, now)
        if self.ended and self.tokens != self.expected:
            raise Wrong(f"a stream ended after {self.tokens} of {self.expected} tokens: {bytes(data[:end])[-200:]!r}")
        return came

    def _count(self, came: int, data: bytearray, whole: int, now: float) -> None:
        if not self.tokens:
            self.first_at = now
            if not data.startswith(b"HTTP/1.1 200 "):
                raise Wrong(f"an answer began with {bytes(data[:200])!r}")
        elif self.gaps is not None:
            self.gaps.append(now - self.last_at)
            if came > 1:
                self.gaps.extend([0.0] * (came - 1))
        self.last_at = now
        self.tokens += came
        at = data.rfind(TEXT_MARK, 0, whole) + len(TEXT_MARK)
        shown = data[at : data.index(b'"', at)]
        if shown != b" %d" % (self.tokens - 1):
            raise Wrong(f"token {self.tokens - 1} of a stream read {bytes(shown)!r}")

    def took(self, stream: bool) -> float:
        """Take in what is there: seconds to a stream's first token once it has ended, or to a whole answer; else 0."""
        if stream:
            self.on_readable()
            return self.first_at - self.sent_at if self.ended else 0.0
        data = self._tail + self.socket.recv(65536)
        # The head can come alone: the rest is a read of its own.
        if data and not data.endswith(b"}}"):
            self._tail = data
            return 0.0
        if not data.startswith(b"HTTP/1.1 200 ") or b'"text":" 0"' not in data or b'"completion_tokens":1,' not in data:
            raise Wrong(f"an answer read {data[:300]!r}")
        return time.perf_counter() - self.sent_at


def request_bytes(tokens: int, stream: bool, rank: int | None) -> bytes:
    body = msgspec.json.encode({"model": "timed", "prompt": PROMPT, "max_tokens": tokens, "stream": stream})
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    if rank is not None:
        head += b"x-data-parallel-rank: %d\r\n" % rank
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


class Job(msgspec.Struct):
    """What to do. `processes`: group name to process ids whose CPU is read."""

    kind: str
    port: int
    connections: int
    seconds: float
    probe_seconds: float
    step_ms: float
    ranks: int
    processes: dict[str, list[int]]
    cores: list[int]


def process_cpu_ns(process: int) -> int:
    """User and system CPU of a whole process to the nanosecond (/proc/PID/stat counts in 10 ms)."""
    return time.clock_gettime_ns((~process << 3) | 2)  # The kernel's CPUCLOCK_SCHED clock of another process.


class Clock:
    """Readings of the time, of every group's CPU, and of what has been received."""

    def __init__(self, processes: dict[str, list[int]]) -> None:
        self._processes = {**processes, "client": [os.getpid()]}
        self.read_at: list[tuple[float, int, dict[str, int]]] = []

    def read(self, count: int) -> None:
        cpu = {name: sum(map(process_cpu_ns, ids)) for name, ids in self._processes.items()}
        self.read_at.append((time.perf_counter(), count, cpu))

    def figures(self) -> dict[str, Any]:
        """Rates and costs between the first and the last reading; `part_us`: the cost of each part."""
        (begin, none, spent), (end, all_, cpu) = self.read_at[0], self.read_at[-1]
        seconds, count = end - begin, all_ - none
        if seconds <= 0 or count <= 0:
            raise Wrong("nothing was received while it was measured")
        part_us = [
            (after[2]["front-ends"] - before[2]["front-ends"]) / (after[1] - before[1]) / 1e3
            for before, after in pairwise(self.read_at)
            if after[1] > before[1]
        ]
        cores = {name: (cpu[name] - spent[name]) / 1e9 / seconds for name in cpu}
        us = (cpu["front-ends"] - spent["front-ends"]) / count / 1e3
        return {
            "seconds": seconds,
            "count": count,
            "rate": count / seconds,
            "us": us,
            "part_us": part_us,
            "cores": cores,
        }


class Pool:
    """Connections on one epoll."""

    def __init__(self, port: int, count: int) -> None:
        self.epoll = select.epoll()
        self.received = 0
        self.by_descriptor: dict[int, Connection] = {}
        self.connections = [self.add(port) for _ in range(count)]

    def add(self, port: int) -> Connection:
        connection = Connection(port)
        self.by_descriptor[connection.descriptor] = connection
        self.epoll.register(connection.descriptor, select.EPOLLIN)
        return connection

    def heard(self, timeout_s: float = SILENCE_S) -> list[Connection]:
        found = [self.by_descriptor[descriptor] for descriptor, _ in self.epoll.poll(timeout_s)]
        if not found and timeout_s == SILENCE_S:
            raise Wrong(f"nothing came for {SILENCE_S:g} s")
        return found

    def turn(self, timeout_s: float = SILENCE_S) -> list[Connection]:
        """Wait and take in; returns the connections that had something."""
        heard = self.heard(timeout_s)
        self.received += sum([connection.on_readable() for connection in heard])
        return heard

    def start(self, tokens: int, rank: int | None) -> None:
        for connection in self.connections:
            connection.send(tokens, stream=True, rank=rank)

    def finish(self) -> None:
        while not all(connection.ended for connection in self.connections):
            self.turn()

    def keep_gaps(self, gaps: array[float] | None) -> None:
        for connection in self.connections:
            connection.gaps = gaps

    def close(self) -> None:
        for connection in self.by_descriptor.values():
            connection.socket.close()
        self.epoll.close()


def run_streams(job: Job) -> dict[str, Any]:
    pool, clock, gaps = Pool(job.port, job.connections), Clock(job.processes), array("d")
    # A lone stream and the probes must meet at one rank.
    rank = 0 if job.connections == 1 else None
    # Short streams warm everything up.
    short = 30 if job.step_ms else max(100, 4000 // job.connections)
    begin = time.perf_counter()
    pool.start(short, rank)
    pool.finish()
    tokens = min(LONGEST_STREAM, int(short / (time.perf_counter() - begin) * job.seconds / PARTS) + 10)
    first_ms = {}
    if job.step_ms:
        # At the set pace; a deployment that cannot hold it takes longer.
        pool.start(int((job.seconds + job.probe_seconds + SLACK_S) * 1e3 / job.step_ms) + 10, rank)
        while not all(connection.tokens for connection in pool.connections):
            pool.turn()
        watch(pool, clock, job.seconds, gaps)
        first_ms = {"first_ms": probe(pool, job)}
        pool.finish()
    else:
        run_whole(pool, clock, tokens, rank, gaps)
    pool.close()
    return clock.figures() | {"gap_ms": quantiles(gaps or [0.0])} | first_ms


def run_whole(pool: Pool, clock: Clock, tokens: int, rank: int | None, gaps: array[float]) -> None:
    """Streams from their beginning to their end, several times: for steps of zero cost, where early streams can
    end before late ones begin."""
    pool.keep_gaps(gaps)
    clock.read(pool.received)
    for _ in range(PARTS):
        pool.start(tokens, rank)
        pool.finish()
        clock.read(pool.received)


def watch(pool: Pool, clock: Clock, seconds: float, gaps: array[float]) -> None:
    """Receive for `seconds`, or until a stream ends: costs while all run and none begins or ends."""
    pool.keep_gaps(gaps)
    begin, over = time.perf_counter(), False
    clock.read(pool.received)
    for part in range(1, PARTS + 1):
        while time.perf_counter() < begin + seconds * part / PARTS and not over:
            over = any(connection.ended for connection in pool.turn())
        clock.read(pool.received)
    pool.keep_gaps(None)


def probe(pool: Pool, job: Job) -> dict[str, float]:
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
    return quantiles(waits)


def run_requests(job: Job) -> dict[str, Any]:
    """Closed loop: each connection asks for one token, again and again."""
    pool, clock = Pool(job.port, job.connections), Clock(job.processes)
    stream = job.kind == "streamed requests"
    waits: list[float] = []
    for connection in pool.connections:
        connection.send(1, stream=stream)
    begin = time.perf_counter() + max(0.3, job.seconds / 6)
    warm = 0
    for part in range(PARTS + 1):
        while time.perf_counter() < begin + job.seconds * part / PARTS:
            for connection in pool.heard():
                if took := connection.took(stream):
                    waits.append(took)
                    connection.send(1, stream=stream)
        warm = warm or len(waits)
        clock.read(len(waits))
    pool.close()
    return clock.figures() | {"first_ms": quantiles(waits[warm:])}


def quantiles(values: list[float] | array[float]) -> dict[str, float]:
    if not values:
        raise Wrong("nothing was measured: too few seconds for this load")
    ordered = sorted(values)
    return {name: ordered[int(share * len(ordered))] * 1e3 for name, share in (("p50", 0.5), ("p99", 0.99))}


def main() -> None:
    job = msgspec.json.decode(sys.stdin.read(), type=Job)
    os.sched_setaffinity(0, job.cores)
    try:
        answer = run_streams(job) if job.kind == "streams" else run_requests(job)
    except (Wrong, OSError) as error:
        answer = {"error": f"{job.kind}, {job.connections} connections: {error}"}
    print(json.dumps(answer))


if __name__ == "__main__":
    main()
