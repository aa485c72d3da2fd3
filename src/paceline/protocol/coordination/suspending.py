"""The suspension as the coordinator conducts it: the transaction, the calls for it, and what front-ends are shown."""

from __future__ import annotations

from collections.abc import Set

from paceline.protocol.coordination.calls import Calls
from paceline.protocol.coordination.generation import Generations
from paceline.protocol.coordination.membership import Membership
from paceline.protocol.coordination.suspension import GroupSuspension
from paceline.protocol.messages import ControlAnswer, RankHello, SuspensionState


class Suspending(GroupSuspension):
    """A GroupSuspension with its calls. `lockstep`: whether the ranks run in waves. `without`: rules left out."""

    def __init__(self, identity: int, lockstep: bool, without: Set[str]) -> None:
        super().__init__(without, together=lockstep)
        self.calls = Calls()
        self.shown = SuspensionState()
        """What front-ends are shown."""
        self._identity = identity
        self._lockstep = lockstep

    def hello(self, hello: RankHello, now: float) -> None:
        """A ready rank said what it knows."""
        self.heard(hello.rank, hello.suspension, hello.mode, hello.held, now)

    def settle(self, membership: Membership, generations: Generations, now: float) -> bool:
        """After anything was heard. Returns whether front-ends are to be shown something else."""
        expected = self.expected(membership, generations, now)
        self.advance(expected, now)
        before, self.shown = self.shown, self.state(expected)
        return self.shown != before

    def answers(self, now: float) -> list[ControlAnswer]:
        """The calls that wait, answered; to be called once the ranks were heard."""
        answers = self.calls.serve(lambda action: self.ask(action, now), self.standing.number)
        return [ControlAnswer(self._identity, *answer) for answer in answers]

    def expected(self, membership: Membership, generations: Generations, now: float) -> list[int]:
        """The ranks that must agree: all that there should be, heard or not, but for those that the others go on
        without, who are told when they come.

        A rank that was told of no suspension when it joined must not step either.
        """
        gone = generations.absent if self._lockstep else membership.gone(now)
        return [rank for rank in range(membership.size) if rank not in gone]
