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
from typing import Any, Protocol

from msgspec import Struct

from paceline.core.blocks import BLOCK_TOKENS, block_hashes, extend_hashes
from paceline.core.rank.events import KvChange
from paceline.engines.scheduler import Chunks, Schedule, Sequence

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


class Kept(Struct, eq=False):
    """What a slot has had: the tokens, the names of their blocks, and their KV where it is laid aside."""

    tokens: list[int]
    names: list[int]
    state: bytes = b""


class HeldNames:
    """The blocks that are there in some slot or aside, and what has changed of them."""

    def __init__(self) -> None:
        self._held: dict[int, int] = {}
        self._changed: dict[int, bool] = {}

    def hold(self, names: Iterable[int]) -> None:
        for name in names:
            count = self._held[name] = self._held.get(name, 0) + 1
            if count == 1 and self._changed.pop(name, None) is None:
                self._changed[name] = True

    def release(self, names: Iterable[int]) -> None:
        # The last first: what is told of last is what prompts begin with.
        for name in reversed(list(names)):
            self._held[name] -= 1
            if not self._held[name]:
                del self._held[name]
                if self._changed.pop(name, None) is None:
                    self._changed[name] = False

    def change(self) -> KvChange | None:
        """Since it was last asked; None where nothing has."""
        changed, self._changed = self._changed, {}
        if not changed:
            return None
        stored = [name for name, there in changed.items() if there]
        return KvChange(stored, [name for name, there in changed.items() if not there])


Source = int | Kept
"""A slot, or what was laid aside."""


class KeptSchedule(Schedule):
    """A schedule of `TextSequence`. `pooled`: whether all slots share the memory; `aside`: tokens that may be laid
    aside.
    """

    def __init__(self, slots: int, kv_tokens: int, budget: int, memory: KVMemory, *, pooled: bool, aside: int) -> None:
        super().__init__(slots, kv_tokens, budget)
        self._memory, self._pooled, self._aside_tokens = memory, pooled, aside
        self._names = HeldNames()
        self._kept: dict[int, Kept] = {}
        """By free slot, least lately used first."""
        self._aside: dict[int, Kept] = {}
        """By the number of each object, least lately used first."""

    def kv_events(self) -> KvChange | None:
        """Blocks that have come and gone since it was last asked."""
        return self._names.change()

    def forget(self, slot: int) -> None:
        """Whatever it has is of no use any more."""
        self._memory.keep(slot, 0)
        kept = self._kept.pop(slot, None)
        if kept is not None:
            self._names.release(kept.names)

    def forget_slots(self) -> bool:
        """Nothing is kept in slots; returns whether anything was."""
        kept = list(self._kept)
        for slot in kept:
            self.forget(slot)
        return bool(kept)

    def forget_all(self) -> None:
        """What was computed does not count any more."""
        self.forget_slots()
        while self._aside:
            self._drop_aside()

    def take_slot(self, sequence: Sequence) -> int:
        wanted = sequence.tokens[:-1] if sequence.reuses else []  # type: ignore[attr-defined]
        # Where little is lost by it, the slot itself is taken; else a copy.
        kept = [(slot, one.tokens) for slot, one in self._kept.items()]
        slot, count = _best([(slot, tokens) for slot, tokens in kept if _goes_on(tokens, wanted)], wanted)
        running = ((one.slot, one.tokens[: one.computed]) for one in self.running if one.slot >= 0)
        aside = ((one, one.tokens) for one in self._aside.values())
        source, more = _best([*kept, *running, *aside], wanted)
        if source is not None and more >= max(LEAST_TOKENS, count + WORTH_COPYING):
            slot, count = self._brought(source, more)
        elif not isinstance(slot, int) or count < LEAST_TOKENS:
            slot, count = self._emptied(), 0
        if not count or not self._memory.keep(slot, count):
            count = 0
            self._memory.keep(slot, 0)
        names = block_hashes(sequence.tokens[:count])  # type: ignore[attr-defined]
        self._names.hold(names)
        sequence.names = list(names)  # type: ignore[attr-defined]
        before = self._kept.pop(slot, None)
        if before is not None:
            self._names.release(before.names)
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
        tokens, names = sequence.tokens[: sequence.computed], sequence.names  # type: ignore[attr-defined]
        self._kept[sequence.slot], sequence.names = Kept(tokens, names), []  # type: ignore[attr-defined]

    def done(self, chunks: Chunks) -> list[Any]:
        complete = super().done(chunks)
        for sequence, _ in chunks:
            if sequence.computed // BLOCK_TOKENS > len(sequence.names):
                self._names.hold(extend_hashes(sequence.names, sequence.tokens, sequence.computed))
        return complete

    def _brought(self, source: Source, count: int) -> tuple[int, int]:
        """A slot that has the first `count` tokens of another, or of what was laid aside; 0 where that cannot be."""
        slot = self._emptied(source)
        # The last free slot may be the one itself.
        if slot == source:
            return slot, count
        self._memory.keep(slot, 0)
        if isinstance(source, int):
            return slot, count if self._memory.copy(source, slot, count) else 0
        loaded = self._memory.take_back(slot, source.state)
        # It may have had to make room for what the slot had.
        if self._aside.pop(id(source), None) is not None:
            # What goes on here is kept here; of what others may go on from, the copy stays.
            if loaded and len(source.tokens) - count >= WORTH_COPYING:
                self._aside[id(source)] = source
            else:
                self._names.release(source.names)
        return slot, count if loaded else 0

    def _emptied(self, but: Source = -1) -> int:
        """The lowest free slot that keeps nothing, else the one that was used least lately; what it has is laid aside
        first.
        """
        free = sorted(self._free_slots)
        empty = [slot for slot in free if slot not in self._kept or not self._kept[slot].tokens]
        used = [slot for slot in self._kept if slot != but]
        slot = (empty or used or free)[0]
        self._lay_aside(slot)
        return slot

    def _lay_aside(self, slot: int) -> None:
        one = self._kept.pop(slot, None)
        if one is None:
            return
        if not WORTH_COPYING <= len(one.tokens) <= self._aside_tokens:
            self._names.release(one.names)
            return
        one.state = self._memory.hand_out(slot)
        self._aside[id(one)] = one
        self._shorten_aside()

    def _shorten_aside(self) -> None:
        """Where all slots share the memory, it is for what is laid aside, too."""
        room = self._aside_tokens
        if self._pooled:
            room = min(room, self._kv_tokens - self._kept_tokens())
        tokens = sum(len(one.tokens) for one in self._aside.values())
        while tokens > room and self._aside:
            tokens -= self._drop_aside()

    def _drop_aside(self) -> int:
        """The least lately used one; returns how many tokens it had."""
        one = self._aside.pop(next(iter(self._aside)))
        self._names.release(one.names)
        return len(one.tokens)

    def _kept_tokens(self) -> int:
        return self.kv_reserved + sum(len(one.tokens) for one in self._kept.values())


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
