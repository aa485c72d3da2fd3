"""Where in a cluster ranks run: a machine that gives each a place, lets it keep that, and gives it another.

    effects = places.handle(event, now)

A place is what a cluster's scheduler has set aside for one rank (under Ray a placement group) on some node. A life of
the rank that ends by itself leaves it as it is: the next begins there at once, and nobody else has taken the devices
meanwhile. A place is given up where its node or what holds it has died, where a life ended before it was ready, which
may be the node's fault, and where the rank is no longer wanted. The next life then gets a new place, on the node with
the fewest ranks of those that have room; the node of a life that was never ready comes last. Where no node has room,
the scheduler is asked all the same: it waits for one, and a cluster that grows by itself learns what is missing.

What ends and begins a life is decided by whoever asks for lives (`process/supervisor.py`), here and elsewhere by the
same rules.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from msgspec import Struct

Resources = Mapping[str, float]
"""What a rank needs or a node has, by the cluster's names."""


class ClusterNode(Struct, frozen=True):
    """A node that lives, and what of it nobody uses."""

    node: str
    free: Resources


# Events ---------------------------------------------------------------------------------------


class Begin(Struct, frozen=True):
    """Whoever watches the rank wants a life of it, which has this number. `nodes`: those that there are now."""

    life: int
    rank: int
    needs: Resources
    nodes: Sequence[ClusterNode]


class End(Struct, frozen=True):
    """It wants the rank no more: its life is to end where it has not, and its place to be given up."""

    rank: int


class Kill(Struct, frozen=True):
    """The life is to end at once."""

    life: int


class Found(Struct, frozen=True):
    """The scheduler has found room for a place."""

    place: int
    node: str


class Lost(Struct, frozen=True):
    """A place is no more: its node has died, or what holds it."""

    place: int
    why: str


class LifeReady(Struct, frozen=True):
    life: int


class LifeEnded(Struct, frozen=True):
    """`exit_code`: None where nobody knows; `why`: in one line. `again`: it met no accident of its own."""

    life: int
    exit_code: int | None
    why: str
    again: bool = False


Event = Begin | End | Kill | Found | Lost | LifeReady | LifeEnded

# Effects --------------------------------------------------------------------------------------


class FindPlace(Struct, frozen=True):
    """Ask the scheduler for room; on `hint`, if that still has it, or None for anywhere."""

    place: int
    rank: int
    needs: Resources
    hint: str | None


class GiveUp(Struct, frozen=True):
    """Free what was set aside, and end what still runs there."""

    place: int


class StartLife(Struct, frozen=True):
    place: int
    life: int


class EndLife(Struct, frozen=True):
    place: int
    life: int
    kill: bool


class SayEnded(Struct, frozen=True):
    """Tell whoever asked for the life that it has ended."""

    life: int
    exit_code: int | None
    why: str


Effect = FindPlace | GiveUp | StartLife | EndLife | SayEnded


class Place(Struct):
    """One place. `node`: None while there is none. `life`: what runs there, or will."""

    number: int
    rank: int
    needs: Resources
    hint: str | None
    node: str | None = None
    life: int | None = None
    ready: bool = False
    wanted: bool = True


class Places:
    """All places of a deployment's ranks. `ranks_a_node`: so many are aimed at, None for an even spread."""

    def __init__(self, ranks_a_node: int | None = None) -> None:
        self._ranks_a_node = ranks_a_node
        self._places: dict[int, Place] = {}
        self._next = 0
        self._last_resort: dict[int, str] = {}
        """By rank the node on which its last life was never ready."""

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; returns what to do, in order."""
        match event:
            case Begin():
                return self._begin(event)
            case End(rank):
                return self._end(rank)
            case Kill(life):
                place = self._running(life)
                return [] if place is None else self._ask_to_end(place, life, kill=True)
            case Found(number, node):
                return self._found(number, node)
            case Lost(number, why):
                place = self._places.get(number)
                return [] if place is None else self._gone(place, None, why)
            case LifeReady(life):
                if (place := self._running(life)) is not None:
                    place.ready = True
                    self._last_resort.pop(place.rank, None)
                return []
            case LifeEnded():
                return self._ended(event)
        raise TypeError(f"places: {type(event).__name__} is not an event of this machine")

    def _begin(self, event: Begin) -> list[Effect]:
        place = self._place_of(event.rank)
        effects: list[Effect] = []
        if place is not None and (place.life is not None or place.needs != event.needs):
            # Whoever watches it has not heard of the end of what it begins anew.
            effects, place = self._gone(place, None, "another life has begun"), None
        if place is None:
            place = Place(self._next, event.rank, event.needs, self._best(event))
            self._next += 1
            self._places[place.number] = place
            effects.append(FindPlace(place.number, place.rank, place.needs, place.hint))
        place.life, place.ready = event.life, False
        return [*effects, StartLife(place.number, event.life)] if place.node else effects

    def _end(self, rank: int) -> list[Effect]:
        self._last_resort.pop(rank, None)
        place = self._place_of(rank)
        if place is None:
            return []
        place.wanted = False
        return self._gone(place, None, "") if place.life is None else self._ask_to_end(place, place.life, kill=False)

    def _ask_to_end(self, place: Place, life: int, *, kill: bool) -> list[Effect]:
        return [EndLife(place.number, life, kill)] if place.node else self._gone(place, None, "it was ended")

    def _found(self, number: int, node: str) -> list[Effect]:
        place = self._places.get(number)
        if place is None or place.life is None:
            return []
        place.node = node
        return [StartLife(number, place.life)]

    def _ended(self, event: LifeEnded) -> list[Effect]:
        place = self._running(event.life)
        if place is None:
            return []
        fit = place.ready or event.again
        if not fit and place.node is not None:
            self._last_resort[place.rank] = place.node
        if not (fit and place.wanted):
            return self._gone(place, event.exit_code, event.why)
        place.life = None
        return [SayEnded(event.life, event.exit_code, event.why)]

    def _gone(self, place: Place, exit_code: int | None, why: str) -> list[Effect]:
        del self._places[place.number]
        effects: list[Effect] = [GiveUp(place.number)]
        return effects if place.life is None else [*effects, SayEnded(place.life, exit_code, why)]

    def _place_of(self, rank: int) -> Place | None:
        return next((place for place in self._places.values() if place.rank == rank), None)

    def _running(self, life: int) -> Place | None:
        return next((place for place in self._places.values() if place.life == life), None)

    def _best(self, event: Begin) -> str | None:
        """The node to be aimed at, if one has room."""
        mine: dict[str, list[Place]] = {}
        for place in self._places.values():
            mine.setdefault(place.node or place.hint or "", []).append(place)
        worst, most = self._last_resort.get(event.rank), self._ranks_a_node

        def rate(one: ClusterNode) -> tuple[bool, bool, int, str]:
            ranks = len(mine.get(one.node, ()))
            full = most is not None and ranks >= most
            # With a number of their own, nodes are filled one after the other.
            return one.node == worst, full, ranks if most is None or full else -ranks, one.node

        with_room = [one for one in event.nodes if _has_room(one, event.needs, mine.get(one.node, ()))]
        return min(with_room, key=rate).node if with_room else None


def _has_room(node: ClusterNode, needs: Resources, mine: Sequence[Place]) -> bool:
    """What has been asked for and not been found yet is still among what is free."""
    asked = [needs, *(place.needs for place in mine if place.node is None)]
    return all(node.free.get(name, 0.0) >= sum(one.get(name, 0.0) for one in asked) for name in needs)
