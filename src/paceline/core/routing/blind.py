"""Routing that looks at no rank, or at two: each in turn, and the less loaded of two drawn ones."""

from __future__ import annotations

from random import Random

from paceline.core.routing.candidates import Candidates
from paceline.core.routing.least import work
from paceline.core.routing.policy import Policy, Query


class RoundRobin(Policy):
    """Each rank in turn, whatever its load."""

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self._next = frontend_index

    def choose(self, candidates: Candidates, query: Query) -> int:
        rank = candidates.ranks[self._next % len(candidates)]
        self._next += 1
        return rank


class PowerOfTwo(Policy):
    """The less loaded of two ranks that are drawn, the first one where they are equal.

    Front-ends that all know the same stale view do not all send to the same rank, because each draws from a
    generator of its own. The seed is the front-end's index, so that a run can be repeated.
    """

    def __init__(self, frontend_index: int = 0, frontend_count: int = 1) -> None:
        super().__init__(frontend_index, frontend_count)
        self._draw = Random(frontend_index).random

    def choose(self, candidates: Candidates, query: Query) -> int:
        size = len(candidates)
        if size == 1:
            return candidates.ranks[0]
        first = int(self._draw() * size)
        second = (first + 1 + int(self._draw() * (size - 1))) % size
        others = self.frontend_count - 1
        better = first if work(candidates[first], others) <= work(candidates[second], others) else second
        return candidates.ranks[better]
