"""Carries a rank's bytes: a thread that owns the rank's sockets.

Everything that arrives becomes an event in `inbox`; everything to be sent comes through `_outbox` with a
wake-up of the poll. Nothing here waits for anybody: the coordinator may be away (of what it does not read,
the last of each kind is kept), a front-end may not read (its queue is bounded; when it is full, what each of its
requests gets is put together until it reads again: so it costs a set amount of memory, and loses nothing).

A front-end that has died is found out at once, not when there is something to send to it: its requests may wait for
long. The end of a connection does not say whose it was, so each front-end is then sent an empty message, which
ZeroMQ refuses where nobody is there.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable

import zmq

from paceline.protocol import codec
from paceline.protocol.messages import FromRank, Outputs, ToRank
from paceline.protocol.rank_events import CoordinatorSaid, Event, FrontEndGone, FrontEndSaid
from paceline.protocol.ranks.backlog import Backlog
from paceline.runtime.garbage import Garbage
from paceline.runtime.sockets import bound_address, open_socket
from paceline.runtime.wakeup import Wakeup

logger = logging.getLogger("paceline.rank")

MESSAGES_A_TURN = 256
PROBES_S = (0.01, 0.1, 0.5)
"""When front-ends are asked for, after the end of a connection: that is seen before the connection is taken away."""

OUTPUTS_QUEUED = 1_000
"""Messages in the queue to one front-end, beyond which they are put together."""

READS_AGAIN_MS = 20
"""How often who does not read is tried again."""


class Carrier:
    """The sockets of one rank.

    `bind`: where front-ends reach the rank. `coordinator_input`, `coordinator_output`: the coordinator's
    addresses as `DPCoordinator.get_engine_socket_addresses()` returns them. Raises StartupError where an
    address cannot be bound or connected.
    """

    def __init__(self, rank: int, incarnation: int, bind: str, coordinator_input: str, coordinator_output: str) -> None:
        self.inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._outbox: deque[tuple[int | None, FromRank | Outputs]] = deque()
        self._wakeup = Wakeup()
        self._closing = False
        self.on_broadcast: Callable[[ToRank], None] = lambda message: self.inbox.put(CoordinatorSaid(message))
        """What is done, in the carrier's thread, with each message from the coordinator."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        control, requests = codec.MAX_CONTROL_BYTES, codec.MAX_REQUEST_BYTES
        queued = {zmq.SNDHWM: OUTPUTS_QUEUED}
        self._router = open_socket(self._context, zmq.ROUTER, bind=bind, max_bytes=requests, options=queued)
        self._broadcasts = open_socket(self._context, zmq.XSUB, connect=coordinator_input, max_bytes=control)
        self._reports = open_socket(self._context, zmq.PUSH, connect=coordinator_output, max_bytes=control)
        self._ends = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._front_ends: set[int] = set()
        self._probes_due: list[float] = []
        self._life = (rank, incarnation)
        self._backlogs: dict[int, Backlog] = {}
        self._late: dict[type, FromRank | Outputs] = {}
        self._nothing = codec.encode(Outputs(rank, incarnation, []))
        self._broadcasts.send(b"\x01")
        self._broadcasts.send(b"\x01" + codec.rank_topic(rank, incarnation))
        self.address = bound_address(self._router)
        self.garbage_requests = Garbage(logger, "the rank's request socket")
        self.garbage_broadcasts = Garbage(logger, "the coordinator's broadcasts")
        self._decode_request = codec.request().decode
        self._decode_broadcast = codec.to_rank().decode
        self._thread = threading.Thread(target=self._run, name="carrier", daemon=True)

    def start(self) -> None:
        """Begin to carry."""
        self._thread.start()

    def send_coordinator(self, message: FromRank) -> None:
        """Send when the carrier comes to it. Called by the engine's thread; never blocks."""
        self._outbox.append((None, message))
        self._wakeup.set()

    def send_front_end(self, front_end: int, message: Outputs) -> None:
        """Likewise, to one front-end."""
        self._outbox.append((front_end, message))
        self._wakeup.set()

    def close(self) -> None:
        """Send what is left and end."""
        self._closing = True
        self._wakeup.set()
        if self._thread.is_alive():
            self._thread.join(timeout=2.0)

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._router, zmq.POLLIN)
        poller.register(self._broadcasts, zmq.POLLIN)
        poller.register(self._wakeup, zmq.POLLIN)
        poller.register(self._ends, zmq.POLLIN)
        while True:
            ready = dict(poller.poll(self._wait_ms()))
            if self._wakeup.fileno() in ready:
                self._wakeup.clear()
            closing = self._closing
            self._send_all()
            if closing:
                break
            if self._ends in ready:
                self._read_ends()
            if self._probes_due and time.monotonic() >= self._probes_due[0]:
                self._probe()
            if self._broadcasts in ready:
                self._read_broadcasts()
            if self._router in ready:
                self._read_requests()
        self._router.disable_monitor()
        self._ends.close()
        # What was sent last (that the rank leaves) gets a moment to go out.
        self._context.destroy(linger=200)
        self._wakeup.close()

    # Out ----------------------------------------------------------------------------------------

    def _send_all(self) -> None:
        outbox = self._outbox
        while outbox:
            to, message = outbox.popleft()
            if to is None or not isinstance(message, Outputs):
                # Of each kind the last one says all; it takes the place of one from before.
                self._late.pop(type(message), None)
                self._late[type(message)] = message
                self._send_late()
            elif to in self._backlogs:
                self._backlogs[to].add(message)
            elif not self._send_front_end(to, codec.encode(message)):
                logger.warning("front-end %d does not read: what it gets is kept for it", to)
                self._backlogs[to] = Backlog(*self._life)
                self._backlogs[to].add(message)
        self._send_late()
        for to, backlog in list(self._backlogs.items()):
            while len(backlog) and self._send_front_end(to, codec.encode(backlog.first())):
                backlog.sent()
            if not len(backlog):
                del self._backlogs[to]
                logger.info("front-end %d reads again", to)

    def _send_late(self) -> None:
        """What is for the coordinator, as far as it reads."""
        while self._late:
            kind = next(iter(self._late))
            try:
                self._reports.send(codec.encode(self._late[kind]), zmq.NOBLOCK)
            except zmq.Again:
                return
            del self._late[kind]

    def _send_front_end(self, to: int, frame: bytes) -> bool:
        """Send to a front-end; whether it is dealt with: sent, or to nobody, since the front-end has gone."""
        try:
            self._router.send_multipart([to.to_bytes(8, "little"), frame], zmq.NOBLOCK)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            if to in self._backlogs:
                self._backlogs[to].clear()
            self._front_ends.discard(to)
            self.inbox.put(FrontEndGone(to))
        return True

    # Front-ends that have died ------------------------------------------------------------------

    def _read_ends(self) -> None:
        """Some connection has ended: look who is there, soon and again."""
        while True:
            try:
                self._ends.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
        now = time.monotonic()
        self._probes_due = sorted([*self._probes_due[-1:], *(now + after_s for after_s in PROBES_S)])

    def _wait_ms(self) -> int | None:
        if self._backlogs or self._late:
            return READS_AGAIN_MS
        return int(max(0.0, self._probes_due[0] - time.monotonic()) * 1000) + 1 if self._probes_due else None

    def _probe(self) -> None:
        self._probes_due.pop(0)
        for front_end in list(self._front_ends):
            self._send_front_end(front_end, self._nothing)

    # In -----------------------------------------------------------------------------------------

    def _read_broadcasts(self) -> None:
        for _ in range(MESSAGES_A_TURN):
            try:
                frames = self._broadcasts.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 1:
                self.garbage_broadcasts.add("frames", f"{len(frames)} frames in place of one")
                continue
            try:
                self.on_broadcast(self._decode_broadcast(frames[0]))
            except codec.BadMessage as error:
                self.garbage_broadcasts.add(error.kind, error.detail)

    def _read_requests(self) -> None:
        for _ in range(MESSAGES_A_TURN):
            try:
                frames = self._router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            # A peer that set no routing id of ours is given one of five bytes that begins with zero.
            front_end = int.from_bytes(frames[0], "little")
            if len(frames) != 2 or len(frames[0]) != 8 or front_end >= 2**63:
                kind = "frames" if len(frames) != 2 else "identity"
                self.garbage_requests.add(kind, f"{len(frames)} frames from {frames[0]!r}")
                continue
            try:
                message = self._decode_request(frames[1])
            except codec.BadMessage as error:
                self.garbage_requests.add(error.kind, error.detail)
                continue
            self._front_ends.add(front_end)
            self.inbox.put(FrontEndSaid(front_end, message))
