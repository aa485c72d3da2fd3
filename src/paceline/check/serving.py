"""What clients are given: every interleaving while ranks, connections and the coordinator die, and ranks come and go.

The production machines of one front-end, the coordinator, the node and independent ranks. What is checked beside waves
and epochs: that each request is with one rank at a time, goes on behind the tokens that its client has, and ends once
(`sim/answers.py`).

Each of these comes at any moment: a request arrives at its rank, a rank makes a token for all that it has, the
front-end gets it, a rank dies, what it had said being lost or still to be read, its next life has loaded, the front-end
or the coordinator sees its connection end, a connection to a living rank ends and comes up again, the coordinator dies
and another one starts that knows nothing. What the coordinator says to ranks, and the front-end to it, arrives at once.

Where the size changes (`scales`) there is a place for one rank more than at first. An operator asks for a rank more or
fewer by another front-end than the one that is walked. What the coordinator says to the node, and it to the
coordinator, arrives at once, and it may take any time to do it. So of a rank that is to leave the front-end may hear
first that it is gone, or that its connection has ended, or neither while it makes tokens still. To keep the search
small, what ranks say to the coordinator arrives at once then too, and faults come only while a change is under way,
until the front-end and the node have done what it asks. That the time of a change is up happens at any moment; with
that a scale-down ends no otherwise than where the rank has nothing left, so what ranks report of that is left out
(`scaling.py` has it).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

from msgspec import Struct

from paceline.check.dispatch import Requests, told
from paceline.check.search import NOW, Broken, Move, Part, Whole
from paceline.core import node as on_node
from paceline.core.coordinator import events as on_coordinator
from paceline.core.coordinator.load_table import Publisher
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as on_frontend
from paceline.core.frontend.inflight import RetryAfter, Router
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import Identify, Members, ScaleRequest, Scaling
from paceline.core.rank import events as on_rank
from paceline.core.rank.machine import Rank
from paceline.core.rank.reporting import LoadReporter
from paceline.core.requests import AddRequest, SamplingParams
from paceline.core.routing.candidates import Candidates
from paceline.core.routing.policy import Policy, Query
from paceline.sim.answers import Answers

FRONTEND, OPERATOR, NODE = 7, 8, 50
PATIENCE_MS = 1000
"""Of each change: whether it is over is the search's choice."""


class Bounds(Struct, frozen=True):
    """What a search covers. `tokens`: of each answer. `crashes`: of a rank or the coordinator. `cuts`: of connections.
    `scales`: changes of how many ranks there are, by one.
    """

    ranks: int = 2
    requests: int = 1
    tokens: int = 2
    crashes: int = 1
    cuts: int = 0
    scales: int = 0


class Moment(Struct):
    """The time, which does not pass."""

    now: float = NOW


class LowestRank(Policy):
    """A request that is sent again goes to the first rank there is: which one matters to no answer."""

    def choose(self, candidates: Candidates, query: Query) -> int:
        return min(candidate.rank for candidate in candidates)


class Desk:
    """The front-end, and what its clients got."""

    def __init__(self) -> None:
        self.machine = Frontend(FRONTEND, LowestRank(), resumes=True)
        self.answers = Answers(Moment(), "the front-end")  # type: ignore[arg-type]

    def hears(self, word: Part[Any]) -> tuple[on_frontend.Effect, ...]:
        event = word.thing
        if isinstance(event, on_frontend.Submit):
            self.answers.asked(event.params.max_tokens, event.request)
        elif isinstance(event, on_frontend.LinkDown):
            self.answers.rank_lost(event.rank)
        effects = self.machine.handle(event, NOW)
        scaling = self.machine.scaling
        for effect in effects:
            match effect:
                case on_frontend.ToRank(rank, AddRequest() as request):
                    if scaling is not None and rank >= scaling.serving:
                        raise Broken(f"request {request.request} goes to rank {rank}, which is to leave")
                    self.answers.sent(rank, request)
                case on_frontend.Deliver(outputs):
                    for output in outputs:
                        self.answers.delivered(output)
                case on_frontend.Refuse():
                    self.answers.refused(effect)
                case on_frontend.Disconnect(rank):
                    self.answers.rank_lost(rank)
        self.answers.none_lost(self.machine)
        return tuple(effects)


class Life:
    """One life of a rank, and by its machine's keys the next token's place in each answer, and where that ends."""

    def __init__(self, rank: int, incarnation: int) -> None:
        self.machine = Rank(rank, incarnation, f"rank-{rank}-{incarnation}", report_loads=False)
        self.left: dict[int, tuple[int, int]] = {}

    def hears(self, word: Part[Any], later: float = 0.0) -> tuple[on_rank.Effect, ...]:
        effects = self.machine.handle(word.thing, NOW + later)
        for effect in effects:
            if isinstance(effect, on_rank.Take):
                self.left[effect.key] = len(effect.request.made_token_ids), effect.request.params.max_tokens
            elif isinstance(effect, on_rank.Drop):
                del self.left[effect.key]
        return tuple(effects)

    def steps(self) -> tuple[on_rank.Effect, ...]:
        """A token for each request that it has."""
        effects = self.machine.handle(on_rank.Turn(Load(), True), NOW)
        outputs = []
        for key, (place, end) in sorted(self.left.items()):
            ends = place + 1 >= end
            outputs.append(on_rank.StepOutput(key, [place], "", "length" if ends else None))
            self.left[key] = place + 1, end
            if ends:
                del self.left[key]
        return (*effects, *self.machine.handle(on_rank.Stepped(outputs, Load(), bool(self.left)), NOW))


class State(Whole):
    """All parts. `said`: by rank, outputs on their way; `gone`: a life of which the coordinator is still to see the
    connection end; `links`: the front-end's, (life, whether it is up). `ending`: whether the node is about to end it;
    `failed`: ranks that have died provisionally.
    """

    def __init__(self, bounds: Bounds, desk: Part[Desk], lives: list[Part[Life]], node: Part[on_node.Node]) -> None:
        places = len(lives)
        self.desk, self.lives, self.node = desk, lives, node
        self.coordinator: Part[Coordinator] | None = None
        self.coordinators = 0
        self.alive, self.ending, self.gone = [False] * places, [False] * places, [0] * places
        self.inbox: list[tuple[Part[Any], ...]] = [()] * places
        self.said: list[tuple[Part[Any], ...]] = [()] * places
        self.links: list[tuple[int, bool] | None] = [None] * places
        self.for_coordinator: tuple[tuple[int, Part[Any]], ...] = ()
        self.for_frontend: tuple[Part[Any], ...] = ()
        self.failed: frozenset[int] = frozenset()
        self.asked = 0
        self.crashes, self.cuts, self.scales = bounds.crashes, bounds.cuts, bounds.scales


class Serving(Requests):
    """The moves of one deployment."""

    def __init__(self, bounds: Bounds) -> None:
        # Loads are reported by nobody; routing has one way to go.
        super().__init__(Router, RetryAfter, LoadReporter, Publisher)
        self.bounds = bounds
        self.places = bounds.ranks + bool(bounds.scales)

    def start(self) -> State:
        """All ranks are ready, and the front-end knows them."""
        ranks = self.bounds.ranks
        lives = [self.machines.part(Life(rank, 0)) for rank in range(self.places)]
        node = self.machines.part(on_node.Node(NODE, range(ranks), ranks))
        state = State(self.bounds, self.machines.part(Desk()), lives, node)
        self._start_coordinator(state)
        for rank in range(ranks):
            self._start_rank(state, rank)
        self._front(state, on_frontend.Connected())
        while state.for_coordinator or state.for_frontend:
            (self._coordinator_hears if state.for_coordinator else self._front_hears)(state)
        return state

    def over(self, state: State) -> bool:
        """Whether no client waits, every rank serves, and of a change of the size all have done what it asks."""
        machine, scaling = state.desk.thing.machine, state.node.thing.scaling
        known = machine.scaling
        if state.desk.thing.answers.open or known is None or known.number != scaling.number or known.under_way:
            return False
        there = [rank for rank, alive in enumerate(state.alive) if alive]
        size = list(range(scaling.size))
        return machine.ready_ranks() == size and (not self.bounds.scales or there == size)

    def key(self, state: State) -> Hashable:
        return state.values()

    # Moves ------------------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[Move]:
        if state.asked < self.bounds.requests:
            for rank in state.desk.thing.machine.ready_ranks():
                yield told(f"a client asks, for rank {rank}", self._submit, rank)
        risk = self._at_risk(state)
        for rank in range(self.places):
            yield from self._rank_moves(state, rank, risk and state.crashes > 0)
            yield from self._link_moves(state, rank, risk and state.cuts > 0)
        if state.for_frontend:
            name = type(state.for_frontend[0].thing.message).__name__
            yield told(f"the front-end hears {name} from the coordinator", self._front_hears)
        if state.coordinator is None:
            yield told("another coordinator starts, which knows nothing", self._start_coordinator)
            return
        if state.for_coordinator:
            rank, word = state.for_coordinator[0]
            name = type(word.thing.message).__name__
            yield told(f"the coordinator hears {name} of rank {rank}", self._coordinator_hears)
        waits = "acquaintance" in state.coordinator.thing.timers()
        if waits:
            text = "the coordinator waits no longer for ranks that say nothing"
            yield told(text, self._coordinator, on_coordinator.Tick(), "acquaintance")
        if risk and state.crashes:
            yield told("the coordinator dies", self._crash_coordinator)
        if not waits and self.bounds.scales:
            yield from self._scaling_moves(state, state.coordinator.thing.scaling)

    def _at_risk(self, state: State) -> bool:
        """Whether a fault may come now: where the size changes, only while a change is under way."""
        if not self.bounds.scales:
            return True
        known, now = state.desk.thing.machine.scaling, state.node.thing.scaling
        return now.under_way or any(state.ending) or known is None or known.number != now.number

    def _rank_moves(self, state: State, rank: int, dies: bool) -> Iterator[Move]:
        kept = rank in state.node.thing.ranks and rank not in state.failed and not state.ending[rank]
        if not state.alive[rank]:
            if kept:
                yield told(f"the next life of rank {rank} is there", self._start_rank, rank)
        else:
            life = state.lives[rank].thing
            if state.inbox[rank]:
                name = type(state.inbox[rank][0].thing.message).__name__
                yield told(f"rank {rank} reads {name}", self._rank_reads, rank)
            if life.left:
                yield told(f"rank {rank} makes a step", self._step, rank)
            joins = life.machine.phase is on_rank.Phase.JOINING and state.coordinator is not None
            if joins and all(who != rank for who, _ in state.for_coordinator):
                yield told(f"rank {rank} says hello again", self._rank, rank, on_rank.Turn(Load(), False), 10.0)
            if dies and kept:
                yield told(f"rank {rank} dies", self._crash_rank, rank, False)
                yield told(f"rank {rank} dies, and with it what it had said", self._crash_rank, rank, True)
        if state.ending[rank]:
            yield told(f"the node ends rank {rank}", self._end_rank, rank, False)
            if state.said[rank]:
                yield told(f"the node ends rank {rank}, and what it had said is lost", self._end_rank, rank, True)

    def _link_moves(self, state: State, rank: int, cuts: bool) -> Iterator[Move]:
        if state.said[rank]:
            yield told(f"the front-end hears rank {rank}", self._outputs, rank)
        if state.gone[rank]:
            yield told(f"the coordinator sees the connection of rank {rank} end", self._seen_gone, rank)
        if state.links[rank] is None:
            return
        life, up = state.links[rank] or (0, False)
        living = state.alive[rank] and state.lives[rank].thing.machine.incarnation == life
        if up and not living:
            yield told(f"the front-end sees its connection to rank {rank} end", self._link, rank, False)
        elif up and cuts:
            yield told(f"the front-end's connection to rank {rank} ends", self._cut, rank, False)
            yield told(f"the front-end's connection to rank {rank} ends with what is on it", self._cut, rank, True)
        elif not up and living:
            yield told(f"the front-end is connected to rank {rank} again", self._link, rank, True)

    def _scaling_moves(self, state: State, scaling: Scaling) -> Iterator[Move]:
        if scaling.under_way:
            text = f"the time of the change to {scaling.target} is up"
            yield told(text, self._coordinator, on_coordinator.Tick(), "scaling-late")
        elif state.scales:
            for size in (scaling.size - 1, scaling.size + 1):
                if 0 < size <= self.places:
                    yield told(f"an operator asks for so many ranks: {size}", self._ask, size)

    # The front-end ----------------------------------------------------------------------------------

    def _submit(self, state: State, rank: int) -> None:
        state.asked += 1
        params = SamplingParams(self.bounds.tokens)
        self._front(state, on_frontend.Submit(state.asked, [state.asked], params, rank))

    def _front_hears(self, state: State) -> None:
        first, state.for_frontend = state.for_frontend[0], state.for_frontend[1:]
        self._front(state, first.thing)

    def _outputs(self, state: State, rank: int) -> None:
        first, state.said[rank] = state.said[rank][0], state.said[rank][1:]
        self._front(state, first.thing)

    def _link(self, state: State, rank: int, up: bool) -> None:
        life, _ = state.links[rank] or (0, False)
        state.links[rank] = life, up
        self._front(state, on_frontend.LinkUp(rank) if up else on_frontend.LinkDown(rank))

    def _cut(self, state: State, rank: int, lost: bool) -> None:
        state.cuts -= 1
        if lost:
            state.inbox[rank] = state.said[rank] = ()
        self._link(state, rank, False)

    def _front(self, state: State, event: on_frontend.Event) -> None:
        state.desk, effects = state.desk.after(Desk.hears, self.messages.part(event))
        for effect in effects:
            match effect:
                case on_frontend.ToRank(rank, message):
                    life = state.lives[rank].thing.machine.incarnation
                    if state.alive[rank] and (state.links[rank] or (-1, False))[0] == life:
                        word = self.messages.part(on_rank.FrontendSaid(FRONTEND, message))
                        state.inbox[rank] = (*state.inbox[rank], word)
                case on_frontend.Connect(member):
                    state.links[member.rank] = member.incarnation, True
                case on_frontend.Disconnect(rank):
                    state.links[rank] = None
                case on_frontend.ToCoordinator(message):
                    self._coordinator(state, on_coordinator.FrontendSaid(message))

    # Ranks, and the node ----------------------------------------------------------------------------

    def _start_rank(self, state: State, rank: int) -> None:
        incarnation = state.lives[rank].thing.machine.incarnation + 1
        state.lives[rank], state.alive[rank] = self.machines.part(Life(rank, incarnation)), True
        self._rank(state, rank, on_rank.Loaded())
        self._coordinator(state, on_coordinator.RankSubscribed(rank, incarnation))

    def _rank_reads(self, state: State, rank: int) -> None:
        first, state.inbox[rank] = state.inbox[rank][0], state.inbox[rank][1:]
        self._rank(state, rank, first.thing)

    def _rank(self, state: State, rank: int, event: on_rank.Event, later: float = 0.0) -> None:
        state.lives[rank], effects = state.lives[rank].after(Life.hears, self.messages.part(event), later)
        self._rank_says(state, rank, effects)
        if later:
            self._coordinator_reads(state)

    def _step(self, state: State, rank: int) -> None:
        state.lives[rank], effects = state.lives[rank].after(Life.steps)
        self._rank_says(state, rank, effects)

    def _rank_says(self, state: State, rank: int, effects: tuple[on_rank.Effect, ...]) -> None:
        for effect in effects:
            if isinstance(effect, on_rank.ToFrontend):
                word = self.messages.part(on_frontend.RankSaid(effect.message))
                state.said[rank] = (*state.said[rank], word)
            elif isinstance(effect, on_rank.ToCoordinator):
                said = self.messages.part(on_coordinator.RankSaid(effect.message))
                state.for_coordinator = (*state.for_coordinator, (rank, said))

    def _dies(self, state: State, rank: int, lost: bool) -> None:
        """`lost`: so is what it had said; else that is still read."""
        state.alive[rank], state.inbox[rank] = False, ()
        state.lives[rank] = self.machines.part(Life(rank, state.lives[rank].thing.machine.incarnation))
        if lost:
            state.said[rank] = ()
            state.for_coordinator = tuple(one for one in state.for_coordinator if one[0] != rank)

    def _crash_rank(self, state: State, rank: int, lost: bool) -> None:
        state.crashes -= 1
        state.gone[rank] = state.lives[rank].thing.machine.incarnation
        self._dies(state, rank, lost)
        if state.node.thing.provisional(rank):
            state.failed = state.failed | {rank}
            self._node(state, on_node.RankEnded(rank, "it died"))
            self._coordinator_reads(state)

    def _end_rank(self, state: State, rank: int, lost: bool) -> None:
        """The node ends a rank that is to be there no more, which nobody waits for."""
        state.ending[rank] = False
        self._dies(state, rank, lost)
        self._coordinator(state, on_coordinator.RankGone(rank, state.lives[rank].thing.machine.incarnation))

    def _node(self, state: State, event: on_node.Event) -> None:
        state.node, effects = self.does(state.node, event)
        for effect in effects:
            if isinstance(effect, on_node.ToCoordinator):
                word = self.messages.part(on_coordinator.RankSaid(effect.message))
                state.for_coordinator = ((-1, word), *state.for_coordinator)
                continue
            state.failed = state.failed - {effect.rank}
            if isinstance(effect, on_node.StopRank):
                state.ending[effect.rank] = state.alive[effect.rank]

    # The coordinator --------------------------------------------------------------------------------

    def _start_coordinator(self, state: State) -> None:
        """One that knows nothing; all are connected to it at once."""
        state.coordinators += 1
        fresh, size = state.coordinators == 1, state.node.thing.scaling.size
        machine = Coordinator(size, state.coordinators, 0.0, lockstep=False, publish_loads=False, fresh=fresh)
        state.coordinator = self.machines.part(machine)
        self._coordinator(state, on_coordinator.FrontendSubscribed())
        for rank, life in enumerate(state.lives):
            if state.alive[rank]:
                self._coordinator(state, on_coordinator.RankSubscribed(rank, life.thing.machine.incarnation))
        if self.bounds.scales:
            self._coordinator(state, on_coordinator.RankSubscribed())

    def _coordinator_hears(self, state: State) -> None:
        (_, word), state.for_coordinator = state.for_coordinator[0], state.for_coordinator[1:]
        self._coordinator(state, word.thing)

    def _seen_gone(self, state: State, rank: int) -> None:
        life, state.gone[rank] = state.gone[rank], 0
        self._coordinator(state, on_coordinator.RankGone(rank, life))

    def _ask(self, state: State, size: int) -> None:
        state.scales -= 1
        request = ScaleRequest(OPERATOR, self.bounds.scales - state.scales, size, PATIENCE_MS, PATIENCE_MS)
        self._coordinator(state, on_coordinator.FrontendSaid(request))

    def _crash_coordinator(self, state: State) -> None:
        """It is gone, and all that was on its way to and from it."""
        state.crashes, state.coordinator = state.crashes - 1, None
        state.for_coordinator, state.for_frontend = (), ()
        state.gone = [0] * self.places

    def _coordinator(self, state: State, event: on_coordinator.Event, timer: str = "") -> None:
        if state.coordinator is None:
            return
        state.coordinator, effects = self.does(state.coordinator, event, timer)
        for effect in effects:
            if isinstance(effect, on_coordinator.ToRanks):
                self._tell_ranks(state, effect.message)
            elif isinstance(effect, on_coordinator.ToFrontends) and isinstance(effect.message, Members):
                word = self.messages.part(on_frontend.CoordinatorSaid(effect.message))
                if state.for_frontend[-1:] != (word,):
                    state.for_frontend = (*state.for_frontend, word)
        self._coordinator_reads(state)

    def _coordinator_reads(self, state: State) -> None:
        """Where the size changes, all that it is told at once. Where there is none, nobody hears it."""
        while self.bounds.scales and state.for_coordinator:
            self._coordinator_hears(state)

    def _tell_ranks(self, state: State, message: Any) -> None:
        if self.bounds.scales and isinstance(message, Scaling | Identify):
            self._node(state, on_node.CoordinatorSaid(message))
        for rank, alive in enumerate(state.alive):
            # A question to a rank that is about to be heard would get the same answer.
            heard = isinstance(message, Identify) and any(who == rank for who, _ in state.for_coordinator)
            if alive and not heard:
                self._rank(state, rank, on_rank.CoordinatorSaid(message))
