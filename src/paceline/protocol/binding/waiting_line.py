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

    def join(self, one: T) -> None:
        """It takes its place by its order."""
        line = self._line
        if not line or self._order(line[-1]) < self._order(one):
            line.append(one)
        else:
            insort(line, one, lo=self._front, key=self._order)

    def first(self) -> T | None:
        """Who is first, if anybody waits."""
        line, front = self._line, self._front
        while front < len(line) and not line[front].waiting:
            front += 1
        self._front = front
        if front > COMPACT and front * 2 > len(line):
            del line[:front]
            self._front = front = 0
        return line[front] if front < len(line) else None

    def __iter__(self) -> Iterator[T]:
        """All that wait, in order."""
        self.first()
        for place in range(self._front, len(self._line)):
            if self._line[place].waiting:
                yield self._line[place]
