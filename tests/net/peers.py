"""Sockets of the other side, for tests of one real process: bad frames first, then proper messages."""

from __future__ import annotations

import contextlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import zmq

from paceline.core import codec
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, RankHello, RankReport
from paceline.net.sockets import open_socket
from tests.pace import stretched

Context = zmq.Context[zmq.Socket[bytes]]

BAD_FRAMES = [
    b"",
    b"\x00",
    b"\xff" * 9,
    b"nonsense",
    b"\x93\x01\x02\x03",
    b"\xdd\xff\xff\xff\xff",
    b"\x81" * 3000,
    b"\x91" * 5000,
    b"\x92\xa3add",
    b"\x94\xabrank-report\x01\x02\xc0",
    b"\x96\xaarank-hello\x63\x00\x01\xa1a\xc3",
    b"\x80\x04\x95\x17\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94.",
    b'["rank-hello", 1, 0, 1, "a", true]',
    *(random.Random(seed).randbytes(seed * 7) for seed in range(1, 40)),
]


@contextlib.contextmanager
def context() -> Iterator[Context]:
    """A ZeroMQ context whose sockets are gone at the block's end."""
    made: Context = zmq.Context()
    try:
        yield made
    finally:
        made.destroy(linger=0)


def receive(endpoint: zmq.Socket[bytes], deadline_ms: int = 10_000) -> list[bytes]:
    assert endpoint.poll(stretched(deadline_ms)), "nothing came"
    return endpoint.recv_multipart()


def send_bad_frames(endpoint: zmq.Socket[bytes], before: tuple[bytes, ...] = ()) -> None:
    for frame in BAD_FRAMES:
        endpoint.send_multipart([*before, frame])
        endpoint.send_multipart([*before, frame, frame, frame])


def shout_at(address: str) -> None:
    """Bytes that are not even ZeroMQ, on a plain socket."""
    plain: Any
    for payload in (b"GET / HTTP/1.1\r\n\r\n", b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f", bytes(range(256)) * 64):
        if address.startswith("ipc://"):
            plain = socket.socket(socket.AF_UNIX)
            plain.connect(address.removeprefix("ipc://"))
        else:
            host, port = address.removeprefix("tcp://").rsplit(":", 1)
            plain = socket.create_connection((host, int(port)))
        with plain, contextlib.suppress(ConnectionError):
            plain.sendall(payload)


class Ranks:
    """`count` ranks that say that they are ready, each with a socket of its own."""

    def __init__(self, count: int, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets = [
            open_socket(self._context, zmq.PUSH, connect=address, max_bytes=codec.MAX_CONTROL_BYTES)
            for _ in range(count)
        ]
        self.step = 0
        for rank, endpoint in enumerate(self.sockets):
            endpoint.send(codec.encode(RankHello(PROTOCOL_VERSION, rank, 1 + rank, "ipc:///rank", True)))

    def frames(self) -> list[bytes]:
        self.step += 1
        load = Load(waiting=self.step)
        return [
            codec.encode(RankReport(rank, 1 + rank, self.step, 0, False, load)) for rank in range(len(self.sockets))
        ]

    def report(self) -> None:
        """Send each rank's report of the next step; waits where the coordinator does not keep up."""
        for endpoint, frame in zip(self.sockets, self.frames(), strict=True):
            endpoint.send(frame)

    def close(self) -> None:
        self._context.destroy(linger=0)


def feed(count: int, address: str) -> None:
    ranks = Ranks(count, address)
    while True:
        ranks.report()
