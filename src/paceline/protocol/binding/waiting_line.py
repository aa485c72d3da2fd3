"""A line of things that wait, in an order of their own: mostly joined at its end and left at its front.

Whoever leaves is only marked, and taken out when the front comes to it, so that leaving from anywhere costs nothing.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator
from typing import Any, Generic, Protocol, TypeVar


class Waits(Protocol):
    """What can stand in a line: `waiting` until it has left all lines that it stands in."""

    waiting: bool


T = TypeVar("T", bound=Waits)

COMPACT = 64
"""So many that have left may stand before the front, whatever the line's length."""


class WaitingLine(Generic[T]):
    """Things by `order`, least first; no two are equal in it."""

    def __init__(self, order: Callable[[T], Any]) -> None:
        self._order = order
        self._line: list[T] = []
        self._front = 0
        self._last: Any = None
        """The order of the last one that was joined at the end; there may be no more of it."""

    def join(self, one: T) -> None:
        """It takes its place by its order."""
        order = self._order(one)
        if self._last is None or self._last < order:
            self._line.append(one)
            self._last = order
        else:
            insort(self._line, one, lo=self._front, key=self._order)

    def first(self) -> T | None:
        """Who is first, if anybody waits."""
        line = self._line
        for place in range(self._front, len(line)):
            one = line[place]
            if one.waiting:
                self._front = place
                if place > COMPACT and place * 2 > len(line):
                    del line[:place]
                    self._front = 0
                return one
        line.clear()
        self._front, self._last = 0, None
        return None

    def __iter__(self) -> Iterator[T]:
        """All that wait, in order."""
        self.first()
        for place in range(self._front, len(self._line)):
            if self._line[place].waiting:
                yield self._line[place]
