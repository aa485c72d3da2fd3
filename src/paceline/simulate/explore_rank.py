"""One rank with its engine and links, as a number: a block.

A block is all that is one rank's own: its machine, what its engine has left to do, its two links to the coordinator,
and the requests and notices on their way that name it. It does not hold its rank's number: inside, each is rank 0.

What the walk does not tell apart, and why it may not matter:

- A rank's step, and the agreement after it, are a barrier. That a rank has entered it is not a state of its own:
  being in it, the rank does not read its inbox until all have come, and that is the same as reading nothing and
  coming last. So a running rank may read (it is between two steps) or not, and `BlockMove.waits` marks what a rank
  that is in the barrier would not do: liveness is shown without these moves.
- A wake that leaves this rank out, and another rank's admission, are ignored in every state: they are not put into
  the link.
- A life of the coordinator asks a rank once: the rank has told all that changed since its first answer, so another
  would repeat its last word. Nor is a wake of the same wave put twice into the link, nor a hello that is equal to the
  message before it in the other direction.
- A question is answered when it is sent, if nothing is before it in the link: a rank answers in mid-step too.
- What a rank hears in mid-step too may overtake what it does not.
"""

from __future__ import annotations

from paceline.core.load import Load
from paceline.core.messages import Admit, FromRank, Identify, RankHello, StartDPWave, ToRank
from paceline.core.rank.events import (
    IN_MID_STEP,
    Agreed,
    CoordinatorSaid,
    Effect,
    Event,
    FrontEndSaid,
    Loaded,
    Phase,
    ToCoordinator,
    Turn,
)
from paceline.core.requests import AddRequest, SamplingParams
from paceline.simulate.explore_block import FRONT_END, Block, BlockMove, Group, Life
from paceline.simulate.explore_machine import Machines
from paceline.simulate.explore_parts import LATER, Register, renumber


class Blocks(Machines):
    """All blocks met, and what can become of them.

    `steps`: engine steps that a request takes. `sync_interval`: steps between agreements. `without`: rules left out.
    """

    def __init__(self, steps: int, sync_interval: int, without: frozenset[str] = frozenset()) -> None:
        super().__init__(steps, sync_interval, without)
        self._lives: Register[Life] = Register(Life.key)
        self.messages: Register[FromRank | ToRank] = Register()
        self._numbers: dict[Block, int] = {}
        self._blocks: list[Block] = []
        self.oldest: list[int] = []
        """By block, the message from the rank that the coordinator reads next; -1 where there is none."""
        self.running: list[bool] = []
        """By block, whether the rank takes part in steps: it runs, and has a group if it needs one."""
        self.incarnation: list[int] = []
        """By block, the rank's life."""
        self.loading: list[bool] = []
        """By block, whether that life has not loaded its engine yet: the one before is dead."""
        self.group: list[Group | None] = []
        """By block, the generation whose connections the rank holds."""
        self._neutral: dict[tuple[ToRank, int], int | None] = {}
        self._moves: dict[int, list[BlockMove]] = {}
        self._heard: dict[tuple[int, int], int] = {}
        self._stepped: dict[int, int] = {}
        self._agreed: dict[tuple[int, bool, int, int], int] = {}
        self._tidied: dict[tuple[int, bool], int] = {}
        self._arrived: dict[tuple[int, int], int] = {}

    def __getitem__(self, number: int) -> Block:
        return self._blocks[number]

    def number(self, block: Block) -> int:
        """The number of a block."""
        number = self._numbers.get(block)
        if number is None:
            number = self._numbers[block] = len(self._blocks)
            self._blocks.append(block)
            life = self._lives[block.life]
            machine = life.machine
            self.oldest.append(block.up[0] if block.up else -1)
            self.running.append(machine._may_step())
            self.incarnation.append(machine.incarnation)
            self.loading.append(life.loading)
            self.group.append(life.group)
        return number

    def life(self, number: int) -> Life:
        """The rank and engine in a block. Not to be changed."""
        return self._lives[self._blocks[number].life]

    def fresh(self) -> int:
        """A rank that has just loaded its engine."""
        return self._loaded(1, Block(0, (), (), True, False, (), ()))

    def reborn(self, number: int) -> int:
        """The block after the rank has died and its next life has loaded: what was on its way to or from it is lost."""
        block = self._blocks[number]
        nothing = block._replace(up=(), down=(), connected=False, asked=False, arriving=())
        return self._loaded(self.incarnation[number] + 1, nothing)

    def _loaded(self, incarnation: int, block: Block) -> int:
        life = self._new_life(incarnation)
        return self._after(block._replace(life=self._lives.number(life)), Loaded())

    def quiet(self, number: int) -> bool:
        """Whether nothing is under way at this rank: paused, without requests, its links empty."""
        block, life = self._blocks[number], self.life(number)
        if life.machine.phase is not Phase.READY:
            return False
        moving = block.up or block.down or block.arriving or block.notices
        return block.connected and not moving and not life.unfinished and not life.machine.running

    def stirs(self, number: int) -> bool:
        """Whether anything at the rank, or about it, is about to happen by itself."""
        block = self._blocks[number]
        return not block.connected or bool(block.notices) or any(not move.waits for move in self.moves(number))

    def tidied(self, number: int, known: bool) -> int:
        """The block without wakes that change nothing, now or later.

        Those of a wave that the rank has finished. Where the coordinator knows the rank, so that it hears of every
        change, those of the wave that the rank runs in, and questions too: the answer would repeat the last word.
        """
        key = (number, known)
        found = self._tidied.get(key)
        if found is None:
            found = number
            block = self._blocks[number]
            if block.down:
                machine = self.life(number).machine
                least = machine.wave + (known and machine.running)
                down = tuple(
                    name
                    for name in block.down
                    if not (isinstance(message := self.messages[name], StartDPWave) and message.wave < least)
                    and not (known and isinstance(message, Identify))
                )
                found = self.number(block._replace(down=down))
            self._tidied[key] = found
        return found

    # What happens ---------------------------------------------------------------------------------

    def moves(self, number: int) -> list[BlockMove]:
        """Everything that can happen at the rank alone."""
        moves = self._moves.get(number)
        if moves is None:
            moves = self._moves[number] = self._find_moves(number)
        return moves

    def _find_moves(self, number: int) -> list[BlockMove]:
        block = self._blocks[number]
        life = self.life(number)
        moves: list[BlockMove] = []
        for place, message_number in enumerate(block.down):
            message = self.messages[message_number]
            at_once = isinstance(message, IN_MID_STEP)
            if at_once and any(isinstance(self.messages[name], IN_MID_STEP) for name in block.down[:place]):
                continue
            if at_once or (place == 0 and not life.busy):
                rest = block._replace(down=block.down[:place] + block.down[place + 1 :])
                after = self._after(rest, CoordinatorSaid(message))  # type: ignore[arg-type]
                moves.append(BlockMove("hear", message_number, after, self.running[number] and not at_once))
        if life.machine.phase is Phase.JOINING and life.idle and not block.up and not block.down and block.connected:
            again = life.copy()
            after = self._put(block, again, self._handle(again, Turn(Load(), False), LATER))
            moves.append(BlockMove("hello", 0, after, False))
        for stamp in sorted(set(block.arriving)) if not life.busy else ():
            rest = block._replace(arriving=_without(block.arriving, stamp))
            moves.append(BlockMove("arrive", stamp, self.arrive(self.number(rest), stamp), self.running[number]))
        return moves

    def arrive(self, number: int, stamp: int) -> int:
        """A request stamped with this wave reaches the rank."""
        key = (number, stamp)
        after = self._arrived.get(key)
        if after is None:
            machine = self.life(number).machine
            name = machine.requests.taken.get(FRONT_END, 0) + 1
            request = AddRequest(name, name, machine.incarnation, stamp, [1], SamplingParams(1))
            after = self._arrived[key] = self._after(self._blocks[number], FrontEndSaid(FRONT_END, request))
        return after

    def sent(self, number: int, stamp: int) -> int:
        """A request stamped with this wave is on its way to the rank."""
        block = self._blocks[number]
        return self.number(block._replace(arriving=tuple(sorted((*block.arriving, stamp)))))

    def noticed(self, number: int, stamp: int) -> int:
        """A front-end's notice that names the rank is on its way to the coordinator."""
        block = self._blocks[number]
        return self.number(block._replace(notices=tuple(sorted((*block.notices, stamp)))))

    def notice_read(self, number: int, stamp: int) -> int:
        """The coordinator has taken in such a notice."""
        block = self._blocks[number]
        return self.number(block._replace(notices=_without(block.notices, stamp)))

    def after_crash(self, number: int) -> list[tuple[int, int]]:
        """The blocks that a crash of the coordinator may leave, each with bits that say what was lost.

        1: what the rank had said; 2: what it was told; 4: the notices that name it.
        """
        block = self._blocks[number]._replace(connected=False, asked=False, late=(), gone=0)
        variants: dict[int, int] = {}
        for bits in (3, 7):
            less = block._replace(
                up=() if bits & 1 else block.up,
                down=() if bits & 2 else block.down,
                notices=() if bits & 4 else block.notices,
            )
            variants.setdefault(self.number(less), bits)
        return [(bits, name) for name, bits in variants.items()]

    def from_rank(self, name: int) -> FromRank:
        """A message that a rank sent."""
        message = self.messages[name]
        assert isinstance(message, FromRank)
        return message

    def said_read(self, number: int) -> int:
        """The coordinator has taken in the oldest message from the rank."""
        block = self._blocks[number]
        return self.number(block._replace(up=block.up[1:]))

    def broadcast(self, number: int, message: int) -> int:
        """The coordinator sent a message, as `neutral` made it, and it is on its way to this rank."""
        key = (number, message)
        after = self._heard.get(key)
        if after is None:
            block = self._blocks[number]
            question = isinstance(self.messages[message], Identify)
            if block.connected and message not in block.down and not (question and block.asked):
                block = block._replace(down=(*block.down, message), asked=block.asked or question)
            after = self.number(block)
            if question and block.down == (message,):
                after = self.moves(after)[0].block
            self._heard[key] = after
        return after

    def neutral(self, message: ToRank, rank: int) -> int | None:
        """The message's number as rank `rank` reads it, None where it ignores it whatever its state."""
        key = (message, rank)
        if key not in self._neutral:
            ignored = isinstance(message, Admit) and message.rank != rank
            if isinstance(message, StartDPWave):
                ignored = message.exclude == rank
                message = StartDPWave(message.wave, None)
            self._neutral[key] = None if ignored else self.messages.number(renumber(message, lambda _: 0))
        return self._neutral[key]

    # Steps ----------------------------------------------------------------------------------------

    def stepped(self, number: int) -> int:
        """The rank takes part in a step; if an agreement follows, it is in that one then (`Life.agree`)."""
        found = self._stepped.get(number)
        if found is None:
            found = self._stepped[number] = self._step(number)
        return found

    def agreed(self, number: int, any_work: bool, wave: int, suspension: int) -> int:
        """The agreement's result reaches the rank."""
        key = (number, any_work, wave, suspension)
        after = self._agreed.get(key)
        if after is None:
            life = self.life(number).copy()
            life.agree = None
            effects = self._handle(life, Agreed(any_work, wave, suspension))
            effects += [] if life.machine.running else self._turn(life)
            after = self._agreed[key] = self._put(self._blocks[number], life, effects)
        return after

    def _step(self, number: int) -> int:
        life = self.life(number).copy()
        effects = self._take_a_step(life)
        return self._put(self._blocks[number], life, effects)

    # The rank and its links -----------------------------------------------------------------------

    def _after(self, block: Block, event: Event) -> int:
        life = self._lives[block.life].copy()
        effects = self._handle(life, event)
        if life.idle:
            effects += self._turn(life)
        return self._put(block, life, effects)

    def _put(self, block: Block, life: Life, effects: list[Effect]) -> int:
        up = list(block.up)
        for effect in effects:
            if isinstance(effect, ToCoordinator):
                message = self.messages.number(effect.message)
                if not (up and up[-1] == message and isinstance(effect.message, RankHello)):
                    up.append(message)
        life.machine = renumber(life.machine)
        return self.number(block._replace(life=self._lives.number(life), up=tuple(up)))


def _without(stamps: tuple[int, ...], stamp: int) -> tuple[int, ...]:
    place = stamps.index(stamp)
    return stamps[:place] + stamps[place + 1 :]
