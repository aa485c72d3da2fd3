"""The whole deployment as a handful of numbers, and everything that can happen in it.

A state is `(coordinator, common, block of rank 0, block of rank 1, ...)`. `common` is the number of a `Common`.

Front-ends hold nothing that matters to waves but what they believe of the wave, and views reach them however late. So
they have no state here: a request may be stamped with the newest wave that was published or with the oldest, wave 0
(the coordinator compares a stamp with its wave once, when it reads the notice: what a stamp between the two would bring
is brought by one of these), and its notice is sent where the production machine with such a belief sends one. A
request and its notice travel on two links, so either comes first, and from the moment it is sent to the moment that the
first of them comes nothing else can tell that it was sent: both are one move. Since a request may wait on its link for
ever, requests of one front-end are not kept in order either; what is walked is any number of front-ends.

A lost broadcast is lost to one receiver, whole: all that one event made the coordinator say. When the coordinator dies,
what was on its way to and from it is lost; that some of it had come through is the walk in which it was read before.
Front-ends' notices may also reach the next one. A rank dies between waves only; its next life is started at once, and
connects and joins as late as one likes. (Its death in a wave: `explore_group`.)
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from paceline.core.invariants import agree_at_rest, joiner_is_told, left_out_has_it, nothing_steps_while_suspended
from paceline.core.messages import Admit, Form, Identify, StartDPWave, ToRank
from paceline.simulate.explore_block import demand
from paceline.simulate.explore_coordinator import Answer
from paceline.simulate.explore_parties import Parties
from paceline.simulate.explore_state import COMMON, COORDINATOR, FIRST_BLOCK, Action, Common, Moves, State


class World(Parties):
    """`ranks`, `requests`, `losses`, `crashes`: how much of each. `calls`: what the operator asks for, one by one.

    `steps`: engine steps of a request. `sync_interval`: steps between agreements. `without`: rules left out.
    `backlog`: messages of one rank that the coordinator may leave unread while the ranks go on to their next step.
    `notices`: whether front-ends' notices come through, or all are lost.
    `merge`: whether states that behave alike are merged; the verdict is the same without, and the walk longer.
    """

    def initial(self) -> State:
        """All ranks have joined, all front-ends know them, nothing is under way."""
        first = self.number(self._bound._replace(losses=0, crashes=0, unsent=0, calls=len(self.calls)))
        state: State = (self.fresh(self._bound, 1), first, *self.first_blocks())
        seen = {state}
        while ahead := [after for action, after in self._moves(state) if action.fair and after not in seen]:
            seen.add(state := ahead[0])
        bound = self.begun(self.common(state))
        return self.canonical((state[COORDINATOR], self.number(bound), *state[FIRST_BLOCK:]))[0]

    def successors(self, state: State) -> Moves:
        """Everything that can happen, and the canonical state after it. Raises Broken."""
        for action, after in self._moves(state):
            yield action, self.canonical(after)[0]

    def story_successors(self, state: State) -> Iterator[tuple[Action, State, State, tuple[int, ...]]]:
        """Likewise, with the state before it was made canonical, and the order.

        Rank `order[i]` before is rank `i` after.
        """
        for action, after in self._moves(state):
            canonical, order = self.canonical(after)
            yield action, after, canonical, order

    def at_rest(self, state: State) -> bool:
        """Whether all that was sent is finished and nothing is under way. Raises Broken where it is wrong then."""
        common = self.common(state)
        if common.settled:
            machines = [self.blocks.life(number).machine for number in state[FIRST_BLOCK:]]
            known = {f"rank {i}": (machine.running, machine.standing.number) for i, machine in enumerate(machines)}
            demand(nothing_steps_while_suspended(common.settled, known))
        if common.asking or not all(map(self.blocks.quiet, self.deployed(state))):
            return False
        if self.coordinators.timers(state[COORDINATOR]):
            return False
        machines = [self.blocks.life(number).machine for number in self.deployed(state)]
        # Who joined after the last wave was told what the coordinator knew then; it catches up with the next one.
        waves = {f"rank {i}": machine.wave for i, machine in enumerate(machines) if machine.incarnation == 1}
        demand(agree_at_rest(self.coordinators.wave(state[COORDINATOR]), waves))
        return True

    # Moves ----------------------------------------------------------------------------------------

    def _moves(self, state: State) -> Moves:
        common = self.common(state)
        if self.commute:
            first = self._first(state, common)
            if first is not None:
                yield first
                return
        for rank in range(self.ranks):
            for move in self.blocks.moves(state[FIRST_BLOCK + rank]):
                yield Action(move.kind, rank, move.detail, fair=not move.waits), self._with(state, rank, move.block)
        yield from self._coordinator_moves(state, common)
        yield from self._timer_moves(state)
        yield from self._round(state)
        if common.unsent:
            yield from self._submit(state, common)
        if common.calls < len(self.calls):
            yield from self._call(state, common)
        if common.crashes:
            yield from self._crash(state, common)
            yield from self._rank_crash(state, common)

    def _first(self, state: State, common: Common) -> tuple[Action, State] | None:
        over = common.calls == len(self.calls)
        kind, rank = self.commuting.first(state, common, over)
        if kind == "say":
            answer = self._said(state, rank)
            after = self._with(state, rank, self.blocks.said_read(state[FIRST_BLOCK + rank]))
            return Action("say", rank, self._oldest(state, rank)), (answer.state, *after[COMMON:])
        if kind == "hear":
            move = self.blocks.moves(state[FIRST_BLOCK + rank])[0]
            return Action("hear", rank, move.detail), self._with(state, rank, move.block)
        return next(self._round(state), None) if kind == "round" else None

    def _oldest(self, state: State, rank: int) -> int:
        return self.blocks[state[FIRST_BLOCK + rank]].up[0]

    def _said(self, state: State, rank: int) -> Answer:
        name = self._oldest(state, rank)
        return self.coordinators.said(state[COORDINATOR], rank, self.blocks.from_rank(name), name)

    def _coordinator_moves(self, state: State, common: Common) -> Moves:
        coordinators, blocks, coordinator = self.coordinators, self.blocks, state[COORDINATOR]
        for rank in range(self.ranks):
            number = state[FIRST_BLOCK + rank]
            block = blocks[number]
            if block.up:
                before = self._with(state, rank, blocks.said_read(number))
                yield from self._answered(before, self._said(state, rank), Action("say", rank, block.up[0]))
            for stamp in sorted(set(block.notices)):
                before = self._with(state, rank, blocks.notice_read(number, stamp))
                answer = coordinators.noticed(coordinator, rank, stamp)
                yield from self._answered(before, answer, Action("notice", rank, stamp))
            if not block.connected and not blocks.loading[number]:
                before = self._with(state, rank, blocks.number(block._replace(connected=True)))
                yield from self._answered(before, coordinators.subscribed(coordinator), Action("connect", rank))
        if common.asking and not common.told:
            before = self._changed(state, common._replace(told=True))
            answer = coordinators.called(coordinator, common.calls, self.calls[common.calls], common.answered)
            yield from self._answered(before, answer, Action("call", detail=common.calls))

    def _timer_moves(self, state: State) -> Moves:
        """A timer is due once all that ranks have said is read: what is repeated is not repeated for them."""
        reach = [self.blocks[number] for number in state[FIRST_BLOCK:]]
        if any(block.up for block in reach):
            return
        for timer, waiting in self.coordinators.timers(state[COORDINATOR]):
            if not any(reach[rank].connected and not reach[rank].down for rank in waiting):
                continue
            answer = self.coordinators.tick(state[COORDINATOR], timer)
            if not (self.coordinators.counts_up(state[COORDINATOR], timer) and self._stirs(state)):
                yield from self._answered(state, answer, Action("tick"))
            elif (common := self.common(state)).losses:
                fewer = self._changed(state, common._replace(losses=common.losses - 1))
                yield from self._answered(fewer, answer, Action("tick", fair=False))

    def _stirs(self, state: State) -> bool:
        """Whether ranks are about to do something by themselves, a step included."""
        blocks = self.blocks
        return any(map(blocks.stirs, state[FIRST_BLOCK:])) or all(blocks.running[one] for one in state[FIRST_BLOCK:])

    def _answered(self, state: State, answer: Answer, action: Action) -> Moves:
        common = self.after_answer(self.common(state), answer)
        number = self.number(common)
        state = (answer.state, number, *state[FIRST_BLOCK:])
        if not answer.broadcasts:
            yield action, state
            return
        self.check_broadcasts(answer)
        left_out, wave = answer.left_out
        if left_out >= 0:
            self.check_left_out(state[FIRST_BLOCK + left_out], wave)
        told = self._told(state, answer.broadcasts, -1)
        yield action, told
        # A question follows a connection that is up: what was lost before is why it is asked.
        if common.losses and any(not isinstance(message, Identify) for message in answer.broadcasts):
            for receiver in self.receivers:
                less = self._told(state, answer.broadcasts, receiver)
                if less != told:
                    fewer = self.common(less)._replace(losses=common.losses - 1)
                    yield action._replace(lost=receiver, fair=False), self._changed(less, fewer)

    def after_answer(self, common: Common, answer: Answer) -> Common:
        """What of it changes with what the coordinator answers."""
        if not self.calls:
            return common if answer.published <= common.published else common._replace(published=answer.published)
        answered = answer.answered or common.answered
        common = common._replace(published=max(common.published, answer.published), answered=answered)
        common = common._replace(settled=answer.settled if answer.settled % 2 else 0)
        if common.asking and answered and answer.settled >= answered:
            return common._replace(calls=common.calls + 1, asking=False, told=False, answered=0)
        return common

    def _told(self, state: State, messages: tuple[ToRank, ...], lost: int) -> State:
        """The state after a broadcast. `lost`: the rank that misses it."""
        numbers = list(state)
        for message in messages:
            for rank in range(self.ranks):
                name = self.blocks.neutral(message, rank)
                if rank != lost and name is not None:
                    numbers[FIRST_BLOCK + rank] = self.blocks.broadcast(numbers[FIRST_BLOCK + rank], name)
        return tuple(numbers)

    def check_broadcasts(self, answer: Answer) -> None:
        """Raises Broken where what the coordinator says to ranks must not be said."""
        for message in answer.broadcasts:
            if isinstance(message, Admit | Form):
                demand(joiner_is_told(message, self.coordinators.wave(answer.state)))

    def check_left_out(self, number: int, wave: int) -> None:
        """Raises Broken where this rank must not be left out of a wake for `wave`."""
        life = self.blocks.life(number)
        machine = life.machine
        # The request that the notice was about may have been lost with the life before.
        if machine.incarnation == 1 and "abort" not in self.calls:
            # What it holds back, or has while it runs, it starts by itself, in whatever wave is current then.
            own = life.unfinished if machine.running else machine.requests.held
            coming = (*self.blocks[number].arriving, *[wave] * own)
            demand(left_out_has_it(StartDPWave(wave, 0), machine.wave, machine.running, coming))

    def _round(self, state: State) -> Moves:
        """All ranks run and take part in a step, and in the agreement if one is due."""
        return self.rounds.of(state, range(self.ranks))

    def _submit(self, state: State, common: Common) -> Moves:
        state = self._changed(state, common._replace(unsent=common.unsent - 1))
        for rank in self.open_ranks(common):
            for sent in self.ways_to_send(self.blocks, state[FIRST_BLOCK + rank], common.published):
                after = self._with(state, rank, sent.block)
                action = Action(sent.kind, rank, sent.stamp, fair=False)
                if sent.read is None:
                    yield action, after
                else:
                    answer = self.coordinators.noticed(state[COORDINATOR], rank, sent.read)
                    yield from self._answered(after, answer, action)

    def _call(self, state: State, common: Common) -> Moves:
        if not common.asking:
            resumes = self.calls[common.calls] == "resume"
            yield Action("ask", detail=common.calls, fair=resumes), self._changed(state, common._replace(asking=True))

    def _crash(self, state: State, common: Common) -> Moves:
        """The coordinator dies; another is up at once, and as late as one likes in reading. Links may lose all."""
        after = self.crashed(common)
        fewer = self.number(after)
        fresh = self.fresh(after, self.coordinators[state[COORDINATOR]].identity + 1)
        choices = [self.blocks.after_crash(number) for number in state[FIRST_BLOCK:]]
        for chosen in product(*choices):
            lost = sum(bits << 3 * place for place, (bits, _) in enumerate(chosen))
            yield Action("crash", detail=lost, fair=False), (fresh, fewer, *(name for _, name in chosen))

    def crashed(self, common: Common) -> Common:
        """What is left when the coordinator has died."""
        return common._replace(crashes=common.crashes - 1, told=False)

    def _rank_crash(self, state: State, common: Common) -> Moves:
        """A rank dies while none runs, and is started again. Its requests are over: its front-ends see it end."""
        if any(self.blocks.running[number] for number in state[FIRST_BLOCK:]):
            return
        before = self._changed(state, common._replace(crashes=common.crashes - 1))
        for rank, number in enumerate(state[FIRST_BLOCK:]):
            yield Action("die", rank, fair=False), self._with(before, rank, self.blocks.reborn(number))
