"""A deployment whose ranks form generations, and die at any moment: what is added to `explore_world`.

A collective completes for all of a group at once, unless one of them leaves just then: it dies, or goes to form the
next generation. Then any of the others may have got the outcome, and the rest find that the generation is over
(`torn`).

A rank that has died is back after any time. Until then the others may go on without it: that the coordinator waits no
longer for a rank whose connection has ended (`lost`), or for one that says nothing (`silent`), happens at any moment
from when it begins to wait. Where it is a living rank that says nothing, that counts as a loss, since it may be
repeated for ever. So it is with a forming that takes too long, for a rank or for the coordinator; where it cannot
succeed any more that happens by itself.

Requests that a dead rank had, or that were on their way to it, are sent to others, by whoever believes what of the
wave: each front-end sees the connection end. An answer that died on its way is one that was not given: its rank dies
before the step was made, and the others after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from paceline.core.invariants import agree_at_rest, same_generation
from paceline.core.messages import Form, ToRank
from paceline.core.rules import OF_GENERATIONS
from paceline.simulate.explore_block import BlockMove, Group, demand
from paceline.simulate.explore_group_rank import GroupedBlocks, signed
from paceline.simulate.explore_rounds import with_blocks
from paceline.simulate.explore_sends import ways_without_notice
from paceline.simulate.explore_state import COORDINATOR, FIRST_BLOCK, Action, Common, Moves, State
from paceline.simulate.explore_world import World

Members = list[int]


class GroupedWorld(World):
    """As `World`, of ranks with a group address."""

    kind_of_blocks = GroupedBlocks
    blocks: GroupedBlocks

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # What else commutes was shown for ranks without generations, and for all rules together but those that are
        # about what the coordinator says and not about how it is read.
        self._tidies, self.commute = self._merge and self._without <= OF_GENERATIONS, False

    def at_rest(self, state: State) -> bool:
        """Likewise; all ranks are members of one generation then, and know the same wave."""
        if self.common(state).stranded or not super().at_rest(state):
            return False
        lives = [self.blocks.life(number) for number in self.deployed(state)]
        if not all(life.idle for life in lives):
            return False
        groups = self._groups(state)
        if not any(len(members) == len(lives) and self._know(state, group) for group, members in groups.items()):
            return False
        waves = {f"rank {rank}": life.machine.wave for rank, life in enumerate(lives)}
        demand(agree_at_rest(self.coordinators.wave(state[COORDINATOR]), waves))
        return True

    def canonical(self, state: State) -> tuple[State, tuple[int, ...]]:
        """Likewise, without the end of a connection that the coordinator will make nothing of."""
        numbers = list(state[FIRST_BLOCK:])
        if self._merge:
            for rank, number in enumerate(numbers):
                block = self.blocks[number]
                over = block.gone or self.blocks.incarnation[number] - (not block.ended)
                if (block.late or block.gone) and self.coordinators.retired(state[COORDINATOR], rank, over):
                    # Whatever still comes from that life is void.
                    numbers[rank] = self.blocks.number(block._replace(late=(), gone=0))
                if self._tidies:
                    numbers[rank] = self.blocks.tidied(numbers[rank], False)
        return super().canonical((*state[:FIRST_BLOCK], *numbers))

    def check_left_out(self, number: int, wave: int) -> None:
        """Likewise, of a rank whose first wave has not been broken off: a request that came in one that the coordinator
        knew to be over may have been answered in that."""
        if self.blocks.life(number).machine.told <= 1:
            super().check_left_out(number, wave)

    def _groups(self, state: State) -> dict[Group, Members]:
        """The groups that stand, and their members."""
        holders: dict[Group, Members] = {}
        for rank, number in enumerate(state[FIRST_BLOCK:]):
            group = self.blocks.group[number]
            if group is not None:
                holders.setdefault(group, []).append(rank)
        return {group: members for group, members in holders.items() if len(members) == group.size}

    def _know(self, state: State, group: Group) -> bool:
        return all(self.blocks.life(number).machine.generation == group.number for number in self.deployed(state))

    # Moves ----------------------------------------------------------------------------------------

    def _moves(self, state: State) -> Moves:
        common = self.common(state)
        if self._tidies and not (common.crashes or self.calls or self.requests_may_come(state)):
            for rank, number in enumerate(state[FIRST_BLOCK:]):
                move = self._hears(number)
                if move is not None:
                    yield Action(move.kind, rank, move.detail), self._with(state, rank, move.block)
                    return
        for action, after in super()._moves(state):
            yield action, self._met(after) if action.kind == "form" else after
        if common.stranded:
            fewer = self._changed(state, common._replace(stranded=common.stranded - 1))
            for rank in self.open_ranks(common):
                for sent in ways_without_notice(self.blocks, state[FIRST_BLOCK + rank], common.published):
                    yield Action(sent.kind, rank, sent.stamp), self._with(fewer, rank, sent.block)
        groups = self._groups(state)
        yield from self._end_moves(state, common, groups)
        yield from self._patience(state, common)
        yield from self._late(state)
        for members in groups.values():
            yield from self._left(state, members)

    def requests_may_come(self, state: State) -> bool:
        """Whether a rank may yet be sent a request."""
        common = self.common(state)
        return bool(common.unsent or common.stranded)

    def _hears(self, number: int) -> BlockMove | None:
        """What a paused rank reads, if that is all that can happen at it: it may as well come first.

        Nothing else will come that could be read before it, no request and no crash, and its reading concerns nobody:
        in what others do it takes no part before it turns.
        """
        moves = self.blocks.moves(number)
        if len(moves) != 1 or moves[0].kind != "hear" or self.blocks.running[number] or self.blocks.life(number).busy:
            return None
        return moves[0]

    def _told(self, state: State, messages: tuple[ToRank, ...], lost: int) -> State:
        by = self.coordinators.identity(state[COORDINATOR])
        return super()._told(state, tuple(signed(one, by) if isinstance(one, Form) else one for one in messages), lost)

    def _met(self, state: State) -> State:
        """The state in which who forms a group holds it, if all its members have come."""
        coming: dict[Group, Members] = {}
        for rank, number in enumerate(state[FIRST_BLOCK:]):
            life = self.blocks.life(number)
            if life.forming is not None and life.group is None:
                coming.setdefault(life.forming, []).append(rank)
        for group, members in coming.items():
            if len(members) == group.size:
                numbers = [self.blocks.met[state[FIRST_BLOCK + rank]] for rank in members]
                state = with_blocks(state, members, numbers)
        return state

    def _end_moves(self, state: State, common: Common, groups: dict[Group, Members]) -> Moves:
        """Ranks find that a group is over, or wait no longer for one."""
        for rank, number in enumerate(state[FIRST_BLOCK:]):
            life = self.blocks.life(number)
            if life.forming is None:
                if self.blocks.running[number] and life.group not in groups:
                    yield Action("ended", rank), self._with(state, rank, self.blocks.ended[number])
            elif life.group is None:
                after = self._with(state, rank, self.blocks.ended[number])
                if self._hopeless(state, life.forming):
                    yield Action("gives-up", rank), after
                elif common.losses:
                    fewer = common._replace(losses=common.losses - 1)
                    yield Action("gives-up", rank, fair=False), self._changed(after, fewer)
            elif life.group not in groups:
                yield Action("gives-up", rank, fair=False), self._with(state, rank, self.blocks.ended[number])

    def _hopeless(self, state: State, group: Group) -> bool:
        """Whether this group cannot be formed any more: a member is dead, or has left it, or was told of a later."""
        coordinator = state[COORDINATOR]
        told = self.coordinators.members(coordinator) if self.coordinators.forming(coordinator) == group else {}
        can = 0
        for rank, number in enumerate(state[FIRST_BLOCK:]):
            life = self.blocks.life(number)
            still = told.get(rank) == self.blocks.incarnation[number] and life.machine.told < group.number
            can += still or group in (life.forming, life.group) or group in self.blocks.to_form[number]
        return can < group.size

    def _patience(self, state: State, common: Common) -> Moves:
        """The coordinator gives a generation up that is not formed, or waits no longer for ranks."""
        coordinator = state[COORDINATOR]
        for timer in [name for name, _ in self.coordinators.timers(coordinator)]:
            if timer == "patience":
                due = self._hopeless(state, self.coordinators.forming(coordinator))
            elif timer == "silent":
                unspoken = self.coordinators.unspoken(coordinator)
                due = all(self.blocks.loading[state[FIRST_BLOCK + rank]] for rank in unspoken)
            elif timer == "lost":
                due = True
            else:
                continue
            answer = self.coordinators.tick(coordinator, timer)
            if due:
                yield from self._answered(state, answer, Action(timer))
            elif common.losses:
                fewer = self._changed(state, common._replace(losses=common.losses - 1))
                yield from self._answered(fewer, answer, Action(timer, fair=False))

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

    # Collectives ----------------------------------------------------------------------------------

    def _round(self, state: State) -> Moves:
        for group, members in self._groups(state).items():
            numbers = [state[FIRST_BLOCK + rank] for rank in members]
            if all(self.blocks.running[number] for number in numbers):
                known = {
                    f"rank {rank}": self.blocks.life(number).machine.generation
                    for rank, number in zip(members, numbers, strict=True)
                }
                demand(same_generation(group.number, known))
                yield from self.rounds.of(state, members)

    def _left(self, state: State, members: Members) -> Moves:
        """A member leaves as a collective, or two, completes: it has got the outcome, and reads then that it is to."""
        numbers = [state[FIRST_BLOCK + rank] for rank in members]
        leaves = [self.blocks.leaves[number] for number in numbers]
        if not any(leaves):
            return
        for after in self._torn(state, members):
            stays = zip(numbers, after, leaves, strict=True)
            if any(left and number not in self._endings(before) for before, number, left in stays):
                yield Action("torn", fair=False), with_blocks(state, members, after)

    def _endings(self, number: int) -> set[int]:
        """What the rank can be like that found in place of a collective's outcome that its group is over."""
        in_step = self.blocks.life(number).agree is None
        return {self.blocks.ended[one] for one in ((number, self.blocks.stepped(number)) if in_step else (number,))}

    def _torn(self, state: State, members: Members) -> set[tuple[int, ...]]:
        """The members' blocks after a collective, or two, that completed for some and for the others did not."""
        blocks, numbers = self.blocks, tuple(state[FIRST_BLOCK + rank] for rank in members)
        if next(self.rounds.of(state, members), None) is None:
            return set()
        found: set[tuple[int, ...]] = set()
        agreeing = blocks.life(numbers[0]).agree is not None
        stepped = numbers if agreeing else tuple(map(blocks.stepped, numbers))
        if not agreeing:
            found |= _either(blocks.ended.__getitem__, numbers, stepped)
        agreements = [agree for number in stepped if (agree := blocks.life(number).agree) is not None]
        if agreements:
            found |= _either(blocks.ended.__getitem__, stepped, self.rounds.agreed(stepped, agreements))
        return found

    def _rank_crash(self, state: State, common: Common) -> Moves:
        """A rank dies at any moment, also as a collective completes."""
        with_others = {rank: members for members in self._groups(state).values() for rank in members}
        fewer = common._replace(crashes=common.crashes - 1)
        for rank, number in enumerate(state[FIRST_BLOCK:]):
            if self.blocks.loading[number]:
                continue
            members = with_others.get(rank, [rank])
            own = tuple(state[FIRST_BLOCK + member] for member in members)
            torn = self._torn(state, members) if rank in with_others else set()
            place = members.index(rank)
            last = {number} | {blocks[place] for blocks in torn} - (self._endings(number) if torn else set())
            for others in sorted({own} | torn):
                yield from self._dies(with_blocks(state, members, others), fewer, rank, last)

    def _dies(self, state: State, common: Common, rank: int, last: set[int]) -> Moves:
        """`last`: what the rank may be like when it dies; each of `state` is as the others are."""
        for block in sorted(last):
            stranded = common.stranded + self.blocks.requests(block)
            after = self._changed(state, common._replace(stranded=stranded))
            for reborn in self.blocks.reborn_late(block):
                yield Action("die", rank, fair=False), self._with(after, rank, reborn)


def _either(end: Callable[[int], int], before: Sequence[int], after: Sequence[int]) -> set[tuple[int, ...]]:
    """Every mixture of blocks that got the outcome and blocks that found in its place that the group is over."""
    return set(product(*zip(map(end, before), after, strict=True)))
