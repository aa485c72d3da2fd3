"""Steps that ranks take together: a barrier, and the agreement after it if one is due."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.core.invariants import same_collective
from paceline.core.rank.events import Agree, Step
from paceline.simulate.explore_block import demand
from paceline.simulate.explore_rank import Blocks
from paceline.simulate.explore_state import FIRST_BLOCK, Action, Moves, State


class Rounds:
    """`backlog`: messages of one rank that the coordinator may leave unread. `called`: whether an operator calls."""

    def __init__(self, blocks: Blocks, backlog: int, *, called: bool) -> None:
        self._blocks = blocks
        self._backlog = backlog
        self._called = called

    def of(self, state: State, members: Sequence[int]) -> Moves:
        """All members run and take part in a step, and in the agreement if one is due."""
        blocks = self._blocks
        numbers = [state[FIRST_BLOCK + rank] for rank in members]
        if not all(blocks.running[number] and len(blocks[number].up) < self._backlog for number in numbers):
            return
        agreeing = all(blocks.life(number).agree is not None for number in numbers)
        if not agreeing:
            numbers = [blocks.stepped(number) for number in numbers]
        agrees = [blocks.life(number).agree for number in numbers]
        demand(same_collective({f"rank {rank}": agree or Step() for rank, agree in zip(members, agrees, strict=True)}))
        agreements = [agree for agree in agrees if agree is not None]
        # In an agreement a rank can hear of a suspension that it has not spoken of.
        if agreements and (agreeing or not self._called):
            numbers = self.agreed(numbers, agreements)
        yield Action("agree" if agreeing else "round", detail=len(agreements)), with_blocks(state, members, numbers)

    def agreed(self, numbers: Sequence[int], agreements: Sequence[Agree]) -> list[int]:
        """The blocks after the agreement."""
        any_work = any(agree.has_work for agree in agreements)
        wave = max(agree.wave for agree in agreements)
        suspension = max(agree.suspension for agree in agreements)
        return [self._blocks.agreed(number, any_work, wave, suspension) for number in numbers]


def with_blocks(state: State, ranks: Sequence[int], numbers: Sequence[int]) -> State:
    """The state with these blocks in the places of the ranks' own."""
    after = list(state)
    for rank, number in zip(ranks, numbers, strict=True):
        after[FIRST_BLOCK + rank] = number
    return tuple(after)
