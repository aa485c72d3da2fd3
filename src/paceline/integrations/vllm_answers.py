"""Which ranks have not answered the last wake, and since when: the stall watchdog under vLLM.

A vLLM rank does not acknowledge a wake. It answers by any sign that it runs in that wave, or a later one, and rank 0
answers for all when its loop has come through an all-reduce.
"""

from __future__ import annotations

from collections.abc import Iterable


class Answers:
    """The ranks that are waited for. `stall_s`: after so long without an answer they are named."""

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._since: float | None = None
        self.wave = 0
        """The wave of the last wake."""
        self.awaited: set[int] = set()
        self.stalled: list[int] = []
        """The ranks that have been named."""
        self._all_in = -1

    @property
    def deadline(self) -> float:
        """When somebody will have to be named."""
        return float("inf") if self._since is None or self.stalled else self._since + self._stall_s

    def woken(self, wave: int, ranks: Iterable[int], now: float) -> None:
        """A wake for this wave goes out. `ranks`: those that have given no sign of it before."""
        if wave > self._all_in and (wave > self.wave or self._since is None):
            self._since = now
            self.wave = wave
            self.awaited = set(ranks)

    def sign(self, rank: int, wave: int) -> None:
        """The rank runs in this wave."""
        if wave >= self.wave:
            self.awaited.discard(rank)

    def all_came(self, wave: int) -> None:
        """All ranks run in this wave, or have finished it."""
        self._all_in = max(self._all_in, wave)
        if wave >= self.wave:
            self.awaited.clear()

    def settle(self, now: float) -> bool:
        """Look at the clock. Returns whether other ranks are named now."""
        if self._since is None:
            return False
        if not self.awaited:
            self._since = None
            named, self.stalled = self.stalled, []
            return bool(named)
        if now < self._since + self._stall_s or self.stalled:
            return False
        self.stalled = sorted(self.awaited)
        return True

    def describe(self) -> list[str]:
        """A line for the log and `/health`, for each rank that is named."""
        return [f"rank {rank} was woken for wave {self.wave} and has given no sign of it" for rank in self.stalled]
