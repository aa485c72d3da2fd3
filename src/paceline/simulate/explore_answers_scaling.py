"""What clients are given while ranks come and go, beside all that `explore_answers.py` has.

There is a place for one rank more than there are at first. An operator asks for a rank more or fewer, by another
front-end than the one that is walked. The node's machine starts and ends ranks; what the coordinator says to it, and it
to the coordinator, arrives at once, and it may take any time to do it. So of a rank that is to leave the front-end may
hear first that it is gone, or that its connection has ended, or neither while it makes tokens still.

To keep the walk small, what ranks say to the coordinator arrives at once too (`explore_answers.py` has it late), and
faults come only while a change is under way, until the front-end and the node have done what it asks.

That the time of a change is up happens at any moment. With that a scale-down ends no otherwise than where the rank has
nothing left, so what ranks report of that is left out (`explore_scaling.py` has it).
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from paceline.core import node as node_events
from paceline.core.coordinator import events as coordinator
from paceline.core.messages import Identify, NodeHello, RankFailed, ScaleRequest, Scaling, ToRank
from paceline.core.requests import AddRequest
from paceline.simulate.explore_answers import AnswersWorld, Move
from paceline.simulate.explore_answers_place import FRONT_END, NOW, Bounds, Place
from paceline.simulate.explore_parts import freeze
from paceline.simulate.explore_search import Broken

NODE = 50
OPERATOR = FRONT_END + 1
"""The front-end by which the operator asks."""
PATIENCE_MS = 1000
"""Of each change: whether it is over is the walk's choice."""


class ScaledPlace(Place):
    """As `Place`, with a node that starts and ends ranks."""

    def __init__(self, bounds: Bounds) -> None:
        self.scales = bounds.scales
        self.node = node_events.Node(NODE, range(bounds.ranks), bounds.ranks)
        self.node_said: list[NodeHello | RankFailed] = []
        self.ending = [False] * bounds.places
        """By rank, whether the node is about to end its life."""
        super().__init__(bounds)
        self.ranks[bounds.ranks].alive = False

    @property
    def size(self) -> int:
        """As the node has it."""
        return self.node.scaling.size

    def settled(self) -> bool:
        """Likewise; no change is under way, the front-end knows of the last one, and who has left is not there."""
        known = self.machine.scaling
        agreed = known is not None and known.number == self.node.scaling.number and not known.under_way
        there = [rank for rank, life in enumerate(self.ranks) if life.alive]
        return agreed and super().settled() and there == self.machine.ready_ranks() == list(range(self.size))

    def is_kept(self, rank: int) -> bool:
        """Not where it is to leave, and where it has ended on trial."""
        return rank in self.node.ranks and rank not in self.node._failed and not self.ending[rank]

    @property
    def at_risk(self) -> bool:
        """Only while a change is under way."""
        known, now = self.machine.scaling, self.node.scaling
        return now.under_way or any(self.ending) or known is None or known.number != now.number

    # What happens -------------------------------------------------------------------------------

    def ask(self, size: int) -> None:
        """The operator asks for so many ranks."""
        self.scales -= 1
        call = self.bounds.scales - self.scales
        request = ScaleRequest(OPERATOR, call, size, PATIENCE_MS, PATIENCE_MS)
        self._coordinator(coordinator.FrontEndSaid(request))

    def time_is_up(self) -> None:
        """Of the change that is under way."""
        assert self.coordinator is not None
        self.coordinator._scaling._deadline = NOW
        self._coordinator(coordinator.Tick())

    def may_scale(self) -> Scaling | None:
        """How many ranks there are, as the coordinator has it; None where it would not do anything about it now."""
        if self.coordinator is None or self.waits_for_ranks():
            return None
        return self.coordinator._scaling.state

    def start_coordinator(self) -> None:
        """Likewise; the node is connected to it too."""
        super().start_coordinator()
        self._coordinator(coordinator.RankSubscribed())

    def hello_again(self, rank: int) -> None:
        """Likewise."""
        super().hello_again(rank)
        self._coordinator_reads()

    def crash_rank(self, rank: int, *, lost: bool) -> None:
        """Likewise; of one on trial the node says so."""
        super().crash_rank(rank, lost=lost)
        self._node(node_events.RankEnded(rank, "it died"))
        self._coordinator_reads()

    def end_rank(self, rank: int, *, lost: bool) -> None:
        """The node ends a rank that is to be there no more, which nobody waits for."""
        self.ending[rank] = False
        self.crashes += 1
        super().crash_rank(rank, lost=lost)
        self.gone[rank] = 0
        self._coordinator(coordinator.RankGone(rank, self.ranks[rank].incarnation))

    # What follows -------------------------------------------------------------------------------

    def _coordinator(self, event: coordinator.Event, now: float = NOW) -> None:
        super()._coordinator(event, now)
        self._coordinator_reads()

    def _coordinator_reads(self) -> None:
        """All that it is told. Where there is none, nobody hears it: the next one asks."""
        while self.node_said or self.for_coordinator:
            message = self.node_said.pop(0) if self.node_said else self.for_coordinator.pop(0)[1]
            super()._coordinator(coordinator.RankSaid(message))

    def _tell_ranks(self, message: ToRank) -> None:
        if isinstance(message, Scaling | Identify):
            self._node(node_events.CoordinatorSaid(message))
        super()._tell_ranks(message)

    def _node(self, event: node_events.Event) -> None:
        for effect in self.node.handle(event, NOW):
            if isinstance(effect, node_events.ToCoordinator):
                self.node_said.append(effect.message)
            elif isinstance(effect, node_events.StopRank):
                self.ending[effect.rank] = self.ranks[effect.rank].alive

    def _sent(self, rank: int, message: AddRequest) -> None:
        known = self.machine.scaling
        if known is not None and rank >= known.serving:
            raise Broken(f"request {message.request} goes to rank {rank}, which is to leave", "the front-end")
        super()._sent(rank, message)


class ScaledAnswersWorld(AnswersWorld):
    """The moves of a deployment whose size changes."""

    kind_of_place = ScaledPlace

    def moves(self, place: Place) -> Iterator[tuple[str, Move]]:
        """Likewise."""
        assert isinstance(place, ScaledPlace)
        yield from super().moves(place)
        state = place.may_scale()
        if state is None:
            return
        if state.under_way:
            yield f"the time of the change to {state.target} is up", ScaledPlace.time_is_up
        elif place.scales:
            for size in (state.size - 1, state.size + 1):
                if 0 < size <= self.bounds.places:
                    yield f"an operator asks for so many ranks: {size}", lambda p, n=size: p.ask(n)  # type: ignore[misc]

    def _rank_moves(self, place: Place, rank: int) -> Iterator[tuple[str, Move]]:
        assert isinstance(place, ScaledPlace)
        yield from super()._rank_moves(place, rank)
        if place.ending[rank]:
            yield f"the node ends rank {rank}", lambda p: p.end_rank(rank, lost=False)
            if place.said[rank]:
                yield f"the node ends rank {rank}, and what it had said is lost", lambda p: p.end_rank(rank, lost=True)

    def key(self, place: Place) -> Hashable:
        """Likewise."""
        assert isinstance(place, ScaledPlace)
        machine = place.machine
        scaling = (sorted(machine._flights.leaving), freeze(machine.scaling), freeze(place.node))
        return super().key(place), scaling, place.ending, place.scales
