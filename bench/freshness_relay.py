"""The floor: a process that passes a frame from one socket on to another and does nothing else."""

from __future__ import annotations

import time
from multiprocessing import get_context

import zmq
from freshness_feed import now_us

from paceline.net.links import SocketFolder
from paceline.net.sockets import open_socket

MAX_BYTES = 1 << 20


def relay(inbox: str, outlet: str) -> None:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    pulling = open_socket(context, zmq.PULL, bind=inbox, max_bytes=MAX_BYTES)
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


class Timer:
    """The process that ticks, and its listener."""

    def __init__(self, interval_s: float) -> None:
        self._folder = SocketFolder()
        address = self._folder.address("outlet")
        self._process = get_context("spawn").Process(target=tick, args=(address, interval_s), daemon=True)
        self._process.start()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.socket = open_socket(self._context, zmq.XSUB, connect=address, max_bytes=MAX_BYTES)
        self.socket.send(b"\x01")

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._process.terminate()
        self._process.join()
        self._folder.close()


class Relay:
    """The process, and both ends of it."""

    def __init__(self) -> None:
        self._folder = SocketFolder()
        addresses = [self._folder.address(name) for name in ("inbox", "outlet")]
        self._process = get_context("spawn").Process(target=relay, args=addresses, daemon=True)
        self._process.start()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pushing = open_socket(self._context, zmq.PUSH, connect=addresses[0], max_bytes=MAX_BYTES)
        self._listening = open_socket(self._context, zmq.XSUB, connect=addresses[1], max_bytes=MAX_BYTES)
        self._listening.send(b"\x01")

    def trip_us(self) -> int:
        """How long one small frame takes there and back, in microseconds."""
        begin = now_us()
        self._pushing.send(bytes(100))
        self._listening.recv()
        return now_us() - begin

    def close(self) -> None:
        self._context.destroy(linger=0)
        self._process.terminate()
        self._process.join()
        self._folder.close()
