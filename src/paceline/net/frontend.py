"""A front-end's shell: ZeroMQ sockets in the event loop, around the front-end's machine.

A step's tokens arrive as one message, and each goes straight to its response: no task is woken for a token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

import zmq

from paceline.core import codec
from paceline.core.coordinator.events import Note
from paceline.core.frontend import events
from paceline.core.frontend.history import History
from paceline.core.frontend.journal import Journal
from paceline.core.frontend.machine import Frontend
from paceline.core.frontend.timeline import Kept, Step, Timeline, Timelines
from paceline.core.messages import FromFrontend, FrontendLeaving, Member, Members, ToFrontend
from paceline.core.rank.requests import put_together
from paceline.core.requests import (
    AddRequest,
    ControlAction,
    FromFrontendToRank,
    Output,
    Outputs,
    SamplingParams,
    WeightAction,
)  # fmt: skip
from paceline.errors import StartupError
from paceline.log import defect, note
from paceline.net.links import CALLS, BadFrames, Callers, LinkMonitor
from paceline.net.sockets import DOORS_S, drain, giving_up_after, has_message, open_socket

logger = logging.getLogger("paceline.front-end")

T = TypeVar("T")

NEVER = float("inf")
MESSAGES_A_TURN = 512
REVIVE_AGAIN_S = 1.0

OnRequest = Callable[[events.Placed | Output | events.Refuse], None]
"""Is told what becomes of a request: its rank, each output, or why there will be none. It must not wait."""


class Observer(Protocol):
    """Who counts what happens to requests, and changes nothing."""

    def placed(self, rank: int, waited_s: float) -> None: ...
    def refused(self, reason: str) -> None: ...
    def aborted(self, rank: int) -> None: ...
    def stepped(self, step: Step, now: float) -> None: ...
    def viewed(self, now: float) -> None: ...
    def moved(self, why: str) -> None: ...


class FrontendShell:
    """One front-end's connections to the coordinator and the ranks, in the running event loop.

    `machine` decides; `coordinator` is where the coordinator publishes to front-ends. `rank_timeout_s`: how long a
    rank's process may be silent before its requests go on elsewhere, 0 for ever. `log_slow_s`: requests that take so
    long are logged, None for none.
    """

    def __init__(
        self, machine: Frontend, coordinator: str, rank_timeout_s: float = 0.0, log_slow_s: float | None = None
    ) -> None:
        self.machine = machine
        self.timelines = Timelines(log_slow_s)
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.observer: Observer | None = None
        self._told: dict[int, OnRequest] = {}
        self._next_request = 1
        self._changed = asyncio.Event()
        self._calls: dict[int, asyncio.Future[events.Controlled | events.Scaled | events.Called]] = {}
        self._tick_at = NEVER
        self._timer: asyncio.TimerHandle | None = None
        self._journal = Journal(machine)
        self.history = History(machine, self.timelines, lockstep=machine.lockstep)
        self._look_again: asyncio.TimerHandle | None = None
        self._ranks = RankConnections(self._context, machine.identity, rank_timeout_s, self._feed, self._ranks_changed)
        limit = codec.MAX_CONTROL_BYTES
        subscriber = open_socket(self._context, zmq.XSUB, connect=coordinator, max_bytes=limit, watched=CALLS)
        self._callers = Callers({subscriber: coordinator})
        bad_frames = BadFrames(logger, "the coordinator's broadcasts")
        said = codec.to_frontend()
        self._coordinator = WatchedSocket(subscriber, said, bad_frames, self._on_coordinator)
        subscriber.send(b"\x01")
        subscriber.send(b"\x01" + codec.frontend_topic(machine.identity))
        self._feed(events.Connected())
        self._call_again()

    # Requests -----------------------------------------------------------------------------------

    def submit(
        self, told: OnRequest, prompt_token_ids: list[int], params: SamplingParams, rank: int | None = None,
        priority: int = 0, session: str | None = None, explain: bool = False, timeline: Timeline | None = None,
        tenant: int = 0, weight: float = 1.0, deadline: float = float("inf"),
    ) -> int:  # fmt: skip
        """Send a request, now or when it is granted a rank; returns its number. `told` may be called before this
        returns. `explain`: whether it is also told what the choice of the rank was based on. `timeline`: of the
        client's request that this is a part of. `deadline`: of the monotonic clock. All else as in events.Submit.
        """
        request = self._next_request
        self._next_request += 1
        name, now = "" if timeline is None else timeline.name, time.monotonic()
        submit = events.Submit(
            request, prompt_token_ids, params, rank, priority, session, explain, name=name,
            tenant=tenant, weight=weight, deadline=deadline,
        )  # fmt: skip
        effects = self.machine.handle(submit, now)
        # After the machine, which may ask a policy of somebody else's: what that raises must leave nothing behind.
        self._told[request] = told
        self.timelines.submitted(request, len(prompt_token_ids), timeline, now)
        self._perform(effects)
        return request

    def abandon(self, requests: list[int]) -> None:
        """Nobody waits for these any more: abort those that still run."""
        for request in requests:
            self._told.pop(request, None)
        for choice in self.timelines.gone(requests, time.monotonic()):
            if self.observer is not None:
                self.observer.aborted(choice.rank)
        self._feed(events.Abandon(requests))

    def ended(self, timeline: Timeline, status: int) -> Kept:
        """A client has its answer, of this HTTP status, or has gone (0): its timeline is kept, and returned."""
        kept, notes = self.timelines.ended(timeline, status, time.monotonic())
        self._write(notes)
        return kept

    # The deployment -----------------------------------------------------------------------------

    async def wait_changed(self) -> None:
        """Until ranks have come or gone."""
        await self._changed.wait()

    async def control(self, action: ControlAction, timeout_s: float) -> events.Controlled:
        """Pause the deployment in a mode, or resume it; returns when all ranks have, or somebody asked for the
        contrary. Raises asyncio.TimeoutError after `timeout_s`; what was asked for stays asked for.
        """
        done = await self._call(lambda call: events.Control(call, action), timeout_s)
        assert isinstance(done, events.Controlled)
        return done

    async def update(self, timeout_s: float, action: WeightAction, **given: Any) -> events.Controlled:
        """Have weights made ready, put in force and so on, as `events.Update` has it; returns when all ranks have done
        so. Raises as `control` does.
        """
        done = await self._call(lambda call: events.Update(call, action, **given), timeout_s)
        assert isinstance(done, events.Controlled)
        return done

    async def scale(self, size: int, drain_s: float, startup_s: float, timeout_s: float) -> events.Scaled:
        """Let the deployment have `size` ranks; returns when it has, or will not. Raises as `control` does."""
        times_ms = round(drain_s * 1000), round(startup_s * 1000)
        done = await self._call(lambda call: events.Scale(call, size, *times_ms), timeout_s)
        assert isinstance(done, events.Scaled)
        return done

    async def call_ranks(
        self, method: str, arguments: str, ranks: Sequence[int] | None, timeout_s: float
    ) -> events.Called:
        """Have the ranks' engines do something; returns what each has said. Raises asyncio.TimeoutError."""
        done = await self._call(lambda call: events.CallRanks(call, method, arguments, ranks), timeout_s)
        assert isinstance(done, events.Called)
        return done

    async def revive(self, rank: int | None, timeout_s: float) -> list[int]:
        """Have a rank, or all that are missing, started again; returns which, once they are ready. Raises
        asyncio.TimeoutError after `timeout_s`.
        """
        machine, asked = self.machine, set(self.machine.missing if rank is None else [rank])
        async with asyncio.timeout(timeout_s):
            while missing := asked.intersection(machine.missing):
                self._feed(events.Again(sorted(missing)))
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self.wait_changed(), REVIVE_AGAIN_S)
        return sorted(asked)

    async def _call(
        self, event: Callable[[int], events.Event], timeout_s: float
    ) -> events.Controlled | events.Scaled | events.Called:
        """Ask, and wait until the machine says what has become of it."""
        call = self._next_request
        self._next_request += 1
        done = self._calls[call] = self._loop.create_future()
        try:
            self._feed(event(call))
            return await asyncio.wait_for(done, timeout_s)
        finally:
            del self._calls[call]
            self._feed(events.ControlGivenUp(call))

    def close(self) -> None:
        for timer in (self._timer, self._look_again, self._calling):
            if timer is not None:
                timer.cancel()
        self._send_coordinator(FrontendLeaving(self.machine.identity))
        self._ranks.close()
        self._loop.remove_reader(self._coordinator.socket.fileno())
        # The good-bye gets a moment to go out.
        self._context.destroy(linger=200)

    # Events and effects -------------------------------------------------------------------------

    def _feed(self, event: events.Event) -> None:
        self._perform(self.machine.handle(event, time.monotonic()))
        if type(event) is not events.RankSaid:
            self._write(self._journal.look(time.monotonic(), getattr(event, "rank", None)))

    def _on_coordinator(self, message: ToFrontend) -> None:
        if type(message) is Members:
            # A rank that ends what it has and then leaves may be seen to leave first: its sockets are others.
            self._ranks.read()
        wanted = self.machine.next_view
        self._feed(events.CoordinatorSaid(message))
        # A repeated one is no news.
        if self.observer is not None and self.machine.next_view != wanted:
            self.observer.viewed(time.monotonic())

    def _write(self, notes: Sequence[Note]) -> None:
        """To the log; and see to it that what is under way is looked at again."""
        for said in notes:
            note(logger, said)
            self.history.say(said.text, said.urgent, time.monotonic())
        if self._look_again is None and (deadline := self._journal.deadline) < NEVER:
            wait_s = max(0.0, deadline - time.monotonic())
            self._look_again = self._loop.call_later(wait_s, self._look)

    def _call_again(self) -> None:
        self._callers.look(time.monotonic())
        self._calling = self._loop.call_later(DOORS_S, self._call_again)

    def _look(self) -> None:
        self._look_again = None
        self._write(self._journal.look(time.monotonic()))

    def _perform(self, effects: Sequence[events.Effect]) -> None:
        for effect in effects:
            match effect:
                case events.Deliver(outputs):
                    self._deliver(outputs)
                case events.ToRank(rank, message):
                    self._send_rank(rank, message)
                case events.Placed(request):
                    self._tell(request, effect)
                case events.Moved():
                    self.timelines.moved(effect, time.monotonic())
                    self._journal.moved(effect)
                    if self.observer is not None:
                        self.observer.moved(effect.why)
                case events.ToCoordinator(to_coordinator):
                    self._send_coordinator(to_coordinator)
                case events.Connect(member):
                    self._ranks.connect(member)
                case events.Disconnect(rank):
                    self._ranks.disconnect(rank)
                case events.Controlled(call) | events.Scaled(call) | events.Called(call):
                    waiter = self._calls.get(call)
                    if waiter is not None and not waiter.done():
                        waiter.set_result(effect)
                case events.Refuse(request):
                    name = self.timelines.name(request)
                    self._tell(request, effect)
                    self._told.pop(request, None)
                    self._write(self._journal.refused(effect, time.monotonic(), name))
        self._arrange_tick()

    def _tell(self, request: int, news: events.Placed | events.Refuse) -> None:
        now = time.monotonic()
        if isinstance(news, events.Placed):
            waited_s = self.timelines.placed(news, now)
            if self.observer is not None and waited_s is not None:
                self.observer.placed(news.rank, waited_s)
        else:
            self.timelines.refused(news, now)
            if self.observer is not None:
                self.observer.refused(news.reason)
        told = self._told.get(request)
        if told is not None:
            told(news)

    def _deliver(self, outputs: list[Output]) -> None:
        told, now = self._told, time.monotonic()
        step = self.timelines.outputs(outputs, now)
        if self.observer is not None:
            self.observer.stepped(step, now)
        for output in outputs:
            tell = told.get(output.request)
            if tell is None:
                continue
            if output.finish_reason is not None:
                del told[output.request]
            try:
                tell(output)
            except Exception as error:
                # A defect of ours in one response must not take the others' tokens of this step with it.
                name = self.timelines.name(output.request)
                defect(logger, f"internal error in the answer to request {name}", error, name)
                self.abandon([output.request])

    def _send_rank(self, rank: int, message: FromFrontendToRank) -> None:
        if not self._ranks.send(rank, message) and isinstance(message, AddRequest):
            # After the effects that are under way: the machine is not to be called from within.
            self._loop.call_soon(self._feed, events.Unsent(message.request))

    def _send_coordinator(self, message: FromFrontend) -> None:
        self._coordinator.send(codec.encode(message), "the coordinator")

    def _ranks_changed(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _arrange_tick(self) -> None:
        """See to it that the machine gets its Tick. One that comes too early asks again."""
        deadline = self.machine.deadline
        if deadline < self._tick_at:
            if self._timer is not None:
                self._timer.cancel()
            self._tick_at = deadline
            self._timer = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._tick)

    def _tick(self) -> None:
        self._tick_at, self._timer = NEVER, None
        if time.monotonic() >= self.machine.deadline:
            self._feed(events.Tick())
        else:
            self._arrange_tick()


# Sockets ------------------------------------------------------------------------------------------


class RankConnections:
    """Connections to ranks, as they come and go. `feed`: the machine's door; `changed`: called when they have."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], identity: int, rank_timeout_s: float,
        feed: Callable[[events.Event], None], changed: Callable[[], None],
    ) -> None:  # fmt: skip
        self._context = context
        self._routing_id = identity.to_bytes(8, "little")
        self._patience = giving_up_after(rank_timeout_s)
        self._feed = feed
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._decoder = codec.outputs()
        self._bad_frames = BadFrames(logger, "a rank's outputs")
        self._sockets: dict[int, WatchedSocket[Outputs]] = {}
        self._monitors: dict[int, LinkMonitor] = {}

    def send(self, rank: int, message: FromFrontendToRank) -> bool:
        """Send, or drop where the rank does not read. Returns False where it was dropped."""
        socket = self._sockets.get(rank)
        # A rank that could not be connected to has been given up already, with all that was meant for it.
        return socket is None or socket.send(codec.encode(message), f"rank {rank}")

    def connect(self, member: Member) -> None:
        """Connect to a life of a rank. What cannot be connected to is `LinkFailed`."""
        rank = member.rank
        try:
            socket = open_socket(
                self._context, zmq.DEALER, connect=member.address, max_bytes=codec.MAX_REQUEST_BYTES,
                routing_id=self._routing_id, options=self._patience,
            )  # fmt: skip
        except StartupError as error:
            logger.warning("rank %d cannot be used: %s", rank, error)
            self._feed(events.LinkFailed(rank))
            return
        feed = self._feed
        self._sockets[rank] = WatchedSocket(
            socket, self._decoder, self._bad_frames, lambda message: feed(events.RankSaid(message)), put_together
        )
        monitor = self._monitors[rank] = LinkMonitor(socket, lambda up: self._on_link(rank, up))
        self._loop.add_reader(monitor.socket.fileno(), monitor.read)
        # What happened before it was watched is no change that the loop would see.
        self._loop.call_soon(monitor.read)
        self._changed()

    def disconnect(self, rank: int) -> None:
        """Close the connection to a rank, if there is one."""
        if rank not in self._sockets:
            return
        socket, monitor = self._sockets.pop(rank), self._monitors.pop(rank)
        self._loop.remove_reader(monitor.socket.fileno())
        monitor.close()
        socket.close()
        self._changed()

    def read(self) -> None:
        """Take in what has come from ranks, before news of them."""
        for rank in list(self._sockets):
            if (socket := self._sockets.get(rank)) is not None:
                socket.drain()

    def close(self) -> None:
        for rank in list(self._sockets):
            self.disconnect(rank)

    def _on_link(self, rank: int, up: bool) -> None:
        """A connection has come up or ended. What came before its end counts."""
        self._sockets[rank].drain()
        if rank in self._sockets:
            self._feed(events.LinkUp(rank) if up else events.LinkDown(rank))
            self._changed()


class WatchedSocket(Generic[T]):
    """A socket of which the event loop watches the file descriptor. `on_message` gets what comes; `together` makes less
    of what has come meanwhile.

    Such a descriptor tells of a change, not of a state: after a wake, and after each send, the socket is read until
    nothing is left, or the loop would not be told again.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], decoder: codec.Decoder[T], bad_frames: BadFrames,
        on_message: Callable[[T], None], together: Callable[[list[T]], list[T]] = list,
    ) -> None:  # fmt: skip
        self.socket = socket
        self._decode = decoder.decode
        self._bad_frames = bad_frames
        self._on_message = on_message
        self._together = together
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(socket.fileno(), self.drain)

    def send(self, frame: bytes, to: str) -> bool:
        """Send, or drop where the peer's queue is full. Returns whether it was sent."""
        try:
            self.socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("%s does not read: a message to it was dropped", to)
            return False
        # A send can swallow the descriptor's sign that something has come in.
        if has_message(self.socket):
            self._loop.call_soon(self.drain)
        return True

    def drain(self) -> None:
        """Read what is there; the rest in the loop's next turn, where it is much."""
        decoded = self._bad_frames.decoded
        frames = drain(self.socket, self._bad_frames, messages=MESSAGES_A_TURN)
        come = [message for [frame] in frames if (message := decoded(self._decode, frame)) is not None]
        for message in come if len(come) < 2 else self._together(come):
            self._on_message(message)
        if not self.socket.closed and has_message(self.socket):
            self._loop.call_soon(self.drain)

    def close(self) -> None:
        self._loop.remove_reader(self.socket.fileno())
        self.socket.close()
