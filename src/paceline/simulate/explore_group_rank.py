"""A rank that forms generations with the others: what is added to a block (`explore_rank`).

A group has a name (`explore_block.Group`) that stands in the life of each of its members, and it stands as long as
there are as many of them as it has: who dies, leaves it for the next, or was told of its end has it no more. So nobody
has to be told that it is over; who enters one of its collectives finds out (`ended`), at once or later.

- A rank that is dead is its next life, which has not loaded its engine yet (`load`): until then it hears nothing and
  nobody hears of it.

- To form is two moves. `form`: the rank turns, leaves the group it was in, and waits; when the last one has come, all
  hold the new group. `formed`: the rank is told so.
- A rank is told a generation once; that it is told again changes nothing but that it repeats its last word.
- A question is answered when it is sent, as elsewhere, if nothing is before it in the link. What is left out by that:
  the same question read later, when the rank has been told to form a generation, of which it does not tell. Questions
  that come then are walked, since they are repeated while a rank is missing or silent. (With questions of any age there
  are two thirds more states, and nothing else was found.)
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.core.messages import Form, GroupMember, Identify, ToRank
from paceline.core.rank.events import Effect, Event, Formed, FormGroup, GenerationEnded, Loaded
from paceline.simulate.explore_block import Block, BlockMove, Group, Life
from paceline.simulate.explore_parts import NOW, Once, RankLabel
from paceline.simulate.explore_rank import Blocks


class GroupedBlocks(Blocks):
    """Blocks of ranks that have a group address."""

    group_address = "group"

    def __init__(self, steps: int, sync_interval: int, without: frozenset[str] = frozenset()) -> None:
        super().__init__(steps, sync_interval, without)
        self.met = Once(self._met)
        """The block after all that the rank forms a group with have come."""
        self.ended = Once(self._ended)
        """The block after the rank has found that its group is over, or waits no longer for it to be formed."""
        self.to_form = Once(self._to_form)
        """The groups that the rank has been told to form and has not begun with, those that it is still to read too."""
        self.leaves = Once(self._leaves)
        """Whether the rank is about to read that it is to leave its group."""

    def reborn(self, number: int) -> int:
        """The block after the rank has died: what was on its way is lost, and its next life has still to load."""
        life = self._lives.number(self._new_life(self.incarnation[number] + 1))
        return self.number(self[number]._replace(life=life, up=(), down=(), connected=False, asked=False, arriving=()))

    def requests(self, number: int) -> int:
        """How many requests the rank has, those on their way to it included."""
        return self.life(number).unfinished + len(self[number].arriving)

    def _to_form(self, number: int) -> set[Group]:
        told, form = self.life(number).machine.told, self.life(number).machine._to_form
        groups = {named(form)} if form is not None else set()
        messages = [self.messages[name] for name in self[number].down]
        return groups | {named(one) for one in messages if isinstance(one, Form) and one.generation > told}

    def _leaves(self, number: int) -> bool:
        return any(isinstance(self.messages[name], Form) for name in self[number].down)

    def reborn_late(self, number: int) -> list[int]:
        """The blocks that the rank's death may leave: what it had said is lost, or may still be read."""
        block = self[number]
        after = self.number(self[self.reborn(number)]._replace(gone=self.incarnation[number]))
        late = self.number(self[after]._replace(late=block.up))
        return [after, late] if late != after else [after]

    def late_read(self, number: int) -> int:
        """The coordinator has taken in the oldest message of the life before."""
        block = self[number]
        return self.number(block._replace(late=block.late[1:]))

    def gone_read(self, number: int) -> int:
        """The coordinator has heard that the connection of the life before has ended."""
        return self.number(self[number]._replace(gone=0))

    def _met(self, number: int) -> int:
        life = self.life(number).copy()
        life.group = life.forming
        return self._put(self[number], life, [])

    def _ended(self, number: int) -> int:
        life = self.life(number).copy()
        life.agree = life.group = life.forming = None
        effects = self._handle(life, GenerationEnded())
        if life.idle:
            effects += self._turn(life)
        return self._put(self[number], life, effects)

    def broadcast(self, number: int, message: int) -> int:
        """The coordinator sent a message, as `neutral` made it, and it is on its way to this rank."""
        key = (number, message)
        after = self._heard.get(key)
        if after is None:
            block = self[number]
            what = self.messages[message]
            machine = self.life(number).machine
            told = isinstance(what, Form) and (
                what.generation <= machine.told or what.members[0].incarnation != machine.incarnation
            )
            if block.connected and message not in block.down and not told:
                block = block._replace(down=(*block.down, message))
            after = self.number(block)
            if isinstance(what, Identify) and block.down == (message,):
                after = next(move.block for move in self.moves(after) if move.kind == "hear")
            self._heard[key] = after
        return after

    def neutral(self, message: ToRank, rank: int) -> int | None:
        """The message's number as rank `rank` reads it, None where it ignores it whatever its state."""
        if not isinstance(message, Form):
            return super().neutral(message, rank)
        own = [member for member in message.members[:-1] if member.rank == rank]
        if not own:
            return None
        members = [GroupMember(RankLabel(0), own[0].incarnation, ""), message.members[-1]]
        return self.messages.number(Form(message.generation, message.wave, members, message.suspension))

    def _find_moves(self, number: int) -> list[BlockMove]:
        moves = super()._find_moves(number)
        block, life = self[number], self.life(number)
        if life.loading and not block.ended:
            moves.append(BlockMove("load", 0, self._after(block, Loaded()), False))
        if life.machine._to_form is not None and not life.busy:
            turned = life.copy()
            moves.append(BlockMove("form", 0, self._put(block, turned, self._turn(turned)), False))
        if life.forming is not None and life.forming == life.group:
            formed = life.copy()
            formed.forming = None
            effects = self._handle(formed, Formed(life.forming.number))
            if formed.idle:
                effects += self._turn(formed)
            moves.append(BlockMove("formed", life.forming.number, self._put(block, formed, effects), False))
        return moves

    def _handle(self, life: Life, event: Event, now: float = NOW) -> list[Effect]:
        effects = super()._handle(life, event, now)
        for effect in effects:
            if isinstance(effect, FormGroup):
                life.group = None
                life.forming = _named(effect.generation, effect.members)
        return effects

    def _put(self, block: Block, life: Life, effects: list[Effect]) -> int:
        if life.machine.told:
            # What it was told before is not read again (`broadcast`), so it may go unread.
            down = tuple(name for name in block.down if not self._outdated(self.messages[name], life))
            block = block._replace(down=down)
        return super()._put(block, life, effects)

    def _outdated(self, message: object, life: Life) -> bool:
        return isinstance(message, Form) and message.generation <= life.machine.told


def signed(form: Form, by: int) -> Form:
    """The message with a last member that names who gave the number, and how many members there are."""
    return Form(
        form.generation,
        form.wave,
        [*form.members, GroupMember(RankLabel(1), len(form.members), str(by))],
        form.suspension,
    )


def named(form: Form) -> Group:
    """The group that such a message is to form."""
    return _named(form.generation, form.members)


def _named(generation: int, members: Sequence[GroupMember]) -> Group:
    return Group(generation, int(members[-1].address), members[-1].incarnation)
