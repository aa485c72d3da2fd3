"""Things in order of a number made of each, kept: a change moves one entry of a sorted list.

Most of what is chosen among, ranks by their load above all, stays as it was between two choices.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")

PLACE_BITS = 16
PLACE_MASK = (1 << PLACE_BITS) - 1
"""An entry of an ordering is `key << PLACE_BITS | place`, one int: comparing tuples takes three times as long."""

RESORT_SHARE = 16
"""Beyond one rank in so many changed, an ordering is sorted anew."""


class Ordering(Generic[T]):
    """The places of all candidates by a key, least first; equal keys by place.

    `keys`: each place's key. `entries`: sorted. `total`: the keys' sum. They hold once `refresh` has been called
    after the last change. `changed`: the places to look at anew; None: all.
    """

    __slots__ = ("_candidates", "_key", "changed", "entries", "keys", "total")

    def __init__(self, candidates: list[T], key: Callable[[T], int]) -> None:
        self._candidates = candidates
        self._key = key
        self.keys: list[int] = []
        self.entries: list[int] = []
        self.total = 0
        self.changed: set[int] | None = None

    def refresh(self) -> None:
        changed = self.changed
        if changed is None or len(changed) * RESORT_SHARE > len(self.keys):
            self.keys = [self._key(candidate) for candidate in self._candidates]
            self.total = sum(self.keys)
            self.entries = [key << PLACE_BITS | place for place, key in enumerate(self.keys)]
            self.entries.sort()
            self.changed = set()
        elif changed:
            for place in changed:
                self._move(place)
            changed.clear()

    def _move(self, place: int) -> None:
        old, new = self.keys[place], self._key(self._candidates[place])
        if new != old:
            entries = self.entries
            del entries[bisect_left(entries, old << PLACE_BITS | place)]
            insort(entries, new << PLACE_BITS | place)
            self.keys[place] = new
            self.total += new - old

    def least(self) -> int:
        return self.entries[0] >> PLACE_BITS

    def most(self) -> int:
        return self.entries[-1] >> PLACE_BITS

    def up_to(self, limit: int) -> int:
        """How many entries have a key of at most `limit`."""
        return bisect_left(self.entries, (limit + 1) << PLACE_BITS)

    def first(self, begin: int, keys: list[int], limit: int) -> int:
        """The place with the least key here among those where `keys[place] <= limit`; there must be one.

        Equal ones are taken in order of place from `begin` on, round past the end.
        """
        entries, size, at = self.entries, len(self.entries), 0
        while at < size:
            key = entries[at] >> PLACE_BITS
            end = bisect_left(entries, (key + 1) << PLACE_BITS, at)
            middle = bisect_left(entries, key << PLACE_BITS | begin, at, end)
            # Without a slice where the first will do, as it mostly does.
            if middle < end and keys[entries[middle] & PLACE_MASK] <= limit:
                return entries[middle] & PLACE_MASK
            for entry in entries[middle:end]:
                if keys[entry & PLACE_MASK] <= limit:
                    return entry & PLACE_MASK
            for entry in entries[at:middle]:
                if keys[entry & PLACE_MASK] <= limit:
                    return entry & PLACE_MASK
            at = end
        raise ValueError("no candidate is within the limit")
