"""What may as well come now: moves whose order with all others makes no difference.

Two things that happen at different parties, or that a party only notes, lead to the same state in either order, so one
order is walked in place of both. Here are the only moves for which that is claimed, each with the reason. The tests
hold the walk against one that does without them (`test_merging_hides_nothing`).
"""

from __future__ import annotations

from paceline.protocol.messages import Identify, RankHello, WaveComplete
from paceline.simulate.explore_coordinator import Coordinators
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
        blocks, coordinators, coordinator = self._blocks, self._coordinators, state[COORDINATOR]
        known = self._known(state)
        numbers = [blocks.tidied(number, known[rank]) for rank, number in enumerate(state[FIRST_BLOCK:])]
        oldest = blocks.oldest
        for rank, number in enumerate(numbers):
            while oldest[number] >= 0:
                message = blocks.from_rank(oldest[number])
                hello = isinstance(message, RankHello)
                if known[rank] != hello or (hello and common.crashes):
                    break
                answer = coordinators.said(coordinator, rank, message, oldest[number])
                # A question is for those that this one has not asked, and it asks whoever is connected.
                if answer.state != coordinator or any(not isinstance(sent, Identify) for sent in answer.broadcasts):
                    break
                number = numbers[rank] = blocks.said_read(number)
        return (coordinator, state[COMMON], *numbers)

    def first(self, state: State, common: Common, quiet: bool) -> tuple[str, int]:
        """A move that is to come first, and its rank; an empty name where there is none.

        `quiet`: no calls will come.
        """
        blocks, coordinators, coordinator = self._blocks, self._coordinators, state[COORDINATOR]
        numbers = state[FIRST_BLOCK:]
        known = self._known(state)
        for rank, number in enumerate(numbers):
            name = blocks.oldest[number]
            if name < 0 or not known[rank]:
                continue
            message = blocks.from_rank(name)
            if self._only_noted(coordinator, rank, message, common.crashes):
                answer = coordinators.said(coordinator, rank, message, name)
                if not answer.broadcasts and answer.published <= common.published:
                    return "say", rank
        if common.unsent or common.crashes or not quiet:
            return "", -1
        if coordinators[coordinator]._suspension.due is not None:
            return "", -1
        for rank, number in enumerate(numbers):
            # All that can happen at this rank, and nothing else will come that could be read before it.
            moves = blocks.moves(number)
            if len(moves) == 1 and moves[0].kind == "hear" and not blocks.running[number]:
                return "hear", rank
        still = all(blocks[number].connected and not blocks[number].down for number in numbers)
        if all(known) and still and not any(blocks[number].arriving for number in numbers):
            return "round", -1
        return "", -1

    def _known(self, state: State) -> list[bool]:
        """By rank, whether the coordinator knows this life of it as ready."""
        lives = self._coordinators.known(state[COORDINATOR])
        return [
            life == self._blocks.incarnation[number] for life, number in zip(lives, state[FIRST_BLOCK:], strict=True)
        ]

    def _only_noted(self, coordinator: int, rank: int, message: object, crashes: int) -> bool:
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
