"""Every interleaving of what clients are given while ranks, connections and the coordinator die.

The production machines of one front-end, the coordinator and independent ranks. What is walked beside waves and
generations (`explore_group.py`, which sends a dead rank's requests elsewhere) is here: that each request is with one
rank at a time, goes on behind the tokens that its client has, and ends once (`answers.py`).

Each of these comes at any moment: a request arrives at its rank, a rank makes a token for all that it has, the
front-end gets it, a rank dies, what it had said being lost or still to be read, its next life has loaded, the front-end
or the coordinator sees its connection end, a connection to a living rank ends and comes up again, the coordinator dies
and another one starts that knows nothing. What the coordinator says to ranks, and the front-end to it, arrives at once.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from typing import Any

from paceline.simulate.explore_answers_place import Bounds, Place
from paceline.simulate.explore_parts import freeze

Move = Callable[[Any], None]


class AnswersWorld:
    """The moves of one deployment."""

    stuck = "a request can never come to its end any more"
    kind_of_place = Place

    def __init__(self, bounds: Bounds) -> None:
        self.bounds = bounds

    def start(self) -> Place:
        """All ranks are ready, and the front-end knows them."""
        place = self.kind_of_place(self.bounds)
        while place.for_coordinator or place.for_frontend:
            if place.for_coordinator:
                place.coordinator_hears()
            else:
                place.frontend_hears()
        return place

    def over(self, place: Place) -> bool:
        """Whether no client waits, and every rank serves."""
        return place.settled()

    def moves(self, place: Place) -> Iterator[tuple[str, Move]]:
        """All that may happen next."""
        if len(place.answers) < self.bounds.requests:
            for rank in place.machine.ready_ranks():
                yield f"a client asks, for rank {rank}", lambda p, r=rank: p.submit(r)  # type: ignore[misc]
        for rank in range(self.bounds.places):
            yield from self._rank_moves(place, rank)
            yield from self._connection_moves(place, rank)
        if place.for_frontend:
            name = type(place.for_frontend[0]).__name__
            yield f"the front-end hears {name} from the coordinator", Place.frontend_hears
        if place.coordinator is None:
            yield "another coordinator starts, which knows nothing", Place.start_coordinator
            return
        if place.for_coordinator:
            rank, message = place.for_coordinator[0]
            text = f"the coordinator hears {type(message).__name__} of rank {rank}"
            yield text, Place.coordinator_hears
        if place.waits_for_ranks():
            yield "the coordinator waits no longer for ranks that say nothing", Place.coordinator_loses_patience
        if place.crashes and place.at_risk:
            yield "the coordinator dies", Place.crash_coordinator

    def _rank_moves(self, place: Place, rank: int) -> Iterator[tuple[str, Move]]:
        life = place.ranks[rank]
        if not life.alive:
            if place.is_kept(rank):
                yield f"the next life of rank {rank} is there", lambda p: p.start_rank(rank)
            return
        if life.inbox:
            name = type(life.inbox[0]).__name__
            yield f"rank {rank} reads {name}", lambda p: p.rank_reads(rank)
        if life.left:
            yield f"rank {rank} makes a step", lambda p: p.step(rank)
        if life.joins and place.coordinator is not None and all(who != rank for who, _ in place.for_coordinator):
            yield f"rank {rank} says hello again", lambda p: p.hello_again(rank)
        if place.crashes and place.at_risk and place.is_kept(rank):
            yield f"rank {rank} dies", lambda p: p.crash_rank(rank, lost=False)
            yield f"rank {rank} dies, and with it what it had said", lambda p: p.crash_rank(rank, lost=True)

    def _connection_moves(self, place: Place, rank: int) -> Iterator[tuple[str, Move]]:
        connection = place.connections[rank]
        if place.said[rank]:
            yield f"the front-end hears rank {rank}", lambda p: p.outputs_arrive(rank)
        if place.gone[rank]:
            yield f"the coordinator sees the connection of rank {rank} end", lambda p: p.coordinator_sees_end(rank)
        if connection is None:
            return
        living = place.ranks[rank].alive and place.ranks[rank].incarnation == connection.life
        if connection.up and not living:
            yield f"the front-end sees its connection to rank {rank} end", lambda p: p.handle_down(rank)
        elif connection.up and place.cuts and place.at_risk:
            yield f"the front-end's connection to rank {rank} ends", lambda p: p.cut(rank, lost=False)
            yield f"the front-end's connection to rank {rank} ends with what is on it", lambda p: p.cut(rank, lost=True)
        elif not connection.up and living:
            yield f"the front-end is connected to rank {rank} again", lambda p: p.handle_up(rank)

    def key(self, place: Place) -> Hashable:
        """Equal for states that go on alike."""
        flights, stranded = place.machine._inflight, place.machine._failover
        links = [
            (link.rank, link.incarnation, tuple(sorted(link.in_flight)), tuple(link.left), link.accounting.last)
            for link in flights.known()
        ]
        requests = [
            (
                wire,
                flight.submit.request,
                flight.handle.rank,
                flight.handle.incarnation,
                len(flight.made),
                tuple(flight.lost),
            )
            for wire, flight in sorted(flights._inflight.items())
        ]
        waiting = [
            (request, len(flight.made), tuple(flight.lost)) for request, (flight, _) in stranded._waiting.items()
        ]
        lives = [
            (life.alive, life.incarnation, life.machine.phase.value, tuple(sorted(life.machine.requests._keys.items())),
             tuple(sorted(life.left.items())), freeze(life.inbox))
            for life in place.ranks
        ]  # fmt: skip
        answers = [(one.tokens, one.over, one.rank, one.losses) for one in place.answers.values()]
        return (
            sorted(links), sorted(flights.down), requests, waiting, place.machine._coordinator, flights._next_resend,
            lives, answers, freeze(place.coordinator), freeze(place.said), freeze(place.for_coordinator),
            freeze(place.for_frontend), freeze(place.connections), place.gone, place.crashes, place.cuts,
        )  # fmt: skip
