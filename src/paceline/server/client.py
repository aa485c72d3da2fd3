"""A front-end's shell: ZeroMQ sockets in the event loop, around the front-end's machine.

The sockets' file descriptors are watched by the loop itself. Such a descriptor tells of a change, not of a state: after
a wake, and after each send, a socket is read until nothing is left, or the loop would not be told again.

A step's tokens arrive as one message, and each goes straight to its answer: no task is woken for a token.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import partial

import zmq

from paceline.core import codec
from paceline.core.frontend.events import (
    Abandon,
    Connect,
    Connected,
    Control,
    ControlGivenUp,
    Controlled,
    CoordinatorSaid,
    Deliver,
    Disconnect,
    Event,
    LinkDown,
    LinkFailed,
    LinkUp,
    Placed,
    RankSaid,
    Refuse,
    Scale,
    Scaled,
    Submit,
    Tick,
    ToCoordinator,
    ToRank,
)
from paceline.core.frontend.machine import Frontend
from paceline.core.messages import FrontendLeaving
from paceline.core.requests import AddRequest, ControlAction, Output, SamplingParams
from paceline.errors import StartupError
from paceline.net.links import BadFrames, LinkMonitor
from paceline.net.sockets import giving_up_after, open_socket
from paceline.server.delivery import Sink
from paceline.server.errors import Refused

logger = logging.getLogger("paceline.front-end")

NEVER = float("inf")
MESSAGES_A_TURN = 512
ASK_AGAIN_S = 0.25
"""A call that is not answered is repeated: the coordinator may have been away."""


class Client:
    """One front-end's connections to the coordinator and the ranks, in the running event loop.

    `machine` decides; `coordinator` is where the coordinator publishes to front-ends. `rank_timeout_s`: how long a
    rank's process may be silent before its requests go on elsewhere, 0 for ever.
    """

    def __init__(self, machine: Frontend, coordinator: str, rank_timeout_s: float = 0.0) -> None:
        self.machine = machine
        self._loop = asyncio.get_running_loop()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sinks: dict[int, Sink] = {}
        self._next_request = 1
        self._decode_outputs = codec.outputs().decode
        self._decode_coordinator = codec.to_frontend().decode
        self.garbage_ranks = BadFrames(logger, "a rank's outputs")
        self.garbage_coordinator = BadFrames(logger, "the coordinator's broadcasts")
        self._ranks: dict[int, zmq.Socket[bytes]] = {}
        self._monitors: dict[int, LinkMonitor] = {}
        self._patience = giving_up_after(rank_timeout_s)
        self._handlers: dict[zmq.Socket[bytes], Callable[[list[bytes]], None]] = {}
        self._changed: list[asyncio.Future[None]] = []
        self._calls: dict[int, asyncio.Future[Controlled | Scaled]] = {}
        self._tick_at = NEVER
        self._timer: asyncio.TimerHandle | None = None
        self._coordinator = open_socket(self._context, zmq.XSUB, connect=coordinator, max_bytes=codec.MAX_CONTROL_BYTES)
        self._watch(self._coordinator, self._on_coordinator_frames)
        self._coordinator.send(b"\x01")
        self._coordinator.send(b"\x01" + codec.frontend_topic(machine.identity))
        self._feed(Connected())

    # Requests -----------------------------------------------------------------------------------

    def submit(
        self, sink: Sink, prompt_token_ids: list[int], params: SamplingParams, rank: int | None = None,
        priority: int = 0, session: str | None = None, explain: bool = False,
    ) -> int:  # fmt: skip
        """Send a request, now or when it is granted a rank; returns its number. `sink` is told of its rank, perhaps
        before this returns, and gets its outputs. `explain`: whether it is also told what the choice of the rank was
        based on. Raises Refused where no rank takes it.
        """
        request = self._next_request
        self._next_request += 1
        submit = Submit(request, prompt_token_ids, params, rank, priority, session, explain)
        effects = self.machine.handle(submit, time.monotonic())
        # After the machine, which may ask a policy of somebody else's: what that raises must leave nothing behind.
        self._sinks[request] = sink
        for effect in effects:
            match effect:
                case Refuse(_, reason, text, retry_after_s):
                    del self._sinks[request]
                    raise Refused(reason, text, retry_after_s)
                case ToRank(to, message):
                    if not self._send(self._ranks[to], codec.encode(message), f"rank {to}"):
                        self.abandon([request])
                        raise Refused("overloaded", f"rank {to} takes no more requests now")
                case _:
                    self._perform(effect)
        self._arrange_tick()
        return request

    def abandon(self, requests: list[int]) -> None:
        """Nobody waits for these any more: abort those that still run."""
        for request in requests:
            self._sinks.pop(request, None)
        self._feed(Abandon(requests))

    # The deployment -----------------------------------------------------------------------------

    async def wait_changed(self) -> None:
        """Until ranks have come or gone."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._changed.append(waiter)
        await waiter

    async def control(self, action: ControlAction, timeout_s: float) -> Controlled:
        """Suspend the deployment in a mode, or resume it; returns when all ranks have, or somebody asked for the
        contrary. Raises asyncio.TimeoutError after `timeout_s`; what was asked for stays asked for.
        """
        done = await self._call(lambda call: Control(call, action), timeout_s)
        assert isinstance(done, Controlled)
        return done

    async def scale(self, size: int, drain_s: float, startup_s: float, timeout_s: float) -> Scaled:
        """Let the deployment have `size` ranks; returns when it has, or will not. Raises as `control` does."""
        times_ms = round(drain_s * 1000), round(startup_s * 1000)
        done = await self._call(lambda call: Scale(call, size, *times_ms), timeout_s)
        assert isinstance(done, Scaled)
        return done

    async def _call(self, event: Callable[[int], Event], timeout_s: float) -> Controlled | Scaled:
        """Ask, again and again, until the machine says what has become of it."""
        call = self._next_request
        self._next_request += 1
        done: asyncio.Future[Controlled | Scaled] = self._loop.create_future()
        self._calls[call] = done
        deadline = self._loop.time() + timeout_s
        try:
            while not done.done():
                left_s = deadline - self._loop.time()
                if left_s <= 0:
                    raise TimeoutError
                self._feed(event(call))
                await asyncio.wait([done], timeout=min(ASK_AGAIN_S, left_s))
            return done.result()
        finally:
            del self._calls[call]
            self._feed(ControlGivenUp(call))

    def close(self) -> None:
        """Say good-bye and close all sockets."""
        if self._timer is not None:
            self._timer.cancel()
        self._perform(ToCoordinator(FrontendLeaving(self.machine.identity)))
        for rank in list(self._ranks):
            self._disconnect(rank)
        self._loop.remove_reader(self._coordinator.fileno())
        # The good-bye gets a moment to go out.
        self._context.destroy(linger=200)

    # Effects ------------------------------------------------------------------------------------

    def _feed(self, event: Event) -> None:
        for effect in self.machine.handle(event, time.monotonic()):
            self._perform(effect)
        self._arrange_tick()

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
            self._feed(Tick())
        else:
            self._arrange_tick()

    def _perform(self, effect: object) -> None:
        match effect:
            case Deliver(outputs):
                self._deliver(outputs)
            # A rank that could not be connected to just now has been given up already, with all that was meant for it.
            case ToRank(rank, message) if rank in self._ranks:
                sent = self._send(self._ranks[rank], codec.encode(message), f"rank {rank}")
                if not sent and isinstance(message, AddRequest):
                    self._unsent(message.request, rank)
            case Placed(request, rank, decision):
                sink = self._sinks.get(request)
                if sink is not None:
                    sink.placed(rank, decision)
            case ToCoordinator(message):
                self._send(self._coordinator, codec.encode(message), "the coordinator")
            case Connect(member):
                self._connect(member.rank, member.address)
            case Disconnect(rank) if rank in self._ranks:
                self._disconnect(rank)
            case Controlled(call) | Scaled(call):
                waiter = self._calls.get(call)
                if waiter is not None and not waiter.done():
                    waiter.set_result(effect)
            case Refuse(request, reason, text, retry_after_s):
                sink = self._sinks.pop(request, None)
                if sink is not None:
                    sink.fail(Refused(reason, text, retry_after_s))

    def _unsent(self, request: int, rank: int) -> None:
        """A request that has waited was granted a rank that reads nothing."""
        sink = self._sinks.get(request)
        self._loop.call_soon(self.abandon, [request])
        if sink is not None:
            sink.fail(Refused("overloaded", f"rank {rank} takes no more requests now"))

    def _deliver(self, outputs: list[Output]) -> None:
        sinks = self._sinks
        for output in outputs:
            sink = sinks.get(output.request)
            if sink is None:
                continue
            if output.finish_reason is not None:
                del sinks[output.request]
            try:
                sink.put(output)
            except Exception as error:
                # A defect of ours in one answer must not take the others' tokens of this step with it.
                logger.error("internal error in an answer: %s: %s", type(error).__name__, error)
                logger.debug("traceback", exc_info=True)
                self.abandon([output.request])

    def _send(self, socket: zmq.Socket[bytes], frame: bytes, to: str) -> bool:
        """Send, or drop where the peer's queue is full. Returns whether it was sent."""
        try:
            socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            logger.warning("%s does not read: a message to it was dropped", to)
            return False
        # A send can swallow the descriptor's sign that something has come in.
        if socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:  # type: ignore[operator, arg-type]
            self._loop.call_soon(self._drain, socket)
        return True

    # Sockets ------------------------------------------------------------------------------------

    def _connect(self, rank: int, address: str) -> None:
        try:
            socket = open_socket(
                self._context,
                zmq.DEALER,
                connect=address,
                max_bytes=codec.MAX_REQUEST_BYTES,
                routing_id=self.machine.identity.to_bytes(8, "little"),
                options=self._patience,
            )
        except StartupError as error:
            logger.warning("rank %d cannot be used: %s", rank, error)
            self._feed(LinkFailed(rank))
            return
        self._ranks[rank] = socket
        self._watch(socket, self._on_rank_frames)
        monitor = self._monitors[rank] = LinkMonitor(socket, partial(self._on_link, rank))
        self._loop.add_reader(monitor.socket.fileno(), monitor.read)
        # What happened before it was watched is no change that the loop would see.
        self._loop.call_soon(monitor.read)
        self._ranks_changed()

    def _disconnect(self, rank: int) -> None:
        socket, monitor = self._ranks.pop(rank), self._monitors.pop(rank)
        self._loop.remove_reader(monitor.socket.fileno())
        monitor.close()
        self._loop.remove_reader(socket.fileno())
        del self._handlers[socket]
        socket.close()
        self._ranks_changed()

    def _on_link(self, rank: int, up: bool) -> None:
        """A connection has come up or ended. What came before its end counts."""
        self._drain(self._ranks[rank])
        if rank in self._ranks:
            self._feed(LinkUp(rank) if up else LinkDown(rank))
            self._ranks_changed()

    def _ranks_changed(self) -> None:
        waiters, self._changed = self._changed, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _watch(self, socket: zmq.Socket[bytes], handler: Callable[[list[bytes]], None]) -> None:
        self._handlers[socket] = handler
        self._loop.add_reader(socket.fileno(), self._drain, socket)

    def _drain(self, socket: zmq.Socket[bytes]) -> None:
        handler = self._handlers.get(socket)
        for _ in range(MESSAGES_A_TURN):
            if handler is None or socket.closed:
                return
            try:
                frames = socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            handler(frames)
        self._loop.call_soon(self._drain, socket)

    def _on_rank_frames(self, frames: list[bytes]) -> None:
        if len(frames) != 1:
            self.garbage_ranks.add("frames", f"{len(frames)} frames in place of one")
            return
        try:
            message = self._decode_outputs(frames[0])
        except codec.BadMessage as error:
            self.garbage_ranks.add(error.kind, error.detail)
            return
        self._feed(RankSaid(message))

    def _on_coordinator_frames(self, frames: list[bytes]) -> None:
        if len(frames) != 1:
            self.garbage_coordinator.add("frames", f"{len(frames)} frames in place of one")
            return
        try:
            message = self._decode_coordinator(frames[0])
        except codec.BadMessage as error:
            self.garbage_coordinator.add(error.kind, error.detail)
            return
        self._feed(CoordinatorSaid(message))
