"""What may happen in a small deployment with brokered binding: the real machines of front-ends and a coordinator.

Ranks are abstract and independent: they take what is sent to them at once, have `slots` slots, end what they like when
they like, and report truly, sooner or later. Requests come and are aborted at any time; a broadcast may be lost at one
receiver; the coordinator may die, while something waits, with all that is on its way to it, and another one starts.

What must hold, in every state: no request is sent twice, and until the coordinator has died no rank has more than it
can run. (A new one does not know at once what the last one granted; that costs a wait and no more.) And from every
state all that was asked for can still come to an end. Timers count as due whenever they are set, with one exception: a
front-end loses patience with a coordinator only while there is none. So a walk does not pass over a request that a
living coordinator has forgotten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from msgspec import Struct

from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.dispatch import ASK_AGAIN_S
from paceline.core.frontend.machine import FrontEnd
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Members, RankHello, RankReport
from paceline.core.requests import AbortRequests, AddRequest, Output, Outputs, SamplingParams
from paceline.core.routing.least import LeastLoad
from paceline.simulate.explore_search import Broken

NOW = 1000.0
LIFE = 7
FIRST = 100


class Limits(Struct, frozen=True):
    """What a walk covers. `aborts`, `losses`, `crashes`: at most so many. `without`: rules left out."""

    ranks: int = 1
    front_ends: int = 1
    requests: int = 2
    slots: int = 1
    aborts: int = 1
    losses: int = 1
    crashes: int = 1
    without: frozenset[str] = frozenset()


class AbstractRank:
    """A rank that computes nothing."""

    def __init__(self) -> None:
        self.taken: dict[int, int] = {}
        self.present: list[tuple[int, int]] = []
        self.step = 0
        self.told = False
        self.known = False

    def load(self, slots: int) -> Load:
        running = min(slots, len(self.present))
        return Load(len(self.present) - running, running, slots)


class Place:
    """One state: machines, ranks, and what is on its way."""

    def __init__(self, limits: Limits) -> None:
        count = limits.front_ends
        self.machines = [
            FrontEnd(FIRST + index, LeastLoad(index, count), brokered=True, without=limits.without)
            for index in range(count)
        ]
        self.ranks = [AbstractRank() for _ in range(limits.ranks)]
        self.up: list[list[Any]] = [[] for _ in range(count)]
        self.down: list[list[Any]] = [[] for _ in range(count)]
        self.coordinator: Coordinator | None = None
        self.lives = 0
        self.asked: set[int] = set()
        self.open: set[int] = set()
        self.sent: set[int] = set()
        self.aborts, self.losses, self.crashes = limits.aborts, limits.losses, limits.crashes
        self.crashed = False


class World:
    """The moves of one deployment."""

    stuck = "a request can never come to its end any more"

    def __init__(self, limits: Limits) -> None:
        self.limits = limits

    def start(self) -> Place:
        """Ready and idle: everybody knows everybody, and shares are handed out."""
        place = Place(self.limits)
        self._begin(place)
        for index in range(self.limits.front_ends):
            self._front_end(place, index, frontend_events.Connected())
        for _ in range(6):
            for rank in range(self.limits.ranks):
                self._report(place, rank)
            for index in range(self.limits.front_ends):
                while place.up[index]:
                    self._up(place, index)
                while place.down[index]:
                    self._down(place, index)
        return place

    def moves(self, place: Place) -> Iterator[tuple[str, Callable[[Place], None]]]:
        """All that may happen next: what it is called, and what to do to a copy."""
        for request in range(1, self.limits.requests + 1):
            if request not in place.asked:
                yield f"request {request} comes", lambda p, r=request: self._submit(p, r)  # type: ignore[misc]
            elif request in place.open and place.aborts:
                yield f"the client of request {request} goes", lambda p, r=request: self._abort(p, r)  # type: ignore[misc]
        for index in range(self.limits.front_ends):
            yield from self._link_moves(place, index)
        for rank, one in enumerate(place.ranks):
            for pair in one.present[: self.limits.slots]:
                text = f"rank {rank} ends request {pair[1]}"
                yield text, lambda p, r=rank, which=pair: self._end(p, r, which)  # type: ignore[misc]
            if place.coordinator is not None and not one.told:
                yield f"rank {rank} reports", lambda p, r=rank: self._report(p, r)  # type: ignore[misc]
        if place.coordinator is None:
            yield "a new coordinator starts", self._begin
        else:
            if place.crashes and any(machine.held() for machine in place.machines):
                yield "the coordinator dies", self._crash
            if place.coordinator.broker.due is not None and not any(place.down) and max(map(len, place.up)) <= 1:
                yield "the coordinator says again what it granted", self._repeat
            if not any(place.down) and place.losses < self.limits.losses:
                yield "the coordinator publishes", self._heartbeat

    def over(self, place: Place) -> bool:
        """Whether nobody waits for anything."""
        if place.open or any(machine.held() for machine in place.machines):
            return False
        return place.coordinator is not None and not list(place.coordinator.broker.descriptors())

    def _link_moves(self, place: Place, index: int) -> Iterator[tuple[str, Callable[[Place], None]]]:
        who, machine = f"front-end {index}", place.machines[index]
        if place.coordinator is not None and place.up[index]:
            name = type(place.up[index][0]).__name__
            yield f"the coordinator hears {name} of {who}", lambda p: self._up(p, index)
        if place.down[index]:
            name = type(place.down[index][0]).__name__
            yield f"{who} hears {name}", lambda p: self._down(p, index)
            if place.losses:
                yield f"{name} is lost on its way to {who}", lambda p: self._lose(p, index)
        if not machine.held():
            return
        if place.coordinator is None:
            yield f"{who} loses patience", lambda p: self._tick(p, index, 10.0)
        elif machine._binding._told > machine._binding._heard and not place.up[index] and not place.down[index]:
            yield f"{who} asks again", lambda p: self._tick(p, index, ASK_AGAIN_S)

    # What happens -------------------------------------------------------------------------------

    def _submit(self, place: Place, request: int) -> None:
        place.asked.add(request)
        place.open.add(request)
        event = frontend_events.Submit(request, [1], SamplingParams(1))
        self._front_end(place, request % self.limits.front_ends, event)

    def _abort(self, place: Place, request: int) -> None:
        place.aborts -= 1
        place.open.discard(request)
        self._front_end(place, request % self.limits.front_ends, frontend_events.Abandon([request]))

    def _up(self, place: Place, index: int) -> None:
        self._coordinator(place, coordinator.FrontEndSaid(place.up[index].pop(0)))

    def _down(self, place: Place, index: int) -> None:
        self._front_end(place, index, frontend_events.CoordinatorSaid(place.down[index].pop(0)))

    def _lose(self, place: Place, index: int) -> None:
        place.losses -= 1
        place.down[index].pop(0)

    def _tick(self, place: Place, index: int, after_s: float) -> None:
        self._front_end(place, index, frontend_events.Tick(), NOW + after_s)

    def _take(self, place: Place, number: int, index: int, message: Any) -> None:
        rank = place.ranks[number]
        if isinstance(message, AddRequest):
            rank.taken[FIRST + index] = message.number
            rank.present.append((index, message.request))
            if not place.crashed and len(rank.present) > self.limits.slots:
                raise Broken(f"rank {number} has {len(rank.present)} requests and room for {self.limits.slots}")
        else:
            assert isinstance(message, AbortRequests)
            rank.present = [one for one in rank.present if one[0] != index or one[1] not in message.requests]
        self._changed(rank)

    def _end(self, place: Place, number: int, which: tuple[int, int]) -> None:
        index, request = which
        place.ranks[number].present.remove(which)
        self._changed(place.ranks[number])
        outputs = Outputs(number, LIFE, [Output(request, [1], finish_reason="length")])
        self._front_end(place, index, frontend_events.RankSaid(outputs))

    def _changed(self, rank: AbstractRank) -> None:
        rank.step += 1
        rank.told = False

    def _report(self, place: Place, number: int) -> None:
        rank = place.ranks[number]
        if not rank.known:
            rank.known = True
            hello = RankHello(PROTOCOL_VERSION, number, LIFE, f"tcp://rank-{number}", True)
            self._coordinator(place, coordinator.RankSaid(hello))
        rank.told = True
        load = rank.load(self.limits.slots)
        report = RankReport(number, LIFE, rank.step, 0, False, load, dict(rank.taken))
        self._coordinator(place, coordinator.RankSaid(report))

    def _crash(self, place: Place) -> None:
        place.crashes -= 1
        place.crashed = True
        place.coordinator = None
        for index in range(self.limits.front_ends):
            place.up[index].clear()

    def _begin(self, place: Place) -> None:
        place.lives += 1
        limits = self.limits
        place.coordinator = Coordinator(
            limits.ranks, place.lives, 0.0, lockstep=False, fresh=place.lives == 1, without=limits.without
        )
        for rank in place.ranks:
            rank.known = rank.told = False
        self._coordinator(place, coordinator.FrontEndSubscribed())

    def _repeat(self, place: Place) -> None:
        assert place.coordinator is not None
        place.coordinator.broker._due = NOW
        self._coordinator(place, coordinator.Tick())

    def _heartbeat(self, place: Place) -> None:
        self._coordinator(place, coordinator.FrontEndSubscribed())

    def _coordinator(self, place: Place, event: coordinator.Event) -> None:
        if place.coordinator is None:
            return
        for effect in place.coordinator.handle(event, NOW):
            if isinstance(effect, coordinator.ToFrontEnds):
                for index, link in enumerate(place.down):
                    self._broadcast(place.machines[index], link, effect.message)

    def _broadcast(self, machine: FrontEnd, link: list[Any], message: Any) -> None:
        """Put it on the link, in place of what it makes void. What a front-end would have done on that, it does in
        those states in which it has heard it already: hearing changes nothing at the coordinator.
        """
        if isinstance(message, Members) and machine._coordinator == message.coordinator:
            return
        if isinstance(message, LoadView):
            link[:] = [one for one in link if not isinstance(one, LoadView)]
        if message not in link:
            link.append(message)

    def _front_end(self, place: Place, index: int, event: frontend_events.Event, now: float = NOW) -> None:
        for effect in place.machines[index].handle(event, now):
            match effect:
                case frontend_events.ToCoordinator(message):
                    place.up[index].append(message)
                case frontend_events.ToRank(rank, message):
                    if isinstance(message, AddRequest):
                        if message.request in place.sent:
                            raise Broken(f"request {message.request} is sent twice")
                        place.sent.add(message.request)
                    self._take(place, rank, index, message)
                case frontend_events.Deliver(outputs):
                    place.open.difference_update(output.request for output in outputs)
                case frontend_events.Refuse(request):
                    place.open.discard(request)
        binding = place.machines[index]._binding
        binding._answered = binding._behind_since = NOW
