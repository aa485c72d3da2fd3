"""The node in the simulation: its machine, which starts and ends the ranks' processes as the coordinator says."""

from __future__ import annotations

from typing import Any, Protocol

from paceline.core import node
from paceline.core.messages import Identify, Scaling
from paceline.core.node import Node
from paceline.simulate.network import Link
from paceline.simulate.world import World

NAME = "node"


class Processes(Protocol):
    """Who has the ranks' processes."""

    def start_loading(self, number: int) -> None:
        """Start a rank's process, which loads its engine, unless it is there."""

    def stop_rank(self, number: int) -> None:
        """End a rank's process for good."""


class NodeParty:
    """The node's supervisor, which does not die."""

    def __init__(self, world: World, machine: Node, processes: Processes) -> None:
        self.world, self.machine = world, machine
        self.to_coordinator: Link
        self.broadcasts: Link
        self.connected = False
        self._processes = processes

    def hear(self, message: Any) -> None:
        """A broadcast; all else is for ranks."""
        if isinstance(message, Scaling | Identify):
            self.feed(node.CoordinatorSaid(message))

    def feed(self, event: node.Event) -> None:
        """Let the machine handle `event`, and do what it says."""
        effects = self.machine.handle(event, self.world.now)
        self.world.journal.record(self.world.now, NAME, event, effects)
        for effect in effects:
            match effect:
                case node.StartRank(rank) | node.KeepRank(rank):
                    self._processes.start_loading(rank)
                case node.StopRank(rank):
                    self._processes.stop_rank(rank)
                case node.ToCoordinator(message):
                    self.to_coordinator.send(message)
