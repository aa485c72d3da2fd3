"""A rank as a process: one thread turns the engine, another carries bytes.

The engine's thread runs the machine and the steps and never touches a socket; the transport's thread owns all sockets
and never touches the engine. Between them are two queues. A step therefore never waits for the network, and what a
step made is encoded and sent while the next one computes.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING

import zmq
from msgspec import Struct

from paceline.core import codec
from paceline.core.messages import Form, FromRank, ToRank
from paceline.core.rank import events
from paceline.core.rank.hang import Limits
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import OFF, setting_of
from paceline.core.rank.requests import Backlog
from paceline.core.requests import CallEngine, Outputs, Refused
from paceline.engines.base import Engine, EngineError, EngineRequest, EngineSettings
from paceline.engines.group import EpochEnded as GroupEnded
from paceline.engines.registry import find_engine
from paceline.errors import StartupError
from paceline.log import about
from paceline.net.links import CALLS, REFUSED, BadFrames, Callers, Doors, monitored, new_identity, refusals
from paceline.net.sockets import DOORS_S, MESSAGES_A_TURN, bound_address, drain, open_socket
from paceline.process.spawn import AGAIN, END, HUNG, Wakeup
from paceline.process.supervisor import Failed, Progressed, Ready
from paceline.settings import DeploymentConfig

if TYPE_CHECKING:
    from paceline.engines.group import Waiting
    from paceline.net.group import GroupMembership  # not needed by independent ranks

logger = logging.getLogger("paceline.rank")

PROBES_S = (0.01, 0.1, 0.5)
"""When front-ends are asked for, after the end of a connection: that is seen before the connection is taken away."""

REQUESTS_S = 0.005
"""How long requests are read at a stretch: each may be large, and others' tokens wait."""

OUTPUTS_QUEUED = 1_000
"""Messages in the queue to one front-end, beyond which they are put together."""

DOORS_MS = round(DOORS_S * 1000)
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
        self.inbox: queue.SimpleQueue[events.Event | None] = queue.SimpleQueue()
        self._outbox: deque[tuple[int | None, FromRank | Outputs]] = deque()
        self._wakeup = Wakeup()
        self._closing = False
        self.on_broadcast: Callable[[ToRank], None] = lambda message: self.inbox.put(events.CoordinatorSaid(message))
        """What is done, in the transport's thread, with each message from the coordinator."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        control, requests = codec.MAX_CONTROL_BYTES, codec.MAX_REQUEST_BYTES
        queued = {zmq.SNDHWM: OUTPUTS_QUEUED}
        self._router = open_socket(self._context, zmq.ROUTER, bind=bind, max_bytes=requests, options=queued)
        self._broadcasts = open_socket(
            self._context, zmq.XSUB, connect=coordinator_input, max_bytes=control, watched=CALLS
        )
        self._reports = open_socket(
            self._context, zmq.PUSH, connect=coordinator_output, max_bytes=control, watched=CALLS
        )
        self._callers = Callers({self._broadcasts: coordinator_input, self._reports: coordinator_output})
        self._ends = self._router.get_monitor_socket(zmq.EVENT_DISCONNECTED | REFUSED)
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
        self._thread.start()

    def send_coordinator(self, message: FromRank) -> None:
        """Send when the thread comes to it. Called by the engine's thread; never blocks."""
        self._outbox.append((None, message))
        self._wakeup.set()

    def send_frontend(self, frontend: int, message: Outputs) -> None:
        self._outbox.append((frontend, message))
        self._wakeup.set()

    def close(self) -> None:
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
        doors = Doors((self._router,), watched=False)
        while True:
            ready = dict(poller.poll(self._wait_ms()))
            doors.look(time.monotonic())
            self._callers.look(time.monotonic())
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
            self.inbox.put(events.FrontendGone(to))
        return True

    # Front-ends that have died ------------------------------------------------------------------

    def _read_ends(self) -> None:
        """Some connection has ended: look which front-ends are there, soon and again. Or one was refused."""
        ended = False
        for frames in drain(self._ends, self.bad_requests, parts=2):
            refused = bool(monitored(frames) & REFUSED)
            ended = ended or not refused
            if refused:
                refusals.add(self.address)
        if not ended:
            return
        now = time.monotonic()
        self._probes_due = sorted([*self._probes_due[-1:], *(now + after_s for after_s in PROBES_S)])

    def _wait_ms(self) -> int:
        if self._backlogs or self._late:
            return READS_AGAIN_MS
        return int(max(0.0, self._probes_due[0] - time.monotonic()) * 1000) + 1 if self._probes_due else DOORS_MS

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
        until = time.monotonic() + REQUESTS_S
        for sender, frame in drain(self._router, self.bad_requests, parts=2, messages=MESSAGES_A_TURN, until=until):
            # A peer that set no routing id of ours is given one of five bytes that begins with zero.
            frontend = int.from_bytes(sender, "little")
            if len(sender) != 8 or frontend >= 2**63:
                self.bad_requests.add("identity", f"a message from {sender!r}")
                continue
            message = self.bad_requests.decoded(self._decode_request, frame)
            if message is not None:
                self._frontends.add(frontend)
                self.inbox.put(events.FrontendSaid(frontend, message, time.monotonic()))


LOOKS_A_TIMEOUT = 5
LONGEST_LOOK_S = 5.0


class StallWatch:
    """Watches how long a rank has waited for its peers, and that its steps return. It decides nothing: whom the ranks
    wait for goes to the coordinator, which finds out of all answers which rank holds the group up
    (`core/coordinator/epoch.py`), and of a step the rank's machine decides.

    It says `Waited` after `timeout_s` of waiting, again after each `timeout_s`, and when it is over; `Looked` always.

    `waiting`: what `RankGroup.waiting` says; `say`: called in the watch's thread; `progress`: the engine's.
    """

    def __init__(
        self, timeout_s: float, waiting: Callable[[], Waiting | None], say: Callable[[events.Event], object],
        progress: Callable[[], int] = lambda: 0,
    ) -> None:  # fmt: skip
        self._progress = progress
        self._timeout_s = timeout_s
        self._waiting = waiting
        self._say = say
        self._stopping = threading.Event()
        self._said_at_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="stall-watch", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()

    def look(self) -> None:
        waiting = self._waiting()
        if waiting is None or waiting.seconds < self._timeout_s:
            if self._said_at_s is not None:
                self._said_at_s = None
                self._say(events.Waited(()))
        elif self._said_at_s is None or waiting.seconds >= self._said_at_s + self._timeout_s:
            self._said_at_s = waiting.seconds
            self._say(events.Waited(waiting.ranks, waiting.collective, waiting.kind, waiting.seconds))
        self._say(events.Looked(self._progress(), waiting is not None))

    def _run(self) -> None:
        while not self._stopping.wait(min(LONGEST_LOOK_S, self._timeout_s / LOOKS_A_TIMEOUT)):
            self.look()


SWITCH_INTERVAL_S = 0.0005
"""How long the engine's thread may keep the interpreter while the transport has something to send."""


class EngineRank:
    """Drives one engine as one rank, until stopped.

    `engine`: anything that meets `Engine`; all calls to it come from the thread that calls `run`. `transport`: the
    sockets. `membership`: for lockstep engines, its place among its peers; `stall_timeout_s`: how long it waits for
    them, or a step lasts, before it says so. `on_hung`: told why, before the process ends. `on_ready`:
    called once, when the rank takes requests.
    """

    def __init__(
        self, engine: Engine, machine: Rank, transport: RankTransport, membership: GroupMembership | None = None,
        stall_timeout_s: float = 30.0, on_ready: Callable[[], None] | None = None,
        on_hung: Callable[[str], object] = print,
    ) -> None:  # fmt: skip
        self._engine = engine
        self._machine = machine
        self._transport = transport
        self._membership = membership
        waiting = membership.waiting if membership is not None else lambda: None
        self._watch = StallWatch(stall_timeout_s, waiting, self._decide, lambda: engine.progress)
        self._on_hung = on_hung
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
        self._watch.start()
        self._feed(events.Loaded())
        while not self._stopping:
            while self._take_in(block_s=0.0):
                pass
            self._feed(events.Turn(self._engine.load(), self._engine.has_work(), self._engine.kv_events()))
        self._feed(events.Leave())
        self._transport.close()
        if self._membership is not None:
            self._membership.close()
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

    def _feed(self, event: events.Event) -> None:
        for effect in self._decide(event):
            self._perform(effect)
        if self._on_ready is not None and self._machine.phase is events.Phase.READY:
            self._on_ready()
            self._on_ready = None

    def _decide(self, event: events.Event) -> list[events.Effect]:
        """Ask the machine, and send what it says; returns what else is to be done."""
        with self._deciding:
            effects = self._machine.handle(event, time.monotonic())
            # Sent before the other thread's turn to decide: messages go out in the order of decisions.
            return [effect for effect in effects if not self._send(effect)]

    def _send(self, effect: events.Effect) -> bool:
        match effect:
            case events.ToFrontend(frontend, outputs):
                self._transport.send_frontend(frontend, outputs)
            case events.ToCoordinator(message):
                self._transport.send_coordinator(message)
            case events.Urge():
                if self._membership is not None:
                    self._membership.urge()
            case events.StartAgain(why) if why:
                self._on_hung(why)
                os._exit(HUNG)
            case events.StartAgain():
                # The engine's thread may be blocked in a collective, and be it for ever.
                if not self._stopping:
                    logger.warning("rank %d: its group has ended; starting again", self._machine.rank)
                os._exit(AGAIN)
            case _:
                return False
        return True

    def _on_broadcast(self, message: ToRank) -> None:
        """In the transport's thread."""
        if isinstance(message, Refused):
            if (message.rank, message.incarnation) == (self._machine.rank, self._machine.incarnation):
                has = f"it is held by {message.holder}" if message.holder else f"there are {message.size} ranks"
                logger.error("rank %d is refused: %s; asking again", message.rank, has)
            return
        if not isinstance(message, events.IN_MID_STEP):
            if isinstance(message, Form) and self._membership is not None:
                # Its members may wait in a collective for one that is stopped, or cut off, and not of the new group.
                self._membership.break_off(message.generation)
                if self._machine.bound:
                    self._decide(events.CoordinatorSaid(message))
            self._transport.inbox.put(events.CoordinatorSaid(message))
            return
        self._decide(events.CoordinatorSaid(message))
        # What it changed may be work for the engine's thread, if that sleeps.
        self._transport.inbox.put(None)

    def _perform(self, effect: events.Effect) -> None:
        try:
            self._do(effect)
        except GroupEnded as error:
            if not self._stopping:
                logger.warning("rank %d: %s", self._machine.rank, error)
            self._feed(events.EpochEnded())

    def _do(self, effect: events.Effect) -> None:
        """Raises `engines.group.EpochEnded` where the epoch ends in a collective."""
        match effect:
            case events.Step(prefill_quota):
                self._engine.limit_prefill(prefill_quota)
                self._step()
            case events.Take(key, request):
                if logger.isEnabledFor(logging.DEBUG):
                    logger.debug("request %s: the engine has it as %d", request.name, key, extra=about(request.name))
                self._engine.add(
                    EngineRequest(
                        key, request.prompt_token_ids, request.params, request.priority, request.made_token_ids
                    )
                )
            case events.Drop(key):
                self._engine.abort(key)
            # A stop that was asked for before this has been taken out of the inbox already.
            case events.Wait(until) if not self._stopping:
                self._take_in(None if until is None else max(0.001, until - time.monotonic()))
            case events.DummyStep():
                self._engine.dummy_step()
                self._feed(events.Stepped((), self._engine.load(), self._engine.has_work(), urged=self._urged()))
            case events.Agree():
                self._feed(self._member().agree(effect))
            case events.FormGroup():
                self._form(effect)
            case events.Invoke(frontend, message):
                self._feed(self._invoked(frontend, message))
            case events.StageWeights() | events.UseWeights():
                self._feed(self._weights(effect))

    def _invoked(self, frontend: int, message: CallEngine) -> events.Invoked:
        try:
            arguments = json.loads(message.arguments)
            if not isinstance(arguments, dict):
                raise EngineError("the arguments are no object")
            said = json.dumps(self._engine.call(message.method, arguments), default=repr)
            return events.Invoked(frontend, message.call, said)
        except Exception as error:
            # The caller is told; whatever it was, the engine serves on.
            return events.Invoked(frontend, message.call, "", str(error)[:1000] or type(error).__name__)

    def _weights(self, effect: events.StageWeights | events.UseWeights) -> events.WeightsDone:
        number, used = effect.number, isinstance(effect, events.UseWeights)
        spoils = not used and "transfer" in effect.source
        try:
            source = json.loads(effect.source)
            if isinstance(effect, events.UseWeights):
                self._engine.update_weights(source, effect.keep_kv)
                return events.WeightsDone(number, used)
            return events.WeightsDone(number, used, outputs=self._engine.stage_weights(source), spoils=spoils)
        except Exception as error:
            # What a file can be wrong in is not to be foreseen; the machine decides what follows.
            logger.warning("rank %d: weights %d: %s", self._machine.rank, number, error)
            logger.debug("traceback", exc_info=True)
            return events.WeightsDone(number, used, str(error)[:1000] or type(error).__name__, spoils=spoils)

    def _form(self, wanted: events.FormGroup) -> None:
        membership = self._member()
        try:
            group = membership.form(wanted.epoch, wanted.members)
        except StartupError as error:
            logger.warning("rank %d: %s", self._machine.rank, error)
            self._feed(events.EpochEnded())
            return
        self._feed(events.Met(wanted.epoch))
        self._engine.join(group)
        self._feed(events.Formed(wanted.epoch))

    def _member(self) -> GroupMembership:
        if self._membership is None:
            raise EngineError(f"rank {self._machine.rank}: a lockstep engine without a group")
        return self._membership

    def _step(self) -> None:
        begin = time.monotonic()
        result = self._engine.step()
        seconds = time.monotonic() - begin
        load, has_work = self._engine.load(), self._engine.has_work()
        made = (result.prefilled_tokens, result.decoded_tokens, seconds)
        self._feed(events.Stepped(result.outputs, load, has_work, *made, self._urged()))

    def _urged(self) -> bool:
        return self._membership is not None and self._membership.urged()


class RankSettings(Struct, frozen=True):
    """What one life of one rank is started with, besides all settings of the deployment.

    `bind`: where front-ends reach it. `coordinator_input`, `coordinator_output`: as
    `DPCoordinator.get_engine_socket_addresses()` returns them. `group_bind`: where the other ranks reach it, for
    lockstep engines. `engine`: prepared; None for what the settings of the deployment say. `facts`: where the rank is
    to find out itself what is particular to its node (`placed.py`), those of the node that serves.
    """

    config: DeploymentConfig
    rank: int
    bind: str
    coordinator_input: str
    coordinator_output: str
    group_bind: str = ""
    engine: EngineSettings | None = None
    facts: dict[str, str] | None = None


def run_rank(settings: RankSettings, status: Connection) -> None:
    """Serve until END. Raises StartupError after telling `status` why the rank cannot be."""
    stopping: list[EngineRank | None] = [None]

    def on_end(*_: object) -> None:
        if stopping[0] is None:
            # It has joined nothing, and owes nobody anything. An exception need not end it: raised in a callback of the
            # import machinery it is printed and forgotten.
            os._exit(0)
        stopping[0].stop()

    signal.signal(END, on_end)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    try:
        stopping[0] = rank = _make(settings, status)
        rank.run()
    except (EngineError, StartupError) as error:
        status.send(Failed(str(error)))
        sys.exit(1)
    except Exception as error:
        # The supervisor has it in the log: it knows what kinds of defects earlier lives had.
        status.send(Failed(f"internal error: {type(error).__name__}: {error}", traceback.format_exc().rstrip()))
        sys.exit(70)


def _make(settings: RankSettings, status: Connection) -> EngineRank:
    if settings.facts is not None:
        from paceline.net.placed import placed

        settings = placed(settings, settings.facts, status)
    parallel = settings.config.parallel
    engine_class = find_engine(settings.config.engine.engine)
    engine_settings = settings.engine or settings.config.engine_settings(settings.rank)
    engine = engine_class.create(engine_settings, lambda what, share: status.send(Progressed(what, share)))
    incarnation = new_identity()
    transport = RankTransport(
        settings.rank, incarnation, settings.bind, settings.coordinator_input, settings.coordinator_output
    )
    membership = None
    lockstep = engine_class.steps_together(engine_settings)
    if lockstep:
        from paceline.net.group import GroupMembership

        membership = GroupMembership(settings.rank, settings.group_bind)
    server = settings.config.server
    step_s = engine_class.step_timeout_s if server.step_timeout_s is None else server.step_timeout_s
    limits = Limits(server.stall_timeout_s, step_s)
    machine = Rank(
        settings.rank, incarnation, transport.address, lockstep=lockstep,
        report_loads=not parallel.data_parallel_external_lb, sync_interval=parallel.dp_sync_interval,
        group_address=membership.address if membership is not None else "",
        prefill_quota=setting_of(parallel.prefill_quota) if lockstep else OFF,
        once=lockstep and engine_class.joins_once, limits=limits,
    )  # fmt: skip
    return EngineRank(
        engine, machine, transport, membership, limits.stall_s, on_ready=lambda: status.send(Ready()),
        on_hung=lambda why: status.send(Failed(why)),
    )  # fmt: skip
