"""When a machine's next tick is due, in virtual time."""

from __future__ import annotations

from collections.abc import Callable
from math import inf
from typing import Protocol

from paceline.simulate.world import World


class Timed(Protocol):
    """A machine with a deadline."""

    @property
    def deadline(self) -> float:
        """When it wants to be ticked at the latest."""


class Alarm:
    """Calls `tick` when the machine's deadline has come, which may move between its events.

    `alive`: whether the party is, when it is asked.
    """

    def __init__(self, world: World, machine: Timed, tick: Callable[[], None], alive: Callable[[], bool]) -> None:
        self._world, self._machine = world, machine
        self._tick, self._alive = tick, alive
        self._at = inf

    def set(self) -> None:
        """After every event: see to it that the tick comes."""
        deadline = self._machine.deadline
        if deadline < self._at:
            self._at = deadline
            self._world.at(deadline, lambda: self._ring(deadline))

    def _ring(self, at: float) -> None:
        if at != self._at:
            return
        self._at = inf
        if self._world.now >= self._machine.deadline:
            self._tick()
        elif self._alive():
            self.set()
