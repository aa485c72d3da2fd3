"""A node's machine: which ranks run there, as scaling goes on.

    effects = node.handle(event, now)

The coordinator says which ranks there are to be, and of new ones where; the node starts and ends them, and says when
one ends that has not joined yet. It keeps the newest Scaling that it has heard: a new coordinator is told.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from paceline.core.load import plausible
from paceline.core.messages import PROTOCOL_VERSION, Identify, NodeHello, RankFailed, Scaling, ToRank
from paceline.core.requests import StartAgain

# Events ---------------------------------------------------------------------------------------


class CoordinatorSaid(Struct, frozen=True):
    message: ToRank


class RankEnded(Struct, frozen=True):
    """A rank of this node has ended, and nobody has ended it. `why`: in one line."""

    rank: int
    why: str


Event = CoordinatorSaid | RankEnded

# Effects --------------------------------------------------------------------------------------


class StartRank(Struct, frozen=True):
    """Start a rank's process. Until `KeepRank` it is not started again where it ends."""

    rank: int


class KeepRank(Struct, frozen=True):
    """The rank has become part of the deployment: whenever it ends it is started again."""

    rank: int


class ReviveRank(Struct, frozen=True):
    """Start a rank's process now, where none runs, however often it has ended."""

    rank: int


class StopRank(Struct, frozen=True):
    rank: int


class ToCoordinator(Struct, frozen=True):
    message: NodeHello | RankFailed


Effect = StartRank | KeepRank | ReviveRank | StopRank | ToCoordinator


class Node:
    """One life of one node. `ranks`: those that it starts with, of `size` in the deployment.

    `own_frontends`, `fixed`: as in NodeHello.
    """

    def __init__(
        self, identity: int, ranks: Iterable[int], size: int, *, own_frontends: bool = False, fixed: bool = False
    ) -> None:
        self.identity = identity
        self.ranks = set(ranks)
        self.scaling = Scaling(0, size, size)
        self._own_frontends = own_frontends
        self._fixed = fixed
        self._provisional: set[int] = set()
        self._failed: dict[int, str] = {}

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; returns what to do, in order."""
        match event:
            case CoordinatorSaid(Scaling() as scaling):
                return self._on_scaling(scaling)
            case CoordinatorSaid(Identify()):
                return [self._hello(), *self._failures()]
            case CoordinatorSaid(StartAgain(ranks)):
                return [ReviveRank(rank) for rank in ranks if rank in self.ranks and rank not in self._provisional]
            case CoordinatorSaid():
                return []
            case RankEnded(rank, why):
                if rank not in self._provisional:
                    return []
                self._failed[rank] = why[:512]
                return self._failures()
        raise TypeError(f"node: {type(event).__name__} is not an event of this machine")

    def provisional(self, rank: int) -> bool:
        """Whether the rank has been started and is not yet part of the deployment."""
        return rank in self._provisional

    def _on_scaling(self, scaling: Scaling) -> list[Effect]:
        if scaling.number <= self.scaling.number or not plausible(scaling.number, self.scaling.number):
            # A repeat; or a new coordinator, that does not know of the newest yet.
            return [self._hello(), *self._failures()]
        self.scaling = scaling
        # One that the flags name may have been put elsewhere while this node was away.
        elsewhere = {rank for rank, node in scaling.hosts if node != self.identity}
        leaving = {rank for rank in self.ranks if rank >= scaling.limit or rank in elsewhere}
        effects: list[Effect] = [StopRank(rank) for rank in sorted(leaving)]
        self.ranks -= leaving
        self._provisional &= self.ranks
        for rank, node in scaling.hosts:
            if node == self.identity and rank < scaling.limit and rank not in self.ranks:
                effects.append(StartRank(rank))
                self.ranks.add(rank)
                self._provisional.add(rank)
        for rank in sorted(self._provisional):
            if rank < scaling.size:
                effects.append(KeepRank(rank))
                self._provisional.discard(rank)
        self._failed = {rank: why for rank, why in self._failed.items() if rank in self._provisional}
        return [*effects, self._hello(), *self._failures()]

    def _failures(self) -> list[Effect]:
        """What is said until the coordinator has done something about it."""
        number = self.scaling.number
        return [ToCoordinator(RankFailed(self.identity, number, rank, why)) for rank, why in self._failed.items()]

    def _hello(self) -> Effect:
        return ToCoordinator(
            NodeHello(
                PROTOCOL_VERSION, self.identity, sorted(self.ranks), self.scaling, self._own_frontends, self._fixed
            )
        )
