"""The central queue: every interleaving of front-ends and a coordinator that binds requests late.

Ranks are abstract and independent: they take what is sent to them at once, have `slots` slots, end what they like when
they like, and report truly, sooner or later. Requests come and are aborted at any time; a broadcast may be lost at one
receiver; the coordinator may die, while something waits, with all that is on its way to it, and another one starts.

What must hold, in every state: no request is sent twice, and until the coordinator has died no rank has more than it
can run. (A new one does not know at once what the last one granted; that costs a wait and no more.) And from every
state all that was asked for can still come to an end. Timers count as due whenever they are set, with two exceptions. A
front-end loses patience with a coordinator only while there is none: so a search does not pass over a request that a
living coordinator has forgotten. And it asks again only where the coordinator does not repeat what it knows of the
queue, as it does more often than front-ends ask.

Views replace each other on a link, and what a front-end would have done on a Members that it knows it does in those
states in which it has heard it already: hearing it again changes nothing at the coordinator.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from paceline.check.search import NOW, Broken, Freezer, Move, Part, Register, Whole
from paceline.core.coordinator import events as on_coordinator
from paceline.core.coordinator.epoch import Epochs, Stalls
from paceline.core.coordinator.load_table import Publisher
from paceline.core.coordinator.machine import Coordinator
from paceline.core.coordinator.pause import Pause
from paceline.core.coordinator.wave import GroupWave
from paceline.core.frontend import events as on_frontend
from paceline.core.frontend.dispatch import Placement
from paceline.core.frontend.inflight import RetryAfter, Router
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Members, RankHello, RankReport
from paceline.core.requests import AddRequest, Output, Outputs, SamplingParams
from paceline.core.routing.least import LeastLoad

LIFE, FIRST = 7, 100
BESIDES = (Router, RetryAfter, Placement, Publisher, GroupWave, Epochs, Stalls, Pause)
"""No part of what is walked, or following from the rest: routing, which has one way to go; waves and pauses."""
Present = tuple[tuple[int, int], ...]


class Limits(Struct, frozen=True):
    """What a search covers. `aborts`, `losses`, `crashes`: at most so many. `without`: rules left out."""

    ranks: int = 1
    frontends: int = 1
    requests: int = 2
    slots: int = 1
    aborts: int = 1
    losses: int = 1
    crashes: int = 1
    without: frozenset[str] = frozenset()


class Requests:
    """Models of requests, whose moves all happen by themselves and are told as they are named.

    `besides`: classes that are no part of what is walked.
    """

    def __init__(self, *besides: type) -> None:
        freeze = Freezer(*besides)
        self.machines: Register[Any] = Register(freeze)
        self.messages: Register[Any] = Register(freeze)

    def stuck(self, _: Any) -> str:
        return "a request can never come to its end any more"

    def tell(self, _: Any, what: tuple[Any, ...], __: Any) -> str:
        return str(what[0])

    def does(self, machine: Part[Any], event: Any, timer: str = "") -> tuple[Any, tuple[Any, ...]]:
        """What becomes of a machine by an event, and its effects."""
        return machine.after(handles, self.messages.part(event), timer)


def handles(machine: Any, event: Part[Any], timer: str = "") -> tuple[Any, ...]:
    """A machine does what is due. A view is numbered when it is read, as the next one."""
    happens = event.thing
    if isinstance(happens, on_frontend.CoordinatorSaid) and isinstance(happens.message, LoadView):
        happens = on_frontend.CoordinatorSaid(replace(happens.message, number=machine.next_view))
    if timer:
        machine.expire(timer, NOW)
    effects = machine.handle(happens, NOW)
    if isinstance(machine, Coordinator):
        machine.moment_passes()
    return tuple(effects)


def told(what: str, do: Callable[..., None], *given: Any) -> Move:
    """A move with its name."""
    return Move((what,), True, do, given)


class State(Whole):
    """All parts. `taken`, `present`, `step`, `reported`, `known`: of each rank. `open`: requests whose clients wait."""

    def __init__(self, limits: Limits, machines: list[Part[Frontend]]) -> None:
        ranks, count = limits.ranks, limits.frontends
        self.machines = machines
        self.coordinator: Part[Coordinator] | None = None
        self.lives = 0
        self.taken: list[tuple[int, ...]] = [(0,) * count] * ranks
        self.present: list[Present] = [()] * ranks
        self.step, self.reported, self.known = [0] * ranks, [False] * ranks, [False] * ranks
        self.up: list[tuple[Part[Any], ...]] = [()] * count
        self.down: list[tuple[Part[Any], ...]] = [()] * count
        self.asked: frozenset[int] = frozenset()
        self.open: frozenset[int] = frozenset()
        self.sent: frozenset[int] = frozenset()
        self.aborts, self.spare, self.crashes = limits.aborts, limits.losses, limits.crashes


class Dispatch(Requests):
    """The moves of one deployment."""

    def __init__(self, limits: Limits) -> None:
        super().__init__(*BESIDES)
        self.limits = limits

    def start(self) -> State:
        """Ready and idle: everybody knows everybody, and shares are handed out."""
        limits, count = self.limits, self.limits.frontends
        machines = [
            self.machines.part(Frontend(FIRST + at, LeastLoad(at, count), late_binding=True, without=limits.without))
            for at in range(count)
        ]
        state = State(limits, machines)
        self._begin(state)
        for index in range(count):
            self._frontend(state, index, on_frontend.Connected())
        for _ in range(6):
            for rank in range(limits.ranks):
                self._report(state, rank)
            for index in range(count):
                while state.up[index]:
                    self._up(state, index)
                while state.down[index]:
                    self._down(state, index)
        return state

    def over(self, state: State) -> bool:
        """Whether nobody waits for anything."""
        if (
            state.open
            or state.coordinator is None
            or any(machine.thing.waiting_for_grant() for machine in state.machines)
        ):
            return False
        return not list(state.coordinator.thing.dispatcher.descriptors())

    def key(self, state: State) -> Hashable:
        return state.lives > 1, state.values("spare", "lives")

    # Moves ------------------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[Move]:
        for request in range(1, self.limits.requests + 1):
            if request not in state.asked:
                yield told(f"request {request} comes", self._submit, request)
            elif request in state.open and state.aborts:
                yield told(f"the client of request {request} goes", self._abort, request)
        for index in range(self.limits.frontends):
            yield from self._link_moves(state, index)
        for rank, present in enumerate(state.present):
            for pair in present[: self.limits.slots]:
                yield told(f"rank {rank} ends request {pair[1]}", self._end, rank, pair)
            if state.coordinator is not None and not state.reported[rank]:
                yield told(f"rank {rank} reports", self._report, rank)
        if state.coordinator is None:
            yield told("a new coordinator starts", self._begin)
            return
        if state.crashes and any(machine.thing.waiting_for_grant() for machine in state.machines):
            yield told("the coordinator dies", self._crash)
        if "queue" in state.coordinator.thing.timers() and not any(state.down) and max(map(len, state.up)) <= 1:
            yield told("the coordinator says again what it granted", self._coordinator, on_coordinator.Tick(), "queue")
        if not any(state.down) and state.spare < self.limits.losses:
            yield told("the coordinator publishes", self._coordinator, on_coordinator.FrontendSubscribed())

    def _link_moves(self, state: State, index: int) -> Iterator[Move]:
        who, timers = f"front-end {index}", state.machines[index].thing.timers()
        up, down, coordinator = state.up[index], state.down[index], state.coordinator
        if coordinator is not None and up:
            yield told(f"the coordinator hears {type(up[0].thing).__name__} of {who}", self._up, index)
        if down:
            name = type(down[0].thing).__name__
            yield told(f"{who} hears {name}", self._down, index)
            if state.spare:
                yield told(f"{name} is lost on its way to {who}", self._lose, index)
        if coordinator is None:
            if "silence" in timers:
                yield told(f"{who} loses patience", self._frontend, index, on_frontend.Tick(), "silence")
        elif "ask" in timers and not up and not down and "queue" not in coordinator.thing.timers():
            yield told(f"{who} asks again", self._frontend, index, on_frontend.Tick(), "ask")

    # What happens -----------------------------------------------------------------------------------

    def _submit(self, state: State, request: int) -> None:
        state.asked, state.open = state.asked | {request}, state.open | {request}
        event = on_frontend.Submit(request, [1], SamplingParams(1))
        self._frontend(state, request % self.limits.frontends, event)

    def _abort(self, state: State, request: int) -> None:
        state.aborts, state.open = state.aborts - 1, state.open - {request}
        self._frontend(state, request % self.limits.frontends, on_frontend.Abandon([request]))

    def _up(self, state: State, index: int) -> None:
        first, state.up[index] = state.up[index][0], state.up[index][1:]
        self._coordinator(state, on_coordinator.FrontendSaid(first.thing))

    def _down(self, state: State, index: int) -> None:
        first, state.down[index] = state.down[index][0], state.down[index][1:]
        self._frontend(state, index, on_frontend.CoordinatorSaid(first.thing))

    def _lose(self, state: State, index: int) -> None:
        state.spare, state.down[index] = state.spare - 1, state.down[index][1:]

    def _take(self, state: State, rank: int, index: int, message: Any) -> None:
        if isinstance(message, AddRequest):
            if message.request in state.sent:
                raise Broken(f"request {message.request} is sent twice")
            state.sent = state.sent | {message.request}
            taken = state.taken[rank]
            state.taken[rank] = (*taken[:index], message.number, *taken[index + 1 :])
            state.present[rank] = (*state.present[rank], (index, message.request))
            if state.lives == 1 and state.coordinator is not None and len(state.present[rank]) > self.limits.slots:
                raise Broken(f"rank {rank} has {len(state.present[rank])} requests and room for {self.limits.slots}")
        else:
            gone = [(index, request) for request in message.requests]
            state.present[rank] = tuple(one for one in state.present[rank] if one not in gone)
        self._changed(state, rank)

    def _end(self, state: State, rank: int, which: tuple[int, int]) -> None:
        state.present[rank] = tuple(one for one in state.present[rank] if one != which)
        self._changed(state, rank)
        outputs = Outputs(rank, LIFE, [Output(which[1], [1], finish_reason="length")])
        self._frontend(state, which[0], on_frontend.RankSaid(outputs))

    def _changed(self, state: State, rank: int) -> None:
        state.step[rank], state.reported[rank] = state.step[rank] + 1, False

    def _report(self, state: State, rank: int) -> None:
        if not state.known[rank]:
            state.known[rank] = True
            hello = RankHello(PROTOCOL_VERSION, rank, LIFE, f"tcp://rank-{rank}", True)
            self._coordinator(state, on_coordinator.RankSaid(hello))
        state.reported[rank] = True
        running = min(self.limits.slots, len(state.present[rank]))
        load = Load(len(state.present[rank]) - running, running, self.limits.slots)
        taken = {FIRST + index: number for index, number in enumerate(state.taken[rank]) if number}
        report = RankReport(rank, LIFE, state.step[rank], 0, False, load, taken)
        self._coordinator(state, on_coordinator.RankSaid(report))

    def _crash(self, state: State) -> None:
        state.crashes, state.coordinator = state.crashes - 1, None
        state.up = [()] * self.limits.frontends

    def _begin(self, state: State) -> None:
        state.lives += 1
        limits = self.limits
        machine = Coordinator(
            limits.ranks, state.lives, 0.0, lockstep=False, fresh=state.lives == 1, without=limits.without
        )
        state.coordinator = self.machines.part(machine)
        state.known, state.reported = [False] * limits.ranks, [False] * limits.ranks
        self._coordinator(state, on_coordinator.FrontendSubscribed())

    def _coordinator(self, state: State, event: on_coordinator.Event, timer: str = "") -> None:
        if state.coordinator is None:
            return
        state.coordinator, said = self.does(state.coordinator, event, timer)
        for effect in said:
            if isinstance(effect, on_coordinator.ToFrontends):
                for index, link in enumerate(state.down):
                    state.down[index] = self._broadcast(state.machines[index].thing, link, effect.message)

    def _broadcast(self, machine: Frontend, link: tuple[Part[Any], ...], message: Any) -> tuple[Part[Any], ...]:
        if isinstance(message, Members) and machine.statistics()["coordinator"] == message.coordinator:
            return link
        if isinstance(message, LoadView):
            link = tuple(one for one in link if not isinstance(one.thing, LoadView))
            message = replace(message, number=0)
        word = self.messages.part(message)
        return link if word in link else (*link, word)

    def _frontend(self, state: State, index: int, event: on_frontend.Event, timer: str = "") -> None:
        state.machines[index], effects = self.does(state.machines[index], event, timer)
        for effect in effects:
            match effect:
                case on_frontend.ToCoordinator(message):
                    state.up[index] = (*state.up[index], self.messages.part(message))
                case on_frontend.ToRank(rank, message):
                    self._take(state, rank, index, message)
                case on_frontend.Deliver(outputs):
                    state.open = state.open - {output.request for output in outputs}
                case on_frontend.Refuse(request):
                    state.open = state.open - {request}
