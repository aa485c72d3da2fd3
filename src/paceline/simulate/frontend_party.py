"""One life of a front-end in the simulation: its machine, and what its clients got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.machine import Frontend
from paceline.core.messages import Member, ToFrontend
from paceline.core.requests import AddRequest, ControlAction, FromFrontendToRank, SamplingParams
from paceline.simulate.alarm import Alarm
from paceline.simulate.answers import Answers
from paceline.simulate.network import Link
from paceline.simulate.world import World

CONTROL_REPEAT_S = 0.25
DRAIN_MS, STARTUP_MS = 1500, 4000
"""Of each change: as long as some ranks need, and not all."""


class Call(Struct):
    """An operator's request to suspend or resume: what, when (virtual seconds), and how it ended."""

    action: ControlAction
    asked: float
    answered: float = -1.0
    superseded: bool = False
    number: int = 0

    @property
    def over(self) -> bool:
        """Whether nobody waits for it any more."""
        return self.answered >= 0


class FrontendChecks(Protocol):
    """What watches a front-end."""

    def frontend(self, party: FrontendParty, event: frontend_events.Event) -> None:
        """`event` has been handled, its effects not yet done."""

    def reconnected(self, party: FrontendParty, rank: int) -> None:
        """The connection to a rank has come up again."""

    def sent(self, party: FrontendParty, rank: int, request: AddRequest) -> None:
        """A request goes to a rank."""

    def controlled(self, party: FrontendParty, answer: frontend_events.Controlled) -> None:
        """An operator's call is answered."""


class FrontendParty:
    """A front-end's process. `dial`: makes the link to a life of a rank."""

    def __init__(
        self, world: World, name: str, machine: Frontend, checks: FrontendChecks,
        dial: Callable[[FrontendParty, Member], Link],
    ) -> None:  # fmt: skip
        self.world, self.name, self.machine = world, name, machine
        self.to_coordinator: Link
        self.broadcasts: Link
        self.connected = False
        self.alive = True
        self.answers = Answers(world, name)
        self.calls: dict[int, Call] = {}
        self.scale_calls: dict[int, int] = {}
        """By call, the size that an operator has asked for and waits for."""
        self.to_ranks: dict[int, Link] = {}
        self.lives: dict[int, int] = {}
        """By rank, the life that it is connected to."""
        self._checks = checks
        self._dial = dial
        self._alarm = Alarm(world, machine, lambda: self.feed(frontend_events.Tick()), lambda: self.alive)

    def submit(self, tokens: int = 8, max_tokens: int = 2, rank: int | None = None) -> int:
        """One request of a client, to `rank` if it names one; returns its number."""
        request = self.answers.asked(max_tokens)
        # The prompt begins with the number: ranks know it by another one where it is sent again.
        self.feed(frontend_events.Submit(request, [request] + [1] * (tokens - 1), SamplingParams(max_tokens), rank))
        return request

    def abandon(self, request: int) -> None:
        """The client hangs up."""
        if self.answers.hung_up(request):
            self.feed(frontend_events.Abandon((request,)))

    def control(self, action: ControlAction) -> int:
        """An operator asks to suspend in this mode, or to resume; asked again until it is so. Returns the call."""
        call = self.answers.number()
        self.calls[call] = Call(action, self.world.now)
        self._ask(call)
        return call

    def scale(self, size: int) -> None:
        """An operator asks for so many ranks; asked again until it is answered."""
        call = self.answers.number()
        self.scale_calls[call] = size
        self._ask_to_scale(call)

    def _ask_to_scale(self, call: int) -> None:
        if self.alive and call in self.scale_calls:
            self.feed(frontend_events.Scale(call, self.scale_calls[call], DRAIN_MS, STARTUP_MS))
            self.world.after(CONTROL_REPEAT_S, lambda: self._ask_to_scale(call))

    def _ask(self, call: int) -> None:
        if self.alive and not self.calls[call].over:
            self.feed(frontend_events.Control(call, self.calls[call].action))
            self.world.after(CONTROL_REPEAT_S, lambda: self._ask(call))

    def finished(self) -> bool:
        """Whether no client waits."""
        return not self.answers.open

    def kill(self) -> None:
        """The process is gone; its clients' connections break."""
        self.alive = False
        self.scale_calls.clear()
        for call in self.calls.values():
            call.answered = self.world.now if not call.over else call.answered
        for request in self.answers:
            self.answers.hung_up(request)

    def hear(self, message: ToFrontend) -> None:
        """A broadcast of the coordinator."""
        self.feed(frontend_events.CoordinatorSaid(message))

    def link_down(self, rank: int, life: int) -> None:
        """The connection to this life of a rank has ended."""
        if self.lives.get(rank) == life:
            self.answers.rank_lost(rank)
            self.feed(frontend_events.LinkDown(rank))

    def link_up(self, rank: int, life: int) -> None:
        """Likewise: it is there again."""
        if self.lives.get(rank) == life:
            self._checks.reconnected(self, rank)
            self.feed(frontend_events.LinkUp(rank))

    def feed(self, event: frontend_events.Event) -> None:
        """Let the machine handle `event`, and do what it says."""
        if not self.alive:
            return
        effects = self.machine.handle(event, self.world.now)
        self.world.journal.record(self.world.now, self.name, event, effects)
        for effect in effects:
            self._perform(effect)
        self.answers.none_lost(self.machine)
        self._checks.frontend(self, event)
        self._alarm.set()

    def _perform(self, effect: frontend_events.Effect) -> None:
        match effect:
            case frontend_events.ToRank(rank, message):
                self._send(rank, message)
            case frontend_events.Deliver(outputs):
                for output in outputs:
                    self.answers.delivered(output)
            case frontend_events.ToCoordinator(message):
                self.to_coordinator.send(message)
            case frontend_events.Connect(member):
                self.to_ranks[member.rank] = self._dial(self, member)
                self.lives[member.rank] = member.incarnation
            case frontend_events.Disconnect(rank):
                self.to_ranks.pop(rank).closed = True
                del self.lives[rank]
                self.answers.rank_lost(rank)
            case frontend_events.Refuse():
                self.answers.refused(effect)
            case frontend_events.Scaled(call):
                self.scale_calls.pop(call, None)
            case frontend_events.Controlled(call, number, superseded):
                self._checks.controlled(self, effect)
                known = self.calls[call]
                known.answered, known.number, known.superseded = self.world.now, number, superseded

    def _send(self, rank: int, message: FromFrontendToRank) -> None:
        if isinstance(message, AddRequest):
            self._checks.sent(self, rank, message)
            self.answers.sent(rank, message)
        self.to_ranks[rank].send(message)
