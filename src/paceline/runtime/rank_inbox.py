"""What ranks say to the coordinator, read in batches: a report costs little, and what is due is not late for it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from itertools import islice

import zmq

from paceline.protocol import codec
from paceline.protocol.coordinator_events import Event, RankSaid, RanksReported
from paceline.protocol.messages import FromRank, NodeHello, RankFailed, RankReport
from paceline.runtime.garbage import Garbage

READ_S = 0.002
"""As long may be read before what has come is handled."""
HANDLED_AT_ONCE = 128
"""Reports: what is due must not wait for more of them than take a fraction of a millisecond."""
REPORTS_KEPT, LEAST_KEPT = 32_768, 16
"""Messages of all ranks, and at least of each, that wait unread. Each costs up to a kilobyte."""


def reports_kept(ranks: int) -> int:
    """How many messages of one rank wait here; the rank keeps what is beyond, and drops what is too old for it."""
    return max(LEAST_KEPT, REPORTS_KEPT // ranks)


class RankInbox:
    """The coordinator's end of the ranks' PUSH sockets. `handle`: the machine's door.

    `every_report`: in lockstep a view wants one step's loads, so none is left out. Else a rank's last one says all.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], garbage: Garbage, handle: Callable[[Event], None], *, every_report: bool
    ) -> None:
        self._socket = socket
        self._garbage = garbage
        self._handle = handle
        self._every_report = every_report
        self._decoder = codec.from_rank()
        self.nodes: set[int] = set()
        """Nodes whose presence has appeared; no other is heard, since nobody would learn that it has gone."""

    def read(self, deadline: float) -> None:
        """Read until nothing is there, or something is due (`deadline`, by the monotonic clock)."""
        until = min(time.monotonic() + READ_S, deadline)
        reports: dict[bytes | int, bytes] = {}
        while True:
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            if self._socket.getsockopt(zmq.RCVMORE):
                frames = 1 + len(self._socket.recv_multipart())
                self._garbage.add("frames", f"{frames} frames in place of one")
                continue
            whose = codec.whose_report(frame)
            if whose is None:
                # What else a rank says is heard in its place.
                self._reported(reports.values())
                reports.clear()
                self._said(frame)
            elif self._every_report:
                reports[len(reports)] = frame
                if len(reports) == HANDLED_AT_ONCE:
                    self._reported(reports.values())
                    reports.clear()
            else:
                reports[whose] = frame
            if time.monotonic() >= until:
                break
        self._reported(reports.values())

    def _reported(self, frames: Iterable[bytes]) -> None:
        remaining = iter(frames)
        while chunk := list(islice(remaining, HANDLED_AT_ONCE)):
            messages = [self._decoded(frame) for frame in chunk]
            self._handle(RanksReported([message for message in messages if isinstance(message, RankReport)]))

    def _said(self, frame: bytes) -> None:
        message = self._decoded(frame)
        if isinstance(message, NodeHello | RankFailed) and message.node not in self.nodes:
            self._garbage.add("no-presence", f"node {message.node} has not subscribed its presence")
        elif message is not None:
            self._handle(RankSaid(message))

    def _decoded(self, frame: bytes) -> FromRank | None:
        try:
            return self._decoder.decode(frame)
        except codec.BadMessage as error:
            self._garbage.add(error.kind, error.detail)
            return None
