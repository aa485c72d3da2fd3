"""What a rank says of the KV that it holds: deltas with numbers, and all of it where one was missed.

An engine tells which blocks it has stored and removed; each turn's are one delta. Whoever listens applies deltas that
follow one another. One that is missing, or a listener that is new, asks, and is told all anew: a delta that begins with
nothing, and as many behind it as the names need. The numbers go on, so that those who did not ask stay in step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from paceline.core.blocks import packed
from paceline.core.messages import MAX_NAMES, KvDelta
from paceline.core.rank.events import KvChange


class KvTeller:
    """Of one life of a rank. `number`: of the last delta."""

    def __init__(self, rank: int, incarnation: int) -> None:
        self.number = 0
        self._life = (rank, incarnation)
        self._held: dict[int, None] = {}
        self._pending = KvChange()
        self._asked = False

    def ask(self) -> None:
        """Somebody lacks a delta."""
        self._asked = True

    def changed(self, change: KvChange) -> None:
        for name in change.removed:
            self._held.pop(name, None)
        self._held.update(dict.fromkeys(change.stored))
        before = self._pending
        if before.stored or before.removed:
            # Nobody could be told yet: all will be.
            self._asked = True
        self._pending = change

    def deltas(self) -> Iterator[KvDelta]:
        """What is to be said now."""
        change, self._pending = self._pending, KvChange()
        if self._asked or max(len(change.stored), len(change.removed)) > MAX_NAMES:
            self._asked = False
            names, whole = iter(self._held), True
            while (part := list(islice(names, MAX_NAMES))) or whole:
                yield self._delta(part, (), whole)
                whole = False
        elif change.stored or change.removed:
            yield self._delta(change.stored, change.removed, whole=False)

    def _delta(self, stored: Sequence[int], removed: Sequence[int], whole: bool) -> KvDelta:
        self.number += 1
        return KvDelta(*self._life, self.number, packed(stored), packed(removed), whole)
