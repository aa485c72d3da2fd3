"""KV that outlives its request: the next one with the same beginning need not compute it again.

A slot keeps what was computed in it after its request has ended. A request that starts takes the free slot whose tokens
it shares most of, and computes the rest; where another slot has more of it, busy or free, that is copied over by the
engine's own operation. What is kept goes where its slot or its memory is needed, least lately used first: it takes
nothing from those that run.
"""

from __future__ import annotations

from heapq import heapify
from typing import Any, Protocol

from paceline.engines.scheduler import Schedule, Sequence

LEAST_TOKENS = 16
"""A shorter beginning is not worth a thought."""

WORTH_COPYING = 64
"""So many more tokens another slot must have than a free one."""


class KVMemory(Protocol):
    """What an engine does with the KV of a slot."""

    def keep(self, slot: int, count: int) -> bool:
        """Let it have its first `count` tokens alone; returns False where that cannot be, and it has none then."""

    def copy(self, source: int, slot: int, count: int) -> bool:
        """Let it have the first `count` tokens of another slot; returns False where that cannot be."""


class KeptSchedule(Schedule):
    """A schedule of `TextSequence`. `pooled`: whether all slots share the memory."""

    def __init__(self, slots: int, kv_tokens: int, budget: int, memory: KVMemory, *, pooled: bool) -> None:
        super().__init__(slots, kv_tokens, budget)
        self._memory, self._pooled = memory, pooled
        self._kept: dict[int, list[int]] = {}
        """By free slot, the tokens whose KV it has, least lately used first."""

    def forget(self, slot: int) -> None:
        """Whatever it has is of no use any more."""
        self._memory.keep(slot, 0)
        self._kept.pop(slot, None)

    def forget_all(self) -> bool:
        """Returns whether anything was kept."""
        kept = list(self._kept)
        for slot in kept:
            self.forget(slot)
        return bool(kept)

    def take_slot(self, sequence: Sequence) -> int:
        wanted = sequence.tokens[:-1] if sequence.reuses else []  # type: ignore[attr-defined]
        slot, count = self._best(self._kept.items(), wanted)
        running = [(one.slot, one.tokens[: one.computed]) for one in self.running if one.slot >= 0]
        source, more = self._best([*self._kept.items(), *running], wanted)
        if more >= max(LEAST_TOKENS, count + WORTH_COPYING):
            slot = self._emptiest(source)
            # The last free slot may be the one itself.
            count = more if slot == source or self._copied(source, slot, more) else 0
        elif count < LEAST_TOKENS:
            slot, count = self._emptiest(), 0
        if not count or not self._memory.keep(slot, count):
            count = 0
            self._memory.keep(slot, 0)
        self._kept.pop(slot, None)
        self._free_slots.remove(slot)
        heapify(self._free_slots)
        sequence.computed = count
        # Said once, of the prompt.
        sequence.cached = 0 if sequence.made else count  # type: ignore[attr-defined]
        return slot

    def take(self, sequence: Sequence) -> None:
        super().take(sequence)
        while self._pooled and self._kept and self.kv_reserved + sum(map(len, self._kept.values())) > self._kv_tokens:
            self.forget(next(iter(self._kept)))

    def give(self, sequence: Sequence) -> None:
        super().give(sequence)
        self._kept.pop(sequence.slot, None)
        self._kept[sequence.slot] = sequence.tokens[: sequence.computed]  # type: ignore[attr-defined]

    def _copied(self, source: int, slot: int, count: int) -> bool:
        self._memory.keep(slot, 0)
        return self._memory.copy(source, slot, count)

    def _emptiest(self, but: int = -1) -> int:
        """The lowest free slot that keeps nothing, else the one that was used least lately."""
        free = sorted(self._free_slots)
        empty = [slot for slot in free if not self._kept.get(slot)]
        used = [slot for slot in self._kept if slot != but]
        return (empty or used or free)[0]

    def _best(self, slots: Any, wanted: list[int]) -> tuple[int, int]:
        """The slot that has most of the beginning, and how much."""
        found = ((slot, common(tokens, wanted)) for slot, tokens in slots)
        return max(found, key=lambda one: one[1], default=(-1, 0))


def common(one: list[int], other: list[int]) -> int:
    """How many tokens both begin with."""
    least, most = 0, min(len(one), len(other))
    while least < most:
        middle = (least + most + 1) // 2
        if one[least:middle] == other[least:middle]:
            least = middle
        else:
            most = middle - 1
    return least
