"""Blocks of KV that requests with the same beginning share, and that stay until their room is needed.

A block is known by the trace's id of it. Blocks that running requests hold are counted; the others are kept in order
of their last use and go first where room is needed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PrefixCache:
    """All cached blocks of one rank. `held`: those in use; `idle`: the others, least lately used first."""

    __slots__ = ("held", "idle")

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.idle: dict[int, None] = {}

    def match(self, blocks: Sequence[int]) -> int:
        """How many leading blocks are there."""
        held, idle = self.held, self.idle
        for count, block in enumerate(blocks):
            if block not in held and block not in idle:
                return count
        return len(blocks)

    def idle_among(self, blocks: Iterable[int]) -> int:
        """How many of these nobody uses."""
        idle = self.idle
        return sum(block in idle for block in blocks)

    def take(self, blocks: Iterable[int]) -> int:
        """Use these, which are there; returns how many nobody used before."""
        held, idle, woken = self.held, self.idle, 0
        for block in blocks:
            if block in idle:
                del idle[block]
                held[block] = 1
                woken += 1
            else:
                held[block] += 1
        return woken

    def add(self, block: int) -> bool:
        """A block has been computed and is in use. Returns False where there is one already: then it is not cached."""
        if block in self.held or block in self.idle:
            return False
        self.held[block] = 1
        return True

    def release(self, blocks: Iterable[int]) -> int:
        """Use these no more; returns how many nobody uses now. Later blocks go before earlier ones of a prompt."""
        freed = 0
        for block in reversed(list(blocks)):
            self.held[block] -= 1
            if not self.held[block]:
                del self.held[block]
                self.idle[block] = None
                freed += 1
        return freed

    def evict(self, count: int) -> None:
        """Forget so many that nobody uses, at most all."""
        idle = self.idle
        for _ in range(min(count, len(idle))):
            del idle[next(iter(idle))]
