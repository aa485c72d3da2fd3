"""The queue before all ranks: requests wait once, and are bound to a rank when one can start them.

A request that is bound when it arrives waits behind one rank, and stays there although another rank is free a moment
later: lengths of answers are not known, so no policy can foresee which. Here nobody waits behind a rank. The
front-ends keep the bodies; the coordinator keeps one queue of descriptors and grants each to a rank at the moment
that one can start it: a slot is free, or will be in a moment; the prompts ahead are fewer than one and a half
steps compute; and the KV memory holds the prompt and the longest answer, with some to spare where none is reserved
(`capacity.py`). Of those ranks it takes the one with the least ahead of a new prompt.

Who is next. By priority (lower first, as in vLLM), then by arrival. A request that fits nowhere now lets those behind
it pass, or one long prompt would idle all ranks; but not for ever. Two requests are watched: the first in order, whom
only those that are smaller pass, and the one that has waited longest, whom also those of a better priority pass. When
so many others have been granted since it came into that place (`PATIENCE`, or where they have a better priority
`PRIORITY_PATIENCE`), it is its turn: it gets the next rank that can start it, and where none can, one rank is kept
for it. A rank that gets nothing new becomes empty, and an empty rank takes anything. So who has k requests before it
by arrival is granted after at most (k + 1) x (PRIORITY_PATIENCE + 1) others, plus the times that k + 1 ranks take to
end what they run.

What a grant is. It says that this request goes to this life of this rank, and counts against the rank's capacity at
once. The front-end that has the body sends it and tells of the send (SendNotice); from then on the accounting counts
it like any other, until the rank itself reports it. Only the front-end sends, and only what it still holds. So a grant
may be lost, come twice, late, or from a coordinator that is no more, and no request is ever sent twice. A grant that
nobody confirms is repeated, because broadcasts can be lost; the confirmation is the notice of the send or, where the
client has gone or the request has a rank already, a Withdraw. A front-end that owes this, or its revoked credits, for
`dispatcher.UNANSWERED_S` hangs, and the others do not wait for it: nothing of it waits any more, as if it had ended.
When it goes on it sees that no view names it, and says hello again. A grant for a life of a rank that has ended goes
back to its old place in the queue, which the order keeps for it.

No hop while ranks are free. As long as nobody waits, each front-end holds grants in advance: a credit of each rank's
capacity that it may use without a word (`credits.py`). Who has no fitting credit asks, and is answered at once where
there is capacity that nobody was given. When somebody waits all the same, all credits are revoked, and what comes back
is granted by the queue.

When the coordinator goes. The queue is soft state: it dies with the coordinator, the bodies do not. A front-end that
is not answered for a while binds what it holds itself, as it would have without a queue (`dispatch.py`). A new
coordinator is told of everything that still waits, with its age, so the order survives too.

This file is the pure queue of the ranks that some front-ends balance over; `dispatcher.py` speaks for it.

A line of things that wait, in an order of their own: mostly joined at its end and left at its front.

Whoever leaves is only marked, and taken out when the front comes to it, so that leaving from anywhere costs nothing.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable, Iterator, Set
from operator import attrgetter
from typing import Any, Generic, Protocol, TypeVar

from msgspec import Struct

from paceline.core.dispatch.capacity import Capacities, Capacity
from paceline.core.messages import Descriptor, Send


class Waits(Protocol):
    """What can stand in a line: `waiting` until it has left all lines that it stands in."""

    waiting: bool


T = TypeVar("T", bound=Waits)

COMPACT = 64
"""So many that have left may stand before the front, whatever the line's length."""


class SortedQueue(Generic[T]):
    """Things by `order`, least first; no two are equal in it."""

    def __init__(self, order: Callable[[T], Any]) -> None:
        self._order = order
        self._line: list[T] = []
        self._front = 0
        self._last: Any = None
        """The order of the last one that was joined at the end; there may be no more of it."""

    def join(self, one: T) -> None:
        """It takes its place by its order."""
        order = self._order(one)
        if self._last is None or self._last < order:
            self._line.append(one)
            self._last = order
        else:
            insort(self._line, one, lo=self._front, key=self._order)

    def first(self) -> T | None:
        """Who is first, if anybody waits."""
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

    def __iter__(self) -> Iterator[T]:
        """All that wait, in order."""
        self.first()
        for place in range(self._front, len(self._line)):
            if self._line[place].waiting:
                yield self._line[place]


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
    """One descriptor. `capacity`: what it was granted, None while it is `waiting`; `granted_at`: when."""

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


_order: Callable[[Entry], tuple[int, float, int]] = attrgetter("priority", "arrival", "number")
_age: Callable[[Entry], tuple[float, int]] = attrgetter("arrival", "number")


class Turn:
    """Who must not be passed over for ever, since which grant, and the rank that is kept for it."""

    __slots__ = ("capacity", "entry", "since")

    def __init__(self) -> None:
        self.entry: Entry | None = None
        self.since = 0
        self.capacity: Capacity | None = None


class CentralQueue:
    """The queue of one set of ranks. `without`: rules (`rules.py`) left out, to show what breaks."""

    def __init__(self, without: Set[str] = frozenset()) -> None:
        self.capacities = Capacities()
        self.granted: dict[tuple[int, int], Entry] = {}
        """By front-end and request: granted, and not confirmed yet."""
        self.queued: dict[tuple[int, int], Entry] = {}
        """Waiting. In no order."""
        self.counts: dict[int, int] = {}
        """How many of both there are of each front-end."""
        self._counts = "grants-count" not in without
        self._by_order: SortedQueue[Entry] = SortedQueue(_order)
        # None while all that wait have the same priority: then `_by_order` is that order too.
        self._by_age: SortedQueue[Entry] | None = None
        self._priority = 0
        self._first = Turn()
        self._oldest = Turn()
        self._made = 0
        self._next_number = 0

    def __len__(self) -> int:
        """Descriptors, waiting and granted."""
        return len(self.queued) + len(self.granted)

    def ask(self, frontend: int, descriptor: Descriptor, now: float) -> None:
        """A request waits. One that is known already keeps its place, or its grant."""
        request, tokens = descriptor.request, descriptor.tokens
        key = (frontend, request)
        if key in self.queued or key in self.granted:
            return
        self._next_number = number = self._next_number + 1
        arrival = now - descriptor.waited_ms / 1000
        self.counts[frontend] = self.counts.get(frontend, 0) + 1
        kv = tokens + descriptor.answer_tokens
        self._join(key, Entry(frontend, request, tokens, kv, descriptor.priority, arrival, number))

    def confirm(self, frontend: int, send: Send) -> bool:
        """The request is on its way to where it was granted: what was promised there, the rank now has. Returns whether
        that is so. It takes no more capacity than before, so nothing has to be looked at anew.
        """
        key = (frontend, send.request)
        entry = self.granted.get(key)
        if entry is None:
            return False
        capacity = entry.capacity
        if (
            capacity is None
            or capacity.rank != send.rank
            or capacity.incarnation != send.incarnation
            or not self._counts
        ):
            return False
        if entry.tokens != send.tokens or entry.kv != send.tokens + send.answer_tokens:
            return False
        del self.granted[key]
        promised = capacity.promised
        promised.requests -= 1
        promised.tokens -= entry.tokens
        promised.kv -= entry.kv
        self._count_out(frontend)
        return True

    def drop(self, frontend: int, request: int) -> None:
        """The request has been sent, or is not wanted any more."""
        key = (frontend, request)
        entry = self.queued.pop(key, None) or self.granted.pop(key, None)
        if entry is None:
            return
        entry.waiting = False
        capacity = entry.capacity
        if capacity is not None and self._counts:
            capacity.promised.add(-1, -entry.tokens, -entry.kv)
            self.capacities.changed(capacity)
        self._count_out(frontend)

    def drop_frontend(self, frontend: int) -> None:
        """Nothing of it waits any more."""
        for _, request in list(self.of_frontend(frontend)):
            self.drop(frontend, request)

    def of_frontend(self, frontend: int) -> Iterator[tuple[int, int]]:
        """What there is of a front-end, waiting or granted."""
        return (key for known in (self.queued, self.granted) for key in known if key[0] == frontend)

    def lost(self, rank: int) -> None:
        """That life of the rank has ended: what was granted there waits again, in its old place."""
        for turn in (self._first, self._oldest):
            if turn.capacity is not None and turn.capacity.rank == rank:
                turn.capacity = None
        for key, entry in list(self.granted.items()):
            if entry.capacity is not None and entry.capacity.rank == rank:
                del self.granted[key]
                # A new one: the old one may still stand in the lines, marked.
                tokens, kv, priority = entry.tokens, entry.kv, entry.priority
                self._join(key, Entry(*key, tokens, kv, priority, entry.arrival, entry.number))
        self.capacities.forget(rank)

    def may_start(self) -> bool:
        """Whether there is any capacity, or some rank is kept for somebody."""
        return bool(self.capacities.open) or self._first.capacity is not None or self._oldest.capacity is not None

    def grant(self) -> list[Entry]:
        """Grant whatever can start now, in order of the grants."""
        made: list[Entry] = []
        while self.may_start() and (found := self._next()) is not None:
            entry, capacity = found
            key = (entry.frontend, entry.request)
            del self.queued[key]
            self.granted[key] = entry
            entry.waiting = False
            entry.capacity = capacity
            if self._counts:
                self.capacities.promise(capacity, entry.tokens, entry.kv)
            self._made += 1
            made.append(entry)
        return made

    def _next(self) -> tuple[Entry, Capacity] | None:
        """Who is granted next, and which rank."""
        first = self._by_order.first()
        oldest = first if self._by_age is None else self._by_age.first()
        if self._oldest.entry is not oldest:
            self._watch(self._oldest, oldest)
        # One request has one turn.
        second = None if first is oldest else first
        if self._first.entry is not second:
            self._watch(self._first, second)
        passed = self._made - self._oldest.since
        # Whose turn it is, it stays: a rank may be kept from all others.
        due = passed >= (PATIENCE if second is None else PRIORITY_PATIENCE) or self._oldest.capacity is not None
        if oldest is not None and due and (capacity := self._turn(self._oldest, oldest)) is not None:
            return oldest, capacity
        due = self._made - self._first.since >= PATIENCE
        if second is not None and due and (capacity := self._turn(self._first, second)) is not None:
            return second, capacity
        if first is None or not self.capacities.open:
            return None
        capacity = self.capacities.best(first.kv)
        if capacity is not None:
            return first, capacity
        for looked, entry in enumerate(self._by_order):
            capacity = self.capacities.best(entry.kv)
            if capacity is not None:
                return entry, capacity
            if looked == LOOK_AHEAD:
                break
        return None

    def _turn(self, turn: Turn, entry: Entry) -> Capacity | None:
        """The rank for one that has been passed over long enough. Where there is none, one is kept for it."""
        if turn.capacity is not None and turn.capacity.takes(entry.kv):
            return turn.capacity
        capacity = self.capacities.best(entry.kv)
        if capacity is None and turn.capacity is None:
            turn.capacity = self.capacities.most_free()
            if turn.capacity is not None:
                turn.capacity.reserved = True
                self.capacities.changed(turn.capacity)
        return capacity

    def _watch(self, turn: Turn, entry: Entry | None) -> None:
        if turn.capacity is not None:
            turn.capacity.reserved = False
            self.capacities.changed(turn.capacity)
        turn.entry, turn.since, turn.capacity = entry, self._made, None

    def _join(self, key: tuple[int, int], entry: Entry) -> None:
        queued = self.queued
        queued[key] = entry
        self._by_order.join(entry)
        if len(queued) == 1:
            self._by_age, self._priority = None, entry.priority
        elif self._by_age is not None:
            self._by_age.join(entry)
        elif entry.priority != self._priority:
            self._by_age = SortedQueue(_age)
            for one in sorted(queued.values(), key=_age):
                self._by_age.join(one)

    def _count_out(self, frontend: int) -> None:
        left = self.counts[frontend] - 1
        if left:
            self.counts[frontend] = left
        else:
            del self.counts[frontend]
