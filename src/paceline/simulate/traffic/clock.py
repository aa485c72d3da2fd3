"""The virtual clock: what happens when. Things at the same moment happen in the order in which they were arranged."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

Happening = Callable[[Any], None]


class Clock:
    """Moves from one happening to the next. `now`: seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._heap: list[tuple[float, int, Happening, Any]] = []
        self._arranged = 0

    def at(self, when: float, happening: Happening, argument: Any = None) -> None:
        """`happening(argument)` at a moment that is not over."""
        self._arranged += 1
        heappush(self._heap, (when, self._arranged, happening, argument))

    def step(self) -> bool:
        """Let the next thing happen. Returns whether there was one."""
        if not self._heap:
            return False
        self.now, _, happening, argument = heappop(self._heap)
        happening(argument)
        return True
