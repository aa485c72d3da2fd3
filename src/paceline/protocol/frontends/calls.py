"""A front-end's calls to suspend and resume: what was asked for and is not so yet (`calls.py` is the other side)."""

from __future__ import annotations

from paceline.protocol.frontend_events import Controlled, Effect, ToCoordinator
from paceline.protocol.messages import ControlAnswer, ControlRequest, SuspensionState
from paceline.protocol.plausible import plausible
from paceline.protocol.sampling import LARGEST_STAMP, ControlAction


class FrontEndCalls:
    """The calls of one front-end, and the suspension as it knows it."""

    def __init__(self, identity: int) -> None:
        self.suspension = SuspensionState()
        self._identity = identity
        # The call, and the number at which it will be so, once answered.
        self._calls: dict[int, int | None] = {}

    @property
    def suspended(self) -> bool:
        """Whether the newest word is to suspend."""
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
        if answer.front_end == self._identity and answer.call in self._calls:
            self._calls[answer.call] = answer.number
        return self._served()

    def learn(self, state: SuspensionState) -> tuple[bool, list[Effect]]:
        """What a view says. Returns whether it is as new as what is known, and what has become of the calls.

        A new coordinator knows of no suspension until the ranks have told it: the number never goes down. Where its
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
