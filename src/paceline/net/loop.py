"""What every coordinator's process does, ours and the one under vLLM: one loop over its three sockets.

A coordinator computes little and waits much, and what it says is due at times finer than a millisecond. ZeroMQ's own
poll knows whole milliseconds and takes longer than all else in a turn. So the loop asks each socket whether it has
something, and sleeps in `select` on their file descriptors. Such a descriptor tells of a change and not of a state: it
is slept on only after every socket was asked and had nothing.

The order is that of urgency. What front-ends say comes first, since a request may wait for it; then what has
come or gone, since only those are heard whose end will be learnt; then the ranks, which say the most and are read for a
set time. What is due interrupts all of them. A turn in which nobody said anything is the time to give memory back.
"""

from __future__ import annotations

import logging
import select
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from itertools import islice
from typing import Any, Generic, TypeVar

import zmq

from paceline.net.links import BadFrames, Doors
from paceline.net.sockets import MESSAGES_A_TURN, CoordinatorSockets, drain, has_message
from paceline.process.spawn import END, MallocTrim, Wakeup, unmoved

M = TypeVar("M")

LONGEST_SLEEP_S = 3600.0


class CoordinatorLoop(ABC):
    """A coordinator's sockets and its loop; a subclass has the machine and the codecs."""

    def __init__(self, logger: logging.Logger) -> None:
        self._bad_from_frontends = BadFrames(logger, "the front-ends' socket")
        self._bad_from_ranks = BadFrames(logger, "the ranks' socket")
        self._stopping = False
        self._wakeup = Wakeup()
        self._malloc_trim = MallocTrim()
        self._sockets: CoordinatorSockets
        self._ranks_wait_until = float("-inf")
        """Until then ranks are not read: what they say now changes nothing."""

    @property
    @abstractmethod
    def deadline(self) -> float:
        """When something is due."""

    @abstractmethod
    def _tick(self) -> None:
        """Do what is due."""

    @abstractmethod
    def _read_frontends(self) -> None:
        """Read what front-ends say, up to MESSAGES_A_TURN."""

    @abstractmethod
    def _read_ranks(self) -> None:
        """Read what ranks say, for a set time."""

    @abstractmethod
    def _on_rank_subscription(self, frame: bytes) -> None:
        """What came up the socket on which ranks listen."""

    def stop_on_signals(self) -> None:
        """Let END end the loop, and SIGTERM and Ctrl-C where those are for this process."""
        for number in (END, signal.SIGTERM, signal.SIGINT):
            if signal.getsignal(number) not in (signal.SIG_IGN, unmoved):
                signal.signal(number, lambda *_: self.stop())

    def stop(self) -> None:
        """Make the loop end. Safe in a signal handler."""
        self._stopping = True
        self._wakeup.set()

    def _serve(self, channel: int | None = None, on_channel: Callable[[], None] = lambda: None) -> None:
        """Serve `_sockets` until stopped. `channel`: a file descriptor, to be read by `on_channel`."""
        front, back_in, back_out = self._sockets.front, self._sockets.back_in, self._sockets.back_out
        doors = Doors((front, back_in, back_out))
        urgent: list[Any] = [front.fd, back_out.fd, self._wakeup.fileno()] + ([] if channel is None else [channel])
        urgent += doors.files
        everything = [*urgent, back_in.fd]
        ready: list[Any] = []
        self._tick()
        while not self._stopping:
            busy = False
            # That its descriptor was seen to change says enough.
            if front.fd in ready or has_message(front):
                busy = True
                self._read_frontends()
            if has_message(back_out):
                busy = True
                for [frame] in drain(back_out, self._bad_from_ranks, messages=MESSAGES_A_TURN):
                    self._on_rank_subscription(frame)
            now = time.monotonic()
            ranks_wait = now < self._ranks_wait_until
            if not ranks_wait and has_message(back_in):
                busy = True
                self._read_ranks()
                now = time.monotonic()
            if now >= (deadline := self.deadline):
                self._tick()
                continue
            if not busy:
                self._malloc_trim.look(now)
                doors.look(now)
            until = min(deadline, self._ranks_wait_until) if ranks_wait else deadline
            files = urgent if ranks_wait else everything
            ready, _, _ = select.select(files, (), (), 0 if busy else min(max(until - now, 0), LONGEST_SLEEP_S))
            if channel in ready:
                on_channel()
            if not doors.files.isdisjoint(ready):
                doors.count()
        self._wakeup.close()
        doors.close()
        self._sockets.close()


class ReportInbox(Generic[M]):
    """The coordinator's end of the ranks' PUSH sockets: reports are handed on in batches, all else in its place.

    Nearly all that comes is load reports, hundreds of thousands a second where there are many ranks. In a batch each
    costs little. `whose_report` tells whose a report is without decoding it, and None of anything else; `decode` raises
    BadMessage. `every_report`: in lockstep a view wants one step's loads, so none is left out; else the last of each
    rank says all, and the others are not even decoded. `at_once`: the largest batch, where what is due must not wait
    for a larger one. `parts`: as for `drain`.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], bad_frames: BadFrames, whose_report: Callable[[bytes], bytes | None],
        decode: Callable[[bytes], M], on_reports: Callable[[list[M]], None], on_message: Callable[[M], None], *,
        parts: int | None, every_report: bool, at_once: int,
    ) -> None:  # fmt: skip
        self._socket, self._bad_frames, self._parts = socket, bad_frames, parts
        self._whose_report, self._decode = whose_report, decode
        self._on_reports, self._on_message = on_reports, on_message
        self._every_report, self._at_once = every_report, at_once

    def read_until(self, until: float) -> None:
        reports: dict[bytes | int, bytes] = {}
        whose_report, every_report = self._whose_report, self._every_report
        for [frame] in drain(self._socket, self._bad_frames, parts=self._parts, until=until):
            whose = whose_report(frame)
            if whose is None:
                self._flush(reports)
                message = self._bad_frames.decoded(self._decode, frame)
                if message is not None:
                    self._on_message(message)
            elif every_report:
                reports[len(reports)] = frame
                if len(reports) == self._at_once:
                    self._flush(reports)
            else:
                reports[whose] = frame
        self._flush(reports)

    def _flush(self, reports: dict[bytes | int, bytes]) -> None:
        remaining = iter(reports.values())
        while chunk := list(islice(remaining, self._at_once)):
            messages = [self._bad_frames.decoded(self._decode, frame) for frame in chunk]
            self._on_reports([message for message in messages if message is not None])
        reports.clear()
