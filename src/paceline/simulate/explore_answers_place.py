"""One state of the walk of what clients are given (`explore_answers.py`), and what happens in it."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.machine import FrontEnd
from paceline.core.load import Load
from paceline.core.messages import Identify, Member, Members, ToRank
from paceline.core.rank import events as rank_events
from paceline.core.rank.events import Phase
from paceline.core.rank.machine import Rank
from paceline.core.requests import AddRequest, Outputs, SamplingParams
from paceline.core.routing.candidates import Candidates
from paceline.core.routing.policy import Policy, Query
from paceline.simulate.answers import Answers

NOW = 1000.0
LONG_AFTER = NOW + 10.0
FRONT_END = 7


class Bounds(Struct, frozen=True):
    """What a walk covers. `tokens`: of each answer. `crashes`: of a rank or the coordinator. `cuts`: of connections.
    `scales`: changes of how many ranks there are, by one (`explore_answers_scaling.py`).
    """

    ranks: int = 2
    requests: int = 1
    tokens: int = 2
    crashes: int = 1
    cuts: int = 0
    scales: int = 0

    @property
    def places(self) -> int:
        """Ranks that there can be: where that changes, one more than at first."""
        return self.ranks + bool(self.scales)


class Moment(Struct):
    """The time, which does not pass."""

    now: float = NOW


class LowestRank(Policy):
    """A request that is sent again goes to the first rank there is: which one matters to no answer."""

    def choose(self, candidates: Candidates, query: Query) -> int:
        """The lowest-numbered rank."""
        return min(candidate.rank for candidate in candidates)


class Life:
    """One life of a rank, by the machine's keys what its engine has still to make, and what it has yet to read."""

    def __init__(self, rank: int, incarnation: int) -> None:
        self.machine = Rank(rank, incarnation, f"rank-{rank}-{incarnation}", report_loads=False)
        self.incarnation = incarnation
        self.alive = True
        self.left: dict[int, tuple[int, int]] = {}
        """The next token's place in the answer, and where it ends."""
        self.inbox: list[Any] = []

    @property
    def joins(self) -> bool:
        """Whether it waits to be admitted."""
        return self.machine.phase is Phase.JOINING


class Connection(Struct):
    """The front-end's, to one life of a rank."""

    life: int
    up: bool = True


class Place:
    """All machines, and what is on its way: to the ranks in their inboxes, and else here."""

    def __init__(self, bounds: Bounds) -> None:
        self.machine = FrontEnd(FRONT_END, LowestRank(), resumes=True)
        self.answers = Answers(Moment(), "the front-end")
        self.bounds = bounds
        self.crashes, self.cuts = bounds.crashes, bounds.cuts
        self.coordinator: Coordinator | None = None
        self.coordinators = 0
        self.said: list[list[Outputs]] = [[] for _ in range(bounds.places)]
        self.gone = [0] * bounds.places
        """By rank, the life of which the coordinator is still to see the connection end; 0 for none."""
        self.connections: list[Connection | None] = [None] * bounds.places
        self.for_coordinator: list[tuple[int, Any]] = []
        self.for_front_end: list[Members] = []
        self.ranks = [Life(rank, 0) for rank in range(bounds.places)]
        self.start_coordinator()
        for rank in range(bounds.ranks):
            self.start_rank(rank)
        self._front_end(frontend_events.Connected())

    @property
    def size(self) -> int:
        """Ranks that there are to be."""
        return self.bounds.ranks

    def settled(self) -> bool:
        """Whether no client waits, and every rank serves."""
        return not self.answers.open and len(self.machine.ready_ranks()) == self.size

    @property
    def at_risk(self) -> bool:
        """Whether a fault may come now."""
        return True

    def is_kept(self, rank: int) -> bool:
        """Whether a life of the rank is followed by another one."""
        return True

    # The front-end ------------------------------------------------------------------------------

    def submit(self, rank: int) -> None:
        """A client asks."""
        request = self.answers.asked(self.bounds.tokens)
        self._front_end(frontend_events.Submit(request, [request], SamplingParams(self.bounds.tokens), rank))

    def front_end_hears(self) -> None:
        """Of the coordinator."""
        self._front_end(frontend_events.CoordinatorSaid(self.for_front_end.pop(0)))

    def outputs_arrive(self, rank: int) -> None:
        """What a rank has made, whichever life of it."""
        self._front_end(frontend_events.RankSaid(self.said[rank].pop(0)))

    def link_down(self, rank: int) -> None:
        """The front-end sees a connection end."""
        connection = self.connections[rank]
        assert connection is not None
        connection.up = False
        self.answers.rank_lost(rank)
        self._front_end(frontend_events.LinkDown(rank))

    def link_up(self, rank: int) -> None:
        """It is there again, and the same life."""
        connection = self.connections[rank]
        assert connection is not None
        connection.up = True
        self._front_end(frontend_events.LinkUp(rank))

    def cut(self, rank: int, *, lost: bool) -> None:
        """A connection to a rank that lives ends. `lost`: so is what is on it; else it comes late."""
        self.cuts -= 1
        if lost:
            self.ranks[rank].inbox.clear()
            self.said[rank].clear()
        self.link_down(rank)

    def _front_end(self, event: frontend_events.Event) -> None:
        for effect in self.machine.handle(event, NOW):
            match effect:
                case frontend_events.ToRank(rank, message):
                    if isinstance(message, AddRequest):
                        self._sent(rank, message)
                    life, connection = self.ranks[rank], self.connections[rank]
                    if life.alive and connection is not None and life.incarnation == connection.life:
                        life.inbox.append(message)
                case frontend_events.Deliver(outputs):
                    for output in outputs:
                        self.answers.delivered(output)
                case frontend_events.Refuse():
                    self.answers.refused(effect)
                case frontend_events.Connect(Member(rank, incarnation)):
                    self.connections[rank] = Connection(incarnation)
                case frontend_events.Disconnect(rank):
                    self.connections[rank] = None
                    self.answers.rank_lost(rank)
                case frontend_events.ToCoordinator(message):
                    self._coordinator(coordinator.FrontEndSaid(message))
        self.answers.none_lost(self.machine)

    def _sent(self, rank: int, message: AddRequest) -> None:
        self.answers.sent(rank, message)

    # Ranks --------------------------------------------------------------------------------------

    def start_rank(self, rank: int) -> None:
        """A new life, its engine loaded."""
        self.ranks[rank] = Life(rank, self.ranks[rank].incarnation + 1)
        self._rank(rank, rank_events.Loaded())
        self._coordinator(coordinator.RankSubscribed(rank, self.ranks[rank].incarnation))

    def rank_reads(self, rank: int) -> None:
        """What the front-end sent it."""
        self._rank(rank, rank_events.FrontEndSaid(FRONT_END, self.ranks[rank].inbox.pop(0)))

    def step(self, rank: int) -> None:
        """A token for each request that it has."""
        life = self.ranks[rank]
        self._rank(rank, rank_events.Turn(Load(), True))
        outputs = []
        for key, (place, end) in sorted(life.left.items()):
            ends = place + 1 >= end
            outputs.append(rank_events.StepOutput(key, [place], "", "length" if ends else None))
            life.left[key] = place + 1, end
            if ends:
                del life.left[key]
        self._rank(rank, rank_events.Stepped(outputs, Load(), bool(life.left)))

    def hello_again(self, rank: int) -> None:
        """It is not admitted yet."""
        self._rank(rank, rank_events.Turn(Load(), False), LONG_AFTER)

    def crash_rank(self, rank: int, *, lost: bool) -> None:
        """It is gone. `lost`: so is what it had said; else that is still read."""
        self.crashes -= 1
        life = self.ranks[rank]
        life.alive = False
        life.left.clear()
        life.inbox.clear()
        self.gone[rank] = life.incarnation
        if lost:
            self.said[rank].clear()
            self.for_coordinator = [one for one in self.for_coordinator if one[0] != rank]

    def _rank(self, rank: int, event: rank_events.Event, now: float = NOW) -> None:
        life = self.ranks[rank]
        for effect in life.machine.handle(event, now):
            match effect:
                case rank_events.Take(key, request):
                    life.left[key] = len(request.made_token_ids), request.params.max_tokens
                case rank_events.Drop(key):
                    del life.left[key]
                case rank_events.ToFrontEnd(_, outputs):
                    self.said[rank].append(outputs)
                case rank_events.ToCoordinator(message):
                    self.for_coordinator.append((rank, message))

    # The coordinator ----------------------------------------------------------------------------

    def start_coordinator(self) -> None:
        """One that knows nothing; all are connected to it at once."""
        self.coordinators += 1
        fresh = self.coordinators == 1
        size = self.size
        self.coordinator = Coordinator(size, self.coordinators, 0.0, lockstep=False, publish_loads=False, fresh=fresh)
        self._coordinator(coordinator.FrontEndSubscribed())
        for life in self.ranks:
            if life.alive and life.incarnation:
                self._coordinator(coordinator.RankSubscribed(life.machine.rank, life.incarnation))

    def coordinator_hears(self) -> None:
        """Of a rank, whichever life of it."""
        self._coordinator(coordinator.RankSaid(self.for_coordinator.pop(0)[1]))

    def coordinator_sees_end(self, rank: int) -> None:
        """A rank's connection has ended."""
        life, self.gone[rank] = self.gone[rank], 0
        self._coordinator(coordinator.RankGone(rank, life))

    def waits_for_ranks(self) -> bool:
        """Whether the coordinator has not heard some rank yet, and it is time."""
        assert self.coordinator is not None
        return bool(self.coordinator._introductions._unheard)

    def coordinator_loses_patience(self) -> None:
        """Who has not said anything is waited for no longer."""
        self._coordinator(coordinator.Tick(), LONG_AFTER)

    def crash_coordinator(self) -> None:
        """It is gone, and all that was on its way to and from it."""
        self.crashes -= 1
        self.coordinator = None
        self.for_coordinator.clear()
        self.for_front_end.clear()
        self.gone = [0] * self.bounds.places

    def _coordinator(self, event: coordinator.Event, now: float = NOW) -> None:
        if self.coordinator is None:
            return
        for effect in self.coordinator.handle(event, now):
            if isinstance(effect, coordinator.ToRanks):
                self._tell_ranks(effect.message)
            elif isinstance(effect, coordinator.ToFrontEnds) and isinstance(effect.message, Members):
                self.for_front_end += [effect.message] if self.for_front_end[-1:] != [effect.message] else []

    def _tell_ranks(self, message: ToRank) -> None:
        for rank, life in enumerate(self.ranks):
            if not life.alive or not life.incarnation:
                continue
            repeated = isinstance(message, Identify) and any(who == rank for who, _ in self.for_coordinator)
            if not repeated:
                self._rank(rank, rank_events.CoordinatorSaid(message))
