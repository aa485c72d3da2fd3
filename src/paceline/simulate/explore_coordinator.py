"""The coordinator as a number: its states, and what it does on each event."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import NamedTuple

from paceline.protocol.coordinator import (
    Coordinator,
    Event,
    FrontEndSaid,
    RankSaid,
    RankSubscribed,
    Tick,
    ToFrontEnds,
    ToRanks,
)
from paceline.protocol.invariants import wave_never_falls
from paceline.protocol.messages import FromRank, ToRank, WakeNotice
from paceline.simulate.explore_parts import LATER, NOW, RankLabel, Register, freeze, renumber
from paceline.simulate.explore_rank import FRONT_END, Broken


class Answer(NamedTuple):
    """What the coordinator makes of an event: its state, what it broadcasts to ranks, what front-ends can hear."""

    state: int
    broadcasts: tuple[ToRank, ...]
    published: tuple[int, bool]


class Coordinators:
    """All states of the coordinator met, and its answers. `size`: ranks in the deployment."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._states: Register[Coordinator] = Register(_key)
        self._answers: dict[tuple[int, Hashable], Answer] = {}
        self._known: dict[int, tuple[bool, ...]] = {}
        self._renumbered: dict[tuple[int, tuple[int, ...]], int] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, number: int) -> Coordinator:
        return self._states[number]

    def fresh(self, identity: int) -> int:
        """One that knows nothing."""
        machine = Coordinator(self._size, identity, 0.0, lockstep=True, publish_loads=False)
        return self._states.number(renumber(machine))

    def wave(self, number: int) -> int:
        """The wave that it holds current."""
        return self._states[number]._group.wave

    def known(self, number: int) -> tuple[bool, ...]:
        """By rank, whether it is ready as far as this coordinator knows."""
        found = self._known.get(number)
        if found is None:
            membership = self._states[number]._membership
            found = self._known[number] = tuple(membership.is_ready(rank) for rank in range(self._size))
        return found

    def lagging(self, number: int) -> list[int]:
        """The ranks whose answer to a wake is owed."""
        return self._states[number]._group.lagging()

    def ticks(self, number: int) -> bool:
        """Whether a timer is set that sends something to ranks."""
        return self._states[number]._group.wake_due is not None

    def renumbered(self, number: int, order: Sequence[int]) -> int:
        """The state in which rank `order[i]` is rank `i`."""
        key = (number, tuple(order))
        found = self._renumbered.get(key)
        if found is None:
            place = {rank: index for index, rank in enumerate(order)}
            copy = renumber(self._states[number], lambda rank: place[rank])
            found = self._renumbered[key] = self._states.number(copy)
        return found

    def said(self, number: int, rank: int, message: FromRank, name: int) -> Answer:
        """A rank's message; `name` is the message's number."""
        event = lambda: RankSaid(renumber(message, lambda _: rank))  # noqa: E731
        return self._answer(number, ("said", rank, name), event)

    def noticed(self, number: int, rank: int, stamp: int) -> Answer:
        """A front-end's notice of a request to a rank."""
        event = lambda: FrontEndSaid(WakeNotice(FRONT_END, RankLabel(rank), stamp))  # noqa: E731
        return self._answer(number, ("noticed", rank, stamp), event)

    def subscribed(self, number: int) -> Answer:
        """A rank's connection has come up."""
        return self._answer(number, "subscribed", RankSubscribed)

    def tick(self, number: int) -> Answer:
        """The timers that are set are due."""
        return self._answer(number, "tick", Tick)

    def _answer(self, number: int, name: Hashable, make: object) -> Answer:
        found = self._answers.get((number, name))
        if found is None:
            event: Event = make()  # type: ignore[operator]
            found = self._answers[number, name] = self._handle(number, event)
        return found

    def _handle(self, number: int, event: Event) -> Answer:
        machine = renumber(self._states[number])
        before = self.wave(number)
        try:
            effects = machine.handle(event, LATER if isinstance(event, Tick) else NOW)
        except Exception as error:
            raise Broken(f"the coordinator's machine failed: {type(error).__name__}: {error}") from error
        why = wave_never_falls("the coordinator", before, machine._group.wave)
        if why is not None:
            raise Broken(why)
        published = (0, False)
        for effect in effects:
            if isinstance(effect, ToFrontEnds):
                published = max(published, (effect.message.wave, effect.message.running))
        broadcasts = tuple(effect.message for effect in effects if isinstance(effect, ToRanks))
        return Answer(self._states.number(renumber(machine)), broadcasts, published)


def _key(machine: Coordinator) -> Hashable:
    group = machine._group
    if group._wake_due is None:
        # Read only while a wake is due; set anew with the next one.
        group._prompt_wake = False
    if group._noticed_wave < group.wave:
        # Compared with the wave alone, which does not come back.
        group._noticed_wave = -1
    return freeze(machine)
