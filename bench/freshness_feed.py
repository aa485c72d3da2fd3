"""Processes that stand in for many ranks (one PUSH socket a rank, and reports as fast as they go, or none), and the
floor: a process that passes a frame from one socket on to another and does nothing else.

Each report's `prefill_tokens` is the time at which it was made, in microseconds of the monotonic clock, so that whoever
sees it in a view knows its age, and its `step` counts the reports of its rank.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection

import zmq

from paceline.core import codec
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, RankHello, RankReport
from paceline.net.links import SocketFolder
from paceline.net.sockets import open_socket

FRONTENDS = (101, 102)


def now_us() -> int:
    """The monotonic clock, which all processes of a machine share."""
    return time.monotonic_ns() // 1000


@dataclass
class Feed:
    """What a feeding process is to do. `per_second`: rounds a second, 0 for as many as there can be."""

    ranks: range
    address: str
    per_second: float = 0.0


class Ranks:
    """Several ranks of one process, said to be ready when made."""

    def __init__(self, ranks: range, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        limit = codec.MAX_CONTROL_BYTES
        self._sockets = {rank: open_socket(self._context, zmq.PUSH, connect=address, max_bytes=limit) for rank in ranks}
        self.step = 0
        self.refused = 0
        for rank, socket in self._sockets.items():
            # Blocks until there is a connection.
            socket.send(codec.encode(RankHello(PROTOCOL_VERSION, rank, 1 + rank, "ipc:///nobody", True)))

    def report(self) -> None:
        self.step += 1
        for rank in self._sockets:
            self._send(rank)

    def report_one(self) -> None:
        """One report of one rank, each rank's turn coming round."""
        self.step += 1
        self._send([*self._sockets][self.step % len(self._sockets)])

    def _send(self, rank: int) -> None:
        taken = dict.fromkeys(FRONTENDS, self.step)
        load = Load(self.step % 64, 16, 16, now_us(), self.step, 65536, 1234.0, 567.0, self.step)
        try:
            self._sockets[rank].send(
                codec.encode(RankReport(rank, 1 + rank, self.step, 0, False, load, taken)), zmq.NOBLOCK
            )
        except zmq.Again:
            self.refused += 1

    def close(self) -> None:
        self._context.destroy(linger=0)


def feed(job: Feed, orders: Connection) -> None:
    """Say hello, wait for the order to go, feed until the next order; answers (sent or refused, refused)."""
    # Real ranks have cores of their own; these must not take the coordinator's. First of all: a thread has the niceness
    # of the one that starts it, and ZeroMQ's does most of the work.
    os.nice(19)
    ranks = Ranks(job.ranks, job.address)
    orders.send("here")
    orders.recv()
    period_s = 1 / job.per_second if job.per_second else 0.0
    due = time.monotonic()
    while not orders.poll():
        ranks.report()
        if period_s:
            due += period_s
            time.sleep(max(0.0, due - time.monotonic()))
    orders.send((ranks.step * len(job.ranks), ranks.refused))
    ranks.close()


MAX_BYTES = 1 << 20


def relay(outlet: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    pulling = open_socket(context, zmq.PULL, bind=f"{outlet}-in", max_bytes=MAX_BYTES)
    publishing = open_socket(context, zmq.XPUB, bind=outlet, max_bytes=MAX_BYTES)
    publishing.recv()
    while True:
        publishing.send(pulling.recv())


def tick(outlet: str, interval_s: float) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    publishing = open_socket(context, zmq.XPUB, bind=outlet, max_bytes=MAX_BYTES)
    while True:
        publishing.send(b"tick")
        # As the coordinator does: one interval after the last one.
        time.sleep(interval_s)


class Floor:
    """A process that publishes at `outlet`, and a socket that listens there."""

    def __init__(self, target: Callable[..., None], *arguments: float) -> None:
        self._folder = SocketFolder()
        self.outlet = self._folder.address("outlet")
        self._process = get_context("spawn").Process(target=target, args=(self.outlet, *arguments), daemon=True)
        self._process.start()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = open_socket(self._context, zmq.XSUB, connect=self.outlet, max_bytes=MAX_BYTES)
        self.socket.send(b"\x01")

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._process.terminate()
        self._process.join()
        self._folder.close()


class Relay(Floor):
    def __init__(self) -> None:
        super().__init__(relay)
        self._pushing = open_socket(self._context, zmq.PUSH, connect=f"{self.outlet}-in", max_bytes=MAX_BYTES)

    def trip_us(self) -> int:
        """How long one small frame takes there and back, in microseconds."""
        begin = now_us()
        self._pushing.send(bytes(100))
        self.socket.recv()
        return now_us() - begin
