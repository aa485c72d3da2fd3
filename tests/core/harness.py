"""Real machines joined by fake links, in virtual time: no mock, no socket, no clock.

Every message is encoded and decoded on its way; every link is first in first out and can be slow, held, or made to
lose a message, also a broadcast to one receiver only. In lockstep each step and each agreement is a barrier over all
ranks, so that a rank which is not woken really stops the others, and two ranks in different collectives fail the
test at once.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace

from paceline.core import codec
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.rank import events as rank_events
from paceline.core.rank.events import Phase
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import agreed
from paceline.core.requests import AddRequest, SamplingParams


def find(things: Iterable[Any], kind: type, **fields: object) -> list[Any]:
    """The things of this kind whose named fields have these values."""
    return [
        thing
        for thing in things
        if isinstance(thing, kind) and all(getattr(thing, name) == value for name, value in fields.items())
    ]


def said(effects: Iterable[Any], kind: type, **fields: object) -> list[Any]:
    """The messages of this kind that the effects send, with these values."""
    return find((getattr(effect, "message", None) for effect in effects), kind, **fields)


def one(things: list[Any]) -> Any:
    """The only thing there is."""
    assert len(things) == 1, f"{len(things)} in place of one: {things}"
    return things[0]


class World:
    """Virtual time: what is to happen, in order."""

    def __init__(self) -> None:
        self.now = 0.0
        self.after_each: Callable[[], None] = lambda: None
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def at(self, when: float, action: Callable[[], None]) -> None:
        heapq.heappush(self._agenda, (max(when, self.now), next(self._order), action))

    def run_for(self, seconds: float) -> None:
        end = self.now + seconds
        while self._agenda and self._agenda[0][0] <= end:
            self._next()
        self.now = end

    def run_until(self, condition: Callable[[], bool], limit_s: float = 30.0) -> float:
        """Run until the condition holds; returns how long that took. Fails where it does not by then."""
        begin = self.now
        while not condition():
            assert self._agenda, "nothing will ever happen again, and the condition does not hold"
            assert self._agenda[0][0] <= begin + limit_s, f"the condition does not hold after {limit_s} s"
            self._next()
        return self.now - begin

    def _next(self) -> None:
        self.now, _, action = heapq.heappop(self._agenda)
        action()
        self.after_each()


class Link:
    """One direction between two machines: frames, first in first out."""

    def __init__(self, world: World, decoder: codec.Decoder[Any], deliver: Callable[[Any], None], delay_s: float):
        self.delay_s = delay_s
        self.held = False
        self.closed = False
        self._world = world
        self._decoder = decoder
        self._deliver = deliver
        self._frames: deque[bytes] = deque()
        self._arrived = 0
        self._last_arrival = 0.0
        self._to_lose: list[type] = []

    def lose(self, kind: type, times: int = 1) -> None:
        """Lose the next messages of this kind."""
        self._to_lose += [kind] * times

    def lose_no_more(self) -> None:
        self._to_lose.clear()

    def send(self, message: Any) -> None:
        for kind in self._to_lose:
            if isinstance(message, kind):
                self._to_lose.remove(kind)
                return
        self._frames.append(codec.encode(message))
        self._last_arrival = max(self._last_arrival, self._world.now + self.delay_s)
        self._world.at(self._last_arrival, self._arrive)

    def hold(self) -> None:
        """Deliver nothing until `release`."""
        self.held = True

    def release(self) -> None:
        self.held = False
        self._flush()

    def _arrive(self) -> None:
        self._arrived += 1
        if not self.held:
            self._flush()

    def _flush(self) -> None:
        while self._arrived and not self.held:
            self._arrived -= 1
            message = self._decoder.decode(self._frames.popleft())
            if not self.closed:
                self._deliver(message)


class StepPart(Struct, frozen=True):
    """A rank in a step. `urging`: it wants all to agree after it."""

    urging: bool


class Group:
    """The collectives of lockstep ranks. `latency_s`: what each takes once all have entered."""

    def __init__(self, world: World, size: int, latency_s: float) -> None:
        self._world = world
        self._size = size
        self._latency_s = latency_s
        self._entered: dict[int, tuple[object, Callable[[Any], None]]] = {}

    def enter(self, rank: int, value: object, done: Callable[[Any], None]) -> None:
        assert rank not in self._entered, f"rank {rank} is in two collectives"
        self._entered[rank] = (value, done)
        kinds = {type(value) for value, _ in self._entered.values()}
        assert len(kinds) == 1, f"ranks in different collectives: {self._entered}"
        if len(self._entered) == self._size:
            entered, self._entered = self._entered, {}
            values = [value for value, _ in entered.values()]
            for _, finish in entered.values():
                self._world.at(self._world.now + self._latency_s, lambda finish=finish: finish(values))

    def leave(self, rank: int) -> None:
        """The rank's process is gone."""
        self._entered.pop(rank, None)


class Engine(Protocol):
    """What a rank's shell needs of an engine."""

    def add(self, key: int, request: AddRequest) -> None: ...
    def abort(self, key: int) -> None: ...
    def has_work(self) -> bool: ...
    def step(self, prefill_quota: int | None = None) -> rank_events.Stepped: ...
    def load(self) -> Load: ...


class RankShell:
    """Turns one rank's machine and engine as `runtime/rank_process.py` does.

    `group`: its collectives in lockstep, else None. `to_coordinator`: its link there. `to_frontends`: the links
    back to those that are connected, by identity.
    """

    def __init__(
        self, world: World, machine: Rank, engine: Engine, group: Group | None, step_s: float, to_coordinator: Link
    ) -> None:
        self.world, self.machine, self.engine = world, machine, engine
        self.to_coordinator = to_coordinator
        self.to_frontends: dict[int, Link] = {}
        self.broadcasts = Link(world, codec.to_rank(), self._coordinator_said, to_coordinator.delay_s)
        self.alive = True
        self.dummy_steps = 0
        self._group = group
        self._step_s = step_s
        self._busy = False
        self._urging = False
        self._inbox: deque[rank_events.Event] = deque()

    def arrive(self, event: rank_events.Event) -> None:
        """Something came in; it is handled now, or when the step is over."""
        self._inbox.append(event)
        self.world.at(self.world.now, self.turn)

    def turn(self) -> None:
        if self._busy or not self.alive or self.machine.phase is Phase.LEFT:
            return
        while self._inbox:
            self._feed(self._inbox.popleft())
        self._feed(rank_events.Turn(self.engine.load(), self.engine.has_work()))

    def kill(self) -> None:
        """The process is gone, without a word."""
        self.alive = False
        self.to_coordinator.closed = self.broadcasts.closed = True
        for link in self.to_frontends.values():
            link.closed = True
        if self._group is not None:
            self._group.leave(self.machine.rank)

    def _coordinator_said(self, message: Any) -> None:
        # As in `runtime/rank_process.py`, a question is answered in the midst of a step too.
        if self._busy and isinstance(message, rank_events.IN_MID_STEP):
            self._feed(rank_events.CoordinatorSaid(message))
        else:
            self.arrive(rank_events.CoordinatorSaid(message))

    def _feed(self, event: rank_events.Event) -> None:
        for effect in self.machine.handle(event, self.world.now):
            self._perform(effect)

    def _perform(self, effect: rank_events.Effect) -> None:
        match effect:
            case rank_events.ToCoordinator(message):
                self.to_coordinator.send(message)
            case rank_events.ToFrontend(frontend, outputs):
                self.to_frontends[frontend].send(outputs)
            case rank_events.Take(key, request):
                self.engine.add(key, request)
            case rank_events.Drop(key):
                self.engine.abort(key)
            case rank_events.Step() | rank_events.DummyStep():
                self._busy = True
                if self._group is not None:
                    part, self._urging = StepPart(self._urging), False
                    self._group.enter(self.machine.rank, part, lambda parts: self._stepped(effect, parts))
                else:
                    self.world.at(self.world.now + self._step_s, lambda: self._stepped(effect))
            case rank_events.Agree():
                assert self._group is not None
                self._busy = True
                self._group.enter(self.machine.rank, effect, self._agreed)
            case rank_events.Urge():
                self._urging = True
            case rank_events.Again():
                self.world.at(self.world.now, self.turn)
            case rank_events.Wait(until) if until is not None:
                self.world.at(until, self.turn)

    def _stepped(self, effect: object, parts: Sequence[StepPart] = ()) -> None:
        self._busy = False
        if not self.alive:
            return
        urged = any(part.urging for part in parts)
        if isinstance(effect, rank_events.Step):
            self._feed(replace(self.engine.step(effect.prefill_quota), urged=urged))
        else:
            self.dummy_steps += 1
            self._feed(rank_events.Stepped((), self.engine.load(), self.engine.has_work(), urged=urged))
        self.turn()

    def _agreed(self, entered: list[rank_events.Agree]) -> None:
        self._busy = False
        if not self.alive:
            return
        self._feed(agreed(entered))
        self.turn()


class FrontendShell:
    """One front-end's machine, and what its clients got.

    `dial`: makes the link to a rank, and the one back.
    """

    def __init__(
        self, world: World, machine: Frontend, to_coordinator: Link, dial: Callable[[FrontendShell, int], Link]
    ) -> None:
        self.world, self.machine = world, machine
        self.to_coordinator = to_coordinator
        self.broadcasts = Link(world, codec.to_frontend(), self._coordinator_said, to_coordinator.delay_s)
        self.outputs: dict[int, list[Any]] = {}
        self.refused: dict[int, str] = {}
        self.placed: dict[int, int] = {}
        self.placed_at: dict[int, float] = {}
        self.to_ranks: dict[int, Link] = {}
        self._dial = dial
        self._next = 1

    def submit(self, tokens: int = 8, max_tokens: int = 2, rank: int | None = None, priority: int = 0) -> int:
        """One request of a client; returns its number."""
        request, self._next = self._next, self._next + 1
        self.outputs[request] = []
        self.feed(frontend_events.Submit(request, [1] * tokens, SamplingParams(max_tokens), rank, priority))
        return request

    def abandon(self, *requests: int) -> None:
        """The clients of these requests hang up."""
        for request in requests:
            del self.outputs[request]
        self.feed(frontend_events.Abandon(requests))

    def finished(self) -> bool:
        """Whether every request sent has had its last output or a refusal."""
        return all(
            request in self.refused or (outputs and outputs[-1].finish_reason is not None)
            for request, outputs in self.outputs.items()
        )

    def feed(self, event: frontend_events.Event) -> None:
        for effect in self.machine.handle(event, self.world.now):
            self._perform(effect)
        if self.machine.deadline < float("inf"):
            # Each event arranges a tick; one that was overtaken finds nothing due.
            self.world.at(self.machine.deadline, self._tick)

    def _tick(self) -> None:
        if self.world.now >= self.machine.deadline:
            self.feed(frontend_events.Tick())

    def _coordinator_said(self, message: Any) -> None:
        self.feed(frontend_events.CoordinatorSaid(message))

    def _perform(self, effect: frontend_events.Effect) -> None:
        match effect:
            case frontend_events.ToCoordinator(message):
                self.to_coordinator.send(message)
            case frontend_events.ToRank(rank, message):
                self.to_ranks[rank].send(message)
            case frontend_events.Connect(member):
                self.to_ranks[member.rank] = self._dial(self, member.rank)
            case frontend_events.Disconnect(rank):
                self.to_ranks.pop(rank).closed = True
            case frontend_events.Placed(request, rank):
                assert request not in self.placed, f"request {request} is placed twice"
                self.placed[request] = rank
                self.placed_at[request] = self.world.now
            case frontend_events.Deliver(outputs):
                for output in outputs:
                    self.outputs[output.request].append(output)
            case frontend_events.Refuse(request, reason):
                self.refused[request] = reason
