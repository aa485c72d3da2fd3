"""One life of the coordinator in the simulation, and its ticks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Protocol

from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.messages import StartDPWave, ToFrontend, ToRank
from paceline.simulate.alarm import Alarm
from paceline.simulate.world import World

NAME = "coordinator"


class CoordinatorChecks(Protocol):
    """What watches the coordinator."""

    def broadcast(self, party: CoordinatorParty, message: ToRank | ToFrontend) -> None:
        """The coordinator says this to all."""

    def coordinator(self, party: CoordinatorParty) -> None:
        """An event has been handled, and its effects done."""


class CoordinatorParty:
    """The coordinator's process. `to_ranks`, `to_frontends`: put a broadcast on every receiver's link."""

    def __init__(
        self, world: World, machine: Coordinator, checks: CoordinatorChecks, to_ranks: Callable[[ToRank], None],
        to_frontends: Callable[[ToFrontend], None],
    ) -> None:  # fmt: skip
        self.world, self.machine = world, machine
        self.alive = True
        self.sent: Counter[str] = Counter()
        self.last_wake = -1
        self.wakes_repeated = 0
        self._checks = checks
        self._to_ranks = to_ranks
        self._to_frontends = to_frontends
        self._alarm = Alarm(world, machine, lambda: self.feed(coordinator.Tick()), lambda: self.alive)

    def kill(self) -> None:
        """The process is gone, and all that it knew."""
        self.alive = False

    def feed(self, event: coordinator.Event) -> None:
        """Let the machine handle `event`, and do what it says."""
        if not self.alive:
            return
        effects = self.machine.handle(event, self.world.now)
        self.world.journal.record(self.world.now, NAME, event, effects)
        for effect in effects:
            match effect:
                case coordinator.ToRanks(to_ranks):
                    self._count(to_ranks)
                    self._checks.broadcast(self, to_ranks)
                    self._to_ranks(to_ranks)
                case coordinator.ToFrontends(to_frontends):
                    self._count(to_frontends)
                    self._checks.broadcast(self, to_frontends)
                    self._to_frontends(to_frontends)
        self._checks.coordinator(self)
        self._alarm.set()

    def _count(self, message: ToRank | ToFrontend) -> None:
        self.sent[type(message).__name__] += 1
        if isinstance(message, StartDPWave):
            self.wakes_repeated += message.wave == self.last_wake
            self.last_wake = message.wave
