"""`make bench-freshness`: how fresh the coordinator's view of the loads is, on real sockets and real processes.

A coordinator process runs as in a deployment. Processes that stand in for the ranks (`freshness_feed.py`) feed it, and
this process is its front-ends. `freshness_report.py` says what the figures mean.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import zmq
from bench.freshness_feed import FRONTENDS, Feed, Floor, Ranks, Relay, feed, now_us, tick
from bench.freshness_report import Cell, Quiet, to_markdown
from tests.serving import cpu_s, memory_mb

from paceline.core import codec
from paceline.core.messages import LoadView, Members
from paceline.net.coordinator import DPCoordinator
from paceline.net.sockets import open_socket
from paceline.settings import ParallelConfig

RESULTS = Path(__file__).resolve().parent / "results" / "freshness.md"
FEEDERS = 2
WARM_UP_S = 0.5
WARM_UP_ROUNDS = 5
GAPS = 300
"""A measurement lasts until so many are due: the p99 of 40 gaps would be the longest of them."""


class Subscribers:
    """The front-ends: they subscribe, and read what comes."""

    def __init__(self, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        limit = codec.MAX_CONTROL_BYTES
        self._sockets = [open_socket(self._context, zmq.XSUB, connect=address, max_bytes=limit) for _ in FRONTENDS]
        for socket in self._sockets:
            socket.send(b"\x01")
        self.also_came: list[int] = []
        self.decode = codec.to_frontend().decode
        self._poller = zmq.Poller()
        for socket in self._sockets:
            self._poller.register(socket, zmq.POLLIN)

    def also(self, socket: zmq.Socket[bytes]) -> None:
        self._poller.register(socket, zmq.POLLIN)

    def read(self, until: float) -> list[tuple[int, bytes]]:
        """What comes to the first of them up to this moment: (when, in microseconds, the frame).

        Of what comes to sockets that are no front-end's, the moments are added to `also_came`.
        """
        found: list[tuple[int, bytes]] = []
        while (left_s := until - time.monotonic()) > 0:
            for socket, _ in self._poller.poll(left_s * 1000):
                frame = socket.recv()
                if socket is self._sockets[0]:
                    found.append((now_us(), frame))
                elif socket not in self._sockets:
                    self.also_came.append(now_us())
        return found

    def wait_members(self, count: int) -> None:
        while True:
            message = self.decode(self._sockets[0].recv())
            if isinstance(message, Members) and len(message.members) == count:
                return

    def wait_step(self, step: int) -> tuple[int, bool]:
        """Read until a view shows a rank at this step; returns when it came, and whether all are at one step."""
        while True:
            frame = self._sockets[0].recv()
            came = now_us()
            message = self.decode(frame)
            steps = {entry.step for entry in message.ranks or ()} if isinstance(message, LoadView) else set()
            if step in steps:
                return came, len(steps) == 1

    def close(self) -> None:
        self._context.destroy(linger=0)


@contextmanager
def running(ranks: int, interval_ms: int, lockstep: bool) -> Iterator[tuple[DPCoordinator, Subscribers]]:
    config = ParallelConfig(
        data_parallel_size=ranks, data_parallel_size_local=ranks, min_stats_update_interval_ms=interval_ms
    )
    coordinator = DPCoordinator(config, lockstep, {"level": "warning"})
    subscribers = Subscribers(coordinator.get_stats_publish_address())
    try:
        yield coordinator, subscribers
    finally:
        subscribers.close()
        coordinator.shutdown()


def quiet(ranks: int, interval_ms: int, rounds: int, lockstep: bool) -> Quiet:
    """How long the first change after quiet takes to a front-end: one round of all ranks' reports at a time."""
    with running(ranks, interval_ms, lockstep) as (coordinator, subscribers):
        fed = Ranks(range(ranks), coordinator.get_engine_socket_addresses()[1])
        bare = Relay()
        try:
            subscribers.wait_members(ranks)
            took_us: list[int] = []
            bare_us: list[int] = []
            whole = 0
            for index in range(rounds + WARM_UP_ROUNDS):
                subscribers.read(time.monotonic() + interval_ms / 1000 + 0.015)
                begin = now_us()
                if lockstep:
                    fed.report()
                    begin = now_us()
                else:
                    fed.report_one()
                came, one_step = subscribers.wait_step(fed.step)
                # The same machine, a moment later.
                subscribers.read(time.monotonic() + 0.015)
                trip_us = bare.trip_us()
                if index >= WARM_UP_ROUNDS:
                    took_us.append(came - begin)
                    bare_us.append(trip_us)
                    whole += one_step
        finally:
            fed.close()
            bare.close()
    return Quiet(ranks, interval_ms, lockstep, took_us, bare_us, whole / rounds)


def saturated(ranks: int, interval_ms: int, seconds: float, lockstep: bool, per_second: float) -> Cell:
    """Views and cost while all ranks feed; `per_second`: rounds a second, 0 for as fast as they can."""
    spawning = get_context("spawn")
    orders: list[Connection] = []
    processes: list[Any] = []
    with running(ranks, interval_ms, lockstep) as (coordinator, subscribers):
        address = coordinator.get_engine_socket_addresses()[1]
        # Lockstep ranks are in one step, and so in one process.
        share = ranks if lockstep else -(-ranks // FEEDERS)
        for first in range(0, ranks, share):
            ours, theirs = spawning.Pipe()
            job = Feed(range(first, min(first + share, ranks)), address, per_second)
            processes.append(spawning.Process(target=feed, args=(job, theirs), daemon=True))
            processes[-1].start()
            theirs.close()
            orders.append(ours)
        for order in orders:
            order.recv()
        subscribers.wait_members(ranks)
        pid = coordinator.proc.pid or 0
        timer = Floor(tick, interval_ms / 1000)
        subscribers.also(timer.socket)
        for order in orders:
            order.send("go")
        subscribers.read(time.monotonic() + WARM_UP_S)
        subscribers.also_came.clear()
        cpu, begin = cpu_s(pid), time.monotonic()
        frames = subscribers.read(begin + seconds)
        cpu, took_s = cpu_s(pid) - cpu, time.monotonic() - begin
        for order in orders:
            order.send("stop")
        refused = sum(order.recv()[1] for order in orders)
        most_mb = memory_mb(pid, "VmHWM")
        timer.close()
        views = [(came, view) for came, frame in frames if isinstance(view := subscribers.decode(frame), LoadView)]
        for process in processes:
            process.join(10)
    return Cell.of(
        ranks, interval_ms, lockstep, per_second, views, took_s, cpu, most_mb, refused, subscribers.also_came
    )


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=numbers, default=[2, 64, 384])
    parser.add_argument("--intervals", type=numbers, default=[100, 20, 5], help="milliseconds")
    parser.add_argument("--seconds", type=float, default=4.0, help=f"of each flood, or until {GAPS} views")
    parser.add_argument("--rounds", type=int, default=200, help="first changes after quiet")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args()
    begin = time.monotonic()
    firsts = []
    for lockstep in (False, True):
        for ranks in options.ranks:
            firsts.append(quiet(ranks, 20, options.rounds, lockstep))
            print(firsts[-1], flush=True)
    cells = []
    for lockstep in (False, True):
        for ranks in options.ranks:
            for interval_ms in options.intervals:
                seconds = max(options.seconds, GAPS * interval_ms / 1000)
                cells.append(saturated(ranks, interval_ms, seconds, lockstep, 0.0))
                print(cells[-1], flush=True)
    for ranks in options.ranks:
        # Nearer to what ranks send than a flood: a report every 10 ms.
        cells.append(saturated(ranks, options.intervals[-1], options.seconds, True, 100.0))
        print(cells[-1], flush=True)
    text = to_markdown(" ".join(sys.argv[1:]), len(os.sched_getaffinity(0)), time.monotonic() - begin, firsts, cells)
    if options.write:
        RESULTS.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
