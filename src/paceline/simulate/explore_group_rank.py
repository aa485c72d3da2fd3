"""A rank that forms generations with the others: what is added to a block (`explore_rank`).

A group is here a pair of numbers (`explore_block.Group`) in the life of each of its members, and it stands as long as
all ranks have the same: who dies, leaves it for the next, or was told of its end has it no more. So nobody has to be
told that it is over; who enters one of its collectives finds out (`ended`), at once or later.

- To form is two moves. `form`: the rank turns, leaves the group it was in, and waits; when the last one has come, all
  hold the new group. `formed`: the rank is told so.
- A rank is told a generation once; that it is told again changes nothing but that it repeats its last word.
- A question is answered when it is sent, as elsewhere, if nothing is before it in the link. What is left out by that:
  the same question read later, when the rank has been told to form a generation, of which it does not tell. Questions
  that come then are walked, since they are repeated while a rank is missing or silent. (With questions of any age there
  are two thirds more states, and nothing else was found.)
"""

from __future__ import annotations

from paceline.protocol.messages import Form, GroupMember, Identify, ToRank
from paceline.protocol.rank_events import Effect, Event, Formed, FormGroup, GenerationEnded
from paceline.simulate.explore_block import Block, BlockMove, Life
from paceline.simulate.explore_parts import NOW, RankLabel
from paceline.simulate.explore_rank import Blocks


class GroupedBlocks(Blocks):
    """Blocks of ranks that have a group address."""

    group_address = "group"

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

    def met(self, number: int) -> int:
        """All that the rank forms a group with have come."""
        life = self.life(number).copy()
        life.group = life.forming
        return self._put(self[number], life, [])

    def ended(self, number: int) -> int:
        """The rank finds that its group is over, or waits no longer for it to be formed."""
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
            told = isinstance(what, Form) and what.generation <= self.life(number).machine.told
            if block.connected and message not in block.down and not told:
                block = block._replace(down=(*block.down, message))
            after = self.number(block)
            if isinstance(what, Identify) and block.down == (message,):
                after = next(move.block for move in self.moves(after) if move.kind == "hear")
            self._heard[key] = after
        return after

    def neutral(self, message: ToRank, rank: int) -> int | None:
        """The message's number as rank `rank` reads it, None where it ignores it whatever its state."""
        if isinstance(message, Form):
            return self.messages.number(_in_short(message, rank))
        return super().neutral(message, rank)

    def _find_moves(self, number: int) -> list[BlockMove]:
        moves = super()._find_moves(number)
        block, life = self[number], self.life(number)
        if life.machine._to_form is not None and not life.busy:
            turned = life.copy()
            moves.append(BlockMove("form", 0, self._put(block, turned, self._turn(turned)), False))
        if life.forming is not None and life.forming == life.group:
            formed = life.copy()
            formed.forming = None
            effects = self._handle(formed, Formed(life.forming[0]))
            if formed.idle:
                effects += self._turn(formed)
            moves.append(BlockMove("formed", life.forming[0], self._put(block, formed, effects), False))
        return moves

    def _handle(self, life: Life, event: Event, now: float = NOW) -> list[Effect]:
        effects = super()._handle(life, event, now)
        for effect in effects:
            if isinstance(effect, FormGroup):
                life.group = None
                life.forming = (effect.generation, effect.members[-1].incarnation)
        return effects

    def _put(self, block: Block, life: Life, effects: list[Effect]) -> int:
        if life.machine.told:
            # What it was told before is not read again (`broadcast`), so it may go unread.
            down = tuple(name for name in block.down if not self._outdated(self.messages[name], life))
            block = block._replace(down=down)
        return super()._put(block, life, effects)

    def _outdated(self, message: object, life: Life) -> bool:
        return isinstance(message, Form) and message.generation <= life.machine.told


def _in_short(form: Form, rank: int) -> Form:
    """The message with the rank's own membership, and a last member whose incarnation is the sum of all."""
    own = [GroupMember(RankLabel(0), member.incarnation, "") for member in form.members if member.rank == rank]
    everyone = GroupMember(RankLabel(1), sum(member.incarnation for member in form.members), "")
    return Form(form.generation, form.wave, [*own, everyone], form.suspension)
