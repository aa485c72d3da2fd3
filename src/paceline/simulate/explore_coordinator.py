"""The coordinator as a number: its states, and what it does on each event."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple

from paceline.core.coordinator.events import (
    Event,
    FrontEndSaid,
    RankGone,
    RankSaid,
    RankSubscribed,
    Tick,
    ToFrontEnds,
    ToRanks,
)
from paceline.core.coordinator.machine import Coordinator
from paceline.core.invariants import wave_never_falls
from paceline.core.messages import (
    ControlAnswer,
    ControlRequest,
    FromRank,
    LoadView,
    Members,
    StartDPWave,
    ToRank,
    WakeNotice,
)
from paceline.core.requests import ControlAction
from paceline.simulate.explore_block import FRONT_END, Broken, Group
from paceline.simulate.explore_parts import LATER, NOW, RankLabel, Register, freeze, renumber


class Answer(NamedTuple):
    """What the coordinator makes of an event.

    `state`: the one after it. `broadcasts`: to ranks. `published`: the newest wave that front-ends can hear of, and
    whether it runs. `answered`: the number that a call is answered with, 0 for none. `settled`: the number of the
    suspension that is in force at all ranks, as this coordinator says; 0 where it does not say that. `scaling`: the
    number of what front-ends are told of that, -1 for nothing.
    """

    state: int
    broadcasts: tuple[ToRank, ...]
    published: tuple[int, bool]
    answered: int
    settled: int
    scaling: int = -1

    @property
    def left_out(self) -> tuple[int, int]:
        """The rank that a wake among the broadcasts leaves out, and the wave; -1 where there is none."""
        for message in self.broadcasts:
            if isinstance(message, StartDPWave) and message.exclude is not None:
                return message.exclude, message.wave
        return -1, 0


TIMERS = {
    "wake": ("_group", "_wake_due"),
    "question": ("_introductions", "_due"),
    "suspension": ("_suspension", "_due"),
    "generation": ("_generations", "_due"),
    "patience": ("_generations", "_give_up_at"),
    "lost": ("_generations", "_lost_at"),
    "silent": ("_generations", "_silent_at"),
}
"""What the coordinator repeats, or waits for, and where its machine keeps when."""


class Coordinators:
    """All states of the coordinator met, and its answers.

    `size`: ranks in the deployment. `without`: rules left out.
    """

    timers_kept: Mapping[str, tuple[str, str]] = TIMERS

    def __init__(self, size: int, without: frozenset[str] = frozenset()) -> None:
        self._size = size
        self._without = without
        self._states: Register[Coordinator] = Register(self.key)
        self._answers: dict[tuple[int, Hashable], Answer] = {}
        self._timers: dict[int, list[tuple[str, list[int]]]] = {}
        self._known: dict[int, tuple[int, ...]] = {}
        self._renumbered: dict[tuple[int, tuple[int, ...]], int] = {}

    def __len__(self) -> int:
        return len(self._states)

    def __getitem__(self, number: int) -> Coordinator:
        return self._states[number]

    def key(self, machine: Coordinator) -> Hashable:
        """Equal for machines that behave alike."""
        return _key(machine)

    def scaling_in(self, message: Members) -> int:
        """The number of what is said there of scaling, -1 where there is none."""
        return -1

    def fresh(self, identity: int, size: int = 0) -> int:
        """One that knows nothing. `size`: ranks that it is told of, 0 for all there can be."""
        machine = Coordinator(
            size or self._size, identity, 0.0, lockstep=True, publish_loads=False, fresh=identity == 1,
            without=self._without,
        )  # fmt: skip
        # Ranks' numbers that the machine makes itself, here and in `_handle`; all others come with messages.
        machine._introductions._unheard = {RankLabel(rank) for rank in machine._introductions._unheard}
        return self._states.number(renumber(machine))

    def wave(self, number: int) -> int:
        """The wave that it holds current."""
        return self._states[number]._group.wave

    def known(self, number: int) -> tuple[int, ...]:
        """By rank, the life of it that is ready as far as this coordinator knows; 0 where it knows of none."""
        found = self._known.get(number)
        if found is None:
            lives = {member.rank: member.incarnation for member in self._states[number]._membership.members()}
            found = self._known[number] = tuple(lives.get(rank, 0) for rank in range(self._size))
        return found

    def retired(self, number: int, rank: int, incarnation: int) -> bool:
        """Whether this coordinator knows that this life of the rank is over."""
        return self._states[number]._membership.is_retired(rank, incarnation)

    def forming(self, number: int) -> Group:
        """The generation that is, or is to be, formed."""
        generations = self._states[number]._generations
        return Group(generations.number, self._states[number].identity, len(generations._members))

    def identity(self, number: int) -> int:
        """Which life of the coordinator it is."""
        return self._states[number].identity

    def members(self, number: int) -> dict[int, int]:
        """By rank, the lives that the generation is, or is to be, formed of."""
        return self._states[number]._generations._members

    def unspoken(self, number: int) -> list[int]:
        """The ranks that have not spoken since the generation ended."""
        spoken = self._states[number]._generations._spoken
        return [] if spoken is None else [rank for rank in range(self._size) if rank not in spoken]

    def timers(self, number: int) -> list[tuple[str, list[int]]]:
        """The timers that are set, each with the ranks whose answer it waits for."""
        found = self._timers.get(number)
        if found is None:
            machine = self._states[number]
            # What others wait for comes or does not: `explore_group`.
            waiting = {
                "wake": machine._group.lagging(),
                "question": _unheard(machine),
                "generation": [*machine._generations._members],
                "suspension": machine._suspension.state(_expected(machine)).waiting_for,
            }
            set_ = {name: getattr(getattr(machine, part), field) for name, (part, field) in self.timers_kept.items()}
            due = [name for name, at in set_.items() if at in (NOW, LATER)]
            found = self._timers[number] = [(name, waiting.get(name, [])) for name in due]
        return found

    def counts_up(self, number: int, timer: str) -> bool:
        """Whether the ranks would be told of the suspension under a new number when this timer is due.

        Numbers would grow for ever with a timer that is faster than everybody. So such a repeat comes when nobody is
        about to do anything else; one that comes earlier counts as a loss.
        """
        return timer == "wake" and self._states[number]._suspension.standing.suspended

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

    def gone(self, number: int, rank: int, incarnation: int) -> Answer:
        """The connection of this life of a rank has ended."""
        return self._answer(number, ("gone", rank, incarnation), lambda: RankGone(RankLabel(rank), incarnation))

    def called(self, number: int, call: int, action: ControlAction, answered: int) -> Answer:
        """A front-end's call, or its repeat."""
        event = lambda: FrontEndSaid(ControlRequest(FRONT_END, call, action, answered))  # noqa: E731
        return self._answer(number, ("called", call, action, answered), event)

    def tick(self, number: int, timer: str) -> Answer:
        """One of the timers that are set is due."""
        return self._answer(number, timer, Tick)

    def _answer(self, number: int, name: Hashable, make: Callable[[], Event]) -> Answer:
        found = self._answers.get((number, name))
        if found is None:
            found = self._answers[number, name] = self._handle(number, name, make())
        return found

    def _handle(self, number: int, name: Hashable, event: Event) -> Answer:
        machine = renumber(self._states[number])
        if isinstance(event, Tick):
            part, field = self.timers_kept[str(name)]
            setattr(getattr(machine, part), field, NOW)
            # Patience is looked at where a repeat is due.
            machine._generations._due = NOW if name == "patience" else machine._generations._due
        before = self.wave(number)
        try:
            effects = machine.handle(event, NOW)
        except Exception as error:
            raise Broken(f"the coordinator's machine failed: {type(error).__name__}: {error}") from error
        machine._generations.absent = {RankLabel(rank) for rank in machine._generations.absent}
        why = wave_never_falls("the coordinator", before, machine._group.wave)
        if why is not None:
            raise Broken(why)
        published, answered, scaling = (0, False), 0, -1
        for effect in effects:
            if isinstance(effect, ToFrontEnds):
                message = effect.message
                if isinstance(message, ControlAnswer):
                    answered = message.number
                elif isinstance(message, Members | LoadView):
                    published = max(published, (message.wave, message.running))
                if isinstance(message, Members):
                    scaling = self.scaling_in(message)
        broadcasts = tuple(effect.message for effect in effects if isinstance(effect, ToRanks))
        state = machine._suspension.state(_expected(machine))
        settled = state.number if state.settled else 0
        return Answer(self._states.number(renumber(machine)), broadcasts, published, answered, settled, scaling)


def _key(machine: Coordinator) -> Hashable:
    group, introductions, generations = machine._group, machine._introductions, machine._generations
    if group._wake_due is None:
        # Read only while a wake is due; set anew with the next one.
        group._prompt_wake = False
    if group._noticed_wave < group.wave:
        # Compared with the wave alone, which does not come back.
        group._noticed_wave = -1
    # The last question and the last admission are long ago: to put one off for milliseconds, so that several share it,
    # is to hear of the others later.
    introductions._asked = float("-inf")
    introductions._admitted = {}
    unheard = _unheard(machine)
    # One more question to ranks that have all been heard brings nothing (`explore_rank`). While some have not, one is
    # asked as soon as anybody is connected, and then again.
    introductions._due = LATER if introductions._asks and unheard else None
    if generations._due is None:
        generations._give_up_at = float("inf")
    if generations._spoken is not None:
        # Set anew with the next generation, and not read before.
        generations._members = {}
    return freeze(machine)


def _unheard(machine: Coordinator) -> list[int]:
    """Ranks that a question is for."""
    return [*machine._membership.missing(), *machine._generations.silent(), *machine._late()]


def _expected(machine: Coordinator) -> list[int]:
    """Ranks whose word on a suspension counts."""
    return machine._suspension.expected(machine._membership, machine._generations, NOW)
