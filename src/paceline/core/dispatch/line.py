"""Who waits, in which order, and that nobody is passed over for ever: one line of the queue.

By priority (lower first, as in vLLM), then by arrival. A request that fits nowhere now lets those behind it pass, or
one long prompt would idle all ranks; but not for ever. Two requests are watched: the first in order, whom only those
that are smaller pass, and the one that has waited longest, whom also those of a better priority pass. When so many
others have been granted since it came into that place (`PATIENCE`, or where they have a better priority
`PRIORITY_PATIENCE`), it is its turn: it gets the next rank that can start it, and where none can, one rank is kept for
it. A rank that gets nothing new becomes empty, and an empty rank takes anything.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Sequence
from operator import attrgetter
from typing import Any

from msgspec import Struct

from paceline.core.dispatch.capacity import Capacity
from paceline.core.requests import Receipt

COMPACT = 64
"""So many that have left may stand before the front, whatever the line's length."""


PATIENCE = 4
"""So many grants may pass over a request that is first in order, because it fits nowhere."""

PRIORITY_PATIENCE = 16
"""So many may pass over one that has waited longest, because their priority is better."""

LOOK_AHEAD = 2
"""So many are asked, in order, whether they fit where the first does not.

With eight, half of all requests wait a third as long where memory is short, and the longest hundredth a fifth longer:
small requests take what large ones wait for (`bench/results/routing.md`).
"""


class Entry(Struct, gc=False, eq=False):
    """One descriptor. `capacity`: what it was granted, None while it is `waiting`; `granted_at`: when.

    `tokens`: of its prompt that are to be computed, of `whole`. `blocks`, `session`: names of its beginnings, and of
    its key. `holders`: by rank, the tokens held there, `by_key`: as its key promises. `home`: the rank that it waits
    for, None for any. `due`: when it came, and as much earlier as what its home holds saves: where it waits for long,
    that is lost. `tenant`, `weight`: whose it is, and the part of the queue that is theirs (`tenants.py`).
    `receipt`: what its client is told of its home.
    """

    frontend: int
    request: int
    tokens: int
    kv: int
    priority: int
    arrival: float
    number: int
    capacity: Capacity | None = None
    granted_at: float = 0.0
    waiting: bool = True
    whole: int = 0
    blocks: Sequence[int] = ()
    session: int = 0
    holders: dict[int, int] = {}
    home: int | None = None
    by_key: bool = False
    due: float = 0.0
    tenant: int = 0
    weight: float = 1.0
    receipt: Receipt | None = None


order_of: Callable[[Entry], tuple[int, float, int]] = attrgetter("priority", "due", "number")
_age: Callable[[Entry], tuple[float, int]] = attrgetter("arrival", "number")


class SortedQueue:
    """Things by `order`, least first; no two are equal in it. Mostly joined at its end and left at its front: whoever
    leaves is only marked, and taken out when the front comes to it, so that leaving from anywhere costs nothing.
    """

    def __init__(self, order: Callable[[Entry], Any]) -> None:
        self._order = order
        self._line: list[Entry] = []
        self._front = 0
        self._last: Any = None
        """The order of the last one that was joined at the end; there may be no more of it."""

    def join(self, one: Entry) -> None:
        """It takes its place by its order."""
        order = self._order(one)
        if self._last is None or self._last < order:
            self._line.append(one)
            self._last = order
        else:
            insort(self._line, one, lo=self._front, key=self._order)

    def first(self) -> Entry | None:
        line = self._line
        for place in range(self._front, len(line)):
            one = line[place]
            if one.waiting:
                self._front = place
                if place > COMPACT and place * 2 > len(line):
                    del line[:place]
                    self._front = 0
                return one
        line.clear()
        self._front, self._last = 0, None
        return None

    def __iter__(self) -> Iterator[Entry]:
        self.first()
        for place in range(self._front, len(self._line)):
            if self._line[place].waiting:
                yield self._line[place]


class Turn:
    """Who must not be passed over for ever, since which grant, and the rank that is kept for it."""

    __slots__ = ("capacity", "entry", "since")

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.since = 0
        self.capacity: Capacity | None = None


class Line:
    """Those that wait for one rank, or for any."""

    def __init__(self) -> None:
        self.first, self.oldest = Turn(), Turn()
        self.passed = 0
        """Grants of what the line waits for, to anybody."""
        self.tokens = 0
        """To be computed of all that wait."""
        self._count = 0
        self._by_order = SortedQueue(order_of)
        # None while all that wait have the same priority: then `_by_order` is that order too.
        self._by_age: SortedQueue | None = None
        self._priority = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Entry]:
        return iter(self._by_order)

    @property
    def keeps(self) -> bool:
        """Whether a rank is kept for one of it."""
        return self.first.capacity is not None or self.oldest.capacity is not None

    def join(self, entry: Entry) -> None:
        self._count += 1
        self.tokens += entry.tokens
        others = self._by_order
        if self._count == 1:
            self._by_age, self._priority = None, entry.priority
        elif self._by_age is not None:
            self._by_age.join(entry)
        elif entry.priority != self._priority:
            self._by_age = SortedQueue(_age)
            for one in sorted([*others, entry], key=_age):
                self._by_age.join(one)
        others.join(entry)

    def leave(self, entry: Entry) -> None:
        """It waits no more: it is marked so already."""
        self._count -= 1
        self.tokens -= entry.tokens

    def next(
        self, best: Callable[[Entry], Capacity | None], most_free: Callable[[], Capacity | None],
        changed: Callable[[Capacity], None], is_open: Callable[[], bool],
    ) -> tuple[Entry, Capacity, bool] | None:  # fmt: skip
        """Who is granted next, which rank, and whether because it is its turn. `best`: the rank that can start it now;
        `most_free`: the one to keep where none can; `changed`: told of one that is kept, or no more; `is_open`:
        whether any can start anything.
        """
        first = self._by_order.first()
        oldest = first if self._by_age is None else self._by_age.first()
        if self.oldest.entry is not oldest:
            self._watch(self.oldest, oldest, changed)
        # One request has one turn.
        second = None if first is oldest else first
        if self.first.entry is not second:
            self._watch(self.first, second, changed)
        waited = self.passed - self.oldest.since
        # Whose turn it is, it stays: a rank may be kept from all others.
        due = waited >= (PATIENCE if second is None else PRIORITY_PATIENCE) or self.oldest.capacity is not None
        if oldest is not None and due:
            capacity = _turn(self.oldest, oldest, best, most_free, changed)
            if capacity is not None:
                return oldest, capacity, True
        if second is not None and self.passed - self.first.since >= PATIENCE:
            capacity = _turn(self.first, second, best, most_free, changed)
            if capacity is not None:
                return second, capacity, True
        if first is None or not is_open():
            return None
        for looked, entry in enumerate(self._by_order):
            capacity = best(entry)
            if capacity is not None:
                return entry, capacity, False
            if looked == LOOK_AHEAD:
                break
        return None

    def lost(self, rank: int) -> None:
        """That life of a rank has ended, which may have been kept."""
        for turn in (self.first, self.oldest):
            if turn.capacity is not None and turn.capacity.rank == rank:
                turn.capacity = None

    def _watch(self, turn: Turn, entry: Entry | None, changed: Callable[[Capacity], None]) -> None:
        if turn.capacity is not None:
            turn.capacity.reserved = False
            changed(turn.capacity)
        turn.entry, turn.since, turn.capacity = entry, self.passed, None


def _turn(
    turn: Turn, entry: Entry, best: Callable[[Entry], Capacity | None], most_free: Callable[[], Capacity | None],
    changed: Callable[[Capacity], None],
) -> Capacity | None:  # fmt: skip
    """The rank for one that has been passed over long enough. Where there is none, one is kept for it."""
    if turn.capacity is not None and turn.capacity.takes(entry.kv):
        return turn.capacity
    capacity = best(entry)
    if capacity is None and turn.capacity is None:
        turn.capacity = most_free()
        if turn.capacity is not None:
            turn.capacity.reserved = True
            changed(turn.capacity)
    return capacity
