"""One life of a front-end in the simulation: its machine, and what its clients got."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from msgspec import Struct

from paceline.protocol import frontend_events
from paceline.protocol.frontend import FrontEnd
from paceline.protocol.messages import AddRequest, FromFrontEndToRank, Member, Output, ToFrontEnd
from paceline.protocol.sampling import ControlAction, SamplingParams
from paceline.simulate.alarm import Alarm
from paceline.simulate.network import Link
from paceline.simulate.world import Violation, World

CONTROL_REPEAT_S = 0.25


class Answer(Struct):
    """What one client got: tokens, how it ended, and when (virtual seconds; -1 for not yet)."""

    asked: float
    max_tokens: int
    rank: int = -1
    tokens: int = 0
    first: float = -1.0
    ended: float = -1.0
    finish_reason: str | None = None
    refused: str | None = None
    error: str | None = None
    abandoned: bool = False

    @property
    def over(self) -> bool:
        """Whether the client waits for nothing more."""
        return self.ended >= 0


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


class FrontEndChecks(Protocol):
    """What watches a front-end."""

    def front_end(self, party: FrontEndParty, event: frontend_events.Event) -> None:
        """`event` has been handled, its effects not yet done."""

    def reconnected(self, party: FrontEndParty, rank: int) -> None:
        """The connection to a rank has come up again."""

    def sent(self, party: FrontEndParty, rank: int, request: AddRequest) -> None:
        """A request goes to a rank."""

    def controlled(self, party: FrontEndParty, answer: frontend_events.Controlled) -> None:
        """An operator's call is answered."""


class FrontEndParty:
    """A front-end's process. `dial`: makes the link to a life of a rank."""

    def __init__(
        self, world: World, name: str, machine: FrontEnd, checks: FrontEndChecks,
        dial: Callable[[FrontEndParty, Member], Link],
    ) -> None:  # fmt: skip
        self.world, self.name, self.machine = world, name, machine
        self.to_coordinator: Link
        self.broadcasts: Link
        self.connected = False
        self.alive = True
        self.answers: dict[int, Answer] = {}
        self.calls: dict[int, Call] = {}
        self.to_ranks: dict[int, Link] = {}
        self.lives: dict[int, int] = {}
        """By rank, the life that it is connected to."""
        self._open = 0
        self._checks = checks
        self._dial = dial
        self._next = 1
        self._alarm = Alarm(world, machine, lambda: self.feed(frontend_events.Tick()), lambda: self.alive)

    def submit(self, tokens: int = 8, max_tokens: int = 2, rank: int | None = None) -> int:
        """One request of a client, to `rank` if it names one; returns its number."""
        request, self._next = self._next, self._next + 1
        self.answers[request] = Answer(self.world.now, max_tokens)
        self._open += 1
        self.feed(frontend_events.Submit(request, [1] * tokens, SamplingParams(max_tokens), rank))
        return request

    def abandon(self, request: int) -> None:
        """The client hangs up."""
        answer = self.answers[request]
        if not answer.over:
            answer.abandoned = True
            self._end(answer)
            self.feed(frontend_events.Abandon((request,)))

    def control(self, action: ControlAction) -> int:
        """An operator asks to suspend in this mode, or to resume; asked again until it is so. Returns the call."""
        call, self._next = self._next, self._next + 1
        self.calls[call] = Call(action, self.world.now)
        self._ask(call)
        return call

    def _ask(self, call: int) -> None:
        if self.alive and not self.calls[call].over:
            self.feed(frontend_events.Control(call, self.calls[call].action))
            self.world.after(CONTROL_REPEAT_S, lambda: self._ask(call))

    def finished(self) -> bool:
        """Whether no client waits."""
        return not self._open

    def kill(self) -> None:
        """The process is gone; its clients' connections break."""
        self.alive = False
        for call in self.calls.values():
            call.answered = self.world.now if not call.over else call.answered
        for answer in self.answers.values():
            if not answer.over:
                answer.abandoned = True
                self._end(answer)

    def hear(self, message: ToFrontEnd) -> None:
        """A broadcast of the coordinator."""
        self.feed(frontend_events.CoordinatorSaid(message))

    def link_down(self, rank: int, life: int) -> None:
        """The connection to this life of a rank has ended."""
        if self.lives.get(rank) == life:
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
        self._checks.front_end(self, event)
        self._alarm.set()

    def _perform(self, effect: frontend_events.Effect) -> None:
        match effect:
            case frontend_events.ToRank(rank, message):
                self._send(rank, message)
            case frontend_events.Deliver(outputs):
                for output in outputs:
                    self._deliver(output)
            case frontend_events.ToCoordinator(message):
                self.to_coordinator.send(message)
            case frontend_events.Connect(member):
                self.to_ranks[member.rank] = self._dial(self, member)
                self.lives[member.rank] = member.incarnation
            case frontend_events.Disconnect(rank):
                self.to_ranks.pop(rank).closed = True
                del self.lives[rank]
            case frontend_events.Placed(request, rank):
                self.answers[request].rank = rank
            case frontend_events.Refuse(request, reason):
                answer = self._answer(request, f"refused ({reason})")
                answer.refused = reason
                self._end(answer)
            case frontend_events.Controlled(call, number, superseded):
                self._checks.controlled(self, effect)
                known = self.calls[call]
                known.answered, known.number, known.superseded = self.world.now, number, superseded

    def _send(self, rank: int, message: FromFrontEndToRank) -> None:
        if isinstance(message, AddRequest):
            self._checks.sent(self, rank, message)
        self.to_ranks[rank].send(message)

    def _deliver(self, output: Output) -> None:
        answer = self._answer(output.request, "given tokens")
        expected = list(range(answer.tokens, answer.tokens + len(output.token_ids)))
        if output.token_ids != expected:
            text = f"request {output.request} got tokens {output.token_ids} in place of {expected}"
            raise Violation(f"{self.name}: {text}", self.name, f"rank {answer.rank}")
        answer.tokens += len(output.token_ids)
        if answer.first < 0:
            answer.first = self.world.now
        if output.finish_reason is None:
            return
        answer.finish_reason, answer.error = output.finish_reason, output.error
        self._end(answer)
        if output.finish_reason == "length" and answer.tokens != answer.max_tokens:
            text = f"request {output.request} ended after {answer.tokens} of {answer.max_tokens} tokens"
            raise Violation(f"{self.name}: {text}", self.name, f"rank {answer.rank}")

    def _answer(self, request: int, what: str) -> Answer:
        answer = self.answers[request]
        if answer.over:
            text = f"{self.name}: request {request} is {what} after it had ended"
            raise Violation(text, self.name, f"rank {answer.rank}")
        return answer

    def _end(self, answer: Answer) -> None:
        answer.ended = self.world.now
        self._open -= 1
