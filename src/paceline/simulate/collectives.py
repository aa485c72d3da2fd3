"""The collectives of lockstep ranks, in virtual time: a barrier that really blocks while a rank is missing."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from msgspec import Struct

from paceline.simulate.world import Violation, World

SCATTER_S = 0.00005
"""Ranks leave a collective within this time of one another."""


class Entered(Struct):
    """A rank in a collective: its part, how long that takes it (seconds), and whom to tell the outcome."""

    value: object
    seconds: float
    done: Callable[[list[Any]], None]


class Collectives:
    """Those of one group of ranks, all entered in the same order by all."""

    def __init__(self, world: World, size: int, stream: random.Random | None) -> None:
        self._world = world
        self._size = size
        self._stream = stream
        self._kind: type | None = None
        self._entered: dict[int, Entered] = {}

    def enter(self, rank: int, value: object, seconds: float, done: Callable[[list[Any]], None]) -> None:
        """`rank` takes part with `value`; `done` gets all values when all have come. Raises Violation."""
        if rank in self._entered:
            raise Violation(f"rank {rank} is in two collectives", f"rank {rank}")
        if self._entered and type(value) is not self._kind:
            other = next(iter(self._entered))
            what = f"ranks in different collectives: rank {rank} in {value}, rank {other} in {self._kind}"
            raise Violation(what, f"rank {rank}", f"rank {other}")
        self._kind = type(value)
        self._entered[rank] = Entered(value, seconds, done)
        if len(self._entered) == self._size:
            self._complete()

    def leave(self, rank: int) -> None:
        """The rank's process is gone."""
        self._entered.pop(rank, None)

    def waiting(self) -> list[int]:
        """The ranks that wait for the others."""
        return sorted(self._entered)

    def _complete(self) -> None:
        entered, self._entered = self._entered, {}
        values = [entry.value for entry in entered.values()]
        end = self._world.now + max(entry.seconds for entry in entered.values())
        for entry in entered.values():
            scatter = self._stream.random() * SCATTER_S if self._stream is not None else 0.0
            self._world.at(end + scatter, lambda done=entry.done: done(values))  # type: ignore[misc]
