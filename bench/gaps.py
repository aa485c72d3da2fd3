"""`make bench-gaps`: how long others wait while a front-end reads a body, whatever is in it.

A real `paceline serve` of one front-end, with a model's tokenizer and ranks that only take time (`gaps_bodies.py`).
Beside it a process reads a stream and asks `/health` again and again. Then comes one body after another, of every kind
that there is an endpoint or a field for, up to `--max-body-bytes`; for each the longest time is told in which no token
came, and in which `/health` did not answer. A machine with other work has gaps of its own: so between two bodies the
same is measured with none, and each body is sent several times, of which the best counts: what a front-end itself
holds up it holds up each time. What is over the bound is sent some times more.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import re
import selectors
import socket
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

from bench.gaps_bodies import Body, all_bodies
from bench.serve_deployment import ending_on_signals
from msgspec import Struct
from tests.serving import Deployment, deployment

RESULTS = Path(__file__).resolve().parent / "results" / "gaps.md"
BOUND_MS = 100.0
MORE_TRIES = 8
"""Of what is over the bound: whether it is each time."""
PAUSE_S = 0.005
"""Between an answer of `/health` and the next question."""
IDLE_S, LONGEST_IDLE_S = 0.5, 3.0
LONGEST_S = 20.0
"""An answer that takes longer has no end."""


# Who watches --------------------------------------------------------------------------------------


class Watch:
    """One stream and one client of `/health`, as bytes of sockets, in a process of its own."""

    def __init__(self, port: int, streams: str) -> None:
        self._port, self._streams = port, streams
        self._selector = selectors.DefaultSelector()
        self._stream = self._health = socket.socket()
        self._token_at = self._asked_at = 0.0
        self._tokens = 0
        self._said = b""
        self._next_ask = 0.0
        self.gaps = [0.0, 0.0]

    def run(self, control: Connection) -> None:
        """Watch until the other side closes; a message sets the gaps to 0 and is answered with those before it."""
        self._selector.register(control, selectors.EVENT_READ, "control")
        if self._streams:
            self._open_stream()
        self._health = socket.create_connection(("127.0.0.1", self._port))
        self._selector.register(self._health, selectors.EVENT_READ, "health")
        while True:
            wait_s = max(0.0, self._next_ask - time.monotonic()) if not self._asked_at else 1.0
            for key, _ in self._selector.select(wait_s):
                if key.data == "control":
                    try:
                        control.recv()
                    except EOFError:
                        return
                    self._reset(control)
                elif key.data == "stream":
                    self._read_stream()
                else:
                    self._read_health()
            if not self._asked_at and time.monotonic() >= self._next_ask:
                self._asked_at = time.monotonic()
                self._health.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")

    def _reset(self, control: Connection) -> None:
        now = time.monotonic()
        # What has not come yet counts, too.
        self._count(0, now - self._token_at if self._tokens else 0.0)
        self._count(1, now - self._asked_at if self._asked_at else 0.0)
        control.send(self.gaps)
        self.gaps = [0.0, 0.0]

    def _count(self, which: int, gap: float) -> None:
        self.gaps[which] = max(self.gaps[which], gap)

    def _open_stream(self) -> None:
        self._stream = socket.create_connection(("127.0.0.1", self._port))
        body = self._streams.encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
        self._stream.sendall(head % len(body) + body)
        self._selector.register(self._stream, selectors.EVENT_READ, "stream")
        self._tokens = 0

    def _read_stream(self) -> None:
        part, now = self._stream.recv(1 << 16), time.monotonic()
        if self._tokens:
            self._count(0, now - self._token_at)
        self._token_at = now
        self._tokens += 1
        if not part:
            # It has had all its tokens: the next one.
            self._selector.unregister(self._stream)
            self._stream.close()
            self._open_stream()

    def _read_health(self) -> None:
        self._said += self._health.recv(1 << 16)
        head, _, body = self._said.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        if length is None or len(body) < int(length[1]):
            return
        assert head.startswith(b"HTTP/1.1 200 "), self._said
        self._said = b""
        self._count(1, time.monotonic() - self._asked_at)
        self._asked_at, self._next_ask = 0.0, time.monotonic() + PAUSE_S


def watch(port: int, streams: str, control: Connection) -> None:
    Watch(port, streams).run(control)


@contextmanager
def watching(running: Deployment, streams: str) -> Iterator[Callable[[], tuple[float, float]]]:
    """Yields what tells the longest gaps since it was called last: of the stream and of `/health`, in seconds."""
    here, there = multiprocessing.Pipe()
    port = int(running.url.rpartition(":")[2])
    process = multiprocessing.get_context("spawn").Process(target=watch, args=(port, streams, there), daemon=True)
    process.start()
    there.close()

    def gaps() -> tuple[float, float]:
        here.send(None)
        stream, health = here.recv()
        return stream, health

    time.sleep(2 * IDLE_S)
    gaps()
    try:
        yield gaps
    finally:
        here.close()
        process.join(10)


# What is sent -------------------------------------------------------------------------------------


def send(port: int, made: Body) -> tuple[int, int]:
    """Send a body and read what comes; returns the status, 0 where there is none, and the answer's bytes."""
    path, head, body = made
    length = b"" if b"chunked" in head else b"Content-Length: %d\r\n" % len(body)
    begin = b"POST %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n" % path.encode()
    status, size = 0, 0
    with socket.create_connection(("127.0.0.1", port), timeout=LONGEST_S) as client:
        # It may be refused before it is read.
        with contextlib.suppress(OSError):
            client.sendall(begin + head + length + b"\r\n" + body)
        with contextlib.suppress(OSError):
            while part := client.recv(1 << 20):
                if not size and part.startswith(b"HTTP/1.1 "):
                    status = int(part.split()[1])
                size += len(part)
    return status, size


class Row(Struct):
    """What was measured of one kind: seconds. `gaps`: of the stream and of `/health`, each try."""

    name: str
    sent: int
    status: int
    answered_s: float
    gaps: list[tuple[float, float]]
    idle: float

    @property
    def best_ms(self) -> float:
        return min(map(max, self.gaps)) * 1000

    @property
    def worst_ms(self) -> float:
        return max(map(max, self.gaps)) * 1000

    def cells(self) -> str:
        stream, health = (min(one) * 1000 for one in zip(*self.gaps, strict=True))
        about = f"{self.name} | {self.sent / 1e6:.2f} | {self.status} | {self.answered_s * 1000:.0f}"
        gaps = f"{self.idle * 1000:.0f} | {stream:.0f} | {health:.0f} | {self.worst_ms:.0f} | {len(self.gaps)}"
        return f"| {about} | {gaps} |"


HEAD = """| body | MB | status | answered, ms | without it, ms | stream, ms | `/health`, ms | worst try, ms | tries |
|---|---|---|---|---|---|---|---|---|"""


def measure(running: Deployment, gaps: Callable[[], tuple[float, float]], name: str, made: Body, tries: int) -> Row:
    port = int(running.url.rpartition(":")[2])
    row = Row(name, len(made[1]) + len(made[2]), 0, 0.0, [], 0.0)
    while len(row.gaps) < tries or (row.best_ms > BOUND_MS and len(row.gaps) < tries + MORE_TRIES):
        gaps()
        # As long as the body will take: the longer one looks, the longer is the longest.
        time.sleep(max(IDLE_S, min(row.answered_s, LONGEST_IDLE_S)))
        row.idle = max(row.idle, *gaps())
        begin = time.monotonic()
        row.status, _ = send(port, made)
        row.answered_s = max(row.answered_s, time.monotonic() - begin)
        row.gaps.append(gaps())
        if not running.health():
            break
    return row


GENERATES = ("--engine", "bench.gaps_bodies:Engine", "--engine-option", "step_ms=5", "--engine-option", "prefill_ms=0",
             "--max-num-batched-tokens", "1000000", "--kv-cache-tokens", "100000000", "--max-num-seqs", "256",
             "--max-model-len", "32768")  # fmt: skip
STREAM = '{"prompt":"a","max_tokens":30000,"stream":true,"ignore_eos":true}'
EMBEDS = ("--task", "embed", "--max-model-len", "2048")


def run(model: str, tries: int, only: list[str], embed: bool) -> list[Row]:
    flags = EMBEDS if embed else (*GENERATES, "--model", model)
    rows = []
    with deployment("-dp", "1", "-asc", "1", *flags) as running:
        # Nothing streams where all is embedded.
        with watching(running, "" if embed else STREAM) as gaps:
            for name, make in all_bodies(embed).items():
                if only and not any(part in name for part in only):
                    continue
                rows.append(measure(running, gaps, name, make(), tries))
                print(rows[-1].cells(), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("only", nargs="*", help="parts of the names of what to send; all where there is none")
    parser.add_argument("--model", default="gemma-3-270m", help="whose tokenizer and template are asked")
    parser.add_argument("--tries", type=int, default=3)
    asked = parser.parse_args()
    print(HEAD, flush=True)
    with ending_on_signals():
        rows = [row for embed in (False, True) for row in run(asked.model, asked.tries, asked.only, embed)]
    worst = max(rows, key=lambda row: row.best_ms)
    idle = statistics.median(row.idle for row in rows) * 1000
    print(f"\nLongest: {worst.best_ms:.0f} ms, {worst.name}. Without a body {idle:.0f} ms (median of the longest).")
    over = [row for row in rows if row.best_ms > BOUND_MS]
    if not asked.only:
        RESULTS.write_text(report(asked.model, rows, idle), encoding="utf-8")
    sys.exit(f"{len(over)} kinds are over {BOUND_MS:g} ms" if over else 0)


REPORT = """# How long others wait while a body is read

Written by `make bench-gaps` on {cores} cores, with the tokenizer and the template of `{model}`. Beside each body a
stream with a token every 5 ms and a client of `/health`: the longest time in which either got nothing. Each body was
sent several times, and more often where it was over the bound: what a front-end itself holds up shows in the best of
the tries, what else the machine does in the worst, and in the column of what there was without a body.

Longest: {worst:.0f} ms, of {name}; promised are {bound:g} ms. Without a body {idle:.0f} ms (median).

"""


def report(model: str, rows: list[Row], idle_ms: float) -> str:
    worst = max(rows, key=lambda row: row.best_ms)
    said = REPORT.format(
        cores=os.cpu_count(), model=model, worst=worst.best_ms, name=worst.name, bound=BOUND_MS, idle=idle_ms
    )
    return said + "\n".join([HEAD, *[row.cells() for row in rows]]) + "\n"


if __name__ == "__main__":
    main()
