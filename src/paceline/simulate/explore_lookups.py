"""What the machines of a world do, as tables of numbers: one for each question about one party, or one pair.

The answers are those of `World` and its parts, asked once for each argument. Numbers are those of states, blocks and
coordinators; beside them are numbered here: events at the coordinator (`event`), its answers (`answers`), what one
rank hears of an answer (`heard`), what changes in `Common` with one (`echo`), what a rank has to say in an agreement.
-1 is none. What a table raises (`Broken`) is of a state that is really met.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from paceline.core.messages import Identify, RankHello
from paceline.core.rank.events import Agree
from paceline.simulate.explore_coordinator import Answer
from paceline.simulate.explore_tables import Fan, Table
from paceline.simulate.explore_world import World


class Names:
    """Things by number, in the order in which they were met."""

    def __init__(self, *first: Any) -> None:
        self.things = [*first]
        self._numbers = {thing: number for number, thing in enumerate(first)}

    def __call__(self, thing: Any) -> int:
        """The number of this."""
        number = self._numbers.setdefault(thing, len(self.things))
        if number == len(self.things):
            self.things.append(thing)
        return number


class CoordinatorLookups:
    """Of the coordinator, its answers and what belongs to no one party."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._coordinators = coordinators = world.coordinators
        self.event = Names()
        self._answers: list[Answer] = []
        self._answer = Names()
        self._heard = Names(())
        self._echoes: list[Answer] = []
        self._echo = Names()
        # By coordinator; the first, with event and rank as one number, and of what is only noted, message and crashes.
        self.answers = Table(lambda state, column: self._answered(state, *divmod(column, world.ranks)))
        self.void = Table(self._void)
        self.noted = Table(self._noted)
        self.life = Table(lambda state, rank: coordinators.known(state)[rank])
        self.resting = Table(lambda state, _: not coordinators.timers(state))
        self.tells = Table(lambda state, _: world.commuting.tells(state))
        self.next_life = Table(lambda state, _: coordinators.fresh(coordinators[state].identity + 1))
        # Events, each with the ranks, as bits, of which one must be silent for it, and whether it makes a new number.
        self.ticks = Fan(3, self._ticks)
        # By answer.
        self.state = Table(lambda answer, _: self._answers[answer].state)
        self.echo = Table(lambda answer, _: self._echoed(self._answers[answer]))
        self.heard = Table(lambda answer, rank: self._hears(self._answers[answer], rank))
        self.sound = Table(self._sound)
        self.left_out = Table(lambda answer, _: self._answers[answer].left_out[0])
        self.wake = Table(lambda answer, _: self._answers[answer].left_out[1])
        # A question follows a connection that is up.
        self.can_be_lost = Table(
            lambda answer, _: any(not isinstance(one, Identify) for one in self._answers[answer].broadcasts)
        )
        # By common, and echo.
        self.after = Table(
            lambda common, echo: world.number(world.after_answer(world.commons[common], self._echoes[echo]))
        )
        self.news = Table(lambda common, echo: self._echoes[echo].published > world.commons[common].published)

    def name(self, answer: Answer) -> int:
        """The number of an answer."""
        number = self._answer(answer)
        if number == len(self._answers):
            self._answers.append(answer)
        return number

    def messages(self, heard: int) -> tuple[int, ...]:
        """The messages that a rank hears."""
        messages: tuple[int, ...] = self._heard.things[heard]
        return messages

    def _answered(self, state: int, event: int, rank: int) -> int:
        kind, *details = self.event.things[event]
        coordinators = self._coordinators
        if kind == "said":
            return self.name(coordinators.said(state, rank, self._world.blocks.from_rank(details[0]), details[0]))
        if kind == "noticed":
            return self.name(coordinators.noticed(state, rank, details[0]))
        if kind == "called":
            return self.name(coordinators.called(state, *details))
        return self.name(coordinators.tick(state, details[0]) if kind == "tick" else coordinators.subscribed(state))

    def _void(self, state: int, column: int) -> bool:
        """Of a hello: whether it may go unread, if it is of a rank that is known and nobody will crash."""
        name, rank = divmod(column, self._world.ranks)
        hello = isinstance(self._world.blocks.from_rank(name), RankHello)
        return self._world.commuting.void(state, rank, name, hello, False)

    def _noted(self, state: int, column: int) -> int:
        rest, rank = divmod(column, self._world.ranks)
        answer = self._world.commuting.noted(state, rank, rest // 2, bool(rest % 2))
        return -1 if answer is None else self.name(answer)

    def _sound(self, answer: int, _: int) -> bool:
        self._world.check_broadcasts(self._answers[answer])
        return True

    def _ticks(self, state: int) -> list[tuple[int, int, bool]]:
        return [
            (
                self.event(("tick", timer)),
                sum(1 << rank for rank in set(ranks)),
                self._coordinators.counts_up(state, timer),
            )
            for timer, ranks in self._coordinators.timers(state)
        ]

    def _hears(self, answer: Answer, rank: int) -> int:
        names = [self._world.blocks.neutral(message, rank) for message in answer.broadcasts]
        return self._heard(tuple(name for name in names if name is not None))

    def _echoed(self, answer: Answer) -> int:
        number = self._echo(answer[2:])
        if number == len(self._echoes):
            self._echoes.append(answer)
        return number


class CommonLookups:
    """Of what belongs to no one party, by its number."""

    def __init__(self, world: World, event: Names) -> None:
        commons, calls, name = world.commons, world.calls, world.number
        self.losses = Table(lambda common, _: commons[common].losses)
        self.lost = Table(lambda common, _: name(commons[common]._replace(losses=commons[common].losses - 1)))
        self.without_losses = Table(lambda common, _: name(commons[common]._replace(losses=0)))
        self.crashes = Table(lambda common, _: commons[common].crashes > 0)
        self.rank_crashed = Table(lambda common, _: name(commons[common]._replace(crashes=commons[common].crashes - 1)))
        self.crashed = Table(
            lambda common, _: name(commons[common]._replace(crashes=commons[common].crashes - 1, told=False))
        )
        self.unsent = Table(lambda common, _: commons[common].unsent)
        self.sent = Table(lambda common, _: name(commons[common]._replace(unsent=commons[common].unsent - 1)))
        published = Names()
        self.publications = published.things
        self.published = Table(lambda common, _: published(commons[common].published))
        self.settled = Table(lambda common, _: commons[common].settled)
        self.over = Table(lambda common, _: commons[common].calls == len(calls))
        self.asking = Table(lambda common, _: commons[common].asking)
        self.asked = Table(lambda common, _: name(commons[common]._replace(asking=True)))
        self.told = Table(lambda common, _: name(commons[common]._replace(told=True)))
        # -1 where no call is on its way to the coordinator.
        self.call = Table(
            lambda common, _: (
                event(("called", one.calls, calls[one.calls], one.answered))
                if (one := commons[common]).asking and not one.told
                else -1
            )
        )
        self.resumes = Table(lambda common, _: calls[commons[common].calls] == "resume")


class BlockLookups:
    """Of one rank with its links, by its block."""

    def __init__(self, world: World, coordinator: CoordinatorLookups) -> None:
        self._world = world
        self._event = coordinator.event
        self._messages = coordinator.messages
        self._sends: dict[int, Fan] = {}
        blocks, commuting = world.blocks, world.commuting
        self.oldest = Table(lambda number, _: blocks.oldest[number])
        self.hello = Table(lambda name, _: isinstance(blocks.from_rank(name), RankHello))
        self.said_read = Table(lambda number, _: blocks.said_read(number))
        self.life = Table(lambda number, _: blocks.incarnation[number])
        self.running = Table(lambda number, _: blocks.running[number])
        self.quiet = Table(lambda number, _: blocks.quiet(number))
        self.suspension = Table(lambda number, _: blocks.life(number).machine.standing.number)
        self.stirs = Table(lambda number, _: blocks.stirs(number))
        self.reached = Table(lambda number, _: blocks[number].connected and not blocks[number].down)
        self.tidied = Table(lambda number, known: blocks.tidied(number, bool(known)))
        self.hears = Table(lambda number, _: -1 if (after := commuting.hears(number)) is None else after)
        self.still = Table(lambda number, _: commuting.still(number))
        self.told = Table(self._told)
        self.may_be_left_out = Table(self._may_be_left_out)
        self.reborn = Table(lambda number, _: blocks.reborn(number))
        # What a crash of the coordinator may leave: one block, or one of two.
        self.crashed = tuple(Table(partial(self._crashed, which)) for which in range(2))
        # Each with the event that the coordinator sees, -1 for none; and whether it is fair.
        self.moves = Fan(3, self._moves)
        self.may_step = Table(lambda number, _: blocks.running[number] and len(blocks[number].up) < world.backlog)
        self.stepped = Table(lambda number, _: blocks.stepped(number))
        self.agreeing = Table(lambda number, _: blocks.life(number).agree is not None)
        self.has_work = Table(lambda number, _: self._agree(number).has_work)
        self.wave = Table(lambda number, _: self._agree(number).wave)
        self.agreed_suspension = Table(lambda number, _: self._agree(number).suspension)
        self.outcome = Names()
        self.agreed = Table(lambda number, outcome: blocks.agreed(number, *self.outcome.things[outcome]))

    def sends(self, publication: int, published: tuple[int, bool]) -> Fan:
        """What may be sent to a rank: the block then, and what the coordinator reads at once."""
        fan = self._sends.get(publication)
        if fan is None:
            fan = self._sends[publication] = Fan(2, partial(self._ways, published))
        return fan

    def _ways(self, published: tuple[int, bool], number: int) -> list[tuple[int, int]]:
        ways = self._world.ways_to_send(self._world.blocks, number, published)
        return [(sent.block, -1 if sent.read is None else self._event(("noticed", sent.read))) for sent in ways]

    def _moves(self, number: int) -> list[tuple[int, int, bool]]:
        blocks, event = self._world.blocks, self._event
        block = blocks[number]
        moves = [(move.block, -1, not move.waits) for move in blocks.moves(number)]
        if block.up:
            moves.append((blocks.said_read(number), event(("said", block.up[0])), True))
        for stamp in sorted(set(block.notices)):
            moves.append((blocks.notice_read(number, stamp), event(("noticed", stamp)), True))
        if not block.connected:
            moves.append((blocks.number(block._replace(connected=True)), event(("subscribed",)), True))
        return moves

    def _told(self, number: int, heard: int) -> int:
        for message in self._messages(heard):
            number = self._world.blocks.broadcast(number, message)
        return number

    def _may_be_left_out(self, number: int, wave: int) -> bool:
        self._world.check_left_out(number, wave)
        return True

    def _crashed(self, which: int, number: int, _: int) -> int:
        left = self._world.blocks.after_crash(number)
        return left[which][1] if which < len(left) else -1

    def _agree(self, number: int) -> Agree:
        agree = self._world.blocks.life(number).agree
        assert agree is not None
        return agree
