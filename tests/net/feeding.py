"""A process that stands in for ranks: it reports for them as fast as it can until it is ended."""

from __future__ import annotations

import zmq

from paceline.core import codec
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, RankHello, RankReport
from paceline.net.sockets import open_socket


class Ranks:
    """`count` ranks that say that they are ready, each with a socket of its own."""

    def __init__(self, count: int, address: str) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.sockets = [
            open_socket(self._context, zmq.PUSH, connect=address, max_bytes=codec.MAX_CONTROL_BYTES)
            for _ in range(count)
        ]
        self.step = 0
        for rank, socket in enumerate(self.sockets):
            socket.send(codec.encode(RankHello(PROTOCOL_VERSION, rank, 1 + rank, "ipc:///rank", True)))

    def frames(self) -> list[bytes]:
        self.step += 1
        load = Load(waiting=self.step)
        return [
            codec.encode(RankReport(rank, 1 + rank, self.step, 0, False, load)) for rank in range(len(self.sockets))
        ]

    def report(self) -> None:
        """Send each rank's report of the next step; waits where the coordinator does not keep up."""
        for socket, frame in zip(self.sockets, self.frames(), strict=True):
            socket.send(frame)

    def close(self) -> None:
        self._context.destroy(linger=0)


def feed(count: int, address: str) -> None:
    ranks = Ranks(count, address)
    while True:
        ranks.report()
