"""The whole deployment as a handful of numbers, and everything that can happen in it.

A state is `(coordinator, common, block of rank 0, block of rank 1, ...)`. `common` is the number of a `Common`.

Front-ends hold nothing that matters to waves but what they believe of the wave, and views reach them however late. So
they have no state here: a request may be stamped with the newest wave that was published or with the oldest, wave 0
(the coordinator compares a stamp with its wave once, when it reads the notice: what a stamp between the two would bring
is brought by one of these), and its notice is sent where the production machine with such a belief sends one. A
request and its notice travel on two links, so either comes first, and from the moment it is sent to the moment that the
first of them comes nothing else can tell that it was sent: both are one move. Since a request may wait on its link for
ever, requests of one front-end are not kept in order either; what is walked is any number of front-ends.

Ranks are alike. States that differ only in which rank is which are one: `canonical` puts the blocks in order and
renumbers the coordinator's state to match.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import permutations, product
from typing import NamedTuple

from paceline.protocol.frontend import FrontEnd
from paceline.protocol.frontend_events import CoordinatorSaid, Submit, ToCoordinator, ToRank
from paceline.protocol.invariants import agree_at_rest, left_out_has_it, same_collective
from paceline.protocol.messages import PROTOCOL_VERSION, LoadView, Member, Members, RankHello, StartDPWave, WaveComplete
from paceline.protocol.messages import ToRank as Broadcast
from paceline.protocol.rank_events import Step
from paceline.protocol.routing import LeastLoad
from paceline.protocol.sampling import SamplingParams
from paceline.simulate.explore_coordinator import Answer, Coordinators
from paceline.simulate.explore_parts import NOW
from paceline.simulate.explore_rank import FRONT_END, Blocks, Broken

State = tuple[int, ...]
COORDINATOR, COMMON, FIRST_BLOCK = 0, 1, 2


class Common(NamedTuple):
    """What belongs to no one party. `published`: the newest (wave, running) that front-ends can have heard."""

    unsent: int
    published: tuple[int, bool]
    losses: int
    crashes: int


class Action(NamedTuple):
    """One move. `rank`: the block it is about, -1 for none. `detail`, `lost`: see `explore_story`.

    `fair`: it happens by itself, sooner or later; requests, faults, and reading while in a barrier do not.
    """

    kind: str
    rank: int = -1
    detail: int = 0
    lost: int = -1
    fair: bool = True


@cache
def front_end_sends(wave: int, running: bool) -> tuple[int, int | None]:
    """What a front-end with this belief sends with a request: the request's stamp, and its notice's, if it sends one."""
    machine = FrontEnd(FRONT_END, LeastLoad(0, 1), lockstep=True)
    members = Members(PROTOCOL_VERSION, 1, 0, False, [Member(0, 1, "rank")])
    machine.handle(CoordinatorSaid(members), NOW)
    machine.handle(CoordinatorSaid(LoadView(1, 1, wave, running)), NOW)
    stamp, notice = 0, None
    for effect in machine.handle(Submit(1, [1], SamplingParams(1), 0), NOW):
        if isinstance(effect, ToRank):
            stamp = effect.message.wave  # type: ignore[union-attr]
        elif isinstance(effect, ToCoordinator):
            notice = effect.message.wave  # type: ignore[union-attr]
    return stamp, notice


class World:
    """`ranks`, `requests`, `losses`, `crashes`: how much of each. `symmetry`: whether alike states are merged."""

    def __init__(
        self, ranks: int, requests: int, losses: int, crashes: int, *, steps: int = 1, sync_interval: int = 1,
        symmetry: bool = True,
    ) -> None:  # fmt: skip
        self.ranks = ranks
        self.blocks = Blocks(steps, sync_interval)
        self.coordinators = Coordinators(ranks)
        self._symmetry = symmetry
        self._commons: dict[Common, int] = {}
        self._common: list[Common] = []
        self._orders: dict[State, tuple[State, tuple[int, ...]]] = {}
        self._bound = Common(requests, (0, False), losses, crashes)

    def common(self, state: State) -> Common:
        """What belongs to no one party."""
        return self._common[state[COMMON]]

    def initial(self) -> State:
        """All ranks have joined, all front-ends know them, nothing is under way."""
        first = self._number(self._bound._replace(losses=0, crashes=0, unsent=0))
        state: State = (self.coordinators.fresh(1), first, *(self.blocks.fresh() for _ in range(self.ranks)))
        while moves := [(action, after) for action, after in self._moves(state) if action.fair]:
            state = moves[0][1]
        common = self.common(state)
        bound = self._bound._replace(published=common.published)
        return self.canonical((state[COORDINATOR], self._number(bound), *state[FIRST_BLOCK:]))[0]

    def successors(self, state: State) -> Iterator[tuple[Action, State]]:
        """Everything that can happen, and the canonical state after it. Raises Broken."""
        for action, after in self._moves(state):
            yield action, self.canonical(after)[0]

    def story_successors(self, state: State) -> Iterator[tuple[Action, State, State, tuple[int, ...]]]:
        """Likewise, with the state before it is made canonical, and the order: rank `order[i]` there is rank `i` after."""
        for action, after in self._moves(state):
            canonical, order = self.canonical(after)
            yield action, after, canonical, order

    def at_rest(self, state: State) -> bool:
        """Whether all that was sent is finished and nothing is under way. Raises Broken where the waves differ then."""
        if self.coordinators.ticks(state[COORDINATOR]) or not all(map(self.blocks.quiet, state[FIRST_BLOCK:])):
            return False
        waves = {f"rank {i}": self.blocks.life(b).machine.wave for i, b in enumerate(state[FIRST_BLOCK:])}
        why = agree_at_rest(self.coordinators.wave(state[COORDINATOR]), waves)
        if why is not None:
            raise Broken(why)
        return True

    def canonical(self, state: State) -> tuple[State, tuple[int, ...]]:
        """The one state of those that differ in the ranks' numbers, and the order that leads to it."""
        state = self._tidied(state)
        blocks = state[FIRST_BLOCK:]
        identity = tuple(range(self.ranks))
        if not self._symmetry:
            return state, identity
        # Where all blocks differ there is one order; where some are equal, the coordinator's state decides.
        key = (state[COORDINATOR], *blocks)
        found = self._orders.get(key)
        if found is None:
            best = sorted(blocks)
            orders = [order for order in permutations(identity) if [blocks[i] for i in order] == best]
            coordinator, order = min((self.coordinators.renumbered(state[COORDINATOR], o), o) for o in orders)
            found = self._orders[key] = ((coordinator, *best), order)
        (coordinator, *best), order = found
        return (coordinator, state[COMMON], *best), order

    def _tidied(self, state: State) -> State:
        """The state after messages that change nothing, now or later, have been read."""
        coordinator = state[COORDINATOR]
        known = self.coordinators.known(coordinator)
        blocks = [self.blocks.tidied(number, known[rank]) for rank, number in enumerate(state[FIRST_BLOCK:])]
        crashes = self.common(state).crashes
        for rank, number in enumerate(blocks):
            while up := self.blocks[number].up:
                message = self.blocks.messages[up[0]]
                if crashes and (known[rank] or isinstance(message, RankHello)):
                    break
                if known[rank] and not isinstance(message, RankHello):
                    break
                answer = self.coordinators.said(coordinator, rank, message, up[0])
                if answer.state != coordinator or answer.broadcasts:
                    break
                number = blocks[rank] = self.blocks.said_read(number)
        return (coordinator, state[COMMON], *blocks)

    # Moves ----------------------------------------------------------------------------------------

    def _moves(self, state: State) -> Iterator[tuple[Action, State]]:
        first = self._first(state)
        if first is not None:
            yield first
            return
        for rank in range(self.ranks):
            for move in self.blocks.moves(state[FIRST_BLOCK + rank]):
                yield Action(move.kind, rank, move.detail, fair=not move.waits), self._with(state, rank, move.block)
        yield from self._coordinator_moves(state)
        yield from self._round(state)
        common = self.common(state)
        if common.unsent:
            yield from self._submit(state, common)
        if common.crashes:
            yield from self._crash(state, common)

    def _first(self, state: State) -> tuple[Action, State] | None:
        """A move that commutes with all others and that nothing can prevent: it may as well come now."""
        blocks, common = self.blocks, self.common(state)
        numbers = state[FIRST_BLOCK:]
        known = self.coordinators.known(state[COORDINATOR])
        for rank, number in enumerate(numbers):
            up = blocks[number].up
            if up and known[rank]:
                message = blocks.messages[up[0]]
                if self._only_noted(state[COORDINATOR], message, common.crashes):
                    answer = self.coordinators.said(state[COORDINATOR], rank, message, up[0])
                    if not answer.broadcasts and answer.published <= common.published:
                        after = self._with(state, rank, blocks.said_read(number))
                        return Action("say", rank, up[0]), (answer.state, *after[1:])
        if common.unsent or common.crashes:
            return None
        for rank, number in enumerate(numbers):
            moves = blocks.moves(number)
            if (
                len(moves) == 1
                and moves[0].kind == "hear"
                and not moves[0].waits
                and not blocks.life(number).machine.running
            ):
                return Action("hear", rank, moves[0].detail), self._with(state, rank, moves[0].block)
        if all(known) and not any(blocks[n].down or blocks[n].arriving or not blocks[n].connected for n in numbers):
            return next(self._round(state), None)
        return None

    def _only_noted(self, coordinator: int, message: object, crashes: int) -> bool:
        """Whether the coordinator notes the message of a rank that it knows, and acts on it no otherwise if it comes later."""
        group = self.coordinators[coordinator]._group
        if isinstance(message, WaveComplete):
            return group.wave > message.wave
        if isinstance(message, RankHello) and not crashes:
            return group.wave >= message.wave if not message.running else group.wave == message.wave and group.running
        return False

    def _coordinator_moves(self, state: State) -> Iterator[tuple[Action, State]]:
        coordinators, blocks, coordinator = self.coordinators, self.blocks, state[COORDINATOR]
        for rank in range(self.ranks):
            number = state[FIRST_BLOCK + rank]
            block = blocks[number]
            if block.up:
                message = blocks.messages[block.up[0]]
                answer = coordinators.said(coordinator, rank, message, block.up[0])  # type: ignore[arg-type]
                before = self._with(state, rank, blocks.said_read(number))
                yield from self._answered(before, answer, Action("say", rank, block.up[0]))
            for stamp in sorted(set(block.notices)):
                before = self._with(state, rank, blocks.notice_read(number, stamp))
                answer = coordinators.noticed(coordinator, rank, stamp)
                yield from self._answered(before, answer, Action("notice", rank, stamp))
            if not block.connected:
                before = self._with(state, rank, blocks.number(block._replace(connected=True)))
                yield from self._answered(before, coordinators.subscribed(coordinator), Action("connect", rank))
        if coordinators.ticks(coordinator):
            answer = coordinators.tick(coordinator)
            reach = [blocks[number] for number in state[FIRST_BLOCK:]]
            if not any(block.up for block in reach) and any(
                reach[rank].connected and not reach[rank].down for rank in coordinators.lagging(coordinator)
            ):
                yield from self._answered(state, answer, Action("tick"))

    def _answered(self, state: State, answer: Answer, action: Action) -> Iterator[tuple[Action, State]]:
        common = self.common(state)
        number = state[COMMON]
        if answer.published > common.published:
            common = common._replace(published=answer.published)
            number = self._number(common)
        state = (answer.state, number, *state[FIRST_BLOCK:])
        if not answer.broadcasts:
            yield action, state
            return
        self._check_left_out(state, answer.broadcasts)
        told = self._told(state, answer.broadcasts, -1)
        yield action, told
        if common.losses and any(isinstance(message, StartDPWave) for message in answer.broadcasts):
            fewer = self._number(common._replace(losses=common.losses - 1))
            for rank in range(self.ranks):
                less = self._told(state, answer.broadcasts, rank)
                if less != told:
                    yield action._replace(lost=rank, fair=False), (less[COORDINATOR], fewer, *less[FIRST_BLOCK:])

    def _told(self, state: State, messages: tuple[Broadcast, ...], lost: int) -> State:
        """The state after a broadcast. `lost`: the rank that misses it."""
        numbers = list(state)
        for message in messages:
            for rank in range(self.ranks):
                name = self.blocks.neutral(message, rank)
                if rank != lost and name is not None:
                    numbers[FIRST_BLOCK + rank] = self.blocks.broadcast(numbers[FIRST_BLOCK + rank], name)
        return tuple(numbers)

    def _check_left_out(self, state: State, messages: tuple[Broadcast, ...]) -> None:
        for message in messages:
            if isinstance(message, StartDPWave) and message.exclude is not None:
                number = state[FIRST_BLOCK + message.exclude]
                machine = self.blocks.life(number).machine
                why = left_out_has_it(message, machine.wave, machine.running, self.blocks[number].arriving)
                if why is not None:
                    raise Broken(why)

    def _round(self, state: State) -> Iterator[tuple[Action, State]]:
        """All ranks run and take part in a step, and in the agreement if one is due."""
        blocks = self.blocks
        if not all(blocks.life(number).machine.running for number in state[FIRST_BLOCK:]):
            return
        stepped = [blocks.stepped(number) for number in state[FIRST_BLOCK:]]
        agrees = [agree for agree, _ in stepped if agree is not None]
        after = [number for _, number in stepped]
        if agrees:
            entered = {f"rank {i}": agree or Step() for i, (agree, _) in enumerate(stepped)}
            why = same_collective(entered)
            if why is not None:
                raise Broken(why)
            any_work, wave = any(agree.has_work for agree in agrees), max(agree.wave for agree in agrees)
            after = [blocks.agreed(number, any_work, wave) for number in after]
        yield Action("round", detail=bool(agrees)), (*state[:FIRST_BLOCK], *after)

    def _submit(self, state: State, common: Common) -> Iterator[tuple[Action, State]]:
        fewer = self._number(common._replace(unsent=common.unsent - 1))
        newest, runs = common.published
        beliefs = {(0, False), (newest, False)} | ({(newest, True)} if runs else {(newest - 1, True)} - {(-1, True)})
        state = (state[COORDINATOR], fewer, *state[FIRST_BLOCK:])
        for rank, (wave, running) in product(range(self.ranks), sorted(beliefs)):
            number = state[FIRST_BLOCK + rank]
            stamp, notice = front_end_sends(wave, running)
            if notice is None:
                after = self._with(state, rank, self.blocks.arrive(number, stamp))
                yield Action("send", rank, stamp, fair=False), after
                continue
            arrived = self.blocks.noticed(self.blocks.arrive(number, stamp), notice)
            yield Action("send-first", rank, stamp, fair=False), self._with(state, rank, arrived)
            before = self._with(state, rank, self.blocks.sent(number, stamp))
            answer = self.coordinators.noticed(state[COORDINATOR], rank, notice)
            yield from self._answered(before, answer, Action("notice-first", rank, stamp, fair=False))

    def _crash(self, state: State, common: Common) -> Iterator[tuple[Action, State]]:
        """The coordinator dies; another is up at once, and as late as one likes in reading. Links may lose all."""
        fewer = self._number(common._replace(crashes=common.crashes - 1))
        fresh = self.coordinators.fresh(self.coordinators[state[COORDINATOR]].identity + 1)
        choices: list[list[tuple[int, int]]] = []
        for number in state[FIRST_BLOCK:]:
            block = self.blocks[number]._replace(connected=False, asked=False)
            variants: dict[int, int] = {}
            for bits in range(8):
                less = block
                less = less._replace(up=()) if bits & 1 else less
                less = less._replace(down=()) if bits & 2 else less
                less = less._replace(notices=()) if bits & 4 else less
                variants.setdefault(self.blocks.number(less), bits)
            choices.append([(bits, name) for name, bits in variants.items()])
        for chosen in product(*choices):
            lost = sum(bits << 3 * place for place, (bits, _) in enumerate(chosen))
            yield Action("crash", detail=lost, fair=False), (fresh, fewer, *(name for _, name in chosen))

    def _with(self, state: State, rank: int, block: int) -> State:
        place = FIRST_BLOCK + rank
        return (*state[:place], block, *state[place + 1 :])

    def _number(self, common: Common) -> int:
        number = self._commons.get(common)
        if number is None:
            number = self._commons[common] = len(self._common)
            self._common.append(common)
        return number
