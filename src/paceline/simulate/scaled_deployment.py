"""A deployment whose size changes: one node beside all others, that starts and ends ranks as the coordinator says."""

from __future__ import annotations

from typing import Any

from paceline.core import codec
from paceline.core.coordinator import events as coordinator
from paceline.core.messages import ToRank
from paceline.core.node import Node, RankEnded
from paceline.simulate.coordinator_party import CoordinatorParty
from paceline.simulate.deployment import Deployment
from paceline.simulate.node_party import NodeParty
from paceline.simulate.rank_party import RankParty

NODE = 900_000
LONGEST_LOADING_S = 2.0


class ScaledDeployment(Deployment):
    """As `Deployment`, with a node. A rank that has left stays in `ranks`, dead."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        ranks = self.shape.ranks
        self.node = NodeParty(self.world, Node(NODE, range(ranks), ranks), self)
        self.node.to_coordinator = self._link("node to coordinator", codec.from_rank(), self._from_rank)
        self.node.broadcasts = self._link("coordinator to node", codec.to_rank(), self.node.hear)
        self.node.to_coordinator.hold()
        self._loading: set[int] = set()
        self._loads = self.seeds.stream("loading")

    def size(self) -> int:
        """Ranks that the node believes there are."""
        return self.node.machine.scaling.size

    def present(self) -> dict[int, RankParty]:
        """The ranks that there are."""
        return {number: party for number, party in self.ranks.items() if number in self.node.machine.ranks}

    def settled(self) -> bool:
        """Whether nobody waits for a change, and all know the same size."""
        machines = [party.machine for party in self.frontends.values()]
        sizes = {machine.scaling.size for machine in machines if machine.scaling is not None}
        under_way = any(machine.scaling is not None and machine.scaling.under_way for machine in machines)
        asked = any(party.scale_calls for party in self.frontends.values())
        return not under_way and not asked and sizes <= {self.size()} and not self.node.machine.scaling.under_way

    def start_coordinator(self) -> CoordinatorParty:
        """Likewise; the node connects too."""
        party = super().start_coordinator()

        def subscribe() -> None:
            if party is self.coordinator and not self.node.connected:
                self.node.connected = True
                party.feed(coordinator.RankSubscribed())
                self.node.to_coordinator.release()

        self.world.after(self._draw_connecting(), subscribe)
        return party

    def crash_coordinator(self) -> None:
        """Likewise."""
        super().crash_coordinator()
        self.node.connected = False
        self.node.to_coordinator.cut()
        self.node.to_coordinator.hold()

    def crash_rank(self, number: int) -> None:
        """Likewise; one that is to join is not started again, and the node says so."""
        super().crash_rank(number)
        if self.node.machine.provisional(number):
            self.node.feed(RankEnded(number, "it died"))

    def revive_rank(self, number: int) -> None:
        """A rank that has died is started again, if it is still of the deployment, and did not die on trial."""
        if number in self.node.machine.ranks and not self.node.machine.provisional(number):
            self._begin(number)

    def start_loading(self, number: int) -> None:
        """A new rank's process begins: its engine is there some time later."""
        party = self.ranks.get(number)
        if number not in self._loading and (party is None or not party.alive):
            self._loading.add(number)
            self.world.after(self._loads.random() * LONGEST_LOADING_S, lambda: self._loaded(number))

    def stop_rank(self, number: int) -> None:
        """Its process is ended."""
        self._loading.discard(number)
        if number in self.ranks and self.ranks[number].alive:
            super().crash_rank(number)

    def _loaded(self, number: int) -> None:
        if number in self._loading:
            self._loading.discard(number)
            self._begin(number)

    def _begin(self, number: int) -> None:
        if number not in self.ranks or not self.ranks[number].alive:
            self.start_rank(number)

    def _to_ranks(self, message: ToRank) -> None:
        super()._to_ranks(message)
        if self.node.connected:
            self.node.broadcasts.loss = self.loss
            self.node.broadcasts.send(message)
