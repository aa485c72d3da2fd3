"""KV that outlives its request: the next one with the same beginning need not compute it again.

A slot keeps what was computed in it after its request has ended. A request that starts takes the free slot whose tokens
it shares most of, and computes the rest; where another slot has more of it, busy or free, that is copied over by the
engine's own operation.

A slot is needed sooner than memory is: sixteen slots of 4,096 tokens that keep chats of 700 are full of nothing. So
what a slot keeps, and the next request there has no use for, is laid aside: the engine hands it out as bytes and takes
them back into any slot, bit for bit. That costs a copy each way, 25 and 5 ms for 700 tokens of a model of 135 million
weights where computing them takes seconds. What is laid aside is bounded by tokens, and the least lately used goes
first. Llama.cpp knows two other ways. One pool for all slots, with more sequence numbers than slots: then each token
looks at the cells of all, and its bits depend on them. More streams than slots: each is as long as the longest request.
"""

from __future__ import annotations

from collections.abc import Iterable
from heapq import heapify
from typing import Protocol

from msgspec import Struct

from paceline.engines.scheduler import Schedule, Sequence

LEAST_TOKENS = 16
"""A shorter beginning is not worth a thought."""

WORTH_COPYING = 64
"""So many more tokens another slot must have than a free one; and so many must be lost with a slot's KV for it to be
laid aside."""


class KVMemory(Protocol):
    """What an engine does with the KV of a slot."""

    def keep(self, slot: int, count: int) -> bool:
        """Let it have its first `count` tokens alone; returns False where that cannot be, and it has none then."""

    def copy(self, source: int, slot: int, count: int) -> bool:
        """Let it have the first `count` tokens of another slot; returns False where that cannot be."""

    def hand_out(self, slot: int) -> bytes:
        """All that it has."""

    def take_back(self, slot: int, state: bytes) -> bool:
        """Let it have what was saved, in place of what it has; returns False where that cannot be."""


class Aside(Struct, eq=False):
    """What a slot has had: the tokens, and their KV."""

    tokens: list[int]
    state: bytes


Source = int | Aside
"""A slot, or what was laid aside."""


class KeptSchedule(Schedule):
    """A schedule of `TextSequence`. `pooled`: whether all slots share the memory; `aside`: tokens that may be laid
    aside.
    """

    def __init__(self, slots: int, kv_tokens: int, budget: int, memory: KVMemory, *, pooled: bool, aside: int) -> None:
        super().__init__(slots, kv_tokens, budget)
        self._memory, self._pooled, self._aside_tokens = memory, pooled, aside
        self._kept: dict[int, list[int]] = {}
        """By free slot, the tokens whose KV it has, least lately used first."""
        self._aside: dict[int, Aside] = {}
        """By the number of each object, least lately used first."""

    def forget(self, slot: int) -> None:
        """Whatever it has is of no use any more."""
        self._memory.keep(slot, 0)
        self._kept.pop(slot, None)

    def forget_slots(self) -> bool:
        """Nothing is kept in slots; returns whether anything was."""
        kept = list(self._kept)
        for slot in kept:
            self.forget(slot)
        return bool(kept)

    def forget_all(self) -> None:
        """What was computed does not count any more."""
        self.forget_slots()
        self._aside.clear()

    def take_slot(self, sequence: Sequence) -> int:
        wanted = sequence.tokens[:-1] if sequence.reuses else []  # type: ignore[attr-defined]
        # Where little is lost by it, the slot itself is taken; else a copy.
        slot, count = _best(((slot, tokens) for slot, tokens in self._kept.items() if _goes_on(tokens, wanted)), wanted)
        running = ((one.slot, one.tokens[: one.computed]) for one in self.running if one.slot >= 0)
        aside = ((one, one.tokens) for one in self._aside.values())
        source, more = _best([*self._kept.items(), *running, *aside], wanted)
        if source is not None and more >= max(LEAST_TOKENS, count + WORTH_COPYING):
            slot, count = self._brought(source, more)
        elif not isinstance(slot, int) or count < LEAST_TOKENS:
            slot, count = self._emptied(), 0
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
        self._shorten_aside()
        while self._pooled and self._kept and self._kept_tokens() > self._kv_tokens:
            self.forget(next(iter(self._kept)))

    def give(self, sequence: Sequence) -> None:
        super().give(sequence)
        self._kept.pop(sequence.slot, None)
        self._kept[sequence.slot] = sequence.tokens[: sequence.computed]  # type: ignore[attr-defined]

    def _brought(self, source: Source, count: int) -> tuple[int, int]:
        """A slot that has the first `count` tokens of another, or of what was laid aside; 0 where that cannot be."""
        slot = self._emptied(source)
        # The last free slot may be the one itself.
        if slot == source:
            return slot, count
        self._memory.keep(slot, 0)
        if isinstance(source, int):
            return slot, count if self._memory.copy(source, slot, count) else 0
        # What goes on here is kept here; of what others may go on from, the copy stays.
        self._aside.pop(id(source), None)
        loaded = self._memory.take_back(slot, source.state)
        if loaded and len(source.tokens) - count >= WORTH_COPYING:
            self._aside[id(source)] = source
        return slot, count if loaded else 0

    def _emptied(self, but: Source = -1) -> int:
        """The lowest free slot that keeps nothing, else the one that was used least lately; what it has is laid aside
        first.
        """
        free = sorted(self._free_slots)
        empty = [slot for slot in free if not self._kept.get(slot)]
        used = [slot for slot in self._kept if slot != but]
        slot = (empty or used or free)[0]
        self._lay_aside(slot)
        return slot

    def _lay_aside(self, slot: int) -> None:
        tokens = self._kept.pop(slot, None) or []
        if not WORTH_COPYING <= len(tokens) <= self._aside_tokens:
            return
        one = Aside(tokens, self._memory.hand_out(slot))
        self._aside[id(one)] = one
        self._shorten_aside()

    def _shorten_aside(self) -> None:
        """Where all slots share the memory, it is for what is laid aside, too."""
        room = self._aside_tokens
        if self._pooled:
            room = min(room, self._kv_tokens - self._kept_tokens())
        tokens = sum(len(one.tokens) for one in self._aside.values())
        while tokens > room and self._aside:
            tokens -= len(self._aside.pop(next(iter(self._aside))).tokens)

    def _kept_tokens(self) -> int:
        return self.kv_reserved + sum(map(len, self._kept.values()))


def _goes_on(tokens: list[int], wanted: list[int]) -> bool:
    """Whether what goes on with `wanted` takes little from who might go on with `tokens`."""
    head = max(0, len(tokens) - WORTH_COPYING + 1)
    return tokens[:head] == wanted[:head]


def _best(sources: Iterable[tuple[Source, list[int]]], wanted: list[int]) -> tuple[Source | None, int]:
    """Which has most of the beginning, and how much; the first of equals."""
    best, most = None, 0
    for source, tokens in sources:
        # Most differ early, and are not gone through.
        if tokens[: most + 1] == wanted[: most + 1] and len(wanted) > most:
            best, most = source, common(tokens, wanted)
    return best, most


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
