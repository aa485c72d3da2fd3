"""One rank of a simulated deployment: its engine, what has arrived, and what can be seen of it from outside."""

from __future__ import annotations

from paceline.simulate.traffic.engine import Counts, Engine, EngineShape
from paceline.simulate.traffic.sequence import Sequence


class SimulatedRank:
    """One rank.

    `counts`: what it had when it was last between two steps. `taken`: per front-end, how many of its sends it has
    taken in. `step`: how many it has made; many may be under way at once (`independent.py`, `lockstep.py`).
    """

    __slots__ = ("counts", "engine", "inbox", "number", "step", "taken")

    def __init__(self, number: int, shape: EngineShape) -> None:
        self.number = number
        self.engine = Engine(shape)
        self.inbox: list[Sequence] = []
        self.counts = Counts()
        self.taken: dict[int, int] = {}
        self.step = 0

    def take_in(self) -> None:
        """All that has arrived goes to the engine."""
        for sequence in self.inbox:
            if sequence.send:
                self.taken[sequence.frontend] = sequence.send
            self.engine.add(sequence)
        self.inbox.clear()
