"""A front-end's calls to pause, to scale and for weights, and what it knows of them (`coordinator/pause.py`, …).

A call is repeated until it is served, since the coordinator may have been away. What was asked for holds once the
coordinator has answered with a number and a view shows that number settled; a change of the size needs no answer of
its own, since the newest Scaling names who asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping

from msgspec import Struct

from paceline.core.frontend.events import (
    Called,
    CallRanks,
    Control,
    Controlled,
    Effect,
    Scale,
    Scaled,
    ToCoordinator,
    ToRank,
    Update,
)  # fmt: skip
from paceline.core.load import plausible
from paceline.core.messages import ControlAnswer, ControlRequest, ScaleRequest, Scaling, SuspensionState
from paceline.core.requests import LARGEST_STAMP, CallEngine, Outputs, UpdateWeights, Weights
from paceline.core.retry import Retry

ASK_AGAIN_S = 0.25


class Call(Struct):
    """A call that is not served yet. `known`: of pausing and weights the number that it was answered with, None before;
    of scaling the size when it was made.
    """

    event: Control | Update | Scale
    known: int | None
    retry: Retry


class Calls:
    """The open calls of one front-end, of one kind."""

    def __init__(self, identity: int) -> None:
        self._identity = identity
        self._open: dict[int, Call] = {}

    @property
    def deadline(self) -> float:
        """When one must be repeated; infinite where none is open."""
        return min((call.retry.due or 0.0 for call in self._open.values()), default=float("inf"))

    def give_up(self, call: int) -> None:
        self._open.pop(call, None)

    def repeat(self, now: float) -> list[Effect]:
        return [self._say(call, now) for call in self._open.values() if call.retry.is_due(now)]

    def _open_call(self, event: Control | Update | Scale, known: int | None, now: float) -> list[Effect]:
        call = self._open[event.call] = Call(event, known, Retry(ASK_AGAIN_S, ASK_AGAIN_S))
        return [self._say(call, now)]

    def _say(self, call: Call, now: float) -> Effect:
        call.retry.said(now)
        return ToCoordinator(self._request(call))

    def _request(self, call: Call) -> ControlRequest | UpdateWeights | ScaleRequest:
        raise NotImplementedError


class FrontendCalls(Calls):
    """The calls to pause, to resume and for weights, and both as this front-end knows them."""

    def __init__(self, identity: int) -> None:
        super().__init__(identity)
        self.suspension = SuspensionState()

    @property
    def suspended(self) -> bool:
        """Whether the newest word is to pause."""
        return self.suspension.number % 2 == 1

    @property
    def weights(self) -> Weights | None:
        """None where nobody has brought any."""
        return self.suspension.weights

    def ask(self, event: Control | Update, now: float) -> list[Effect]:
        return self._open_call(event, None, now)

    def _request(self, call: Call) -> ControlRequest | UpdateWeights:
        event = call.event
        if isinstance(event, Update):
            return UpdateWeights(
                self._identity, event.call, event.action, event.version, event.source, event.keep_kv, event.commit,
                event.timeout_ms, call.known or 0, self.weights,
            )  # fmt: skip
        assert isinstance(event, Control)
        known, number = self.suspension, min(self.suspension.number, LARGEST_STAMP)
        return ControlRequest(self._identity, event.call, event.action, call.known or 0, number, known.mode)

    def answered(self, answer: ControlAnswer) -> list[Effect]:
        """The coordinator has answered somebody's call."""
        call = self._open.get(answer.call) if answer.frontend == self._identity else None
        if call is None:
            return []
        call.known = answer.number
        if isinstance(call.event, Update) and not answer.number:
            del self._open[answer.call]
            return [Controlled(answer.call, 0, False, answer.why or "refused")]
        return self._served()

    def learn(self, state: SuspensionState) -> tuple[bool, list[Effect]]:
        """What a view says. Returns whether it is as new as what is known, and what has become of the calls.

        A new coordinator knows of no pause until the ranks have told it: the number never goes down. Where its
        number is lower, it may be that nobody but this front-end knows the higher one any more.
        """
        if not plausible(state.number, self.suspension.number):
            return True, []
        mine, theirs = self.weights or Weights(), state.weights or Weights()
        current = state.number >= self.suspension.number and theirs.number >= mine.number
        if current:
            self.suspension = state
        return current, self._served()

    def _served(self) -> list[Effect]:
        """So it is, or somebody has asked for the contrary meanwhile."""
        state, weights = self.suspension, self.weights or Weights()
        effects: list[Effect] = []
        for call, opened in list(self._open.items()):
            number, updates = opened.known, isinstance(opened.event, Update)
            if number is None or (weights.number if updates else state.number) < number:
                continue
            superseded = not updates and state.number % 2 != number % 2
            # One that is to be put in force is decided with an even number.
            decided = not updates or not weights.under_way or not weights.commit
            wanted = isinstance(opened.event, Update) and opened.event.action != "drop"
            why = weights.why or weights.outcome if wanted and weights.outcome != "done" else ""
            if superseded or why or (state.settled and decided):
                del self._open[call]
                effects.append(Controlled(call, weights.number if updates else state.number, superseded, why))
        return effects


class EngineCalls:
    """The open calls to ranks' engines: by number, who is to answer and what was said so far."""

    def __init__(self) -> None:
        self.open: dict[int, tuple[dict[int, int], Called]] = {}

    def ask(self, event: CallRanks, lives: Mapping[int, int]) -> list[Effect]:
        """`lives`: the incarnations of the ranks that are there."""
        asked = sorted(lives) if event.ranks is None else event.ranks
        errors = {rank: "is not there" for rank in asked if rank not in lives}
        waits = {rank: lives[rank] for rank in asked if rank in lives}
        self.open[event.call] = waits, Called(event.call, {}, errors)
        messages = [
            ToRank(rank, CallEngine(event.call, life, event.method, event.arguments)) for rank, life in waits.items()
        ]
        return [*messages, *self._over(event.call)]

    def said(self, message: Outputs) -> list[Effect]:
        effects: list[Effect] = []
        for output in message.outputs:
            waits, called = self.open.get(output.request, ({}, None))
            if called is not None and waits.get(message.rank) == message.incarnation:
                del waits[message.rank]
                if output.finish_reason == "error":
                    called.errors[message.rank] = output.error or ""
                else:
                    called.said[message.rank] = output.text
                effects += self._over(output.request)
        return effects

    def lost(self, rank: int) -> list[Effect]:
        """The rank's connection has ended: whatever it was asked it does not answer, or not here."""
        effects: list[Effect] = []
        for call, (waits, called) in list(self.open.items()):
            if waits.pop(rank, None) is not None:
                called.errors[rank] = "ended meanwhile"
                effects += self._over(call)
        return effects

    def give_up(self, call: int) -> None:
        self.open.pop(call, None)

    def _over(self, call: int) -> list[Effect]:
        waits, called = self.open[call]
        if waits:
            return []
        del self.open[call]
        return [called]


def in_words(state: Scaling) -> dict[str, object]:
    """A change of the size, for `/health` and clients."""
    going = "loading" if state.joining else "draining"
    return {
        "status": going if state.under_way else "settled",
        "number": state.number,
        "size": state.size,
        "target": state.target,
        "waiting_for": state.waiting_for,
        "outcome": state.outcome,
        "why": state.why,
    }


class FrontendScaling(Calls):
    """Scaling as one front-end sees it.

    `ranks`: those that it balances over, None for all; else also those that scaling brings to its `node`.
    """

    def __init__(self, identity: int, ranks: frozenset[int] | None, node: int) -> None:
        super().__init__(identity)
        self.state: Scaling | None = None
        """The newest that has been heard; None before the first."""
        self.ranks = ranks
        self._node = node
        # Ranks of the deployment that are not ready.
        self._missing: list[int] = []

    def serves(self, rank: int) -> bool:
        """Whether this front-end balances over the rank, as soon as it is ready."""
        return self.ranks is None or rank in self.ranks

    def takes_new(self, rank: int) -> bool:
        """Whether the rank gets new requests: one that is to leave gets none."""
        return self.state is None or rank < self.state.serving

    def over(self, rank: int) -> bool:
        """Whether the deployment has no such rank any more."""
        return self.state is not None and rank >= self.state.limit

    def learn(self, state: Scaling | None, missing: list[int]) -> bool:
        """What a Members says; `missing`: the ranks that are not ready. Returns whether a change has begun or ended,
        of which the coordinator wants to hear that it is known here.
        """
        self._missing = missing
        before = self.state
        known = 0 if before is None else before.number
        if state is None or state.number < known or not plausible(state.number, known):
            return False
        self.state = state
        if self.ranks is not None:
            mine = {rank for rank, node in state.hosts if node == self._node}
            self.ranks = frozenset(rank for rank in self.ranks | mine if rank < state.limit)
        return state.number > known

    @property
    def told(self) -> Scaling | None:
        """What the coordinator is told: nothing where nothing was ever scaled."""
        return self.state if self.state is not None and self.state.number else None

    def ask(self, event: Scale, now: float) -> list[Effect]:
        """Somebody asks.

        A second call during the first is not sent: heard before the first, it would make that look like a late repeat.
        """
        known = self.state.size if self.state is not None else event.size
        return [Scaled(event.call, known, None)] if self._open else self._open_call(event, known, now)

    def _request(self, call: Call) -> ScaleRequest:
        event = call.event
        assert isinstance(event, Scale)
        return ScaleRequest(self._identity, event.call, event.size, event.drain_ms, event.startup_ms)

    def served(self) -> list[Effect]:
        """What has become of the calls, by the Members that has just come: what was known before may be out of date."""
        state = self.state
        effects: list[Effect] = []
        for call, before in [(call, open_call.known or 0) for call, open_call in self._open.items()]:
            if state is None:
                break
            mine = (state.frontend, state.call) == (self._identity, call)
            new_are_missing = any(rank >= before for rank in self._missing)
            over = not state.under_way and not new_are_missing
            if over if mine else state.under_way:
                del self._open[call]
                effects.append(Scaled(call, before, state if mine else None))
        return effects
