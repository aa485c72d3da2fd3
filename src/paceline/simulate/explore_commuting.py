"""What may as well come now: moves whose order with all others makes no difference.

Two things that happen at different parties, or that a party only notes, lead to the same state in either order, so one
order is walked in place of both. Here are the only moves for which that is claimed, each with the reason. The tests
hold the walk against one that does without them (`test_merging_hides_nothing`).
"""

from __future__ import annotations

from paceline.core.messages import Identify, RankHello, WaveComplete
from paceline.simulate.explore_coordinator import Answer, Coordinators
from paceline.simulate.explore_rank import Blocks
from paceline.simulate.explore_state import COMMON, COORDINATOR, FIRST_BLOCK, Common, State


class Commuting:
    """Finds such moves, by looking into the machines' states."""

    def __init__(self, blocks: Blocks, coordinators: Coordinators) -> None:
        self._blocks = blocks
        self._coordinators = coordinators

    def tidied(self, state: State, common: Common) -> State:
        """The state after messages that change nothing, now or later, have been read.

        To the coordinator that is: anything but a hello of a rank that it does not know, and a hello that repeats
        what the rank said before; the next one, if there will be one, might not know that.
        """
        blocks, coordinator = self._blocks, state[COORDINATOR]
        known = self._known(state)
        numbers = [blocks.tidied(number, known[rank]) for rank, number in enumerate(state[FIRST_BLOCK:])]
        oldest = blocks.oldest
        for rank, number in enumerate(numbers):
            while (name := oldest[number]) >= 0 and self.void(coordinator, rank, name, known[rank], common.crashes > 0):
                number = numbers[rank] = blocks.said_read(number)
        return (coordinator, state[COMMON], *numbers)

    def void(self, coordinator: int, rank: int, name: int, known: bool, crashes: bool) -> bool:
        """Whether the message `name` of a rank is one of these.

        `known`: whether the coordinator knows this life of the rank as ready; `crashes`: whether anybody may crash.
        """
        hello = isinstance(self._blocks.from_rank(name), RankHello)
        if known != hello or (hello and crashes):
            return False
        answer = self._coordinators.said(coordinator, rank, self._blocks.from_rank(name), name)
        # A question is for those that this one has not asked, and it asks whoever is connected.
        return answer.state == coordinator and all(isinstance(sent, Identify) for sent in answer.broadcasts)

    def first(self, state: State, common: Common, quiet: bool) -> tuple[str, int]:
        """A move that is to come first, and its rank; an empty name where there is none.

        `quiet`: no calls will come.
        """
        blocks, coordinator = self._blocks, state[COORDINATOR]
        numbers = state[FIRST_BLOCK:]
        known = self._known(state)
        for rank, number in enumerate(numbers):
            name = blocks.oldest[number]
            if name >= 0 and known[rank]:
                answer = self.noted(coordinator, rank, name, common.crashes > 0)
                if answer is not None and answer.published <= common.published:
                    return "say", rank
        if common.unsent or common.crashes or not quiet or self.tells(coordinator):
            return "", -1
        for rank, number in enumerate(numbers):
            if self.hears(number) is not None:
                return "hear", rank
        if all(known) and all(map(self.still, numbers)):
            return "round", -1
        return "", -1

    def tells(self, coordinator: int) -> bool:
        """Whether the coordinator is about to tell the ranks of a suspension, again and again."""
        return self._coordinators[coordinator]._suspension.due is not None

    def hears(self, number: int) -> int | None:
        """The block after a paused rank has read what it is told, if that is all that can happen at it.

        Nothing else will come that could be read before it.
        """
        moves = self._blocks.moves(number)
        if len(moves) == 1 and moves[0].kind == "hear" and not self._blocks.running[number]:
            return moves[0].block
        return None

    def still(self, number: int) -> bool:
        """Whether nothing is on its way to the rank, and it is connected."""
        block = self._blocks[number]
        return block.connected and not block.down and not block.arriving

    def noted(self, coordinator: int, rank: int, name: int, crashes: bool) -> Answer | None:
        """What the coordinator makes of a message that it only notes, of a rank that it knows; None for any other."""
        message = self._blocks.from_rank(name)
        if not self._only_noted(coordinator, rank, message, crashes):
            return None
        answer = self._coordinators.said(coordinator, rank, message, name)
        return None if answer.broadcasts else answer

    def _known(self, state: State) -> list[bool]:
        """By rank, whether the coordinator knows this life of it as ready."""
        lives = self._coordinators.known(state[COORDINATOR])
        return [
            life == self._blocks.incarnation[number] for life, number in zip(lives, state[FIRST_BLOCK:], strict=True)
        ]

    def _only_noted(self, coordinator: int, rank: int, message: object, crashes: bool) -> bool:
        """Whether the coordinator notes the message of a rank that it knows, and acts on it no otherwise if it is late.

        A rank that pauses after others have: the wave is over already. A rank that runs in the wave that others are
        known to run in: it owes no answer any more. A hello is read by the next coordinator if this one dies.
        """
        machine = self._coordinators[coordinator]
        group = machine._group
        if isinstance(message, WaveComplete):
            return group.wave > message.wave
        if not isinstance(message, RankHello) or crashes:
            return False
        said = machine._suspension._said.get(rank)
        if said is None or (said.number, said.held) != (message.suspension, message.held):
            return False
        if message.running:
            return group.wave == message.wave and group.running
        return group.wave >= message.wave
