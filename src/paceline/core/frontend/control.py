"""What a front-end knows of scaling, and its calls to scale (`scaling.py` is the other side).

Its calls need no answer of their own: the newest Scaling names who asked for it.

A front-end's calls to pause and resume: what was asked for and is not so yet (`pause.py` is the other side).
"""

from __future__ import annotations

from paceline.core.frontend.events import Controlled, Effect, Scale, Scaled, ToCoordinator
from paceline.core.load import plausible
from paceline.core.messages import ControlAnswer, ControlRequest, ScaleRequest, Scaling, SuspensionState
from paceline.core.requests import LARGEST_STAMP, ControlAction


class FrontendCalls:
    """The calls of one front-end, and the pause as it knows it."""

    def __init__(self, identity: int) -> None:
        self.suspension = SuspensionState()
        self._identity = identity
        # The call, and the number at which it will be so, once answered.
        self._calls: dict[int, int | None] = {}

    @property
    def suspended(self) -> bool:
        """Whether the newest word is to pause."""
        return self.suspension.number % 2 == 1

    def ask(self, call: int, action: ControlAction) -> list[Effect]:
        """Somebody asks, or asks again."""
        answered = self._calls.setdefault(call, None)
        known = self.suspension
        number = min(known.number, LARGEST_STAMP)
        return [ToCoordinator(ControlRequest(self._identity, call, action, answered or 0, number, known.mode))]

    def give_up(self, call: int) -> None:
        """Nobody waits for this call any more."""
        self._calls.pop(call, None)

    def answered(self, answer: ControlAnswer) -> list[Effect]:
        """The coordinator has answered somebody's call."""
        if answer.frontend == self._identity and answer.call in self._calls:
            self._calls[answer.call] = answer.number
        return self._served()

    def learn(self, state: SuspensionState) -> tuple[bool, list[Effect]]:
        """What a view says. Returns whether it is as new as what is known, and what has become of the calls.

        A new coordinator knows of no pause until the ranks have told it: the number never goes down. Where its
        number is lower, it may be that nobody but this front-end knows the higher one any more.
        """
        if not plausible(state.number, self.suspension.number):
            return True, []
        current = state.number >= self.suspension.number
        if current:
            self.suspension = state
        return current, self._served()

    def _served(self) -> list[Effect]:
        """So it is, or somebody has asked for the contrary meanwhile."""
        state = self.suspension
        effects: list[Effect] = []
        for call, number in list(self._calls.items()):
            if number is None or state.number < number:
                continue
            superseded = state.number % 2 != number % 2
            if superseded or state.settled:
                del self._calls[call]
                effects.append(Controlled(call, state.number, superseded))
        return effects


class FrontendScaling:
    """Scaling as one front-end sees it.

    `ranks`: those that it balances over, None for all; else also those that scaling brings to its `node`.
    """

    def __init__(self, identity: int, ranks: frozenset[int] | None, node: int) -> None:
        self.state: Scaling | None = None
        """The newest that has been heard; None before the first."""
        self.ranks = ranks
        self._identity = identity
        self._node = node
        # By the call's number: the size when it was made.
        self._calls: dict[int, int] = {}
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

    def ask(self, event: Scale) -> list[Effect]:
        """Somebody asks, or asks again.

        A second call during the first is not sent: heard before the first, it would make that look like a late repeat.
        """
        known = self.state.size if self.state is not None else event.size
        if self._calls and event.call not in self._calls:
            return [Scaled(event.call, known, None)]
        self._calls.setdefault(event.call, known)
        request = ScaleRequest(self._identity, event.call, event.size, event.drain_ms, event.startup_ms)
        return [ToCoordinator(request)]

    def give_up(self, call: int) -> None:
        """Nobody waits for this call any more."""
        self._calls.pop(call, None)

    def served(self) -> list[Effect]:
        """What has become of the calls, by the Members that has just come: what was known before may be out of date."""
        state = self.state
        effects: list[Effect] = []
        for call, before in list(self._calls.items()):
            if state is None:
                break
            mine = (state.frontend, state.call) == (self._identity, call)
            new_are_missing = any(rank >= before for rank in self._missing)
            over = not state.under_way and not new_are_missing
            if over if mine else state.under_way:
                del self._calls[call]
                effects.append(Scaled(call, before, state if mine else None))
        return effects
