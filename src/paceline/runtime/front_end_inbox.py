"""What front-ends say to the coordinator, read in batches: the more they say, the less each of it costs."""

from __future__ import annotations

from collections.abc import Callable

import zmq

from paceline.protocol import codec
from paceline.protocol.coordinator_events import (
    Event,
    FrontEndGone,
    FrontEndSaid,
    FrontEndsSaid,
    FrontEndSubscribed,
)
from paceline.protocol.messages import FromFrontEnd, OfRequests
from paceline.runtime.garbage import Garbage

READ_AT_ONCE = 256
"""Messages that are read before others get their turn and what is due is sent."""

MAX_PRESENT = 65536
"""Front-ends that are heard at once: in external mode each of as many ranks as there can be has one."""


MOST_QUEUED, LEAST_QUEUED = 1_000, 64
QUEUED_BYTES, VIEW_BYTES_A_RANK = 64 << 20, 512


def views_queued(ranks: int) -> int:
    """How many messages wait for a front-end that does not read; it loses what is beyond, and the next view says all.

    Those that wait for several are there once.
    """
    return max(LEAST_QUEUED, min(MOST_QUEUED, QUEUED_BYTES // (ranks * VIEW_BYTES_A_RANK)))


class FrontEndInbox:
    """The coordinator's end of the front-ends' sockets. `handle`: the machine's door.

    What a front-end has said is kept until its presence ends. So only those are heard whose presence has appeared: of
    any other nobody would ever learn that it has gone, and ids that somebody invents would be kept for ever.
    """

    def __init__(self, socket: zmq.Socket[bytes], garbage: Garbage, handle: Callable[[Event], None]) -> None:
        self._socket = socket
        self._garbage = garbage
        self._handle = handle
        self._decoder = codec.from_front_end()
        self._of_requests: list[OfRequests] = []
        self._present: set[int] = set()

    def read(self) -> None:
        """Read what is there, up to READ_AT_ONCE."""
        for _ in range(READ_AT_ONCE):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            if len(frames) != 1 or not frames[0]:
                self._garbage.add("frames", f"{len(frames)} frames in place of one")
            elif frames[0][0] in (0, 1):
                self._on_subscription(frames[0])
            else:
                message = self._decoded(frames[0])
                if message is None:
                    continue
                if message.front_end not in self._present:
                    self._garbage.add("no-presence", f"front-end {message.front_end} has not subscribed its presence")
                elif isinstance(message, OfRequests):
                    self._of_requests.append(message)
                else:
                    self._flush()
                    self._handle(FrontEndSaid(message))
        self._flush()

    def _flush(self) -> None:
        """Everything is heard in its place."""
        if self._of_requests:
            messages, self._of_requests = self._of_requests, []
            self._handle(FrontEndsSaid(messages))

    def _on_subscription(self, frame: bytes) -> None:
        self._flush()
        front_end = codec.read_front_end_topic(frame[1:])
        if frame[0] == 1:
            if front_end is not None and len(self._present) >= MAX_PRESENT:
                self._garbage.add("too-many", f"{MAX_PRESENT} front-ends are there")
                return
            if front_end is not None:
                self._present.add(front_end)
            self._handle(FrontEndSubscribed())
        elif front_end is not None:
            self._present.discard(front_end)
            self._handle(FrontEndGone(front_end))

    def _decoded(self, frame: bytes) -> FromFrontEnd | None:
        try:
            return self._decoder.decode(frame)
        except codec.BadMessage as error:
            self._garbage.add(error.kind, error.detail)
            return None
