"""A rank as a process: one thread turns the engine, another carries bytes.

The engine's thread runs the machine and the steps and never touches a socket; the transport's thread owns all sockets
and never touches the engine. Between them are two queues. A step therefore never waits for the network, and what a
step made is encoded and sent while the next one computes.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import zmq
from msgspec import Struct

from paceline.core import codec
from paceline.core.messages import Form, FromRank, ToRank
from paceline.core.rank.events import (
    IN_MID_STEP,
    Agree,
    CoordinatorSaid,
    Drop,
    DummyStep,
    Effect,
    EpochEnded,
    Event,
    Formed,
    FormGroup,
    FrontendGone,
    FrontendSaid,
    Leave,
    Loaded,
    Phase,
    Step,
    Stepped,
    Take,
    ToCoordinator,
    ToFrontend,
    Turn,
    Urge,
    Wait,
)
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import AUTO, OFF
from paceline.core.rank.requests import Backlog
from paceline.core.requests import Outputs
from paceline.engines.base import Engine, EngineError, EngineRequest, EngineSettings
from paceline.engines.group import EpochEnded as GroupEnded
from paceline.engines.registry import find_engine
from paceline.errors import StartupError
from paceline.net.group import StallWatch
from paceline.net.links import BadFrames, new_identity
from paceline.net.sockets import MESSAGES_A_TURN, bound_address, drain, open_socket
from paceline.process.spawn import Wakeup
from paceline.process.supervisor import Failed, Progressed, Ready

if TYPE_CHECKING:
    from paceline.net.group import GroupMembership  # not needed by independent ranks

logger = logging.getLogger("paceline.rank")

PROBES_S = (0.01, 0.1, 0.5)
"""When front-ends are asked for, after the end of a connection: that is seen before the connection is taken away."""

OUTPUTS_QUEUED = 1_000
"""Messages in the queue to one front-end, beyond which they are put together."""

READS_AGAIN_MS = 20
"""How often one that does not read is tried again."""


class RankTransport:
    """The sockets of one rank, and the thread that owns them.

    Everything that arrives becomes an event in `inbox`; everything to be sent comes through a queue with a wake-up of
    the poll. Nothing here waits for anybody. The coordinator may be away: of what it does not read, the last of each
    kind is kept. A front-end may not read: its queue is bounded, and when it is full, what each of its requests gets
    is put together until it reads again; so it costs a set amount of memory, and loses nothing.

    A front-end that has died is found out at once, not when there is something to send to it: its requests may wait
    for long. The end of a connection does not say whose it was, so each front-end is then sent an empty message, which
    ZeroMQ refuses where nobody is there.

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
        """What is done, in the transport's thread, with each message from the coordinator."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        control, requests = codec.MAX_CONTROL_BYTES, codec.MAX_REQUEST_BYTES
        queued = {zmq.SNDHWM: OUTPUTS_QUEUED}
        self._router = open_socket(self._context, zmq.ROUTER, bind=bind, max_bytes=requests, options=queued)
        self._broadcasts = open_socket(self._context, zmq.XSUB, connect=coordinator_input, max_bytes=control)
        self._reports = open_socket(self._context, zmq.PUSH, connect=coordinator_output, max_bytes=control)
        self._ends = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._frontends: set[int] = set()
        self._probes_due: list[float] = []
        self._life = (rank, incarnation)
        self._backlogs: dict[int, Backlog] = {}
        self._late: dict[type, FromRank | Outputs] = {}
        self._nothing = codec.encode(Outputs(rank, incarnation, []))
        self._broadcasts.send(b"\x01")
        self._broadcasts.send(b"\x01" + codec.rank_topic(rank, incarnation))
        self.address = bound_address(self._router)
        self.bad_requests = BadFrames(logger, "the rank's request socket")
        self.bad_broadcasts = BadFrames(logger, "the coordinator's broadcasts")
        self._decode_request = codec.request().decode
        self._decode_broadcast = codec.to_rank().decode
        self._thread = threading.Thread(target=self._run, name="transport", daemon=True)

    def start(self) -> None:
        """Begin to send and hear."""
        self._thread.start()

    def send_coordinator(self, message: FromRank) -> None:
        """Send when the thread comes to it. Called by the engine's thread; never blocks."""
        self._outbox.append((None, message))
        self._wakeup.set()

    def send_frontend(self, frontend: int, message: Outputs) -> None:
        """The same, to one front-end."""
        self._outbox.append((frontend, message))
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
            elif not self._send_frontend(to, codec.encode(message)):
                logger.warning("front-end %d does not read: what it gets is kept for it", to)
                self._backlogs[to] = Backlog(*self._life)
                self._backlogs[to].add(message)
        self._send_late()
        for to, backlog in list(self._backlogs.items()):
            while len(backlog) and self._send_frontend(to, codec.encode(backlog.first())):
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

    def _send_frontend(self, to: int, frame: bytes) -> bool:
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
            self._frontends.discard(to)
            self.inbox.put(FrontendGone(to))
        return True

    # Front-ends that have died ------------------------------------------------------------------

    def _read_ends(self) -> None:
        """Some connection has ended: look who is there, soon and again."""
        for _ in drain(self._ends, self.bad_requests, parts=2):
            pass
        now = time.monotonic()
        self._probes_due = sorted([*self._probes_due[-1:], *(now + after_s for after_s in PROBES_S)])

    def _wait_ms(self) -> int | None:
        if self._backlogs or self._late:
            return READS_AGAIN_MS
        return int(max(0.0, self._probes_due[0] - time.monotonic()) * 1000) + 1 if self._probes_due else None

    def _probe(self) -> None:
        self._probes_due.pop(0)
        for frontend in list(self._frontends):
            self._send_frontend(frontend, self._nothing)

    # In -----------------------------------------------------------------------------------------

    def _read_broadcasts(self) -> None:
        for [frame] in drain(self._broadcasts, self.bad_broadcasts, messages=MESSAGES_A_TURN):
            message = self.bad_broadcasts.decoded(self._decode_broadcast, frame)
            if message is not None:
                self.on_broadcast(message)

    def _read_requests(self) -> None:
        for sender, frame in drain(self._router, self.bad_requests, parts=2, messages=MESSAGES_A_TURN):
            # A peer that set no routing id of ours is given one of five bytes that begins with zero.
            frontend = int.from_bytes(sender, "little")
            if len(sender) != 8 or frontend >= 2**63:
                self.bad_requests.add("identity", f"a message from {sender!r}")
                continue
            message = self.bad_requests.decoded(self._decode_request, frame)
            if message is not None:
                self._frontends.add(frontend)
                self.inbox.put(FrontendSaid(frontend, message))


SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread may keep the interpreter while the transport has something to send."""


class EngineRank:
    """Drives one engine as one rank, until stopped.

    `engine`: anything that meets `Engine`; all calls to it come from the thread that calls `run`.
    `transport`: the sockets. `membership`: for lockstep engines, its place among its peers; `stall_timeout_s`: how
    long it waits for them before it says so.
    `on_ready`: called once, when the rank takes requests.
    """

    def __init__(
        self,
        engine: Engine,
        machine: Rank,
        transport: RankTransport,
        membership: GroupMembership | None = None,
        stall_timeout_s: float = 30.0,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self._engine = engine
        self._machine = machine
        self._transport = transport
        self._membership = membership
        self._watch = None if membership is None else StallWatch(stall_timeout_s, membership.waiting, self._decide)
        self._on_ready = on_ready
        self._stopping = False
        # The machine is called by both threads: for the blink of a decision, never while a step computes.
        self._deciding = threading.Lock()
        transport.on_broadcast = self._on_broadcast

    def stop(self) -> None:
        """Make `run` return after the step it is in. Safe in a signal handler."""
        self._stopping = True
        if self._membership is not None:
            # The step may wait for peers that have stopped already, or never start.
            self._membership.leave()
        self._transport.inbox.put(None)

    def run(self) -> None:
        """Join the deployment and serve until `stop`. Raises EngineError where the engine fails."""
        self._transport.start()
        if self._watch is not None:
            self._watch.start()
        self._feed(Loaded())
        while not self._stopping:
            while self._take_in(block_s=0.0):
                pass
            self._feed(Turn(self._engine.load(), self._engine.has_work()))
        self._feed(Leave())
        self._transport.close()
        if self._membership is not None:
            self._membership.close()
        if self._watch is not None:
            self._watch.stop()
        self._engine.close()

    def _take_in(self, block_s: float | None) -> bool:
        """Handle one thing that arrived, waiting for it up to `block_s` (None: for ever). Returns whether one did."""
        try:
            event = self._transport.inbox.get(block_s != 0.0, block_s)
        except queue.Empty:
            return False
        if event is not None:
            self._feed(event)
        return True

    def _feed(self, event: Event) -> None:
        for effect in self._decide(event):
            self._perform(effect)
        if self._on_ready is not None and self._machine.phase is Phase.READY:
            self._on_ready()
            self._on_ready = None

    def _decide(self, event: Event) -> list[Effect]:
        """Ask the machine, and send what it says; returns what else is to be done."""
        with self._deciding:
            effects = self._machine.handle(event, time.monotonic())
            # Sent before the other thread's turn to decide: messages go out in the order of decisions.
            return [effect for effect in effects if not self._send(effect)]

    def _send(self, effect: Effect) -> bool:
        match effect:
            case ToFrontend(frontend, outputs):
                self._transport.send_frontend(frontend, outputs)
            case ToCoordinator(message):
                self._transport.send_coordinator(message)
            case Urge():
                if self._membership is not None:
                    self._membership.urge()
            case _:
                return False
        return True

    def _on_broadcast(self, message: ToRank) -> None:
        """In the transport's thread."""
        if not isinstance(message, IN_MID_STEP):
            if isinstance(message, Form) and self._membership is not None:
                # Its members may wait in a collective for one that is stopped, or cut off, and not of the new group.
                self._membership.break_off(message.generation)
            self._transport.inbox.put(CoordinatorSaid(message))
            return
        self._decide(CoordinatorSaid(message))
        # What it changed may be work for the engine's thread, if that sleeps.
        self._transport.inbox.put(None)

    def _perform(self, effect: Effect) -> None:
        match effect:
            case Step(prefill_quota):
                self._engine.limit_prefill(prefill_quota)
                self._step()
            case Take(key, request):
                self._engine.add(
                    EngineRequest(
                        key, request.prompt_token_ids, request.params, request.priority, request.made_token_ids
                    )
                )
            case Drop(key):
                self._engine.abort(key)
            # A stop that was asked for before this has been taken out of the inbox already.
            case Wait(until) if not self._stopping:
                self._take_in(None if until is None else max(0.001, until - time.monotonic()))
            case DummyStep():
                self._dummy_step()
            case Agree():
                self._agree(effect)
            case FormGroup():
                self._form(effect)

    def _form(self, wanted: FormGroup) -> None:
        membership = self._member()
        try:
            group = membership.form(wanted.epoch, wanted.members)
        except StartupError as error:
            logger.warning("rank %d: %s", self._machine.rank, error)
            self._feed(EpochEnded())
            return
        self._engine.join(group)
        self._feed(Formed(wanted.epoch))

    def _agree(self, agree: Agree) -> None:
        membership = self._member()
        try:
            agreed = membership.agree(agree)
        except GroupEnded as error:
            self._ended(error)
            return
        self._feed(agreed)

    def _member(self) -> GroupMembership:
        if self._membership is None:
            raise EngineError(f"rank {self._machine.rank}: a lockstep engine without a group")
        return self._membership

    def _ended(self, error: GroupEnded) -> None:
        if not self._stopping:
            logger.warning("rank %d: %s", self._machine.rank, error)
        self._feed(EpochEnded())

    def _step(self) -> None:
        begin = time.monotonic()
        try:
            result = self._engine.step()
        except GroupEnded as error:
            self._ended(error)
            return
        seconds = time.monotonic() - begin
        load, has_work = self._engine.load(), self._engine.has_work()
        made = (result.prefilled_tokens, result.decoded_tokens, seconds)
        self._feed(Stepped(result.outputs, load, has_work, *made, self._urged()))

    def _dummy_step(self) -> None:
        try:
            self._engine.dummy_step()
        except GroupEnded as error:
            self._ended(error)
            return
        self._feed(Stepped((), self._engine.load(), self._engine.has_work(), urged=self._urged()))

    def _urged(self) -> bool:
        return self._membership is not None and self._membership.urged()


class RankSettings(Struct, frozen=True):
    """What one rank's process needs to know.

    `bind`: where front-ends reach it. `coordinator_input`, `coordinator_output`: as
    `DPCoordinator.get_engine_socket_addresses()` returns them. `report_loads`: False in external mode.
    `group_bind`: where the other ranks reach it, for lockstep engines. `sync_interval`: steps between agreements.
    `stall_timeout_s`: how long it waits for its peers in a collective before it says so.
    `prefill_quota`: how it is set (`core/rank/prefill_quota.py`), for lockstep engines.
    """

    engine: str
    settings: EngineSettings
    bind: str
    coordinator_input: str
    coordinator_output: str
    report_loads: bool = True
    group_bind: str = ""
    sync_interval: int = 16
    stall_timeout_s: float = 30.0
    prefill_quota: int = AUTO


def run_rank(settings: RankSettings, status: Connection) -> None:
    """Serve until SIGTERM. Raises StartupError after telling `status` why the rank cannot be."""
    stopping: list[EngineRank | None] = [None]

    def on_terminate(*_: object) -> None:
        if stopping[0] is None:
            # It has joined nothing, and owes nobody anything. An exception need not end it: raised in a callback of the
            # import machinery it is printed and forgotten.
            os._exit(0)
        stopping[0].stop()

    signal.signal(signal.SIGTERM, on_terminate)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        stopping[0] = rank = _make(settings, status)
        rank.run()
    except (EngineError, StartupError) as error:
        status.send(Failed(str(error)))
        sys.exit(1)
    except Exception as error:
        status.send(Failed(f"internal error: {type(error).__name__}: {error}"))
        raise


def _make(settings: RankSettings, status: Connection) -> EngineRank:
    engine_class = find_engine(settings.engine)
    number = settings.settings.rank
    engine = engine_class.create(settings.settings, lambda what, share: status.send(Progressed(what, share)))
    incarnation = new_identity()
    transport = RankTransport(
        number, incarnation, settings.bind, settings.coordinator_input, settings.coordinator_output
    )
    membership = None
    if engine_class.lockstep:
        from paceline.net.group import GroupMembership

        membership = GroupMembership(number, settings.group_bind)
    machine = Rank(
        number, incarnation, transport.address, lockstep=engine_class.lockstep, report_loads=settings.report_loads,
        sync_interval=settings.sync_interval, group_address=membership.address if membership is not None else "",
        prefill_quota=settings.prefill_quota if engine_class.lockstep else OFF,
    )  # fmt: skip
    return EngineRank(
        engine, machine, transport, membership, settings.stall_timeout_s, on_ready=lambda: status.send(Ready())
    )
