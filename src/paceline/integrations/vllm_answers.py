"""Whether the last wake has been answered, and since when not: the stall watchdog under vLLM.

A vLLM rank does not acknowledge a wake. It answers by any sign that it runs in that wave, or a later one, and rank 0
answers for all when its loop has come through an all-reduce. Who has given no sign is looked up when that is wanted:
a wake is urgent, and there may be hundreds of ranks.
"""

from __future__ import annotations

from collections.abc import Callable


class Answers:
    """The last wake. `stall_s`: after so long without an answer the ranks are named that `silent(wave)` finds."""

    def __init__(self, stall_s: float, silent: Callable[[int], list[int]]) -> None:
        self._stall_s = stall_s
        self._silent = silent
        self._since: float | None = None
        self._all_in = -1
        self.wave = -1
        """The wave of the last wake."""
        self.stalled: list[int] = []
        """The ranks that have been named."""

    @property
    def deadline(self) -> float:
        """When somebody may have to be named."""
        return float("inf") if self._since is None or self.stalled else self._since + self._stall_s

    def woken(self, wave: int, now: float) -> None:
        """A wake for this wave goes out."""
        if wave > self._all_in and (wave > self.wave or self._since is None):
            self._since = now
            self.wave = wave

    def all_came(self, wave: int) -> None:
        """All ranks run in this wave, or have finished it."""
        self._all_in = max(self._all_in, wave)

    def awaited(self) -> list[int]:
        """The ranks that have given no sign since the last wake."""
        return [] if self._since is None or self._all_in >= self.wave else self._silent(self.wave)

    def settle(self, now: float) -> bool:
        """Look at the clock. Returns whether other ranks are named now."""
        if self._since is None or (not self.stalled and self._all_in < self.wave and now < self.deadline):
            return False
        awaited = self.awaited()
        if not awaited:
            self._since = None
            named, self.stalled = self.stalled, []
            return bool(named)
        if self.stalled:
            return False
        self.stalled = awaited
        return True

    def describe(self) -> list[str]:
        """A line for the log and `/health`, for each rank that is named."""
        return [f"rank {rank} was woken for wave {self.wave} and has given no sign of it" for rank in self.stalled]
