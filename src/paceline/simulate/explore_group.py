"""A deployment whose ranks form generations, and die at any moment: what is added to `explore_world`.

A collective completes for all at once, unless one of them leaves just then: it dies, or goes to form the next
generation. Then any of the others may have got the outcome, and the rest find that the generation is over (`torn`).

That forming takes too long, for a rank or for the coordinator, happens by itself where it cannot succeed any more, and
else counts as a loss: the numbers of generations would grow for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from paceline.protocol.invariants import same_generation
from paceline.protocol.messages import Form
from paceline.simulate.explore_block import Group, demand
from paceline.simulate.explore_group_rank import GroupedBlocks
from paceline.simulate.explore_state import COORDINATOR, FIRST_BLOCK, Action, Common, State
from paceline.simulate.explore_world import Moves, World


class GroupedWorld(World):
    """As `World`, of ranks with a group address."""

    kind_of_blocks = GroupedBlocks
    blocks: GroupedBlocks

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # What else commutes was shown for ranks without generations.
        self._tidies, self.commute = self.commute, False

    def at_rest(self, state: State) -> bool:
        """Likewise; all ranks are members of one generation then."""
        if not super().at_rest(state):
            return False
        group = self._standing(state)
        lives = map(self.blocks.life, state[FIRST_BLOCK:])
        return group is not None and all(life.idle and life.machine.generation == group[0] for life in lives)

    def canonical(self, state: State) -> tuple[State, tuple[int, ...]]:
        """Likewise, without the end of a connection that the coordinator will make nothing of."""
        numbers = list(state[FIRST_BLOCK:])
        if self._merge:
            for rank, number in enumerate(numbers):
                block = self.blocks[number]
                over = block.gone or self.blocks.incarnation[number] - 1
                if (block.late or block.gone) and self.coordinators.retired(state[COORDINATOR], rank, over):
                    # Whatever still comes from that life is void.
                    numbers[rank] = self.blocks.number(block._replace(late=(), gone=0))
                if self._tidies:
                    numbers[rank] = self.blocks.tidied(numbers[rank], False)
        return super().canonical((*state[:FIRST_BLOCK], *numbers))

    def _standing(self, state: State) -> Group | None:
        """The group that all ranks hold."""
        groups = {self.blocks.life(number).group for number in state[FIRST_BLOCK:]}
        return groups.pop() if len(groups) == 1 else None

    # Moves ----------------------------------------------------------------------------------------

    def _moves(self, state: State) -> Moves:
        common = self.common(state)
        for action, after in super()._moves(state):
            yield action, self._met(after) if action.kind == "form" else after
        yield from self._end_moves(state, common)
        yield from self._patience(state, common)
        yield from self._late(state)
        numbers = state[FIRST_BLOCK:]
        leaves = [self._leaves(number) for number in numbers]
        if any(leaves):
            for after in self._torn(state):
                # Who leaves has got the outcome, and reads then that it is to leave.
                stays = zip(numbers, after, leaves, strict=True)
                if any(left and number not in self._endings(before) for before, number, left in stays):
                    yield Action("torn", fair=False), (*state[:FIRST_BLOCK], *after)

    def _endings(self, number: int) -> set[int]:
        """What the rank can be like that found in place of a collective's outcome that its group is over."""
        in_step = self.blocks.life(number).agree is None
        return {self.blocks.ended(one) for one in ((number, self.blocks.stepped(number)) if in_step else (number,))}

    def _leaves(self, number: int) -> bool:
        down = self.blocks[number].down
        return any(isinstance(self.blocks.messages[name], Form) for name in down)

    def _met(self, state: State) -> State:
        """The state in which all ranks hold the group that all of them wait for, if that is so."""
        lives = [self.blocks.life(number) for number in state[FIRST_BLOCK:]]
        first = lives[0].forming
        if first is None or first[1] != self._total(state) or any(life.forming != first for life in lives):
            return state
        return (*state[:FIRST_BLOCK], *map(self.blocks.met, state[FIRST_BLOCK:]))

    def _total(self, state: State) -> int:
        return sum(self.blocks.incarnation[number] for number in state[FIRST_BLOCK:])

    def _end_moves(self, state: State, common: Common) -> Moves:
        """Ranks find that a group is over, or wait no longer for one."""
        stands = self._standing(state) is not None
        for rank, number in enumerate(state[FIRST_BLOCK:]):
            life = self.blocks.life(number)
            if life.forming is None:
                if self.blocks.running[number] and not stands:
                    yield Action("ended", rank), self._with(state, rank, self.blocks.ended(number))
            elif life.forming != life.group:
                after = self._with(state, rank, self.blocks.ended(number))
                if self._hopeless(state, life.forming):
                    yield Action("gives-up", rank), after
                elif common.losses:
                    fewer = common._replace(losses=common.losses - 1)
                    yield Action("gives-up", rank, fair=False), self._changed(after, fewer)
            elif not stands:
                yield Action("gives-up", rank, fair=False), self._with(state, rank, self.blocks.ended(number))

    def _hopeless(self, state: State, group: Group) -> bool:
        """Whether this group cannot be formed any more: a member is dead, or has left it, or was told of a later."""
        if group[1] != self._total(state):
            return True
        for number in state[FIRST_BLOCK:]:
            life = self.blocks.life(number)
            machine = life.machine
            tried = machine._to_form is None and group not in (life.forming, life.group)
            if machine.told > group[0] or (machine.told == group[0] and tried):
                return True
        return False

    def _patience(self, state: State, common: Common) -> Moves:
        """The coordinator gives a generation up that is not formed."""
        coordinator = state[COORDINATOR]
        if not any(name == "patience" for name, _ in self.coordinators.timers(coordinator)):
            return
        answer = self.coordinators.tick(coordinator, "patience")
        if self._hopeless(state, self.coordinators.forming(coordinator)):
            yield from self._answered(state, answer, Action("patience"))
        elif common.losses:
            fewer = self._changed(state, common._replace(losses=common.losses - 1))
            yield from self._answered(fewer, answer, Action("patience", fair=False))

    def _late(self, state: State) -> Moves:
        """The coordinator hears of a life that is over. It may just as well not."""
        coordinators, blocks, coordinator = self.coordinators, self.blocks, state[COORDINATOR]
        for rank, number in enumerate(state[FIRST_BLOCK:]):
            block = blocks[number]
            if block.late:
                answer = coordinators.said(coordinator, rank, blocks.from_rank(block.late[0]), block.late[0])
                before = self._with(state, rank, blocks.late_read(number))
                yield from self._answered(before, answer, Action("late", rank, block.late[0], fair=False))
            if block.gone:
                before = self._with(state, rank, blocks.gone_read(number))
                answer = coordinators.gone(coordinator, rank, block.gone)
                yield from self._answered(before, answer, Action("gone", rank, fair=False))

    def _round(self, state: State) -> Moves:
        group = self._standing(state)
        if group is None or not all(self.blocks.running[number] for number in state[FIRST_BLOCK:]):
            return
        machines = [self.blocks.life(number).machine for number in state[FIRST_BLOCK:]]
        demand(same_generation(group[0], {f"rank {i}": machine.generation for i, machine in enumerate(machines)}))
        yield from super()._round(state)

    def _torn(self, state: State) -> set[tuple[int, ...]]:
        """The blocks after a collective, or two, that completed for some and for the others did not."""
        blocks, numbers = self.blocks, state[FIRST_BLOCK:]
        if next(self._round(state), None) is None:
            return set()
        found: set[tuple[int, ...]] = set()
        agreeing = blocks.life(numbers[0]).agree is not None
        stepped = numbers if agreeing else tuple(map(blocks.stepped, numbers))
        if not agreeing:
            found |= _either(blocks.ended, numbers, stepped)
        agreements = [agree for number in stepped if (agree := blocks.life(number).agree) is not None]
        if agreements:
            found |= _either(blocks.ended, stepped, self._agreed(list(stepped), agreements))
        return found

    def _rank_crash(self, state: State, common: Common) -> Moves:
        """A rank dies at any moment, also as a collective completes, and is started again."""
        before = self._changed(state, common._replace(crashes=common.crashes - 1))
        numbers = state[FIRST_BLOCK:]
        torn = self._torn(state)
        for rank, number in enumerate(numbers):
            last = {number} | {blocks[rank] for blocks in torn} - (self._endings(number) if torn else set())
            reborn = sorted({after for block in last for after in self.blocks.reborn_late(block)})
            for others in sorted({numbers} | torn):
                for after in reborn:
                    yield Action("die", rank, fair=False), self._with((*before[:FIRST_BLOCK], *others), rank, after)


def _either(end: Callable[[int], int], before: Sequence[int], after: Sequence[int]) -> set[tuple[int, ...]]:
    """Every mixture of blocks that got the outcome and blocks that found in its place that the group is over."""
    return set(product(*zip(map(end, before), after, strict=True)))
